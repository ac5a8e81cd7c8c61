"""Records of a run as a trainer makes them, for the tests of what writes them down."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hyperscale.config.tracking import TrackingSettings
from hyperscale.tracking.trackers import open_trackers
from hyperscale.training.callbacks import Callback, EvaluationRecord, RunFacts, StepRecord

SECRET = "postgresql://someone:hunter2@db:5432/mlflow"


def make_facts(folder: Path | str, **changes: object) -> RunFacts:
    facts = RunFacts(
        name="demo",
        folder=str(folder),
        recipe={
            "name": "demo",
            "adaptation": {"adapters": [{"kind": "lora", "rank": 8}], "generator": {"kind": "hypernetwork"}},
            "training": {"steps": 100, "betas": [0.9, 0.999], "note": "x" * 9000},
            "tracking": {"mlflow": {"uri": SECRET}},
        },
        tasks=("sst2", "word pairs!"),
        datasets={
            "sst2": {"source": "sst2.jsonl", "digest": "d" * 64, "train": 67, "validation": 87},
            "word pairs!": {"source": "words", "digest": "e" * 64, "train": 10, "validation": 5},
        },
        world_size=2,
        trained_parameters=1_000,
        total_parameters=100_000,
        start_step=0,
        total_steps=100,
        tracking_state={},
    )
    return replace(facts, **changes)


def make_step(step: int) -> StepRecord:
    return StepRecord(
        step=step,
        total_steps=100,
        loss=1 / step,
        task_losses={"sst2": 0.5 / step, "word pairs!": 1.5 / step},
        learning_rate=3e-4,
        grad_norm=math.nan if step == 3 else 0.7,
        tokens=512,
        samples=8,
        step_seconds=0.25,
        tokens_per_second=2048.0,
        seconds_left=10.0,
    )


def make_evaluation(step: int, stage: str = "validation", score: float = 80.0) -> EvaluationRecord:
    scores = {"sst2": {"accuracy": score, "f1": score - 1}, "word pairs!": {"exact_match": score - 20}}
    return EvaluationRecord(step, stage, scores, samples={"sst2": 87, "word pairs!": 5}, seconds=1.5)


def read_lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Recorded:
    """A run's listeners, called as the trainer calls them."""

    def __init__(
        self, folder: Path, settings: Mapping[str, object], key: str = "key", tags: Mapping[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tracking = TrackingSettings.model_validate({"mlflow": {"enabled": False}} | dict(settings))
        self.folder = folder
        self.listeners: Sequence[Callback] = open_trackers(tracking, str(folder), str(folder.parent), key, tags or {})
        self.recipe = dict(make_facts(folder).recipe) | {"tracking": tracking.model_dump(mode="json")}

    def start(self, **changes: object) -> None:
        for listener in self.listeners:
            listener.on_run_start(make_facts(self.folder, **({"recipe": self.recipe} | changes)))

    def step(self, *steps: int) -> None:
        for step in steps:
            for listener in self.listeners:
                listener.on_step(make_step(step))

    def call(self, method: str, record: object) -> None:
        for listener in self.listeners:
            getattr(listener, method)(record)

    def state(self) -> dict[str, object]:
        return {key: value for listener in self.listeners for key, value in listener.state().items()}

    def end(self, outcome: object) -> None:
        self.call("on_run_end", outcome)
