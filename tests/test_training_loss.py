"""What a step minimises: means that weigh samples by their label tokens, or a sum, with smoothed labels."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hyperscale.data.collate import Batch
from hyperscale.model.adapted import AdaptedModel, label_positions, token_losses
from tests.runs import corpus_of, engine_of, loader_of, make_recipe, write_tasks


def test_label_smoothing_is_the_published_formula():
    """`(1 - ε) · nll + ε / V · Σ_v -log p_v`, per token."""
    random = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(7, 11, generator=random, dtype=torch.float64), torch.arange(7)
    log_p = logits - torch.logsumexp(logits, -1, keepdim=True)
    smoothed = torch.stack([0.9 * -row[target] + 0.1 / 11 * -row.sum() for row, target in zip(log_p, targets)])  # noqa: B905
    torch.testing.assert_close(token_losses(logits, targets, 0.1), smoothed, rtol=1e-5, atol=1e-6)
    plain = -log_p[torch.arange(7), targets]
    torch.testing.assert_close(token_losses(logits, targets), plain, rtol=1e-5, atol=1e-6)


def sample_losses(model: AdaptedModel, batches: Sequence[Batch], label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Return each sample's mean loss over its label tokens, and how many it has."""
    losses, sizes = [], []
    for batch in batches:
        positions, targets, samples = label_positions(batch.labels, model.architecture.is_encoder_decoder)
        with torch.no_grad(), model.adapting(batch.task_index):
            logits = model.label_logits(batch.input_ids, batch.attention_mask, batch.labels, positions)
        of_tokens = token_losses(logits, targets, label_smoothing).double()
        losses += [of_tokens[samples == sample].mean() for sample in range(len(batch.labels))]
        sizes += [(samples == sample).sum() for sample in range(len(batch.labels))]
    return torch.stack(losses), torch.stack(sizes)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_what_a_sample_weighs(tiny_t5_folder: Path, tmp_path: Path, label_smoothing: float):
    results = {}
    for loss in ("token_mean", "square_mean", "sample_mean", "token_sum"):
        recipe = make_recipe(
            tiny_t5_folder,
            write_tasks(tmp_path / "tasks"),
            tmp_path / "run",
            training={
                "steps": 2,
                "batch_size": 8,
                "micro_batch_size": 4,
                "loss": loss,
                "label_smoothing": label_smoothing,
                "optimizer": {"warmup_steps": 0},
            },
        )
        engine, corpus = engine_of(recipe), corpus_of(recipe)
        batches = loader_of(recipe, corpus, 0, 1).next_step()
        losses, sizes = sample_losses(engine.model, batches, label_smoothing)
        assert sizes.unique().numel() > 1
        result = results[loss] = engine.train_step(batches, 0)
        if loss == "token_sum":
            assert result.loss == pytest.approx((losses * sizes).sum().item(), rel=1e-5)
            continue
        weights = sizes ** {"token_mean": 1.0, "square_mean": 0.5, "sample_mean": 0.0}[loss]
        assert result.loss == pytest.approx(((losses * weights).sum() / weights.sum()).item(), rel=1e-5)
    tokens = sizes.sum().item()
    assert results["token_sum"].grad_norm == pytest.approx(tokens * results["token_mean"].grad_norm, rel=1e-5)
    assert results["token_sum"].task_losses == pytest.approx(results["token_mean"].task_losses, rel=1e-6)
