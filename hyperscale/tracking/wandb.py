"""The tracker for Weights & Biases. The only file that knows it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from hyperscale.config.secrets import without_credentials
from hyperscale.config.tracking import WandbSettings
from hyperscale.errors import ConfigError
from hyperscale.places import is_uri, local_path
from hyperscale.tracking.jsonl import Entry, recorded_points
from hyperscale.tracking.pusher import first_line
from hyperscale.training.callbacks import CheckpointRecord, RunFacts, RunOutcome


class WandbTracker:
    """Records the run in Weights & Biases; a `Tracker`.

    W&B does not say which steps it has. A file in its folder therefore holds the last step that was sent.
    """

    def __init__(self, settings: WandbSettings, default_root: str, tags: Mapping[str, str]) -> None:
        self._settings = settings
        self._default_root = default_root
        self._tags = dict(tags)
        self._run: Any = None
        self._cursor = Path()

    def open(self, facts: RunFacts, run_key: str, live: bool) -> None:
        self._open(run_key, facts.name, {**facts.recipe, "tags": self._tags, "datasets": facts.datasets})

    def push(self, entries: Sequence[Entry], may_be_there: bool) -> int:
        sent = self._sent_step() if may_be_there else -1
        rows: dict[int, dict[str, float]] = {}
        for point in recorded_points(entries):
            if point.step > sent:
                rows.setdefault(point.step, {"_timestamp": point.time})[point.key] = point.value
        for step, row in sorted(rows.items()):
            self._run.log(row, step=step)
        for record in (entry.record for entry in entries):
            if isinstance(record, CheckpointRecord):
                self._run.summary["hyperscale.checkpoint"] = record.path
            elif isinstance(record, RunOutcome):
                self._run.summary["hyperscale.status"] = record.status
                self._run.summary["hyperscale.message"] = str(without_credentials(record.message))
        if isinstance(entries[-1].record, RunOutcome):
            self._run.finish(exit_code=0 if entries[-1].record.status == "finished" else 1)
        if rows:
            self._cursor.write_text(str(max(rows)), encoding="utf-8")
        return sum(len(row) - 1 for row in rows.values())

    def is_temporary(self, error: Exception) -> bool:
        return isinstance(error, wandb.errors.CommError | OSError)

    def state(self) -> Mapping[str, str]:
        folder = str(Path(self._run.dir).parent)
        place = {"run_id": str(self._run.id), "title": "Weights & Biases"}
        if self._settings.mode == "offline":
            return place | {"where": folder, "command": f"wandb sync {folder}"}
        return place | {"where": str(self._run.url or self._run.id), "command": ""}

    def close(self) -> None:
        self._run.finish()

    def record_end(self, run_key: str, outcome: RunOutcome) -> None:
        self._open(run_key, None, {})
        self._run.summary["hyperscale.status"] = outcome.status
        self._run.summary["hyperscale.message"] = str(without_credentials(outcome.message))
        self._run.finish(exit_code=1)

    def record_comparison(self, name: str, metrics: Mapping[str, float], files: Sequence[Path]) -> None:
        self._open(f"comparison-{name}", name, {})
        self._run.log(dict(metrics))
        for file in files:
            self._run.save(str(file), base_path=str(file.parent), policy="now")
        self._run.finish()

    def _open(self, run_key: str, name: str | None, config: Mapping[str, Any]) -> None:
        folder = self._folder()
        run_id = re.sub(r"[^\w-]", "-", run_key, flags=re.ASCII)[:128]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                project=self._settings.project,
                entity=self._settings.entity,
                id=run_id,
                name=self._settings.run_name or name,
                dir=str(folder),
                config=without_credentials(dict(config)),
                mode=self._settings.mode,
                resume=None if self._settings.mode == "offline" else "allow",
                settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
            )
        except Exception as error:  # noqa: BLE001 - no login, no network, a folder that cannot be written
            raise ConfigError(
                f"tracking.wandb: the run cannot be opened ({first_line(error)}). Run `wandb login`, set "
                "tracking.wandb.mode=offline, or set tracking.wandb.enabled=false."
            ) from None
        self._cursor = folder / f"{run_id}.sent"

    def _folder(self) -> Path:
        if self._settings.folder is not None:
            return Path(self._settings.folder)
        if is_uri(self._default_root):
            raise ConfigError(f"tracking.wandb.folder=null needs a local run folder, not {self._default_root}: set it.")
        return local_path(self._default_root)

    def _sent_step(self) -> int:
        try:
            return int(self._cursor.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return -1
