"""Plain attention for heads that share keys and values, without copies of them.

transformers' own repeats the keys and values of a group for each of its heads, in every block and at every decoded
token. The queries of a group are laid below each other here instead, so that one product serves them all.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

GROUPED = "hyperscale_grouped"
"""Its name for `config._attn_implementation`."""


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_others: Any,
) -> tuple[Tensor, Tensor]:
    """Attend as transformers' `eager` does, in the same order of operations.

    Args:
        query: [B, H, T, D]; head `h` reads the keys and values `h // (H / K)`.
        key, value: [B, K, S, D]; K divides H.
        attention_mask: added to the scores, broadcast to [B, H, T, S]; None where all is visible.

    Returns:
        The output [B, T, H, D], and the weights [B, H, T, S].
    """
    batch, heads, tokens, width = query.shape
    groups = key.shape[1]
    together = query.reshape(batch, groups, heads // groups * tokens, width)
    scores = torch.matmul(together, key.transpose(2, 3)).view(batch, heads, tokens, -1) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = torch.matmul(weights.view(batch, groups, heads // groups * tokens, -1), value)
    return output.view(batch, heads, tokens, width).transpose(1, 2).contiguous(), weights


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, eager_mask)
