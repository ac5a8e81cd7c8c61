"""The run that a checkpoint belongs to, and the check that the present run matches it."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from typing import Any

from pydantic import ValidationError

from hyperscale.config.adaptation import AdaptationSettings
from hyperscale.errors import CheckpointError, PluginError

_SHOWN = 3


def build_manifest(
    *,
    site_map: Sequence[Mapping[str, Any]],
    generator: Mapping[str, Any],
    tasks: Sequence[str],
    backbone: Mapping[str, Any],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Return the manifest of a run, as plain JSON values.

    `site_map`: per site `name`, `stack`, `layer`, `position`, `kind`, `in_features`, `out_features`, in order;
    `backbone`: `name` and `digest` (of its weights; None if unknown); `versions`: package -> version, for information.
    """
    return {
        "site_map": [dict(site) for site in site_map],
        "generator": dict(generator),
        "tasks": list(tasks),
        "backbone": dict(backbone),
        "versions": dict(versions),
    }


def check_manifest(stored: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Raise `CheckpointError`, with the first differences in words, unless the weights fit the present run.

    Order counts for sites and tasks: weights and task embeddings are stored by position. Versions may differ.
    """
    differences = list(_differences(stored, present))
    if not differences:
        return
    shown = "; ".join(islice(differences, _SHOWN))
    more = f"; and {len(differences) - _SHOWN} more differences" if len(differences) > _SHOWN else ""
    raise CheckpointError(
        f"The checkpoint belongs to another run: {shown}{more}. "
        "Use the recipe.yaml beside the checkpoint, or start again with another `output=`."
    )


def _differences(stored: Mapping[str, Any], present: Mapping[str, Any]) -> Iterator[str]:
    yield from _backbone(stored.get("backbone", {}), present.get("backbone", {}))
    yield from _sites(stored.get("site_map", []), present.get("site_map", []))
    yield from _tasks(stored.get("tasks", []), present.get("tasks", []))
    yield from _settings("generator", _with_defaults(stored.get("generator", {})), present.get("generator", {}))


def _with_defaults(generator: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return stored settings with those that were added since they were stored, which have their defaults."""
    try:
        return AdaptationSettings.model_validate(generator).model_dump(mode="json")
    except (ValidationError, PluginError):
        return generator


def _backbone(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    # A moved folder is the same backbone: the digest of its weights decides where both are known.
    before, after = was.get("digest"), now.get("digest")
    if before and after and before != after:
        yield f"the backbone was {was.get('name')} (sha256 {before[:12]}…), is {now.get('name')} (sha256 {after[:12]}…)"
    elif not (before and after) and was.get("name") != now.get("name"):
        yield f"the backbone was {was.get('name')}, is {now.get('name')}"
    stored, expected = was.get("quantization", "none"), now.get("quantization", "none")
    if stored != expected:
        yield f"backbone.quantization was {stored}, is {expected}"


def _sites(was: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if len(was) != len(now):
        yield f"the site map had {len(was)} sites, has {len(now)}"
    for number, (before, after) in enumerate(zip_longest(was, now)):
        if before is None:
            yield f"site {number} ({_site(after)}) is new"
        elif after is None:
            yield f"site {number} ({_site(before)}) is gone"
        elif before.get("name") != after.get("name"):
            yield f"site {number} was {_site(before)}, is {_site(after)}"
        else:
            yield from _settings(f"site {number} ({before.get('name')})", before, after)


def _site(site: Mapping[str, Any]) -> str:
    return f"{site.get('name')}: {site.get('kind')} {site.get('in_features')} -> {site.get('out_features')}"


def _tasks(was: Sequence[str], now: Sequence[str]) -> Iterator[str]:
    if sorted(was) == sorted(now) and list(was) != list(now):
        yield f"the tasks were in the order {', '.join(was)}, are {', '.join(now)}"
        return
    gone = [task for task in was if task not in now]
    new = [task for task in now if task not in was]
    if gone:
        yield f"its tasks {', '.join(gone)} are not in this run"
    if new:
        yield f"it was not trained for the tasks {', '.join(new)}"


def _settings(where: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*was, *now]):
        before, after = _by_number(was.get(key, "not set")), _by_number(now.get(key, "not set"))
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _settings(f"{where}.{key}", before, after)
        elif before != after:
            yield f"{where}: {key} was {before}, is {after}"


def _by_number(value: Any) -> Any:
    """Return a list of sections as a mapping, so that one of them is compared key by key."""
    is_list_of_sections = isinstance(value, list) and bool(value) and all(isinstance(one, Mapping) for one in value)
    return {str(number): one for number, one in enumerate(value)} if is_list_of_sections else value
