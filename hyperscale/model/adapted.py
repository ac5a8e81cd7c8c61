"""A frozen backbone, a generator, and the hooks that join them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hyperscale.model.architectures import Architecture
from hyperscale.model.generation import EagerGeneration, Generation
from hyperscale.model.generators.generator import Generator
from hyperscale.model.injection import Injection, adapting
from hyperscale.model.losses import CrossEntropy
from hyperscale.model.sites import SiteMap


class AdaptedModel:
    """The model that the engines run. It takes plain tensors and knows no optimizer, vendor or data set."""

    def __init__(
        self,
        backbone: nn.Module,
        generator: nn.Module,
        injection: Injection,
        site_map: SiteMap,
        architecture: Architecture,
        site_by_site: bool = False,
    ) -> None:
        """`site_by_site`: generate inside the blocks, for adapters that are too large to hold all at once."""
        self.backbone = backbone
        self.generator = generator
        self.injection = injection
        self.site_map = site_map
        self.architecture = architecture
        self.site_by_site = site_by_site
        self.dtype: torch.dtype = next(one.dtype for one in backbone.parameters() if one.is_floating_point())
        self._positions: Tensor | None = None
        head = backbone.get_output_embeddings()  # type: ignore[operator]
        head.register_forward_pre_hook(self._keep_labelled)
        if architecture.is_encoder_decoder:
            backbone.register_forward_pre_hook(self._look_up_together, with_kwargs=True)

    def adapting(self, tasks: Tensor) -> AbstractContextManager[None]:
        """Generate the adapters of the tasks [B] of a batch once, and adapt forwards inside the `with`.

        See `injection.adapting`. The micro-batches of a training step share one `generation` instead.
        """
        return adapting(self.injection, self.generator, tasks, self.dtype, self.site_by_site)

    def generation(self, tasks: Tensor) -> Generation:
        """Return the weights of K tasks for the micro-batches of a step, see `training`."""
        generator: Generator = self.generator  # type: ignore[assignment]
        return generator.site_by_site(tasks) if self.site_by_site else EagerGeneration(generator(tasks))

    def training(self, generation: Generation, slots: Tensor, num_tasks: int) -> AbstractContextManager[None]:
        """Adapt forwards (and their backwards) inside the `with`; `slots` [B] index the tasks of `generation`."""
        return self.injection.active(generation.source(self.dtype), None if num_tasks == 1 else slots)

    def label_logits(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        """Return logits [N, V] at the N label positions only; the rest of the vocabulary product is never computed.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 1 for real tokens.
            labels: seq2seq decoder targets [B, L] with -100 for none; unused by causal models.
            positions: [N] flat indices from `label_positions`.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if self.architecture.is_encoder_decoder:
            inputs["decoder_input_ids"] = shift_right(labels, self.backbone.config)
        with self._only_at(positions):
            logits: Tensor = self.backbone(**inputs).logits
        return logits

    def _keep_labelled(self, _head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Pass only the label positions to the head; if none are set, make the hidden states contiguous.

        When the input is a slice (the last position of each prompt) and no gradient is needed, PyTorch multiplies row
        by row, and on CPUs copies the head for every row: 1.8 GB and 4 s for 32 rows of SmolLM2-135M in bf16.
        """
        if self._positions is None:
            return (args[0].contiguous(),)
        return (args[0].flatten(0, 1).index_select(0, self._positions),)

    def _look_up_together(
        self, _backbone: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Look up the encoder's and the decoder's tokens together, so that a sharded embedding is gathered once.

        This must happen inside the backbone's forward: ZeRO-3 treats the start of that call as the start of a pass.
        """
        if inputs.get("input_ids") is None or inputs.get("decoder_input_ids") is None:
            return args, inputs
        source, target = inputs["input_ids"], inputs["decoder_input_ids"]
        ids = torch.cat([source.flatten(), target.flatten()])
        vectors: Tensor = self.backbone.get_input_embeddings()(ids)  # type: ignore[operator]
        of_source, of_target = vectors.split([source.numel(), target.numel()])
        embedded = {
            "inputs_embeds": of_source.unflatten(0, source.shape),
            "decoder_inputs_embeds": of_target.unflatten(0, target.shape),
        }
        return args, {**inputs, "input_ids": None, "decoder_input_ids": None, **embedded}

    @contextmanager
    def _only_at(self, positions: Tensor) -> Iterator[None]:
        self._positions = positions
        try:
            yield
        finally:
            self._positions = None


def shift_right(labels: Tensor, config: Any) -> Tensor:
    """Return decoder inputs [B, L]: the start token, then all targets except the last, with padding for -100."""
    start = labels.new_full((labels.shape[0], 1), config.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, config.pad_token_id)], dim=1)


def label_positions(labels: Tensor, is_encoder_decoder: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Locate the labels of a batch, on the CPU, before anything moves to a device.

    Args:
        labels: [B, L], -100 for none; for causal models aligned with the inputs (token t is predicted from t - 1).

    Returns:
        `positions` [N] flat indices of the predicting hidden states, `targets` [N] token ids, `samples` [N] batch rows.
    """
    if is_encoder_decoder:
        samples, columns = (labels != -100).nonzero(as_tuple=True)
        return samples * labels.shape[1] + columns, labels[samples, columns], samples
    samples, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    return samples * labels.shape[1] + columns, labels[samples, columns + 1], samples


def token_losses(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy [N], at least in fp32, of logits [N, V] at target ids [N]."""
    losses: Tensor = CrossEntropy.apply(logits, targets, label_smoothing)  # type: ignore[no-untyped-call]
    return losses
