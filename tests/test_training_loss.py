"""What a step minimises: mean over tokens, mean over samples or the sum over tokens, with smoothed labels."""

from pathlib import Path

import pytest
import torch

from hyperscale.model.adapted import token_losses
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


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_sum_is_the_mean_times_the_steps_label_tokens(tiny_t5_folder: Path, tmp_path: Path, label_smoothing: float):
    results, tokens = {}, 0
    for loss in ("token_mean", "sample_mean", "token_sum"):
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
        tokens = sum(batch.num_label_tokens for batch in batches)
        results[loss] = engine.train_step(batches, 0)
    assert tokens > 8
    assert results["token_sum"].loss == pytest.approx(tokens * results["token_mean"].loss, rel=1e-6)
    assert results["token_sum"].grad_norm == pytest.approx(tokens * results["token_mean"].grad_norm, rel=1e-5)
    assert results["token_sum"].task_losses == pytest.approx(results["token_mean"].task_losses, rel=1e-6)
    assert results["sample_mean"].loss != pytest.approx(results["token_mean"].loss, rel=1e-4)
