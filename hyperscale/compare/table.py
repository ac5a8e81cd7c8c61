"""The result of a comparison as numbers, as Markdown and as metrics."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hyperscale.compare.intervals import Scores, draw, interval, resampled_scores, seed_interval
from hyperscale.compare.record import TaskAnswers
from hyperscale.compare.schedule import FinishedTrial, Outcome
from hyperscale.run.worker import record_comparison_run
from hyperscale.terminal.formats import counted, duration
from hyperscale.tracking.metrics import key_part

_SEED = 20261125
"""The bootstrap's seed: the same runs give the same intervals."""


@dataclass(frozen=True)
class MethodSummary:
    """One row of the table."""

    method: str
    learning_rate: float
    search: Mapping[float, float]
    """learning rate -> mean validation score in percent with the search seed."""
    task_scores: Mapping[str, Sequence[float]]
    """task -> main score in percent, one per seed."""
    means: Sequence[float]
    """Mean over the tasks, one per seed."""
    difference: float
    """Mean minus the baseline's mean, in points."""
    interval: tuple[float, float]
    """The middle 95 % of the difference over resampled rows and seeds."""
    seed_interval: tuple[float, float] | None
    """Student's 95 % interval over the seeds' own differences; None with one seed."""
    parameters_per_task: float
    """Trained parameters divided by the tasks that share them."""
    tokens_per_second: float
    """Real tokens, all ranks."""
    seconds: float
    """Of training steps alone, summed over the method's final runs of one seed."""

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds; 0 with one seed."""
        return statistics.stdev(self.means) if len(self.means) > 1 else 0.0

    @property
    def verdict(self) -> str:
        """`above` or `below` where `interval` excludes 0, else `not shown`: no evidence is not evidence of equality."""
        low, high = self.interval
        return "not shown" if low <= 0 <= high else "above" if low > 0 else "below"


def summarise(outcome: Outcome) -> list[MethodSummary]:
    """Compare every method's final answers with the baseline's."""
    comparison = outcome.comparison
    answers = {method: [_answers(trial) for trial in trials] for method, trials in outcome.final.items()}
    resampled = _resample(answers, comparison.resamples)
    observed = {method: _observed(of_seeds) for method, of_seeds in answers.items()}
    base = _means(observed[comparison.baseline])
    summaries = []
    for method, trials in outcome.final.items():
        scores = observed[method]
        means = _means(scores)
        tokens = sum(record.tokens for trial in trials for record in trial.records)
        seconds = sum(record.step_seconds for trial in trials for record in trial.records)
        summaries.append(
            MethodSummary(
                method=method,
                learning_rate=trials[0].trial.learning_rate,
                search={one.trial.learning_rate: one.validation for one in outcome.search.get(method, ())},
                task_scores=scores,
                means=means,
                difference=statistics.fmean(means) - statistics.fmean(base),
                interval=interval(resampled[method] - resampled[comparison.baseline]),
                seed_interval=seed_interval([mean - of_base for mean, of_base in zip(means, base, strict=True)]),
                parameters_per_task=sum(one.trained_parameters for one in trials[0].records) / len(scores),
                tokens_per_second=tokens / seconds if seconds else 0.0,
                seconds=seconds / len(trials),
            )
        )
    return summaries


def _means(scores: Mapping[str, Sequence[float]]) -> list[float]:
    """Return the mean over the tasks, one per seed."""
    return [statistics.fmean(of_seed) for of_seed in zip(*scores.values(), strict=True)]


def _answers(finished: FinishedTrial) -> dict[str, TaskAnswers]:
    return {task: of_task for record in finished.records for task, of_task in record.answers.items()}


def _observed(answers: Sequence[Mapping[str, TaskAnswers]]) -> dict[str, list[float]]:
    """Return task -> main score per seed."""
    return {
        task: _scores(task, answers, np.arange(len(of_task.references))[None])[:, 0].tolist()
        for task, of_task in answers[0].items()
    }


def _resample(answers: Mapping[str, Sequence[Mapping[str, TaskAnswers]]], resamples: int) -> dict[str, Scores]:
    """Return method -> mean score [R] over tasks and seeds, rows and seeds drawn alike for all methods."""
    generator = np.random.default_rng(_SEED)
    first = next(iter(answers.values()))
    seeds = draw(generator, resamples, len(first))
    totals = {method: np.zeros(resamples) for method in answers}
    for task, of_task in first[0].items():
        rows = draw(generator, resamples, len(of_task.references))
        for method, of_method in answers.items():
            scores = _scores(task, of_method, rows)
            totals[method] += np.take_along_axis(scores, seeds.T, axis=0).mean(axis=0) / len(first[0])
    return totals


def _scores(task: str, answers: Sequence[Mapping[str, TaskAnswers]], rows: NDArray[np.int64]) -> Scores:
    """Return one task's main score [seeds, R] on chosen rows [R, N]."""
    first = answers[0][task]
    runs = [of_seed[task].predictions for of_seed in answers]
    return resampled_scores(first.metrics[0], first.references, runs, rows, first.positive)


