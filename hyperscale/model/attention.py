"""Plain attention for heads that share keys and values, without copies of them.

transformers' `eager` attention repeats the keys and values of a group for each of its heads, in every block and at
every decoded token. Here the queries of a group are stacked along the token dimension, so one product serves them all.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from hyperscale.errors import BackboneError

GROUPED = "hyperscale_grouped"
"""The name of this attention for `config._attn_implementation`."""
_WITHOUT_EFFECT = frozenset(
    {
        "position_ids",  # queries and keys are already rotated
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "num_items_in_batch",  # for the loss
        "is_causal",  # the mask contains it, as it does the sliding window
        "sliding_window",
    }
)
"""What transformers 5.17 to 5.23 pass to the attention of the families in the table, and `eager` ignores.

They also declare `cu_seq_lens_q` and related options, for several texts packed into a row. No mask covers those."""


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Attend as transformers' `eager` does, in the same order of operations.

    Args:
        query: [B, H, T, D]; head `h` reads the keys and values `h // (H / K)`.
        key, value: [B, K, S, D]; K divides H.
        attention_mask: added to the scores, broadcast to [B, H, T, S]; None if all is visible.
        softcap: scores become `softcap · tanh(scores / softcap)` before the mask is added (Gemma 2).
        s_aux: [H], a learned score of each head that takes its share of the softmax and has no value (gpt-oss).

    Returns:
        The output [B, T, H, D], and the weights [B, H, T, S].

    Raises:
        BackboneError: an option that changes the attention and is not computed here, such as `cu_seq_lens_q`.
    """
    unsupported = [name for name, value in options.items() if value is not None and name not in _WITHOUT_EFFECT]
    if unsupported:
        raise BackboneError(
            f"backbone.attention 'auto' does not compute {', '.join(unsupported)}, which {type(module).__name__} asks "
            "for; set backbone.attention=eager"
        )
    batch, heads, tokens, width = query.shape
    groups = key.shape[1]
    together = query.reshape(batch, groups, heads // groups * tokens, width)
    scores = torch.matmul(together, key.transpose(2, 3)).view(batch, heads, tokens, -1) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is None:
        weights = nn.functional.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    else:
        weights = _weights_beside_sinks(scores, s_aux)
    weights = nn.functional.dropout(weights.to(query.dtype), p=dropout, training=module.training)
    output = torch.matmul(weights.view(batch, groups, heads // groups * tokens, -1), value)
    return output.view(batch, heads, tokens, width).transpose(1, 2).contiguous(), weights


def _weights_beside_sinks(scores: Tensor, sinks: Tensor) -> Tensor:
    """Return the softmax over the scores [B, H, T, S] and each head's sink [H], without the sinks' share.

    In the scores' own dtype and less their maximum, as transformers computes gpt-oss.
    """
    columns = sinks.view(1, -1, 1, 1).expand(len(scores), -1, scores.shape[2], 1)
    both = torch.cat([scores, columns], dim=-1)
    both = both - both.max(dim=-1, keepdim=True).values
    return nn.functional.softmax(both, dim=-1, dtype=both.dtype)[..., :-1]


def cache_argument(module: nn.Module) -> str:
    """Return what a model or an attention layer calls its key-value cache.

    transformers 5.24 renamed `past_key_values` to `cache`. It ignores the old name where the new one is given too.
    """
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, eager_mask)
