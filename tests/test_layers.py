"""The rooms of the package, and who may know whom."""

import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hyperscale

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hyperscale"

IMPORT_ALL = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def modules_below(room: str) -> list[str]:
    """Return the names of all modules of `hyperscale.<room>`."""
    modules = pkgutil.walk_packages([str(PACKAGE / room)], prefix=f"hyperscale.{room}.")
    return [f"hyperscale.{room}", *(module.name for module in modules)]


def imported_by(modules: list[str]) -> set[str]:
    """Return the top-level packages that a fresh interpreter holds after importing `modules`."""
    command = [sys.executable, "-c", IMPORT_ALL, json.dumps(modules)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_import_contracts_hold() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


VENDORS = {"deepspeed", "ray", "mlflow"}
HEAVY = VENDORS | {"torch", "transformers", "datasets"}


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (["hyperscale.errors", "hyperscale.logger", *modules_below("config")], HEAVY),
        (["hyperscale.cli"], HEAVY),
        ([*modules_below("export"), *modules_below("inference"), *modules_below("serving")], VENDORS),
        ([*modules_below("model"), *modules_below("training"), "hyperscale.engine.local"], VENDORS),
        (["hyperscale.run.worker"], VENDORS),
    ],
    ids=["config", "cli", "export, inference and serving", "model, train and local engine", "worker"],
)
def test_importing_brings_no_vendor(modules: list[str], absent: set[str]) -> None:
    # A linter reads import statements; this also sees what a re-export or a third package drags in.
    assert imported_by(modules) & absent == set()


def test_only_the_wall_uses_deepspeeds_private_names() -> None:
    wall = PACKAGE / "engine" / "deepspeed_names.py"
    text = wall.read_text(encoding="utf-8")
    listed = re.findall(r'"([a-z_]+)": "[a-z]', text)
    assert {"ds_tensor", "ds_status", "get_param_coordinator", "_convert_to_deepspeed_param"} <= set(listed)
    # `partition` is also a method of every string.
    names = [name for name in listed if name not in ("all_gather", "partition")]
    private = re.compile(rf"\b({'|'.join(names)}|ds_(?!configs?\b)[a-z]\w*|_PartitionedParameterCoordinator\w*)\b")
    uses = [
        f"{path.relative_to(PACKAGE)}: {match[0]}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != wall
        for match in private.finditer(path.read_text(encoding="utf-8"))
    ]
    assert uses == []
    assert [match[0] for match in private.finditer("ds_config ds_configs one.ds_numel")] == ["ds_numel"]


def test_package_markers_are_empty() -> None:
    markers = sorted(PACKAGE.rglob("__init__.py"))
    assert len(markers) > 10
    assert [path for path in markers if path.parent != PACKAGE and path.read_text()] == []
    assert re.fullmatch(r"\d+\.\d+\.\d+", hyperscale.__version__)


def test_no_file_names_another_project_to_install() -> None:
    """On PyPI `hyperscale` is not ours; ours is `hypernet-scale`."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    install = re.compile(r"(?:pip3?|uv|pipx|poetry|pdm)\s+(?:install|add|run|tool install)\b([^\n]*)")
    package = re.compile(r"(?<![\w./-])hyperscale(?![\w/-])(?!\.git)")
    offenders = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path == Path(__file__) or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        offenders += [f"{name}: {match[0]}" for match in install.finditer(text) if package.search(match[1])]
    assert offenders == []
    assert package.search(" --upgrade hyperscale[peft]")
    assert not package.search(" hypernet-scale ./hyperscale/x")
