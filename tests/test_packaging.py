"""What is shipped and what it asks for: the wheel, the dependencies, the pins, the presets, the rendered documents."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import deepspeed
import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hyperscale
from hyperscale.assets.presets import find_preset, preset_folder
from hyperscale.config.loading import packaged_recipes
from hyperscale.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PRESETS = sorted((ROOT / "ds_configs").glob("*.json"))


def requirements(*extras: str) -> list[Requirement]:
    """Return the declared dependencies, with those of `extras`."""
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in PROJECT["optional-dependencies"][extra])]
    return [requirement for requirement in map(Requirement, texts) if requirement.name != PROJECT["name"]]


def pins() -> dict[str, str]:
    """Return constraints.txt as canonical name -> version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network and unpacked as an installation would be."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    (archive,) = folder.glob("*.whl")
    assert archive.name == f"hypernet_scale-{hyperscale.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_carries_everything(wheel: Path) -> None:
    shipped = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    expected = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "hyperscale").rglob("*")
        if path.suffix in (".py", ".yaml")
    ]
    assert "hyperscale/recipes/demo.yaml" in expected
    assert "hyperscale/py.typed" in shipped
    assert any(name.startswith("hyperscale/data/tasks/") for name in expected)
    assert set(expected) <= shipped
    assert {f"hyperscale/ds_configs/{path.name}" for path in PRESETS} <= shipped
    assert not [name for name in shipped if name.split("/")[0] in ("tests", "benchmarks", "ds_configs")]

    (metadata,) = wheel.glob("*.dist-info")
    assert metadata.name.startswith("hypernet_scale-")
    assert "hyperscale = hyperscale.cli:main" in (metadata / "entry_points.txt").read_text()
    assert (metadata / "licenses/LICENSE").read_text() == (ROOT / "LICENSE").read_text()

    # Seen from elsewhere: the installed package finds its own files, not this checkout's.
    program = (
        "from hyperscale.assets.presets import find_preset, preset_folder\n"
        "from hyperscale.config.loading import load_recipe, packaged_recipes\n"
        "print(preset_folder()); print(find_preset('zero3').read_text())\n"
        "assert [load_recipe(name) for name in packaged_recipes()]"
    )
    environment = os.environ | {"PYTHONPATH": str(wheel)}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=wheel.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    folder, _, text = result.stdout.partition("\n")
    assert Path(folder) == wheel / "hyperscale/ds_configs"
    assert json.loads(text) == json.loads(find_preset("zero3").read_text())


USER_PROGRAM = """
import hyperscale as hs

recipe = hs.load_recipe("demo", {"training.steps": 300})
steps: int = recipe.training.steps
wrong: str = recipe.training.steps
reveal_type(hs.Generator.from_pretrained("runs/demo").adapters("tweets"))
hs.train(recipe, launcher="slurm")
"""


def test_a_users_mypy_sees_our_types(wheel: Path, tmp_path: Path) -> None:
    """Without py.typed mypy takes all that we export for Any, and finds nothing wrong in this program."""
    (tmp_path / "program.py").write_text(USER_PROGRAM)
    (tmp_path / "mypy.ini").write_text("[mypy]\nfollow_imports = silent\nplugins = pydantic.mypy\n")
    # Only in site-packages does mypy ask for py.typed, so the wheel lies in those of an environment of its own.
    site = tmp_path / "environment" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    python = tmp_path / "environment" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "environment"], check=True)
    shutil.copytree(wheel, site, dirs_exist_ok=True)
    command = [sys.executable, "-m", "mypy", "--python-executable", python, "--ignore-missing-imports"]
    command += ["--cache-dir", tmp_path / "cache", "program.py"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    checked = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    lines = checked.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines if ": error: " in line] == ["program.py:6", "program.py:8"], lines
    assert "dict[str, dict[str, " in checked.stdout


def test_presets_are_found_by_name() -> None:
    assert preset_folder() == ROOT / "ds_configs"
    assert find_preset("zero3_offload") == ROOT / "ds_configs/zero3_offload.json"
    with pytest.raises(ConfigError, match=r"no DeepSpeed preset 'zero3_ofload': .*Did you mean 'zero3_offload'"):
        find_preset("zero3_ofload")


