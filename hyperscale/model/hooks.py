"""The hooks that adapt each place of a block.

They do nothing when no adapter is active, and never touch a parameter of the backbone.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hyperscale.model.adapters.kinds import AdapterKind, Place
from hyperscale.model.adapters.prefix import Prefix, PrefixedCache, widened_mask
from hyperscale.model.attention import cache_argument


class Act(NamedTuple):
    """One adapter kind at one place, with the weights of the batch's tasks."""

    place: Place
    kind: AdapterKind
    weights: Mapping[str, Tensor]


Acting = Callable[[], Sequence[Act]]
"""Returns the adapters that are active at a layer, in order; none outside of `Injection.active`."""


def after(layer: nn.Module, acting: Acting) -> RemovableHandle:
    """Adapt the output of a linear layer."""

    def adapt(_layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for act in acting():
            output = act.kind.apply(args[0], output, act.weights)
        return output

    return layer.register_forward_hook(adapt)


def before(layer: nn.Module, acting: Acting) -> RemovableHandle:
    """Adapt the input of a linear layer."""

    def adapt(_layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        for act in acting():
            x = act.kind.apply(x, x, act.weights)
        return (x, *args[1:])

    return layer.register_forward_pre_hook(adapt)


def inside_norm(norm: nn.Module, acting: Acting) -> Sequence[RemovableHandle]:
    """Let a norm's own code compute with an adapted weight, whatever that code does with it.

    Between the two hooks an attribute of the instance hides the parameter, which stays where it is. The first hook runs
    after that of DeepSpeed, which gathers the parameter.
    """

    def adapt(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        acts = acting()
        if acts:
            weight: Tensor = layer.get_parameter(_WEIGHT)
            for act in acts:
                weight = act.kind.apply(weight, weight, act.weights)
            vars(layer)[_WEIGHT] = _broadcast(weight, args[0].dim())

    def restore(layer: nn.Module, _args: tuple[Tensor, ...], _output: Tensor) -> None:
        vars(layer).pop(_WEIGHT, None)

    return norm.register_forward_pre_hook(adapt), norm.register_forward_hook(restore, always_call=True)


_WEIGHT = "weight"


def _broadcast(weight: Tensor, dimensions: int) -> Tensor:
    """Return [D] unchanged and [B, D] as [B, 1, …, D], which broadcasts over tokens, and over heads where there are."""
    if weight.dim() == 1:
        return weight
    return weight.view(len(weight), *(1 for _ in range(dimensions - 2)), -1)


def inside_attention(attention: nn.Module, acting: Acting, mask_argument: str) -> RemovableHandle:
    """Prepend keys and values to those of a self-attention, and columns for them to its mask."""
    cache_name = cache_argument(attention)

    def adapt(layer: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        acts = acting()
        if not acts:
            return args, named
        states = args[0] if args else named["hidden_states"]
        length = prefix_length(acts)
        cache = PrefixedCache(named.get(cache_name), length, {act.place: partial(_applied, act) for act in acts})
        mask = widened_mask(named.get(mask_argument), states, length, getattr(layer, "is_causal", False))
        return args, named | {cache_name: cache, mask_argument: mask}

    return attention.register_forward_pre_hook(adapt, with_kwargs=True)


def before_rotary(rotary: nn.Module, length: Callable[[], int]) -> RemovableHandle:
    """Shift the text's positions by the length of the prefix."""

    def adapt(_layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if "position_ids" in named:
            return args, named | {"position_ids": named["position_ids"] + length()}
        return (args[0], args[1] + length(), *args[2:]), named

    return rotary.register_forward_pre_hook(adapt, with_kwargs=True)


def prefix_length(acts: Sequence[Act]) -> int:
    """Return the length of the prefix; 0 without one."""
    return next((act.kind.length for act in acts if isinstance(act.kind, Prefix)), 0)


def _applied(act: Act, states: Tensor) -> Tensor:
    return act.kind.apply(states, states, act.weights)
