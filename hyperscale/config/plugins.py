"""Plug-ins: names that other installed packages add to this one's tables.

A plug-in is an entry point in a package's metadata. It names a function without arguments, and that function makes the
registration calls of its group. A group is loaded when a name is looked up that nothing packaged has, so a recipe of
packaged names never imports a plug-in.

| group | registration call |
|---|---|
| `hyperscale.adapter_kinds` | `register_adapter_kind` |
| `hyperscale.generators` | `register_generator` |
| `hyperscale.families` | `register_family` |
| `hyperscale.trackers` | `register_tracker` |
| `hyperscale.metrics` | `register_metric` |
"""

import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from hyperscale.errors import PluginError

T = TypeVar("T")
_loaded: set[EntryPoint] = set()


def load_plugins(group: str) -> None:
    """Call the function of each entry point of a group, once per process.

    Raises:
        PluginError: some could not be imported, or failed when called. The others are still loaded.
    """
    failures = []
    for entry_point in sorted(entry_points(group=group), key=lambda entry: (entry.name, entry.value)):
        if entry_point in _loaded:
            continue
        try:
            entry_point.load()()
        except Exception as error:  # noqa: BLE001  (a plug-in's code is not ours)
            failures.append(f"{_describe(entry_point)} cannot be loaded: {type(error).__name__}: {error}")
        else:
            _loaded.add(entry_point)
    if failures:
        raise PluginError("\n".join(f"{failure}. Repair or uninstall it" for failure in failures))


def _describe(entry_point: EntryPoint) -> str:
    distribution = entry_point.dist
    package = f"of {distribution.name} {distribution.version}" if distribution else "of an unknown package"
    return f"plug-in '{entry_point.name}' {package} ({entry_point.group}: {entry_point.value})"


def import_object(path: str) -> Any:
    """Return what an import path `package.module:name` names.

    Raises:
        PluginError: the path has another form, or the import fails.
    """
    module, separator, name = path.partition(":")
    if not separator or not module or not name:
        raise PluginError(f"'{path}' is not an import path of the form package.module:name")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PluginError(f"'{path}' cannot be imported: {type(error).__name__}: {error}") from error


class Registry(Generic[T]):
    """A table of named things that plug-ins can extend.

    It iterates over the names, those of the package first. A name that is not in it loads the group's plug-ins.
    """

    def __init__(self, thing: str, group: str, packaged: Mapping[str, T]) -> None:
        """`thing`: what one entry is called in messages, such as `adapter kind`."""
        self.thing = thing
        self.group = group
        self._entries = dict(packaged)

    def register(self, name: str, entry: T) -> None:
        """Add an entry; adding the same one again does nothing.

        Raises:
            PluginError: the name is taken.
        """
        if self._entries.setdefault(name, entry) != entry:
            raise PluginError(f"{self.thing} '{name}' is registered already; choose another name")

    def find(self, name: str) -> T | None:
        """Return an entry, or None if neither the package nor a plug-in has the name.

        Raises:
            PluginError: the name is not in the table, and a plug-in that might add it cannot be loaded.
        """
        if name not in self._entries:
            try:
                load_plugins(self.group)
            except PluginError:
                if name not in self._entries:
                    raise
        return self._entries.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, name: str) -> T:
        """Return an entry that is in the table already."""
        return self._entries[name]
