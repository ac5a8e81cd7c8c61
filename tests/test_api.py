"""The Python API: recipes, training and its result, the names of the package."""

import subprocess
import sys
from pathlib import Path

import pytest

import hyperscale as hs
from tests.runs import make_recipe, write_tasks


def python(program: str) -> str:
    """Run a program in a fresh interpreter and return what it printed."""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_package_loads_without_torch() -> None:
    program = (
        "import sys, hyperscale as hs\n"
        "heavy = {'torch', 'transformers', 'datasets', 'deepspeed', 'ray', 'mlflow'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert {'train', 'Generator', 'load_recipe', 'adapt'} <= set(dir(hs))\n"
        "print(hs.load_recipe('demo', {'training.steps': 70}).training.steps)\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    assert python(program) == "70\n"


def test_a_room_does_not_hide_a_function() -> None:
    # Importing `package.name` binds the module to `name` of its package, where it would hide a function of that name.
    program = (
        "import importlib, pkgutil, hyperscale as hs\n"
        "rooms = [room.name for room in pkgutil.iter_modules(hs.__path__)]\n"
        "for room in rooms: importlib.import_module('hyperscale.' + room)\n"
        "assert not set(rooms) & set(hs.__all__), set(rooms) & set(hs.__all__)\n"
        "print(all(hasattr(hs, name) for name in hs.__all__), callable(hs.train))\n"
    )
    assert python(program) == "True True\n"


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match=r"module 'hyperscale' has no attribute 'trian'"):
        _ = hs.trian  # type: ignore[attr-defined]


def test_overrides_are_python_values_or_texts(tmp_path: Path) -> None:
    values = {
        "training.steps": 70,
        "training.optimizer.learning_rate": 5e-4,
        "output": tmp_path / "run: 1 \U0001f600",
        "data.tasks": ["tweets", "plural"],
        "start": None,
        "data.mixture.weights": [0.25, 0.75],
        "adaptation.adapters": [{"kind": "lora", "rank": 2, "targets": ["q"]}],
    }
    recipe = hs.load_recipe("demo", values)
    assert recipe.training.steps == 70
    assert recipe.training.optimizer.learning_rate == 5e-4
    assert recipe.output == str(tmp_path / "run: 1 \U0001f600")
    assert recipe.data.tasks == ("tweets", "plural")
    assert recipe.data.mixture.weights == (0.25, 0.75)
    assert recipe.adaptation.adapters == (hs.LoraSettings(rank=2, targets=("q",)),)
    assert hs.load_recipe("demo", ["training.steps=70"]) == hs.load_recipe("demo", {"training.steps": 70})
    with pytest.raises(hs.HyperscaleError, match=r"training\.stpes.*Did you mean"):
        hs.load_recipe("demo", {"training.stpes": 7})


def test_train_returns_scores_and_places(tmp_path: Path, tiny_llama_folder: Path) -> None:
    recipe = make_recipe(
        tiny_llama_folder,
        write_tasks(tmp_path / "tasks"),
        tmp_path / "run",
        training={"steps": 2, "batch_size": 2, "micro_batch_size": 2, "optimizer": {"warmup_steps": 0}},
    )
    result = hs.train(recipe)
    assert result.scores.keys() == {"feeling", "past", "plural"}
    assert result.majority.keys() == result.scores.keys()
    assert result.untouched == result.test == result.trackers == {}
    assert (result.name, result.steps, result.folder) == ("small", 2, str(tmp_path / "run"))
    assert 0 < result.trained_parameters < result.total_parameters
    assert Path(result.checkpoint).is_dir()
    assert result.bundles.keys() == result.scores.keys()
    assert all(Path(bundle).is_dir() for bundle in result.bundles.values())
    lines = repr(result).splitlines()
    assert lines[0].startswith("TrainResult('small'): 2 steps in ")
    accuracy = f"{result.scores['feeling']['accuracy']:.1f}"
    assert lines[2].split() == ["feeling", "accuracy", accuracy, "-", f"{result.majority['feeling']['accuracy']:.1f}"]
    assert result.generator().tasks == ("feeling", "past", "plural")
    with pytest.raises(hs.HyperscaleError, match=r"resume"):
        hs.train(recipe)
    again = hs.train(recipe, resume=True)
    assert again.scores == result.scores