def filled(value: Any, key: str = "") -> Any:
    """Return a preset with its `auto` values filled in, as the engine does from a recipe."""
    if isinstance(value, dict):
        return {name: filled(child, name) for name, child in value.items()}
    return {"enabled": True}.get(key, 1) if value == "auto" else value


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_deepspeed_reads_every_preset(path: Path) -> None:
    config = filled(json.loads(path.read_text()))
    parsed = deepspeed.DeepSpeedConfig(config)
    assert parsed.zero_config.stage == 3
    assert parsed.bfloat16_config.enabled
    assert parsed.zero_config.param_persistence_threshold == 0, "what stays gathered is the engine's decision"

    # DeepSpeed forgives unknown keys in places; a misspelt one must not pass for a setting.
    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {field.alias for field in fields.values() if field.alias}
    assert set(config["zero_optimization"]) <= known
    top_level = Path(deepspeed.__file__).parent.joinpath("runtime/constants.py").read_text()
    assert all(f'"{key}"' in top_level or key in ("bf16", "zero_optimization") for key in config)
    if path.stem == "zero3_offload":
        assert parsed.zero_config.offload_param.device == "cpu"
    if path.stem == "zero3_hpz":
        assert parsed.zero_config.zero_hpz_partition_size > 1


def imported_packages(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the top-level name of every absolute import under `folder`, wherever in a file it stands."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((alias.name.partition(".")[0], path) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.partition(".")[0], path


def test_every_import_is_a_declared_dependency() -> None:
    providers = importlib.metadata.packages_distributions()
    # What is imported inside a function may belong to an extra that users install; `dev` is for us alone.
    extras = PROJECT["optional-dependencies"].keys() - {"dev"}
    declared = {canonicalize_name(requirement.name) for requirement in requirements(*extras)}
    undeclared = {
        f"{name} ({path.relative_to(ROOT)})"
        for name, path in imported_packages(ROOT / "hyperscale")
        if name not in sys.stdlib_module_names
        and name != "hyperscale"
        and not declared & {canonicalize_name(provider) for provider in providers.get(name, [name])}
    }
    assert undeclared == set()


def test_the_pins_cover_all_that_is_installed_for_us() -> None:
    pinned = pins()
    waiting = [(requirement, frozenset(requirement.extras)) for requirement in requirements("dev", "peft")]
    visited = set()
    while waiting:
        requirement, extras = waiting.pop()
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(pinned[name], prereleases=True), f"{requirement} against {pinned[name]}"
        if (name, extras) in visited:
            continue
        visited.add((name, extras))
        for text in importlib.metadata.requires(name) or []:
            child = Requirement(text)
            is_needed = any(not child.marker or child.marker.evaluate({"extra": extra}) for extra in ("", *extras))
            if is_needed:
                waiting.append((child, frozenset(child.extras)))
    assert len(visited) > 100
    assert pinned["torch"] == "2.13.0", "no local version: pip takes the CPU or CUDA build that is at hand"


def render_module() -> ModuleType:
    """Import docs/render.py, which is a script beside what it writes."""
    spec = importlib.util.spec_from_file_location("render", ROOT / "docs/render.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rendered_documents_are_current(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for path in render_module().render(tmp_path / "docs"):
        name = path.resolve().relative_to(tmp_path.resolve())
        assert (ROOT / name).read_text() == path.read_text(), f"run `make docs`: {name} is not what the program says"


def test_make_targets_exist_and_the_readme_names_real_ones() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    assert {"demo", "test", "test-long", "check", "fmt", "bench", "docs"} <= targets
    for name in ("README.md", "CONTRIBUTING.md", ".ci/run"):
        named = set(re.findall(r"^(?:    )?make ([a-z-]+)", (ROOT / name).read_text(), flags=re.MULTILINE))
        assert named <= targets, name
    assert os.access(ROOT / ".ci/run", os.X_OK)
    subprocess.run(["bash", "-n", ROOT / ".ci/run"], check=True)
    assert "demo" in packaged_recipes()
