"""The kinds of `source` in a task file: files, a packaged data set, or the Hugging Face hub."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from hyperscale.config.section import Section

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class FileSource(Section):
    """JSONL, CSV, TSV or Parquet files; paths are relative to the task file, `~` and `${VARIABLE}` are expanded."""

    kind: Literal["file"] = "file"
    path: str | None = None
    """A folder with train, validation and test files, or one file of training rows."""
    train: str | None = None
    validation: str | None = None
    test: str | None = None

    @model_validator(mode="after")
    def _one_way_to_name_the_files(self) -> Self:
        if self.path is None and self.train is None:
            raise ValueError("name the rows: path (a folder, or a file of training rows) or train, validation, test")
        if self.path is not None and (self.train or self.validation or self.test):
            raise ValueError("path and train, validation, test exclude each other")
        return self


class AssetSource(Section):
    """A data set that the package fetches and checks against a pinned digest."""

    kind: Literal["asset"] = "asset"
    asset: str
    subset: str


class HubSource(Section):
    """A data set of the Hugging Face hub, or a folder that `datasets.load_dataset` understands.

    On the hub a label of -1 means that the row has no label, as in the hidden test sets of GLUE.
    """

    kind: Literal["hub"] = "hub"
    path: str
    name: str | None = None
    """The configuration, such as `sst2` of `nyu-mll/glue`."""
    revision: str | None = None
    splits: dict[Split, str] | None = None
    """Our split -> its name on the hub; by default every split with the same name."""
    columns: dict[str, str] | None = None
    """Our column -> its name on the hub, if the names differ."""
    streaming: bool = False
    """Read the rows from the hub one by one while they are encoded. Without it, `datasets` first downloads the whole
    data set and converts it on disk."""
    folder: str | None = None
    """A folder with the same rows in our columns, as train, validation and test files. It is read instead of the hub
    if its variables are set and it exists; its path is written as in a file source."""

    @property
    def local_folder(self) -> Path | None:
        """`folder`, if its variables are set and it exists."""
        if self.folder is None or unset_variable(self.folder) or not Path(self.folder).is_dir():
            return None
        return Path(self.folder)


def _with_kind(source: Any) -> Any:
    """Expand the short forms of `kind: file` and `kind: asset`."""
    if isinstance(source, str):
        return {"kind": "file", "path": source}
    if isinstance(source, dict) and "kind" not in source:
        return {"kind": "asset" if "asset" in source else "file", **source}
    return source


Source = Annotated[FileSource | AssetSource | HubSource, Field(discriminator="kind"), BeforeValidator(_with_kind)]


def located(source: FileSource | AssetSource | HubSource, folder: Path) -> FileSource | AssetSource | HubSource:
    """Return the source with absolute paths; `folder` is the folder of its task file."""
    match source:
        case FileSource():
            paths = source.model_dump(exclude={"kind"}, exclude_none=True)
            return FileSource(**{key: _absolute(path, folder) for key, path in paths.items()})
        case HubSource(folder=str(path)):
            return source.model_copy(update={"folder": _absolute(path, folder)})
    return source


def unset_variable(path: str) -> str | None:
    """Return the first variable that is still in a located path because it is not set, or None."""
    return next((match[1] for match in _VARIABLE.finditer(path)), None)


def _absolute(path: str, folder: Path) -> str:
    expanded = _VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), path)
    if _VARIABLE.search(expanded):
        return expanded  # a task can be listed without the variable; opening its rows reports it
    return os.path.normpath(folder / Path(expanded).expanduser())
