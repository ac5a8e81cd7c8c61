"""The weight files of a checkpoint: which they are, what they hold, and a model filled from them."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hyperscale.errors import BackboneError


def weight_files(path: Path) -> tuple[Path, ...]:
    """Return the files that transformers would read: one, those of the index, or none.

    Raises:
        BackboneError: the index is damaged or names a file that is not there.
    """
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        whole = path / "model.safetensors"
        return (whole,) if whole.is_file() else ()
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackboneError(f"backbone.name: {index} is damaged; fetch it again") from error
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise BackboneError(
            f"backbone.name: {path} lacks {missing[0]} ({len(missing)} of {len(names)} files are missing); fetch them"
        )
    return tuple(path / name for name in names)


def tensor_names(files: Sequence[Path]) -> frozenset[str]:
    """Return the names of the tensors in safetensors files; reads their headers.

    Raises:
        BackboneError: a file is damaged.
    """
    names: set[str] = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names.update(opened.keys())
        except (SafetensorError, OSError) as error:
            raise BackboneError(
                f"backbone.name: {file} is not a safetensors file or is truncated ({error}); fetch it again"
            ) from error
    return frozenset(names)


def fill_parameters(model: nn.Module, files: Sequence[Path], stored_as: Callable[[str], Sequence[str]]) -> None:
    """Put stored tensors in the place of a model's meta parameters; nothing else in the files is read.

    `stored_as`: a parameter's name -> the names in the files of the tensors that make it, one after the other.

    Raises:
        BackboneError: the files lack a tensor or hold it in another shape.
    """
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)  # tied weights have several names
    with ExitStack() as stack:
        opened: dict[str, Any] = {}
        for file in files:
            reader = stack.enter_context(safe_open(file, framework="pt"))
            opened |= dict.fromkeys(reader.keys(), reader)
        for names in names_of.values():
            stored = next(filter(None, map(stored_as, names)), None)
            if stored is None:
                raise BackboneError(
                    f"backbone.name: no file beside {files[0]} holds the tensor '{names[0]}'; the checkpoint is "
                    "incomplete"
                )
            filled = _filled(model.get_parameter(names[0]), [opened[name].get_tensor(name) for name in stored])
            if filled is None:
                raise BackboneError(
                    f"backbone.name: tensor '{stored[0]}' beside {files[0]} has another shape than config.json says, "
                    f"{list(model.get_parameter(names[0]).shape)}"
                )
            for name in names:
                owner, _, key = name.rpartition(".")
                model.get_submodule(owner).register_parameter(key, filled)


def _filled(meta: nn.Parameter, pieces: Sequence[Tensor]) -> nn.Parameter | None:
    """Return the parameter that the pieces make in a meta one's shape and dtype, or None if they do not make one."""
    whole = pieces[0] if len(pieces) == 1 else torch.stack(list(pieces)).view(-1, *meta.shape[1:])
    return nn.Parameter(whole.to(meta.dtype), requires_grad=False) if whole.shape == meta.shape else None
