"""Plug-ins: entry points of other packages, loaded when a name is looked up, with errors that name the package."""

import sys
from pathlib import Path

import pytest

from hyperscale.config.plugins import Registry, import_object, load_plugins
from hyperscale.errors import PluginError

GROUP = "hyperscale.tests"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a package of one module with one entry point, for the length of a test."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, code: str, entry_point: str) -> Path:
        (tmp_path / f"{name}.py").write_text(code)
        metadata = tmp_path / f"{name}-1.2.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (metadata / "entry_points.txt").write_text(f"[{GROUP}]\n{entry_point}\n")
        return tmp_path

    known = set(sys.modules)
    yield write
    for module in set(sys.modules) - known:
        del sys.modules[module]


def test_a_plugin_is_loaded_once_and_only_for_an_unknown_name(install):
    registry: Registry[int] = Registry("number", GROUP, {"one": 1})
    install("plugin_of_two", "calls = []\ndef add():\n    calls.append(1)\n", "two = plugin_of_two:add")
    assert registry.find("one") == 1
    assert "plugin_of_two" not in sys.modules
    assert registry.find("two") is None  # its function registers nothing
    assert registry.find("two") is None
    assert sys.modules["plugin_of_two"].calls == [1]


def test_a_plugin_that_fails_is_named_and_hides_no_other(install):
    registry: Registry[int] = Registry("number", GROUP, {})
    install("broken_plugin", "import no_such_module", "broken = broken_plugin:add")
    install("sound_plugin", "def add():\n    registry.register('four', 4)\n", "sound = sound_plugin:add")
    import sound_plugin

    sound_plugin.registry = registry
    assert registry.find("four") == 4
    with pytest.raises(PluginError, match=r"plug-in 'broken' of broken_plugin 1\.2 \(hyperscale\.tests: broken_plugin"):
        registry.find("five")
    with pytest.raises(PluginError, match=r"ModuleNotFoundError: No module named 'no_such_module'\. Repair or uninst"):
        load_plugins(GROUP)


def test_a_name_is_registered_once():
    registry: Registry[int] = Registry("number", GROUP, {"one": 1})
    registry.register("one", 1)
    registry.register("three", 3)
    assert list(registry) == ["one", "three"]
    with pytest.raises(PluginError, match="number 'one' is registered already; choose another name"):
        registry.register("one", 2)


def test_import_paths():
    assert import_object("pathlib:Path") is Path
    with pytest.raises(PluginError, match=r"'pathlib\.Path' is not an import path of the form package\.module:name"):
        import_object("pathlib.Path")
    with pytest.raises(PluginError, match=r"'pathlib:Pathh' cannot be imported: AttributeError: "):
        import_object("pathlib:Pathh")
