"""The output of `hyperscale tasks`: the list of tasks that a recipe can name, or one task in detail."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from hyperscale.data.hub import printable
from hyperscale.data.origins import AssetSource, FileSource, HubSource, unset_variable
from hyperscale.data.sources import load_task_data
from hyperscale.data.tasks import Task

_STATES = {
    "hub": "hub: fetched from the Hugging Face hub when it is used",
    "missing": "missing: its folder or file is not there",
    "unset": "unset: its rows lie in a folder that an environment variable must name; hyperscale tasks NAME says which",
}


def table(tasks: Sequence[Task], columns: int | None = None) -> Iterator[str]:
    """Yield a line per task, at most `columns` wide: name, kind, metrics, place of its rows, description."""
    rows = [(task.name, task.kind, ", ".join(task.metrics), state(task)) for task in tasks]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for task, row in zip(tasks, rows, strict=True):
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield _cut(f"{cells}  {task.description}".rstrip(), columns)
    notes = [note for word, note in _STATES.items() if word in {row[3] for row in rows}]
    yield from ["", *notes] if notes else []


def state(task: Task) -> str:
    """Return one word for the place of a task's rows: `packaged`, `file`, `folder`, `hub`, `unset` or `missing`."""
    match task.source:
        case AssetSource():
            return "packaged"
        case FileSource() as source:
            if _unset(source):
                return "unset"
            return "file" if Path(source.path or source.train or "").exists() else "missing"
        case HubSource() as source:
            return "hub" if source.local_folder is None else "folder"


def details(task: Task) -> Iterator[str]:
    """Yield a task's facts and one example, in the form of each family of backbones if these differ.

    Raises:
        DataError: its rows cannot be read. The facts that need no rows are yielded before.
    """
    yield f"{task.name}: {task.description}".rstrip(": ")
    facts = {
        "kind": task.kind,
        "metrics": ", ".join(task.metrics),
        "rows from": origin(task),
        "answers": ", ".join(task.labels.values()) if task.labels else "",
        "not with": ", ".join(task.not_with),
        "shares texts with": ", ".join(task.shares_texts_with),
    }
    yield from (f"  {name:<17}  {value}" for name, value in facts.items() if value)
    families = ("encoder-decoder", "decoder-only") if task.tagging is not None else ("",)
    for family in families:
        data = load_task_data(task.written_for(family == "encoder-decoder"))
        if family == families[0]:
            yield f"  {'rows':<17}  {', '.join(f'{split} {len(rows):,}' for split, rows in data.splits.items())}"
        example = data.splits["validation"][0]
        yield f"\nprompt{f', {family}' if family else ''}"
        yield from (f"  {line}" for line in example.source.splitlines())
        yield "answer"
        yield from (f"  {line}" for line in example.target.splitlines())


def origin(task: Task) -> str:
    """Return a description of the place of a task's rows."""
    match task.source:
        case AssetSource(asset=asset, subset=subset):
            return f"the packaged data set {asset}/{subset}"
        case FileSource() as source:
            missing = _unset(source)
            return f"{source.path or source.train}" + (f" ({missing} is not set)" if missing else "")
        case HubSource() as source if source.local_folder is not None:
            return f"{source.local_folder}, else {printable(source)}"
        case HubSource() as source:
            return printable(source) + (f", or {source.folder}, which is not there" if source.folder else "")


def _unset(source: FileSource) -> str | None:
    return unset_variable(source.path or source.train or "")


def _cut(line: str, columns: int | None) -> str:
    return line if columns is None or len(line) <= columns else line[: columns - 1] + "…"
