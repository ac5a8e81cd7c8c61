"""Features of a text from the frozen backbone, for a task encoder."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hyperscale.model.architectures import Architecture

_TEXTS_AT_ONCE = 8


@torch.no_grad()
def text_features(backbone: nn.Module, architecture: Architecture, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the mean, over each text's tokens, of the last hidden states: [K, D] in fp32 on the CPU.

    An encoder-decoder's features come from its encoder. Adapters must be off. The whole model runs on a few texts at a
    time, so ZeRO-3 gathers it as in any forward pass. Every rank must call this.

    Args:
        input_ids: [K, T], padded on the right.
        attention_mask: [K, T], 1 on real tokens.
    """
    was_training = backbone.training
    backbone.eval()
    try:
        features = [
            _mean_states(backbone, architecture, ids, mask)
            for ids, mask in zip(input_ids.split(_TEXTS_AT_ONCE), attention_mask.split(_TEXTS_AT_ONCE), strict=True)
        ]
    finally:
        backbone.train(was_training)
    return torch.cat(features)


def _mean_states(backbone: nn.Module, architecture: Architecture, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    longest = int(attention_mask.sum(1).max())
    ids, mask = input_ids[:, :longest], attention_mask[:, :longest]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if architecture.is_encoder_decoder:
        config: Any = backbone.config
        inputs["decoder_input_ids"] = ids.new_full((len(ids), 1), config.decoder_start_token_id)
    else:
        inputs["logits_to_keep"] = 1
    with _output_of(backbone.get_submodule(architecture.stacks[0].final_norm)) as outputs:
        backbone(**inputs)
    weights = mask.unsqueeze(-1).float()
    means: Tensor = (outputs[0].float() * weights).sum(1) / weights.sum(1)
    return means.cpu()


@contextmanager
def _output_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect a module's outputs inside the `with`; outputs of earlier layers are not kept."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
