"""Reading a YAML file that a user wrote, with its place in every message. A key given twice is a mistake."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from hyperscale.errors import HyperscaleError

_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice; PyYAML would let the last one win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                problem = f"the key '{key}' is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path, what: str, error_class: type[HyperscaleError]) -> dict[str, Any]:
    """Return the mapping that a YAML file holds; `what` names it in messages ("a recipe").

    Raises:
        `error_class`: unreadable, not valid YAML (with the line), a key given twice, or not a mapping.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise error_class(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise error_class(f"{path}: cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise error_class(f"{path}: {what} is a mapping of keys to values, not {type(raw).__name__}")
    return raw
