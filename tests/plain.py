"""Every adapter kind and generator written plainly, straight from the formulas: one task and one site at a time.

The reference that the batched generation and the hooks are compared with. It shares their parameters and their site
map, and none of their code: adapted layers are modules of their own in the places of the backbone's.
"""

import math
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from hyperscale.config.adaptation import AdaptationSettings
from hyperscale.model.adapted import AdaptedModel
from hyperscale.model.adapters.registry import build_kinds
from hyperscale.model.generators.generator import group_specs
from hyperscale.model.sites import Site, is_norm

Plain = Mapping[str, Tensor]


def weights(adapted: AdaptedModel, chosen: AdaptationSettings, task: int, site: Site) -> dict[str, Tensor]:
    """Make one task's weights of one site from the generator's parameters."""
    parameters = dict(adapted.generator.named_parameters())
    specs = group_specs(adapted.site_map, build_kinds(chosen.adapters), chosen.init)[site.group]
    names = {one.kind for one in chosen.adapters}
    root = "generated." if {"norm_delta"} < names else ""
    if site.kind == "norm_delta":
        per_task = parameters["kept.table." + _key(site, "delta")]
        row = task if len(per_task) > 1 else 0
        return {"delta": per_task[row, _index(adapted, site)]}
    flat = {name: _flat(adapted, chosen, parameters, root, task, site, name) for name in specs}
    return {name: (flat[name] * spec.scale).reshape(spec.shape) for name, spec in specs.items()}


def _flat(
    adapted: AdaptedModel,
    chosen: AdaptationSettings,
    parameters: Mapping[str, Tensor],
    root: str,
    task: int,
    site: Site,
    name: str,
) -> Tensor:
    kind = chosen.generator.kind
    if kind in ("independent", "shared"):
        table = parameters[f"{root}table.{_key(site, name)}"]
        return table[task if kind == "independent" else 0, _index(adapted, site)]
    code = parameters[f"{root}task_encoder.embedding.weight"][task]
    if kind == "per_layer":
        code = _mlp(parameters, f"{root}project", code)
        head = f"{root}heads.{_key(site, name)}"
        tensor = parameters[f"{head}.weight"][_index(adapted, site)] @ code
        return tensor + parameters[f"{head}.bias"][_index(adapted, site)] if f"{head}.bias" in parameters else tensor
    settings: Any = chosen.generator
    generated = [other for other in adapted.site_map.sites if other.kind != "norm_delta"]
    part = [other for other in generated if settings.stacks == "joint" or other.stack == site.stack]
    root = f"{root}stacks.{'joint' if settings.stacks == 'joint' else site.stack}"
    blocks = list(dict.fromkeys((other.stack, other.layer) for other in part))
    places = list(dict.fromkeys((other.kind, other.position) for other in generated))
    code = torch.cat(
        [
            code,
            parameters[f"{root}.trunk.layer_embedding.weight"][blocks.index((site.stack, site.layer))],
            parameters[f"{root}.trunk.position_embedding.weight"][places.index((site.kind, site.position))],
        ]
    )
    code = _mlp(parameters, f"{root}.trunk.project", code)
    code = (code - code.mean()) / (code.var(correction=0) + 1e-6).sqrt()
    code = code * parameters[f"{root}.trunk.project.3.weight"] + parameters[f"{root}.trunk.project.3.bias"]
    specs = group_specs(adapted.site_map, build_kinds(chosen.adapters), chosen.init)[site.group]
    words = [site.kind, *([site.position] if settings.heads == "position" else []), name]
    head = f"{root}.heads.heads.{'_'.join(words)}_{'x'.join(map(str, specs[name].shape))}.linear"
    tensor = parameters[f"{head}.weight"] @ code
    if settings.biases == "site":
        biases = parameters[f"{root}.heads.site_biases.{_key(site, name)}"]
        return tensor + biases[[other for other in part if other.group == site.group].index(site)].flatten()
    return tensor + parameters[f"{head}.bias"] if f"{head}.bias" in parameters else tensor


def _mlp(parameters: Mapping[str, Tensor], name: str, code: Tensor) -> Tensor:
    code = (parameters[f"{name}.0.weight"] @ code + parameters[f"{name}.0.bias"]).clamp(min=0)
    return parameters[f"{name}.2.weight"] @ code + parameters[f"{name}.2.bias"]


