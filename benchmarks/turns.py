"""Process groups that take turns: each waits for its turn, so that other load on the machine affects all alike."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.005
START_SECONDS = 300.0


class Group:
    """Two or more ranks of one module under torchrun, driven from outside; rank 0 of them uses `TurnFollower`."""

    def __init__(self, name: str, ranks: int, module: str, arguments: Sequence[str], folder: Path) -> None:
        self.name = name
        self._folder = folder / name
        self._folder.mkdir(parents=True)
        self._log = self._folder / "log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
        command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", module, *arguments]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *command, str(self._folder)], env=environment, stdout=log, stderr=log
            )

    def turn(self, number: int) -> Any:
        """Let the group take turn `number` and return the figures that rank 0 reports."""
        (self._folder / f"go-{number}").touch()
        done = self._folder / f"done-{number}"
        deadline = time.monotonic() + START_SECONDS
        while not done.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{self.name} failed:\n{self._log.read_text(errors='replace')[-3000:]}")
            time.sleep(_POLL_SECONDS)
        return json.loads(done.read_text(encoding="utf-8"))

    def stop(self) -> None:
        """End the processes."""
        self._process.terminate()
        self._process.wait()


class TurnFollower:
    """Rank 0's side of a `Group`: waits for turns and reports their figures."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def wait(self, number: int) -> None:
        """Return when turn `number` begins."""
        while not (self._folder / f"go-{number}").exists():
            time.sleep(_POLL_SECONDS)

    def done(self, number: int, figures: Mapping[str, Any]) -> None:
        """Report the figures of turn `number`."""
        part = self._folder / f"part-{number}"
        part.write_text(json.dumps(figures), encoding="utf-8")
        part.rename(self._folder / f"done-{number}")
