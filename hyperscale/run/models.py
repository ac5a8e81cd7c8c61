"""The families of backbones and what each supports, read from the tables that the program itself uses."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, get_args

from hyperscale.assets.backbones import PACKAGED
from hyperscale.config.adaptation import ADAPTER_SETTINGS, AdapterSection
from hyperscale.config.backbone import BackboneSettings
from hyperscale.config.plugins import load_plugins
from hyperscale.config.section import Section
from hyperscale.export.peft_format import peft_limitation, vllm_limitation
from hyperscale.model.adapters.kinds import ALL
from hyperscale.model.adapters.registry import build_kinds
from hyperscale.model.architectures import ARCHITECTURES, Architecture
from hyperscale.model.sites import CHOSEN, table_sites


class KindSupport(Section):
    """One adapter kind on one family."""

    targets: tuple[str, ...]
    """The kind's default targets that the family has; empty if it has none of them."""
    lacks: tuple[str, ...]
    """Default targets that the family does not have: a recipe must then name others, if there are any."""
    peft: str | None
    """Why no PEFT folder can hold these adapters; null if one can."""
    vllm: str | None
    """Why vLLM cannot serve them; null if it can."""


class FamilySupport(Section):
    """One family of backbones."""

    model_type: str
    """As in a backbone's config.json."""
    model_class: str
    encoder_decoder: bool
    projections: tuple[str, ...]
    """Short names, for the `targets` of a recipe; a model may lack some."""
    adapters: Mapping[str, KindSupport]
    quantization: tuple[str, ...]
    tested_with: tuple[str, ...]
    """Packaged backbones with trained weights, or `random weights`."""


_RANDOM = "random weights"


def list_families() -> Sequence[FamilySupport]:
    """Return the support of every family, those of installed plug-ins included.

    Raises:
        PluginError: a plug-in of families or adapter kinds cannot be loaded.
    """
    load_plugins(ARCHITECTURES.group)
    load_plugins(ADAPTER_SETTINGS.group)
    return [family_support(ARCHITECTURES[name]) for name in ARCHITECTURES]


def family_support(architecture: Architecture) -> FamilySupport:
    """Return the support of one family."""
    projections = [name for stack in architecture.stacks for name in stack.projections]
    quantization = get_args(BackboneSettings.model_fields["quantization"].annotation)
    left_out = {"none", "nf4_all"} if architecture.model_type in _SCALED_EMBEDDINGS else {"none"}
    trained = [name for name, packaged in PACKAGED.items() if packaged.architecture == architecture.model_class]
    return FamilySupport(
        model_type=architecture.model_type,
        model_class=architecture.model_class,
        encoder_decoder=architecture.is_encoder_decoder,
        projections=tuple(dict.fromkeys(projections)),
        adapters={kind: _kind(ADAPTER_SETTINGS[kind], architecture) for kind in ADAPTER_SETTINGS},
        quantization=tuple(word for word in quantization if word not in left_out),
        tested_with=(*trained, _RANDOM),
    )


def _kind(settings: type[AdapterSection], architecture: Architecture) -> KindSupport:
    defaults: Any = settings.model_validate({"kind": settings.model_fields["kind"].default})
    (kind,) = build_kinds([defaults])
    site_map = table_sites(architecture, [kind])
    present = site_map.targets_of(kind.name)
    if not present:  # what can be exported does not depend on the defaults
        site_map = table_sites(architecture, build_kinds([defaults.model_copy(update={"targets": (ALL,)})]))
    named = [target for target in kind.targets if target != ALL and kind.acts_on(target) in CHOSEN]
    return KindSupport(
        targets=present,
        lacks=tuple(target for target in named if target not in present),
        peft=peft_limitation(site_map, architecture),
        vllm=vllm_limitation(site_map, architecture),
    )


def render_json(families: Sequence[FamilySupport]) -> str:
    """Return everything as JSON."""
    return json.dumps([family.model_dump(mode="json") for family in families], indent=2)


_SCALED_EMBEDDINGS = ("gemma2", "gemma3_text")
"""Families whose embedding is a class of its own, which `nf4_all` refuses."""
_COLUMNS = ("family", "class", "adapters", "PEFT folder", "vLLM", "quantization", "tested with")


def _cells(family: FamilySupport) -> Sequence[str]:
    kinds = family.adapters
    return (
        family.model_type,
        family.model_class,
        _usable(kinds),
        _listed(kinds, lambda kind: kind.peft is None),
        _listed(kinds, lambda kind: kind.peft is None and kind.vllm is None),
        ", ".join(family.quantization),
        ", ".join(family.tested_with),
    )


def _usable(kinds: Mapping[str, KindSupport]) -> str:
    named = [name for name, kind in kinds.items() if kind.lacks]
    return f"all ({' and '.join(named)}: name targets)" if named else "all"


def _listed(kinds: Mapping[str, KindSupport], holds: Callable[[KindSupport], bool]) -> str:
    return ", ".join(name for name, kind in kinds.items() if holds(kind)) or "–"


def render_text(families: Sequence[FamilySupport]) -> Iterator[str]:
    """Yield a table for the terminal, and the notes below it."""
    rows = [_COLUMNS, *map(_cells, families)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield ""
    yield from _notes(families)


def render_markdown(families: Sequence[FamilySupport]) -> Iterator[str]:
    """Yield the same table and notes for the documentation."""
    for row in (_COLUMNS, ("---",) * len(_COLUMNS), *map(_cells, families)):
        yield f"| {' | '.join(row)} |"
    yield ""
    yield from (f"- {note}" for note in _notes(families))


def _notes(families: Sequence[FamilySupport]) -> Iterator[str]:
    """Yield what the columns leave open: the kinds, the projections, and what is missing where."""
    yield f"adapters: {', '.join(families[0].adapters)}"
    for names, of in _by(families, lambda family: ", ".join(family.projections)).items():
        yield f"projections of {', '.join(of)}: {names}"
    for kind in families[0].adapters:
        for lacks, of in _by(families, partial(_lacks, kind)).items():
            if lacks:
                yield f"{kind} on {', '.join(of)}: the default target {lacks} is not there; name others"
    supports = [support for family in families for support in family.adapters.values()]
    yield from dict.fromkeys(f"no PEFT folder: {support.peft}" for support in supports if support.peft)
    yield from dict.fromkeys(f"not for vLLM: {kind.vllm}" for kind in supports if kind.vllm and not kind.peft)


def _lacks(kind: str, family: FamilySupport) -> str:
    return ", ".join(family.adapters[kind].lacks)


def _by(families: Sequence[FamilySupport], key: Callable[[FamilySupport], str]) -> Mapping[str, Sequence[str]]:
    """Group the families' names by a text."""
    grouped: dict[str, list[str]] = {}
    for family in families:
        grouped.setdefault(key(family), []).append(family.model_type)
    return grouped