def _key(site: Site, name: str) -> str:
    return f"{site.group}/{name}".replace("/", "__")


def _index(adapted: AdaptedModel, site: Site) -> int:
    return [other for other in adapted.site_map.sites if other.group == site.group].index(site)


class PlainLinear(nn.Module):
    """A linear layer with what acts on it, for one sample of one task."""

    def __init__(self, base: nn.Linear, chosen: AdaptationSettings) -> None:
        super().__init__()
        self.base = base
        self.settings: dict[str, Any] = {one.kind: one for one in chosen.adapters}
        self.at: dict[tuple[str, str], Plain] = {}

    @property
    def weight(self) -> Tensor:  # T5 looks at its dtype
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        for (kind, position), weights in self.at.items():
            if kind == "ia3" and position == "feed_forward":
                x = x * (1 + weights["delta"])
        y = x @ self.base.weight.T
        if self.base.bias is not None:
            y = y + self.base.bias
        for (kind, _), weights in self.at.items():
            if kind == "lora":
                y = y + x @ (weights["b"] @ weights["a"]).T
            if kind == "vera":
                d = weights["d"] + self.settings["vera"].d_initial
                update = weights["b"].diag() @ weights["shared_b"] @ d.diag() @ weights["shared_a"]
                y = y + x @ update.T
        for (kind, position), weights in self.at.items():
            if kind == "ia3" and position != "feed_forward":
                y = y * (1 + weights["delta"])
        for (kind, _), weights in self.at.items():
            if kind == "bottleneck":
                y = y + self._branch(y, weights)
        return y

    def _branch(self, y: Tensor, weights: Plain) -> Tensor:
        hidden = y @ weights["down"].T + weights["down_bias"]
        hidden = hidden / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        branch = hidden @ weights["up"].T + weights["up_bias"]
        if not self.settings["bottleneck"].layer_norm:
            return branch
        centred = branch - branch.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights["gamma"] + weights["beta"]


class PlainNorm(nn.Module):
    """`(w + δ) ⊙ x / rms(x)`; Gemma's: `(1 + w + δ) ⊙ x / rms(x)`."""

    def __init__(self, base: Any, delta: Tensor) -> None:
        super().__init__()
        self.weight, self.delta = base.weight, delta
        self.one, self.eps = constants(base)

    def forward(self, x: Tensor) -> Tensor:
        return (self.one + self.weight + self.delta) * x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()


def constants(norm: Any) -> tuple[int, float]:
    """Return what a norm adds to its weight, and its epsilon."""
    is_gemma = type(norm).__name__.startswith("Gemma")
    return int(is_gemma), norm.eps if is_gemma else norm.variance_epsilon


class PlainAttention(nn.Module):
    """Self-attention over one sample with P rows of keys and values at positions 0 to P - 1, the text after them."""

    def __init__(self, base: Any, keys: Tensor, values: Tensor, first: Any) -> None:
        super().__init__()
        self.base, self.keys, self.values = base, keys, values
        self.first = [first]  # T5's first attention holds the bias of all; a list, so that it is no submodule

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Any, ...]:
        base, length = self.base, len(self.keys)
        is_t5, is_umt5 = hasattr(base, "key_value_proj_dim"), type(base).__name__ == "UMT5Attention"
        names = ("q", "k", "v", "o") if is_t5 else ("q_proj", "k_proj", "v_proj", "o_proj")
        q, k, v, o = (getattr(base, name) for name in names)
        width = base.key_value_proj_dim if is_t5 else base.head_dim
        x = hidden_states[0]
        positions = torch.arange(length, length + len(x))
        queries, keys, values = (part(x).unflatten(-1, (-1, width)) for part in (q, k, v))
        if not is_t5:
            queries, keys = rotated(queries, positions), rotated(keys, positions)
        keys = torch.cat([self.keys.unflatten(-1, (-1, width)), keys])
        values = torch.cat([self.values.unflatten(-1, (-1, width)), values])
        rows = []
        for place, query in zip(positions.tolist(), queries, strict=True):
            num_visible = place + 1 if base.is_causal else len(keys)
            heads = []
            for head in range(query.shape[0]):
                shared = head // (query.shape[0] // keys.shape[1])
                scores = keys[:num_visible, shared] @ query[head]
                scores = scores + self._bias(place, num_visible, head) if is_t5 else scores / math.sqrt(width)
                heads.append(torch.softmax(scores, 0) @ values[:num_visible, shared])
            rows.append(torch.cat(heads))
        attended = o(torch.stack(rows).unsqueeze(0))
        return (attended, None, None) if is_t5 and not is_umt5 else (attended, None)

    def _bias(self, place: int, num_visible: int, head: int) -> Tensor:
        if type(self.base).__name__ == "UMT5Attention":  # there every attention has a bias of its own
            buckets = self.base._relative_position_bucket(torch.arange(num_visible) - place)
            return self.base.relative_attention_bias.weight[buckets, head]
        first = self.first[0]
        buckets = first._relative_position_bucket(
            torch.arange(num_visible) - place, not first.is_decoder, first.relative_attention_num_buckets
        )
        return first.relative_attention_bias.weight[buckets, head]


