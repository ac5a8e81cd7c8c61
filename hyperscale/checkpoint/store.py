"""Checkpoints that are whole or do not count.

A checkpoint is written beside the others under a temporary name, brought to disk and renamed; on an object store, which
has no rename, its marker is written last. Nothing that existed before is removed until the new one is committed, so a
process may be killed at any moment. Only rank 0 writes: neither `save` nor `sweep` may run on two ranks at once.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyperscale.checkpoint.layout import (
    CHECKPOINTS,
    MANIFEST,
    MARKER,
    RECIPE,
    STATE,
    TENSORS_SUFFIX,
    checkpoint_name,
    parse_name,
    whole_checkpoints,
)
from hyperscale.checkpoint.run_folder import check_owner, read_owner
from hyperscale.errors import CheckpointError
from hyperscale.logger import get_logger
from hyperscale.places import Place, open_place

_FORMAT = 1
_PARTIAL = ".partial"
_PAUSES = (1, 5)
"""Seconds before a failed save is tried a second and a third time."""

_logger = get_logger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to continue."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    """One safetensors file per key: `generator`, `optimizer`. Loaded on the CPU."""
    state: Mapping[str, Any]
    """JSON values: schedule, sampler, seeds, what trackers need to continue."""
    manifest: Mapping[str, Any]
    """What it belongs to: see `manifest.build_manifest`."""
    recipe: Mapping[str, Any]
    """The resolved recipe."""


class CheckpointStore:
    """The checkpoints of one run folder, of which the newest `keep` steps are kept."""

    def __init__(self, folder: str, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: at least the newest checkpoint has to stay")
        self._run = open_place(folder)
        self._owner = read_owner(self._run)
        self._keep = keep

    def save(self, checkpoint: Checkpoint) -> str:
        """Commit a checkpoint and return its path. Rank 0 only.

        A failed write is retried twice, after 1 and 5 seconds: object stores and network file systems fail now and
        then. `CheckpointError`, marked as transient, if the third attempt fails too. `RunFolderError` if another run
        has taken the folder since this store was made.

        Nothing is written if the checkpoint holds NaN or infinity, because it would replace the last one that a run
        can continue from.
        """
        self._require_finite(checkpoint)
        return self._commit(checkpoint.step, lambda target: _commit_whole(checkpoint, target))

    def update_state(self, path: str, state: Mapping[str, Any]) -> str:
        """Commit the checkpoint at `path` again with another `state`, and return its path. Rank 0 only.

        The other files are linked, or copied by the storage itself. They are not written again.

        Raises:
            CheckpointError, RunFolderError: as `save`.
        """
        source = open_place(path)
        key = parse_name(source.name)
        assert key is not None, "only a checkpoint that this store has saved is updated"
        return self._commit(key[0], lambda target: _commit_state(key[0], state, source, target))

    def _commit(self, step: int, write: Callable[[Place], None]) -> str:
        for seconds in _PAUSES:
            try:
                return self._commit_once(step, write)
            except OSError as error:
                _logger.warning("checkpoint of step %d: %s; trying again in %d s", step, error, seconds)
                time.sleep(seconds)
        try:
            return self._commit_once(step, write)
        except OSError as error:
            raise CheckpointError(
                f"The checkpoint of step {step} cannot be written in {self._run.child(CHECKPOINTS)}: "
                f"{error}. Free some space or fix the location, then use --resume. {self._last_whole()}",
                is_transient=True,
            ) from error

    def _require_finite(self, checkpoint: Checkpoint) -> None:
        for part, tensors in checkpoint.tensors.items():
            for name, tensor in tensors.items():
                if not torch.isfinite(tensor).all():
                    raise CheckpointError(
                        f"The checkpoint of step {checkpoint.step} is not written: '{name}' of the {part} holds NaN or "
                        f"infinity, so that training has diverged. {self._last_whole()} Continue from there with a "
                        "lower learning rate: --resume training.optimizer.learning_rate=…"
                    )

    def _commit_once(self, step: int, write: Callable[[Place], None]) -> str:
        check_owner(self._run, self._owner)
        self.sweep()
        target = self._run.child(CHECKPOINTS).child(self._free_name(step))
        write(target)
        self._prune()
        return str(_with_plain_name(target, step))

    def _last_whole(self) -> str:
        try:
            previous = self.latest()
        except OSError:  # the storage is unreachable: still report the failed save
            return "Earlier checkpoints could not be listed."
        return f"The last whole one is {previous}." if previous else "None has been written yet."

    def latest(self) -> str | None:
        """Return the path of the newest whole checkpoint, or None."""
        whole = whole_checkpoints(self._run)
        return str(whole[-1]) if whole else None

    def load(self, path: str) -> Checkpoint:
        """Read and verify a checkpoint; see `load_checkpoint`."""
        return load_checkpoint(path)

    def sweep(self) -> None:
        """Delete what a killed `save` left half-written or unpruned. Rank 0 only, in the run that writes here."""
        for place in self._run.child(CHECKPOINTS).children():
            unfinished = parse_name(place.name) is not None and not place.child(MARKER).exists()
            if unfinished or place.name.endswith(_PARTIAL):
                place.fs.rm(place.path, recursive=True)
        self._prune()

    def list(self) -> tuple[str, ...]:
        """Return the paths of all whole checkpoints, oldest first."""
        return tuple(str(place) for place in whole_checkpoints(self._run))

    def _free_name(self, step: int) -> str:
        # A run that went back to an earlier checkpoint saves a step again. Its old copy stays until the new one counts.
        keys = [parse_name(place.name) for place in whole_checkpoints(self._run)]
        return checkpoint_name(step, max((key[1] for key in keys if key and key[0] == step), default=0) + 1)

    def _prune(self) -> None:
        newest: dict[int, Place] = {}
        for place in whole_checkpoints(self._run):
            key = parse_name(place.name)
            assert key is not None
            if key[0] in newest:
                _remove(newest[key[0]])
            newest[key[0]] = place
        for step in sorted(newest)[: -self._keep]:
            _remove(newest[step])


def find_checkpoint(path: str) -> str:
    """Return the checkpoint that a user means by its own path or by its run folder (then the newest one)."""
    place = open_place(path)
    if place.child(MARKER).exists():
        return str(place)
    whole = whole_checkpoints(place)
    if whole:
        return str(whole[-1])
    reason = "is neither a checkpoint nor a run folder with one" if place.exists() else "does not exist"
    others = whole_checkpoints(place.parent.parent)
    advice = f"Use {others[-1]}." if others else "Give a checkpoint, or the folder of a run that has written one."
    raise CheckpointError(f"{path} {reason} (no {MARKER} marker). {advice}")


def load_checkpoint(path: str, only: Collection[str] | None = None) -> Checkpoint:
    """Read a checkpoint, its digests verified first, onto the CPU. Any number of ranks may do so at once.

    `only` names the tensor files to read (`("generator",)` for an export). `CheckpointError` names the file that is
    missing or damaged and the checkpoint to use instead.
    """
    place = open_place(path)
    files = _read_marker(place)
    selected = [f for f in files if not f.endswith(TENSORS_SUFFIX) or only is None or f[: -len(TENSORS_SUFFIX)] in only]
    with _verified(place, {file: files[file] for file in selected}) as folder:
        tensors = {
            # Cloned: load_file maps the file into memory, and a mapped file that is pruned or replaced is a SIGBUS.
            file[: -len(TENSORS_SUFFIX)]: {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
            for file in selected
            if file.endswith(TENSORS_SUFFIX)
        }
        state = json.loads((folder / STATE).read_text("utf-8"))
        return Checkpoint(
            step=state["step"],
            tensors=tensors,
            state=state["state"],
            manifest=json.loads((folder / MANIFEST).read_text("utf-8")),
            recipe=yaml.safe_load((folder / RECIPE).read_text("utf-8")),
        )


def _commit_whole(checkpoint: Checkpoint, target: Place) -> None:
    def write(folder: Path) -> None:
        _write_state(checkpoint.step, checkpoint.state, folder)
        _write_files(checkpoint, folder)

    if target.is_local:
        _commit_locally(write, target.local_path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder)
        target.fs.makedirs(target.path, exist_ok=True)
        for file in sorted(folder.iterdir()):
            target.fs.put_file(str(file), target.child(file.name).path)
        target.fs.pipe_file(target.child(MARKER).path, _marker(_entries(folder)))


def _commit_state(step: int, state: Mapping[str, Any], source: Place, target: Place) -> None:
    """Write a checkpoint with the files of `source`, but another state."""
    files = _read_marker(source)
    others = [name for name in files if name != STATE]
    if target.is_local:

        def write(folder: Path) -> None:
            for name in others:
                _link(source.local_path / name, folder / name)
            _write_state(step, state, folder)

        _commit_locally(write, target.local_path)
        return
    target.fs.makedirs(target.path, exist_ok=True)
    for name in others:
        _copy(source.child(name), target.child(name))
    with tempfile.TemporaryDirectory() as scratch:
        _write_state(step, state, Path(scratch))
        target.fs.put_file(str(Path(scratch) / STATE), target.child(STATE).path)
        target.fs.pipe_file(target.child(MARKER).path, _marker(files | _entries(Path(scratch))))


def _commit_locally(write: Callable[[Path], None], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}{_PARTIAL}")
    try:
        partial.mkdir()
        write(partial)
        (partial / MARKER).write_bytes(_marker(_entries(partial)))
        for file in partial.iterdir():
            _flush(file)
        _flush(partial)
        partial.rename(target)
        _flush(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links. Committed files never change."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _copy(source: Place, target: Place) -> None:
    """Let the storage copy a file, or carry it through this machine where it cannot."""
    try:
        source.fs.cp_file(source.path, target.path)
    except NotImplementedError:
        target.fs.pipe_file(target.path, source.fs.cat_file(source.path))


def _write_state(step: int, state: Mapping[str, Any], folder: Path) -> None:
    (folder / STATE).write_text(json.dumps({"step": step, "state": state}, indent=1), "utf-8")


def _write_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Write everything but the state, which must lie there already."""
    (folder / MANIFEST).write_text(json.dumps(checkpoint.manifest, indent=1), "utf-8")
    (folder / RECIPE).write_text(yaml.safe_dump(dict(checkpoint.recipe), sort_keys=False, allow_unicode=True), "utf-8")
    for key, tensors in checkpoint.tensors.items():
        file = folder / f"{key}{TENSORS_SUFFIX}"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)
        # safetensors writes 0600; a run folder is shared by a team, so follow the umask as the other files do.
        file.chmod((folder / STATE).stat().st_mode)


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the size and the digest of every file."""
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.iterdir())
        if file.name != MARKER
    }


def _marker(files: Mapping[str, Mapping[str, Any]]) -> bytes:
    return json.dumps({"format": _FORMAT, "files": files}, indent=1).encode()


def _read_marker(place: Place) -> dict[str, dict[str, Any]]:
    try:
        marker = json.loads(place.fs.cat_file(place.child(MARKER).path))
        stored, files = marker["format"], {str(name): dict(entry) for name, entry in marker["files"].items()}
    except OSError as error:
        raise CheckpointError(
            f"{place} is not a whole checkpoint: it has no {MARKER}. {_recovery_hint(place)}"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{place.child(MARKER)} is damaged. {_recovery_hint(place)}") from error
    if stored != _FORMAT:
        raise CheckpointError(
            f"{place} has checkpoint format {stored}, this hyperscale reads {_FORMAT}: use the version that wrote it."
        )
    return files


@contextmanager
def _verified(place: Place, files: Mapping[str, Mapping[str, Any]]) -> Iterator[Path]:
    """Yield a local folder with these files, fetched if they are remote, with every digest checked."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = place.local_path if place.is_local else Path(scratch)
        for name, entry in files.items():
            file = folder / name
            try:
                if not place.is_local:
                    place.fs.get_file(place.child(name).path, str(file))
                whole = file.stat().st_size == entry["bytes"] and _sha256(file) == entry["sha256"]
            except OSError as error:
                raise CheckpointError(f"{place.child(name)} is missing: {error}. {_recovery_hint(place)}") from error
            if not whole:
                raise CheckpointError(
                    f"{place.child(name)} is damaged: its sha256 is not the one in {MARKER}. {_recovery_hint(place)}"
                )
        yield folder


def _recovery_hint(place: Place) -> str:
    """Return what to do about an unusable checkpoint."""
    key = parse_name(place.name)
    others = [other for other in whole_checkpoints(place.parent.parent) if other.name != place.name]
    earlier = [other for other in others if key and (parse_name(other.name) or key) < key]
    if earlier:
        return f"Use the previous checkpoint at {earlier[-1]}: delete {place} and use --resume."
    return "There is no earlier checkpoint in this run folder: restore the file, or start again with another `output=`."


def _with_plain_name(place: Place, step: int) -> Place:
    """Rename a checkpoint to the plain name of its step if no older one has it and the storage can rename."""
    plain = place.parent.child(checkpoint_name(step))
    if not place.is_local or place.name == plain.name or plain.exists():
        return place
    place.local_path.rename(plain.path)
    _flush(plain.local_path.parent)
    return plain


def _remove(place: Place) -> None:
    # Delete the marker first: what a kill leaves behind then no longer counts, and the next sweep deletes it.
    place.fs.rm_file(place.child(MARKER).path)
    place.fs.rm(place.path, recursive=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Flush a file or folder to disk, so that a power cut cannot keep its new name and lose its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
