"""A resolved recipe as flat parameters."""

import json
from collections.abc import Iterator, Mapping
from typing import Any


def flatten(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Return dotted path -> value, as `optimizer.betas -> "[0.9, 0.999]"`. A list of plain values is one value."""
    return dict(_leaves("", recipe))


def _leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and (value or not path):
        for key, entry in value.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), entry)
    elif isinstance(value, list | tuple) and any(isinstance(entry, Mapping) for entry in value):
        for number, entry in enumerate(value):
            yield from _leaves(f"{path}.{number}", entry)
    else:
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
