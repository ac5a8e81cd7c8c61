"""The names under which the files of a checkpoint hold the parameters of a model."""

import re
from collections.abc import Iterator, Sequence
from itertools import count

from hyperscale.model.architectures import Architecture
from hyperscale.model.families.multimodal import Multimodal

_EXPERT = "{expert}"


def stored_as(
    name: str, stored: frozenset[str], architecture: Architecture, multimodal: Multimodal | None
) -> tuple[str, ...]:
    """Return the names of the tensors that make a parameter, one after the other; none if the files lack it.

    Args:
        name: of the parameter, in the class that `architecture` names.
        stored: the names in the files.
        multimodal: the checkpoint around the model, if there is one.
    """
    for candidate in multimodal.stored_names(name) if multimodal else (name,):
        if candidate in stored:
            return (candidate,)
        pieces = tuple(_pieces(candidate, stored, architecture))
        if pieces:
            return pieces
    return ()


def _pieces(name: str, stored: frozenset[str], architecture: Architecture) -> Iterator[str]:
    for pattern, templates in architecture.stored.items():
        matched = re.fullmatch(pattern, name)
        if matched:
            yield from _of_experts([matched.expand(template) for template in templates], stored)


def _of_experts(templates: Sequence[str], stored: frozenset[str]) -> Iterator[str]:
    """Yield the names in the files, expert by expert, up to the first that is missing."""
    for expert in count():
        names = [template.replace(_EXPERT, str(expert)) for template in templates]
        if not stored.issuperset(names):
            return
        yield from names
        if not any(_EXPERT in template for template in templates):
            return
