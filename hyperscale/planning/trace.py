"""What a training step keeps in memory, found by running the model's own code on the meta device: shapes, no numbers.

Everything that acts on a step is seen as it is: eager or fused attention, the fp32 copies of norms and softmax, the
adapters at their sites, checkpointed blocks, the loss. Parameters are not counted here.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from hyperscale.config.run import Recipe
from hyperscale.model.adapted import AdaptedModel, token_losses
from hyperscale.model.backbone import DTYPES, BackboneFolder, build_empty, set_activation_checkpointing
from hyperscale.model.build import Blueprint
from hyperscale.model.checkpoints import bytes_on_host
from hyperscale.model.task_encoders.registry import blank_features
from hyperscale.planning.generated import generates_site_by_site, tasks_of_a_step

SMALL_BYTES = 1024 * 1024
"""Tensors below this share glibc's heap on CPUs (engine/host_memory.py); larger ones are mapped one by one."""


@dataclass(frozen=True)
class StepShape:
    """The longest micro-batch that one rank runs."""

    rows: int
    source_tokens: int
    """Tokens of a prompt: the encoder's length, or the first part of a decoder-only row."""
    target_tokens: int
    """Tokens of an answer, all of them labels."""
    tasks: int
    """Different tasks among the rows of a step."""


@dataclass(frozen=True)
class Trace:
    """Bytes of a forward and backward pass on one rank, besides parameters and what is gathered of them."""

    generated: int
    """Generated weights of the step's tasks: fp32, their fp32 gradients, and the copy in the backbone's dtype. Where
    every site makes its own: the codes and their gradients."""
    kept: int
    """Activations that wait for the backward pass when the last block is done."""
    loss: int
    """On top of `kept` while logits and loss are there; the head is gathered."""
    blocks: int
    """On top of `kept` at the worst moment inside the blocks; blocks are gathered."""
    small: int
    """The most that tensors of less than 1 MiB hold at one time, generated weights apart."""
    on_host: int
    """What the blocks are recomputed from, in host memory."""


def build_meta_model(recipe: Recipe, folder: BackboneFolder) -> AdaptedModel:
    """Build what the worker builds, on the meta device: no weight is read and none allocated."""
    backbone = build_empty(folder, recipe.backbone)
    if recipe.engine.activation_checkpointing:
        set_activation_checkpointing(backbone, recipe.engine.offload_checkpoints)
    backbone.to("meta")  # type: ignore[arg-type]  # transformers' annotation hides nn.Module's
    blueprint = Blueprint.of_backbone(backbone, folder.architecture, recipe.adaptation.adapters)
    with _FloatsOnMeta():
        num_tasks = len(recipe.data.tasks)
        features = blank_features(recipe.adaptation, num_tasks, folder.config.hidden_size)
        generator = blueprint.build_generator(recipe.adaptation, num_tasks, recipe.seed, features)
    tasks = tasks_of_a_step(recipe.data, recipe.training.batch_size, recipe.cluster.workers)
    itemsize = DTYPES[recipe.backbone.dtype].itemsize
    by_site = generates_site_by_site(recipe.engine, recipe.adaptation, blueprint, tasks, itemsize)
    return blueprint.adapt(backbone, generator.to("meta"), by_site)


def trace_step(model: AdaptedModel, shape: StepShape) -> Trace:
    """Run one micro-batch forward and backward and note what is alive when."""
    ledger = _Ledger([*model.backbone.parameters(), *model.backbone.buffers(), *model.generator.parameters()])
    with _kernels_on_meta(), ledger:
        generation = model.generation(torch.arange(shape.tasks, device="meta"))
        before = ledger.live
        inputs, num_labels = _inputs(model, shape)
        slots = torch.zeros(shape.rows, dtype=torch.int64, device="meta")
        with model.training(generation, slots, shape.tasks), _watched(model, ledger):
            logits = model.label_logits(**inputs)
            on_host = bytes_on_host(model.backbone)
            targets = torch.zeros(num_labels, dtype=torch.int64, device="meta")
            token_losses(logits, targets).sum().backward()
        del logits
        generation.backward()
    generated = generation.held_bytes(model.dtype.itemsize)
    return Trace(
        generated=generated,
        kept=ledger.kept - before,
        loss=ledger.peaks["loss"] - ledger.kept,
        blocks=max(0, ledger.peaks["blocks"] - ledger.kept - (generated - generation.nbytes)),
        small=ledger.most_small,
        on_host=on_host,
    )


