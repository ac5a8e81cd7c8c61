"""Attention whose heads share keys and values."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import eager_attention_forward

from hyperscale.model.attention import grouped_attention


@pytest.mark.parametrize(("heads", "groups", "tokens"), [(9, 3, 5), (8, 1, 1), (4, 4, 7)])
@pytest.mark.parametrize("is_masked", [True, False])
def test_grouped_attention_is_transformers_own(heads: int, groups: int, tokens: int, is_masked: bool):
    torch.manual_seed(0)
    seen, width = 11, 16
    shapes = ((2, heads, tokens, width), (2, groups, seen, width), (2, groups, seen, width))
    mask = torch.where(torch.rand(2, 1, tokens, seen, dtype=torch.float64) < 0.3, -1e9, 0.0)
    module = SimpleNamespace(num_key_value_groups=heads // groups, training=False)
    states = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    results = []
    for attend in (eager_attention_forward, grouped_attention):
        inputs = [state.clone().requires_grad_() for state in states]
        output, weights = attend(module, *inputs, mask if is_masked else None, scaling=width**-0.5)  # type: ignore[operator]
        output.sin().sum().backward()
        results.append([output, weights, *(state.grad for state in inputs)])
    for theirs, ours in zip(*results, strict=True):
        # both take the softmax in fp32
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
