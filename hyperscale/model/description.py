"""What the frozen backbone makes of a text: features for a task encoder."""

from typing import Any

import torch
from torch import Tensor, nn

from hyperscale.model.architectures import Architecture


@torch.no_grad()
def text_features(backbone: nn.Module, architecture: Architecture, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the mean, over each text's tokens, of the last hidden states: [K, D] in fp32 on the CPU.

    The encoder's states where there is one. Adapters must be off. The whole model runs, so that ZeRO-3 gathers it as in
    any forward pass; every rank must call this.

    Args:
        input_ids: [K, T], padded on the right.
        attention_mask: [K, T], 1 on real tokens.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if architecture.is_encoder_decoder:
        config: Any = backbone.config
        inputs["decoder_input_ids"] = input_ids.new_full((len(input_ids), 1), config.decoder_start_token_id)
    else:
        inputs |= {"output_hidden_states": True, "logits_to_keep": 1}
    was_training = backbone.training
    backbone.eval()
    output = backbone(**inputs)
    backbone.train(was_training)
    states = output.encoder_last_hidden_state if architecture.is_encoder_decoder else output.hidden_states[-1]
    weights = attention_mask.unsqueeze(-1).float()
    features: Tensor = (states.float() * weights).sum(1) / weights.sum(1)
    return features.cpu()
