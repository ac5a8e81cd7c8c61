"""Reading a YAML file that a user wrote, with the line of every key for messages. A key given twice is a mistake."""

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hyperscale.errors import HyperscaleError

_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error; PyYAML silently keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in keys:
                problem = f"the key '{key}' is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class YamlFile:
    """A YAML file whose top level is a mapping, and where each of its keys stands."""

    path: Path
    values: dict[str, Any]
    root: yaml.Node

    def where(self, key: str) -> str:
        """Return `file:line` of a dotted key (`data.tasks[1].name`).

        A key that the file lacks has the line of the innermost section that the file has; the top level has no line.
        """
        line = _line_of(self.root, key)
        return str(self.path) if line is None else f"{self.path}:{line}"


def read_file(path: Path, what: str, error_class: type[HyperscaleError]) -> YamlFile:
    """Read a YAML file that holds a mapping; `what` names it in messages ("a recipe").

    Raises:
        `error_class`: unreadable, not valid YAML (with the line), a key given twice, or not a mapping.
    """
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        try:
            root = loader.get_single_node()
            values = loader.construct_document(root) if root else None
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise error_class(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise error_class(f"{path}: cannot be read: {error}") from error
    if root is None or not isinstance(values, dict):
        raise error_class(f"{path}: {what} is a mapping of keys to values, not {type(values).__name__}")
    return YamlFile(path, values, root)


def read_mapping(path: Path, what: str, error_class: type[HyperscaleError]) -> dict[str, Any]:
    """Return only the values of `read_file`."""
    return read_file(path, what, error_class).values


def _line_of(node: yaml.Node, key: str) -> int | None:
    """Return the line, from 1, of the longest part of `key` that lies below `node`.

    The nodes are searched, not the text of the key alone: a key of the file may itself have dots.
    """
    line = None
    while key:
        children = [(name, at, child) for name, at, child in _children(node) if _begins(key, name)]
        if not children:
            break
        name, line, node = max(children, key=lambda child: len(child[0]))
        key = key[len(name) :].removeprefix(".")
    return line


def _children(node: yaml.Node) -> list[tuple[str, int, yaml.Node]]:
    """Return each entry of a mapping or a list: its part of the dotted key, its line and its node."""
    if isinstance(node, yaml.MappingNode):
        return [(str(key.value), key.start_mark.line + 1, value) for key, value in reversed(node.value)]
    if isinstance(node, yaml.SequenceNode):
        return [(f"[{place}]", item.start_mark.line + 1, item) for place, item in enumerate(node.value)]
    return []


def _begins(key: str, name: str) -> bool:
    return key == name or key.startswith((f"{name}.", f"{name}["))