def publish(outcome: Outcome) -> str:
    """Write `comparison.md` and `comparison.json` beside the runs and in the trackers; return the Markdown."""
    summaries = summarise(outcome)
    text, output = markdown(outcome, summaries), Path(outcome.comparison.output)
    files = [output / "comparison.md", output / "comparison.json"]
    report = {
        "comparison": outcome.comparison.model_dump(mode="json", exclude={"output", "records"}),
        "methods": [asdict(one) for one in summaries],
        "versions": _versions(outcome),
    }
    output.mkdir(parents=True, exist_ok=True)
    files[0].write_text(text, encoding="utf-8")
    files[1].write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    recipe = next(iter(outcome.final.values()))[0].trial.recipes[0]
    record_comparison_run(recipe.tracking, recipe.output, outcome.comparison.name, metrics(summaries), files)
    return text


def _versions(outcome: Outcome) -> dict[str, list[str]]:
    """Return package -> the versions that the runs used; several if it was upgraded between runs."""
    by_package: dict[str, set[str]] = {}
    for trials in (*outcome.search.values(), *outcome.final.values()):
        for record in (record for trial in trials for record in trial.records):
            for package, version in record.versions.items():
                by_package.setdefault(package, set()).add(version)
    return {package: sorted(versions) for package, versions in by_package.items()}


def metrics(summaries: Sequence[MethodSummary]) -> dict[str, float]:
    """Return the numbers for a tracker: `compare/<method>/…`."""
    values: dict[str, float] = {}
    for summary in summaries:
        prefix = f"compare/{key_part(summary.method)}"
        values |= {f"{prefix}/{key_part(task)}": statistics.fmean(of) for task, of in summary.task_scores.items()}
        values |= {
            f"{prefix}/mean": statistics.fmean(summary.means),
            f"{prefix}/deviation": summary.deviation,
            f"{prefix}/difference": summary.difference,
            f"{prefix}/parameters_per_task": summary.parameters_per_task,
            f"{prefix}/tokens_per_second": summary.tokens_per_second,
        }
    return values


def markdown(outcome: Outcome, summaries: Sequence[MethodSummary]) -> str:
    """Return the table, with what a reader needs to trust it."""
    comparison = outcome.comparison
    first = next(iter(outcome.final.values()))[0]
    recipe = first.trial.recipes[0]
    steps = sum(one.training.steps for one in first.trial.recipes)
    tasks = list(summaries[0].task_scores)
    samples = {task: len(of_task.references) for task, of_task in _answers(first).items()}
    rates = f"Learning rates were chosen on the validation rows with seed {comparison.search_seed}."
    if not outcome.search:
        rates = "All methods use the same learning rate."
    columns = ["method", "learning rate", "mean", f"against {comparison.baseline}"]
    columns += ["95 % interval", "verdict", "over seeds", *tasks, "parameters a task", "tokens/s", "training"]
    about = (
        f"{counted(len(comparison.seeds), 'seed')} a method, {steps} steps × "
        f"{recipe.training.batch_size} samples on {recipe.backbone.name}; main scores on the {comparison.split} rows "
        f"in percent, mean ± standard deviation over the seeds. {rates} "
        f"The `95 % interval` comes from {comparison.resamples} paired resamples of rows and seeds and decides the "
        "verdict: `above` or `below` where it excludes 0, else `not shown`, which does not mean that the methods are "
        "equal. `over seeds` is Student's 95 % interval of the seeds' own differences: with few seeds it is the wider "
        "one, and a verdict whose `over seeds` holds 0 needs more seeds."
    )
    lines = [f"# {comparison.name}", "", about, ""]
    lines += [
        "Rows scored: " + ", ".join(f"{task} {samples[task]}" for task in tasks) + ".",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * 2 + "|---:" * 3 + "|---" + "|---:" * (len(tasks) + 4) + "|",
    ]
    lines += [_row(summary, tasks, comparison.baseline) for summary in summaries]
    if outcome.search:
        lines += ["", "Mean validation score of the search, by learning rate:", ""]
        lines += ["| method | " + " | ".join(f"{rate:g}" for rate in comparison.learning_rates) + " |"]
        lines += ["|---" + "|---:" * len(comparison.learning_rates) + "|"]
        lines += [
            f"| {summary.method} | " + " | ".join(f"{score:.1f}" for score in summary.search.values()) + " |"
            for summary in summaries
        ]
    return "\n".join(lines) + "\n"


def _row(summary: MethodSummary, tasks: Sequence[str], baseline: str) -> str:
    against = ["–", "–", "baseline", "–"]
    if summary.method != baseline:
        against = [f"{summary.difference:+.1f}", _range(summary.interval), summary.verdict]
        against.append(_range(summary.seed_interval))
    cells = [
        summary.method,
        f"{summary.learning_rate:g}",
        f"{statistics.fmean(summary.means):.1f} ± {summary.deviation:.1f}",
        *against,
        *(f"{statistics.fmean(summary.task_scores[task]):.1f}" for task in tasks),
        f"{summary.parameters_per_task:,.0f}",
        f"{summary.tokens_per_second:,.0f}",
        duration(summary.seconds),
    ]
    return "| " + " | ".join(cells) + " |"


def _range(ends: tuple[float, float] | None) -> str:
    return f"{ends[0]:+.1f} … {ends[1]:+.1f}" if ends else "–"
