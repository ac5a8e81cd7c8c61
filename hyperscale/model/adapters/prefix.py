"""Prefix tuning (arXiv 2101.00190): keys and values before those of the text in every self-attention.

The prefix has the positions 0 to P - 1, and the text starts at P, in every family. Rotations begin at P; the
prefix's keys are neither rotated nor normalised, as in PEFT. T5's relative bias counts the prefix's positions. Every
token sees the whole prefix, also where a window slides over the text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache

from hyperscale.config.adaptation import PrefixSettings
from hyperscale.model.adapters.kinds import Place, TensorSpec

_SCALE = 10.0
"""Factor on the rows, so that a prefix trains at the learning rates of the other kinds. Measured without it on
SmolLM2-135M, 25 steps from a loss of 8.6: stored rows reach 6.9 at a rate of 3e-3, 2.9 at 1e-2 and 1.0 at 3e-2."""


@dataclass(frozen=True)
class Prefix:
    """P positions for the keys and for the values of a self-attention.

    No start leaves the model unchanged: attention to the prefix is always taken from the text. Rows with a norm near 1
    are small compared with a pretrained model's keys, and they differ from each other, so they learn different things.
    """

    settings: PrefixSettings
    name = "prefix"
    is_generated = True
    targets = ("keys", "values")

    @property
    def length(self) -> int:
        return self.settings.length

    def acts_on(self, target: str) -> Place:
        return "keys" if target == "keys" else "values"

    def tensors(self, in_features: int, out_features: int) -> Mapping[str, TensorSpec]:
        """Rows [P, out]; `out` is the width of all key (or value) heads together."""
        return {"rows": TensorSpec((self.settings.length, out_features), "normal", scale=_SCALE)}

    def apply(self, x: Tensor, y: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        rows = weights["rows"]
        heads = (rows if rows.dim() == 3 else rows.unsqueeze(0)).unflatten(-1, (y.shape[1], y.shape[3]))
        return torch.cat([heads.transpose(1, 2).expand(len(y), -1, -1, -1), y], dim=2)


class PrefixedCache:
    """Wraps the cache of one attention layer and prepends the prefix to the keys and values that it returns.

    The cache itself never holds the prefix. It is prepended again at every token, so it can differ by sample and no
    graph is kept between calls.
    """

    def __init__(self, cache: Any, length: int, adapt: Mapping[Place, Any]) -> None:
        """`cache`: the model's own, or None; `adapt`: functions for `keys` and `values` that prepend the prefix."""
        self._cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        self._length = length
        self._adapt = adapt

    def update(self, keys: Tensor, values: Tensor, layer: int, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """Store the new tokens' keys and values; return all of them, [B, heads, P + T, width]."""
        if self._cache is not None:
            keys, values = self._cache.update(keys, values, layer, *rest, **more)
        return self._adapt["keys"](keys), self._adapt["values"](values)

    def get_seq_length(self, layer: int = 0) -> int:
        """Return how many positions come before the new tokens, including the prefix; T5 needs it for its bias."""
        stored = 0 if self._cache is None else int(self._cache.get_seq_length(layer))
        return stored + self._length


def widened_mask(mask: Tensor | None, queries: Tensor, length: int, is_causal: bool) -> Tensor | None:
    """Return an attention mask [B or 1, 1, T, P + keys] whose first P columns are visible to all queries.

    Args:
        mask: the model's, additive or boolean. None if all is visible, or if the attention kernel would build a causal
            mask itself; it cannot do that with more keys than queries, so one is built here.
        queries: hidden states [B, T, D], for length and dtype.
    """
    if mask is None:
        tokens = queries.shape[1]
        if not is_causal or tokens == 1:
            return None
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=queries.device).triu(1)
        mask = torch.zeros(1, 1, tokens, tokens, dtype=queries.dtype, device=queries.device)
        mask = mask.masked_fill(later, torch.finfo(queries.dtype).min)
    visible = torch.ones if mask.dtype == torch.bool else torch.zeros
    front = visible(*mask.shape[:-1], length, dtype=mask.dtype, device=mask.device)
    return torch.cat([front, mask], dim=-1)