def rotated(states: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotate [T, heads, width] by LLaMA's angles: pairs (i, i + width / 2), position · base^(-2i / width)."""
    half = states.shape[-1] // 2
    angles = positions[:, None] * base ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos()[:, None].to(states.dtype), angles.sin()[:, None].to(states.dtype)
    one, other = states[..., :half], states[..., half:]
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)


def exact_norms(backbone: nn.Module) -> None:
    """Let a backbone's norms and rotations compute in the dtype of their input: transformers has fp32 in them."""
    for module in backbone.modules():
        if is_norm(module):
            module.forward = MethodType(_exact_norm, module)
        if type(module).__name__ == "LlamaRotaryEmbedding":
            half = module.inv_freq.shape[0]
            module.inv_freq = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
            module.forward = MethodType(_exact_rotation, module)


def _exact_norm(norm: Any, x: Tensor) -> Tensor:
    one, eps = constants(norm)
    return (one + norm.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def _exact_rotation(rotary: Any, _x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    angles = position_ids[..., None] * torch.cat([rotary.inv_freq] * 2)
    return angles.cos(), angles.sin()


REFERENCE = "hyperscale_reference"
"""The name of `reference_attention` for `config._attn_implementation`."""


def reference_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend causally over one unpadded sample, a head and a token at a time: no mask is read.

    The module's `prefix_rows`, if it has any, come before the text and are visible to every token, whatever the window.
    """
    width, shared = query.shape[-1], query.shape[1] // key.shape[1]
    keys, values = key[0], value[0]
    length = 0
    if hasattr(module, "prefix_rows"):
        rows = [one.unflatten(-1, (-1, width)).transpose(0, 1) for one in module.prefix_rows]
        keys, values, length = torch.cat([rows[0], keys], 1), torch.cat([rows[1], values], 1), rows[0].shape[1]
    tokens = []
    for place in range(query.shape[2]):
        first = 0 if sliding_window is None else max(0, place - sliding_window + 1)
        visible = [*range(length), *range(length + first, length + place + 1)]
        heads = []
        for head in range(query.shape[1]):
            scores = keys[head // shared, visible] @ query[0, head, place] * scaling
            scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
            heads.append(torch.softmax(scores, 0) @ values[head // shared, visible])
        tokens.append(torch.stack(heads))
    return torch.stack(tokens).unsqueeze(0), None


AttentionInterface.register(REFERENCE, reference_attention)
AttentionMaskInterface.register(REFERENCE, eager_mask)


def compare(
    ours: AdaptedModel, theirs: AdaptedModel, chosen: AdaptationSettings, batch: Mapping[str, Tensor], tasks: Tensor
) -> None:
    """Compare a mixed batch, padded on the right, with each row alone among plain modules; and the gradients.

    Both models must hold the same weights, in float64. The hooks of `theirs` are removed.
    """
    theirs.injection.remove()
    mask, is_seq2seq = batch["attention_mask"].bool(), ours.architecture.is_encoder_decoder
    with ours.adapting(tasks):
        mixed = ours.backbone(**batch, use_cache=False).logits
    real = torch.ones(mixed.shape[:2], dtype=torch.bool) if is_seq2seq else mask
    mixed[real].square().sum().backward()

    layers = {site.name: theirs.backbone.get_submodule(site.name) for site in theirs.site_map.sites}
    untouched, expected = [], []
    for row, task in enumerate(tasks.tolist()):
        alone = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        for name in ("input_ids", "attention_mask"):
            alone[name] = alone[name][:, mask[row]]
        for name, layer in sorted(layers.items()):  # the attention comes before what lies in it
            replace(theirs.backbone, name, layer)
            vars(layer).pop("prefix_rows", None)
        untouched.append(theirs.backbone(**alone, use_cache=False).logits[0])
        put_in(theirs.backbone, {site: weights(theirs, chosen, task, site) for site in theirs.site_map.sites}, chosen)
        if theirs.backbone.config._attn_implementation == REFERENCE:
            start = next((one.length for one in chosen.adapters if one.kind == "prefix"), 0)
            alone["position_ids"] = torch.arange(start, start + alone["input_ids"].shape[1]).unsqueeze(0)
        expected.append(theirs.backbone(**alone, use_cache=False).logits[0])
    torch.cat(expected).square().sum().backward()

    torch.testing.assert_close(mixed[real], torch.cat(expected), rtol=1e-9, atol=1e-9)
    assert (mixed[real] - torch.cat(untouched)).abs().max() > 1e-2
    for (name, parameter), other in zip(ours.generator.named_parameters(), theirs.generator.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            rounding = 1e-8 * max(1.0, parameter.grad.abs().max().item())
            assert (parameter.grad - other.grad).abs().max() <= rounding, name
    assert not any(parameter.requires_grad for parameter in ours.backbone.parameters())


def shared_matrices(sites: Sequence[Site], chosen: AdaptationSettings) -> tuple[Tensor, Tensor] | None:
    """Draw VeRA's A [R, widest input] and B [widest output, R] one after the other, U(±√(6 / columns))."""
    if not sites:
        return None
    settings = next(one for one in chosen.adapters if one.kind == "vera")
    torch.manual_seed(settings.projection_seed)
    widest = max(site.in_features for site in sites), max(site.out_features for site in sites)
    a = torch.empty(settings.rank, widest[0]).uniform_(-math.sqrt(6 / widest[0]), math.sqrt(6 / widest[0]))
    b = torch.empty(widest[1], settings.rank).uniform_(-math.sqrt(6 / settings.rank), math.sqrt(6 / settings.rank))
    return a, b


def put_in(backbone: nn.Module, weights: Mapping[Site, Plain], chosen: AdaptationSettings) -> None:
    """Put plain modules with one task's weights in the places of a backbone's layers."""
    shared = shared_matrices([site for site in weights if site.kind == "vera"], chosen)
    for site, own in weights.items():
        layer: Any = backbone.get_submodule(site.name)
        weights_here = own
        if shared and site.kind == "vera":
            a, b = (matrix.to(own["b"]) for matrix in shared)
            weights_here = {**own, "shared_a": a[:, : site.in_features], "shared_b": b[: site.out_features]}
        if site.kind in ("lora", "vera", "ia3", "bottleneck"):
            if isinstance(layer, nn.Linear):
                layer = PlainLinear(layer, chosen)
                replace(backbone, site.name, layer)
            layer.at[site.kind, site.position] = weights_here
        elif site.kind == "norm_delta":
            replace(backbone, site.name, PlainNorm(layer, weights_here["delta"]))
    prefixes = {site: rows for site, rows in weights.items() if site.kind == "prefix"}
    firsts: dict[str, Any] = {}
    for site, keys in prefixes.items():
        if site.position == "keys":
            layer = backbone.get_submodule(site.name)
            (values,) = [rows for other, rows in prefixes.items() if other.name == site.name and other != site]
            first = firsts.setdefault(site.stack, layer)
            if backbone.config._attn_implementation == REFERENCE:
                layer.prefix_rows = (keys["rows"], values["rows"])
            else:
                replace(backbone, site.name, PlainAttention(layer, keys["rows"], values["rows"], first))


def replace(backbone: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of a backbone's."""
    owner, _, last = name.rpartition(".")
    setattr(backbone.get_submodule(owner), last, module)
