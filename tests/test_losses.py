"""Cross-entropy in chunks against PyTorch's, and what it keeps."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hyperscale.model import losses
from hyperscale.model.losses import CrossEntropy


def example(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(rows, vocabulary, generator=random, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), torch.randint(vocabulary, (rows,), generator=random)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 70, 10**6])
def test_it_is_pytorchs(monkeypatch: pytest.MonkeyPatch, smoothing: float, chunk: int):
    monkeypatch.setattr(losses, "_CHUNK_NUMEL", chunk)
    for rows in (0, 1, 7):
        logits, targets = example(rows, 33, torch.float64)
        weights = torch.linspace(0.5, 2, rows, dtype=torch.float64)
        loss = CrossEntropy.apply(logits, targets, smoothing)
        reference = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(loss, reference, rtol=1e-12, atol=1e-12)
        (gradient,) = torch.autograd.grad((loss * weights).sum(), logits)
        (expected,) = torch.autograd.grad((reference * weights).sum(), logits)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_bf16_logits_are_computed_in_fp32_and_kept_as_they_are():
    logits, targets = example(9, 500, torch.bfloat16)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = CrossEntropy.apply(logits, targets, 0.0)
    assert loss.dtype == torch.float32
    assert [tensor.dtype for tensor in kept if tensor.dim() == 2] == [torch.bfloat16]
    exact = F.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits.float(), targets, reduction="sum"), logits)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_logits_are_left_as_they_are(dtype: torch.dtype):
    logits, targets = example(7, 33, dtype)
    before = logits.detach().clone()
    CrossEntropy.apply(logits, targets, 0.1).sum().backward()
    assert torch.equal(logits.detach(), before)


def test_a_soft_cap_before_it_gets_its_gradient():
    logits, targets = example(7, 33, torch.float64)
    gradients = []
    for loss in (
        lambda capped: CrossEntropy.apply(capped, targets, 0.0),
        partial(F.cross_entropy, target=targets, reduction="none"),
    ):
        capped = torch.tanh(logits)  # it keeps its output for the backward pass
        gradients += torch.autograd.grad(loss(capped).sum(), logits)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
