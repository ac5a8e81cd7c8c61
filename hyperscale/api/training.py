"""Training from Python: what `hyperscale train` does, with its result as an object."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hyperscale.config.run import Recipe
from hyperscale.launch.start import Launcher, start
from hyperscale.run.context import RunResult
from hyperscale.training.evaluation import MAJORITY, TEST, UNTOUCHED, VALIDATION

if TYPE_CHECKING:
    from hyperscale.api.generator import Generator

Scores = Mapping[str, Mapping[str, float]]
"""Task -> metric -> score in percent; the first metric of a task is its main one."""


@dataclass(frozen=True, repr=False)
class TrainResult:
    """The result of a run, which `hs.train` returns. It prints as a table."""

    name: str
    scores: Scores
    """On the validation rows after the last step."""
    untouched: Scores
    """Of the backbone without adapters; empty where the recipe does not ask for it."""
    majority: Scores
    """Of the most common training answer."""
    test: Scores
    """On the test rows; empty where the recipe does not ask for them."""
    folder: str
    """The run folder."""
    checkpoint: str
    """The newest checkpoint."""
    bundles: Mapping[str, str]
    """Task -> its exported bundle; empty where `export.enabled` is false."""
    trackers: Mapping[str, Mapping[str, str]]
    """Tracker -> the keys that identify the run there; empty without trackers."""
    steps: int
    seconds: float
    trained_parameters: int
    total_parameters: int
    """Backbone and generator together."""

    def generator(self) -> "Generator":
        """Read the trained generator from the newest checkpoint.

        Example:
            >>> result.generator().adapters("tweets")
        """
        from hyperscale.api.generator import Generator  # noqa: PLC0415 (a result is printed without it)

        return Generator.from_pretrained(self.checkpoint)

    def __repr__(self) -> str:
        share = 100 * self.trained_parameters / self.total_parameters if self.total_parameters else 0.0
        width = max([4, *map(len, self.scores)])
        parameters = f"{self.trained_parameters:,} of {self.total_parameters:,} parameters ({share:.2f} %)"
        lines = [
            f"TrainResult({self.name!r}): {self.steps} steps in {self.seconds:.1f} s, trained {parameters}",
            f"  {'task':<{width}}  {'metric':<12} {'trained':>9} {'untouched':>9} {'majority':>9}",
        ]
        for task, metrics in self.scores.items():
            metric = next(iter(metrics), "")
            shown = [_cell(scores, task, metric) for scores in (self.scores, self.untouched, self.majority)]
            lines.append(f"  {task:<{width}}  {metric:<12} {' '.join(f'{cell:>9}' for cell in shown)}")
        lines.append(f"  checkpoint: {self.checkpoint}")
        return "\n".join(lines)


def train(recipe: Recipe, launcher: Launcher = "local", resume: bool = False) -> TrainResult:
    """Train a recipe, evaluate it and export its bundles.

    Args:
        recipe: what `load_recipe` returned.
        launcher: `local` runs one worker in this process, `torchrun` starts the recipe's workers on this machine, `ray`
            starts them on a Ray cluster.
        resume: continue from the newest checkpoint in the run folder.

    Raises:
        ConfigError: the recipe cannot be run, or asks for more workers than the launcher starts.
        RunFolderError: the run folder holds an earlier run and `resume` is false, or it is busy.
        HyperscaleError: any other error that stops the run. Its checkpoints stay.

    Example:
        >>> result = hs.train(hs.load_recipe("demo", {"cluster.workers": 1, "engine.kind": "local"}))
        >>> result.scores["tweets"]["accuracy"]
        71.5
    """
    return summarize(start(recipe, launcher, resume))


def summarize(result: RunResult) -> TrainResult:
    """Return a launcher's result as the Python API shows it."""
    return TrainResult(
        name=result.name,
        scores=_last(result.evaluations, VALIDATION),
        untouched=_last(result.evaluations, UNTOUCHED),
        majority=_last(result.evaluations, MAJORITY),
        test=_last(result.evaluations, TEST),
        folder=result.folder,
        checkpoint=result.checkpoint,
        bundles=result.bundles,
        trackers=result.trackers,
        steps=result.steps,
        seconds=result.seconds,
        trained_parameters=result.trained_parameters,
        total_parameters=result.total_parameters,
    )


def _last(evaluations: Sequence[Mapping[str, Any]], stage: str) -> Scores:
    return next((one["scores"] for one in reversed(evaluations) if one["stage"] == stage), {})


def _cell(scores: Scores, task: str, metric: str) -> str:
    value = scores.get(task, {}).get(metric)
    return "-" if value is None else f"{value:.1f}"
