"""Another package adds an adapter kind, a generator, a family, a tracker and a metric: installed, trained, exported."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import GenerationConfig, SeedOssConfig, SeedOssForCausalLM

from tests import cluster
from tests.runs import write_tasks

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tests/plugin_package"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Install the package into a folder of its own, and return the environment of a command that sees it."""
    folder = tmp_path_factory.mktemp("plugin")
    source, target = folder / "source", folder / "installed"
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__"))
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    subprocess.run([sys.executable, "-m", "pip", "install", *offline, "--target", target, source], check=True)
    return cluster.client_environment(PYTHONPATH=os.pathsep.join((str(target), str(ROOT))))


@pytest.fixture(scope="module")
def seed_oss(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """Return a tiny Seed-OSS, which LLaMA's row fits but for three names, with the tokenizer of the tiny LLaMA."""
    folder = tmp_path_factory.mktemp("backbone") / "seed_oss"
    shutil.copytree(tiny_llama_folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(tiny_llama_folder / "tokenizer_config.json", folder)
    llama = json.loads((tiny_llama_folder / "config.json").read_text())
    same = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "num_attention_heads", "num_key_value_heads")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512}
    config = SeedOssConfig(**sizes, **{name: llama[name] for name in same}, tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SeedOssForCausalLM(config)
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(folder)
    return folder


def write_recipe(folder: Path, backbone: Path, **adaptation: object) -> Path:
    recipe = {
        "name": "outside",
        "output": str(folder / "run"),
        "backbone": {"name": str(backbone), "dtype": "float32"},
        "adaptation": {
            "generator": {"kind": "mixture"},
            "task_encoder": {"kind": "table", "dim": 4},
            "adapters": [{"kind": "shift", "scale": 2.0}, {"kind": "lora", "rank": 2}],
            **adaptation,
        },
        "data": {"tasks": write_tasks(folder / "tasks"), "validation_limit": 4},
        "training": {
            "steps": 2,
            "batch_size": 4,
            "micro_batch_size": 2,
            "optimizer": {"warmup_steps": 1, "learning_rate": 0.01},
            "evaluate_untouched": False,
        },
        "engine": {"kind": "local"},
        "tracking": {"mlflow": {"enabled": False}, "progress": {"enabled": False}},
    }
    path = folder / "outside.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def succeed(*arguments: object, environment: dict[str, str], folder: Path) -> str:
    done = cluster.run(*arguments, environment=environment, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_plan_export_and_predict(tmp_path: Path, seed_oss: Path, environment: dict[str, str]):
    recipe = write_recipe(tmp_path, seed_oss)
    with (tmp_path / "tasks/past.yaml").open("a") as task:
        task.write("metrics: [exact_match, length_ratio]\n")
    place = {"environment": environment, "folder": tmp_path}
    assert "generated weights" in succeed("plan", recipe, **place)
    steps = tmp_path / "steps.csv"
    tracker = ("tracking.csv.enabled=true", f"tracking.csv.file={steps}")
    assert "CSV run" in succeed("train", recipe, "--launcher", "local", *tracker, **place)
    assert [line.partition(",")[0] for line in steps.read_text().splitlines()] == ["step", "1", "2"]
    wrong = cluster.run("validate", recipe, *tracker, "tracking.csv.flie=x", **place)
    assert (wrong.returncode, "csv.flie: Extra inputs" in wrong.stderr) == (2, True), wrong.stderr
    scores = json.loads((tmp_path / "run/result.json").read_text())["evaluations"][-1]["scores"]["past"]
    assert 0 <= scores["length_ratio"] <= 100
    bundle = tmp_path / "run/bundles/past"
    tensors = load_file(bundle / "weights.safetensors")
    assert any("/shift/" in name and tensor.any() for name, tensor in tensors.items())
    assert json.loads((bundle / "hyperscale.json").read_text())["backbone"]["model_type"] == "seed_oss"

    exported = succeed("export", tmp_path / "run", "--output", tmp_path / "again", **place)
    assert len(exported.splitlines()) == 3
    again = load_file(tmp_path / "again/past/weights.safetensors")
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)

    rows = tmp_path / "tasks/past.jsonl"
    succeed("predict", bundle, "--input", rows, "--output", tmp_path / "answers.jsonl", **place)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == len(rows.read_text().splitlines())

    bare = environment | {"PYTHONPATH": str(ROOT)}
    without = cluster.run(
        *("predict", bundle, "--input", rows, "--output", tmp_path / "none.jsonl"), environment=bare, folder=tmp_path
    )
    assert without.returncode != 0
    assert (
        "adapters[0].kind: 'shift' is not allowed: must be one of lora, vera, bottleneck, ia3, norm_" in without.stderr
    )
    assert "No installed package adds it" in without.stderr


def test_two_sharded_ranks(tmp_path: Path, seed_oss: Path, environment: dict[str, str]):
    """The workers are other processes: they find the kinds by their entry points."""
    recipe = write_recipe(tmp_path, seed_oss)
    options = ("--launcher", "torchrun", "engine.kind=zero", "cluster.workers=2")
    succeed("train", recipe, *options, environment=environment, folder=tmp_path)
    assert (tmp_path / "run/bundles/past/weights.safetensors").is_file()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["adaptation.adapters.0.kind=shfit"],
            "'shfit' is not allowed: must be one of lora, vera, bottleneck, ia3, norm_delta, prefix, shift",
        ),
        (
            ["adaptation.adapters.0.scael=2"],
            "adaptation.adapters[0].scael: unknown key (value 2). Did you mean 'scale'? Known: kind, targets, scale",
        ),
        (
            ["adaptation.adapters.0.scale=-1"],
            "adaptation.adapters[0].scale: -1 is not allowed: must be greater than 0",
        ),
        (
            ["adaptation.generator.size=3"],
            "adaptation.generator.size: unknown key (value 3). Known: kind",
        ),
        (
            ["adaptation.generator.kind=mixtures"],
            "must be one of hypernetwork, per_layer, independent, shared, mixture. Did you mean 'mixture'?",
        ),
        (["export.format=peft"], "export.format 'peft' cannot express shift + lora; use 'native' or 'auto'"),
    ],
)
def test_mistakes_are_reported_as_for_packaged_kinds(
    overrides: list[str], expected: str, tmp_path: Path, seed_oss: Path, environment: dict[str, str]
):
    outcome = cluster.run(
        "validate", write_recipe(tmp_path, seed_oss), *overrides, environment=environment, folder=tmp_path
    )
    assert outcome.returncode == 2
    assert expected in outcome.stderr
    assert len(cluster.errors(outcome.stderr)) == 1