def _inputs(model: AdaptedModel, shape: StepShape) -> tuple[dict[str, Tensor], int]:
    rows, source, target = shape.rows, shape.source_tokens, shape.target_tokens
    length = source if model.architecture.is_encoder_decoder else source + target
    columns = target if model.architecture.is_encoder_decoder else length
    queries = 1 if model.architecture.is_encoder_decoder else length
    num_labels = rows * target
    return {
        "input_ids": torch.zeros(rows, length, dtype=torch.int64, device="meta"),
        # Already of four dimensions: transformers would look at the values of a flat one.
        "attention_mask": torch.zeros(rows, 1, queries, length, dtype=model.dtype, device="meta"),
        "labels": torch.zeros(rows, columns, dtype=torch.int64, device="meta"),
        "positions": torch.zeros(num_labels, dtype=torch.int64, device="meta"),
    }, num_labels


class _Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and their peak in each region of a step."""

    def __init__(self, uncounted: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.kept = 0
        self.region = "generate"
        self.peaks: dict[str, int] = {}
        self.most_small = 0
        self._small = 0
        self._known: Any = WeakIdKeyDictionary({tensor.untyped_storage(): 0 for tensor in uncounted})

    def enter(self, region: str) -> None:
        self.region = region
        self.peaks[region] = max(self.peaks.get(region, 0), self.live)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.live += size
        self._small += size if size < SMALL_BYTES else 0
        self.most_small = max(self.most_small, self._small)
        self.enter(self.region)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live -= size
        self._small -= size if size < SMALL_BYTES else 0


@contextmanager
def _watched(model: AdaptedModel, ledger: _Ledger) -> Iterator[None]:
    """Name the regions: the blocks, then head and loss, then, once the head's input has its gradient, the blocks."""

    def at_head(_head: nn.Module, args: tuple[Tensor, ...]) -> None:
        ledger.kept = ledger.live
        ledger.enter("loss")
        args[0].register_hook(lambda _gradient: ledger.enter("blocks"))

    ledger.enter("blocks")
    handle = model.backbone.get_output_embeddings().register_forward_pre_hook(at_head)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()
        ledger.enter("generator")


class _FloatsOnMeta(TorchFunctionMode):
    """Parameters made inside are on the meta device; indices, which constructors look into, are real."""

    _factories = (torch.empty, torch.zeros, torch.ones, torch.randn)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        arguments = dict(kwargs or {})
        if func in self._factories:
            arguments["device"] = "meta"
        return func(*args, **arguments)


class _FusedAttention(torch.autograd.Function):
    """What the fused kernels of CUDA keep: queries, keys, values, the output, and one fp32 number a query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _GroupedProduct(torch.autograd.Function):
    """What the products of experts keep with frozen weights: the weights, and where each expert's rows end."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, ends)
        return rows.new_empty(len(rows), weight.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, _ = ctx.saved_tensors
        return gradient.new_empty(len(gradient), weight.shape[-2]), None, None


@contextmanager
def _kernels_on_meta() -> Iterator[None]:
    """On the meta device PyTorch would take fused attention apart, which CUDA does not, and has no fp32 experts."""

    def fused(query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        output: Tensor = _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
        return output

    def grouped(rows: Tensor, weight: Tensor, *, offs: Tensor | None = None, **_kwargs: Any) -> Tensor:
        output: Tensor = _GroupedProduct.apply(rows, weight, offs)  # type: ignore[no-untyped-call]
        return output

    before = F.scaled_dot_product_attention, F.grouped_mm
    F.scaled_dot_product_attention, F.grouped_mm = fused, grouped  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.grouped_mm = before
