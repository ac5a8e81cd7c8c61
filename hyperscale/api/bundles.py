"""Exported tasks on one backbone, from Python."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hyperscale.data.rows import Row
from hyperscale.export.bundle import read_manifest
from hyperscale.places import local_path
from hyperscale.serving import load
from hyperscale.serving.predict import answer_rows, continue_prompts


def load_bundles(
    folders: Sequence[str | Path] | str | Path, backbone: str | None = None, dtype: str | None = None
) -> "Bundles":
    """Load bundles that share a backbone and sites, and the backbone.

    Args:
        folders: bundle folders, as `hyperscale export` or a run wrote them.
        backbone: another name or folder of the same backbone, for example where it lies on this machine.
        dtype: `bfloat16` or `float32`; by default as trained.

    Raises:
        BundleError: no bundle, a damaged one, two of one task, or bundles that do not fit together.
        BackboneError: the backbone cannot be found, or is another one.

    Example:
        >>> bundles = hs.load_bundles(["runs/demo/bundles/tweets", "runs/demo/bundles/plural"])
        >>> bundles.predict([{"task": "tweets", "text": "what a day"}, {"task": "plural", "word": "city"}])
        ['positive', 'cities']
    """
    listed = [folders] if isinstance(folders, str | Path) else folders
    return Bundles(load.load_bundles([local_path(folder) for folder in listed], backbone, dtype))


class Bundles:
    """One loaded backbone and the tasks whose bundles are loaded; `load_bundles` makes it.

    Tasks can be added and removed while it is in use; the backbone stays loaded. It is not safe to call from several
    threads at once.
    """

    def __init__(self, loaded: load.LoadedBundles) -> None:
        self._loaded = loaded
        self._first = loaded.manifests[0]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the loaded tasks."""
        return self._loaded.tasks

    def add(self, folder: str | Path) -> str:
        """Load one more bundle of the same backbone and sites; returns its task's name.

        Raises:
            BundleError: the bundle is damaged, does not fit, or its task is loaded already.
        """
        bundle = local_path(folder)
        manifest = read_manifest(bundle)
        load.check_alike(bundle, manifest, self._first)
        self._loaded.append(bundle, manifest)
        return manifest.task.name

    def remove(self, task: str) -> None:
        """Forget a task.

        Raises:
            BundleError: no bundle of that task is loaded.
        """
        self._loaded.remove(task)

    def predict(self, rows: Sequence[Mapping[str, Any]], task: str | None = None, batch_size: int = 16) -> list[str]:
        """Return the answer to each row, in order: a label, a number or text, as the task says.

        Args:
            rows: the columns of the task's prompt. Without `task` and with several bundles also `task`, its name.
            task: the task of all rows.
            batch_size: rows that run at once; a batch mixes tasks.

        Raises:
            DataError: a row lacks a column, names no loaded task, or is too long.
        """
        named = rows if task is None else [{**row, "task": self.tasks[self._loaded.index_of(task)]} for row in rows]
        numbered = [Row(row, f"row {number}") for number, row in enumerate(named)]
        return answer_rows(self._loaded, numbered, batch_size)

    def generate(
        self,
        prompts: Sequence[str],
        tasks: Sequence[str] | str,
        max_new_tokens: int | None = None,
        batch_size: int = 16,
    ) -> list[str]:
        """Return the greedy continuation of each prompt with the adapters of its task, in order.

        Args:
            prompts: texts as the tasks' templates write them; no template is applied, but a chat task's prompt becomes
                the user's turn of the chat template.
            tasks: the task of each prompt, or one task for all.
            max_new_tokens: the longest answer; by default each task's own limit.
            batch_size: prompts that run at once; a batch mixes tasks.

        Raises:
            BundleError: no bundle of such a task is loaded.
            DataError: a prompt is longer than its task was trained with.
            ValueError: not one task for each prompt.
        """
        names = [tasks] * len(prompts) if isinstance(tasks, str) else list(tasks)
        if len(names) != len(prompts):
            raise ValueError(f"{len(names)} tasks for {len(prompts)} prompts: give one for each, or one for all")
        return continue_prompts(self._loaded, prompts, names, batch_size, max_new_tokens)

    def __repr__(self) -> str:
        backbone = self._first.backbone
        return f"Bundles({', '.join(self.tasks) or 'no task'}; {backbone.name} in {backbone.dtype})"
