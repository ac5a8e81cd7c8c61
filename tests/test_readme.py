"""The README is followed to the letter: its files are written, its commands run on a tiny backbone or are parsed."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hyperscale.cli import _parse
from hyperscale.config.loading import load_recipe
from tests.command import run

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [shlex.split(line) for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
OURS = [words[1:] for words in COMMANDS if words[0] == "hyperscale"]
TINY = [
    "engine.kind=local",
    "cluster.workers=1",
    "backbone.dtype=float32",
    "data.train_limit=16",
    "data.validation_limit=2",
    "training.batch_size=2",
    "training.micro_batch_size=2",
    "training.optimizer.warmup_steps=0",
    "tracking.mlflow.enabled=false",
]


def write_files(folder: Path) -> None:
    """Write every file that the README shows; its name is the last one in backquotes before the block."""
    for match in re.finditer(
        r"`([\w.]+\.(?:jsonl|yaml))`:\n\n```\w+\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE
    ):
        (folder / match[1]).write_text(match[2])


def small(words: list[str], backbone: Path) -> list[str]:
    """Make a command that trains or validates small enough for a test; what it means to show stays."""
    if words[0] == "adapt":
        return [*words, "training.steps=2", "--launcher", "local"]
    if words[0] not in ("train", "validate", "plan") or "--show" in words:
        return words
    given = {word.partition("=")[0] for word in words}
    steps = 3 if "training.steps" in given else 2
    launcher = ["--launcher", "local"] if words[0] == "train" else []
    named = [] if "backbone.name" in given else [f"backbone.name={backbone}"]
    named += [] if "data.tasks" in given else ["data.tasks=[tweets, plural]"]
    return [*words, *named, *TINY, f"training.steps={steps}", *launcher]


def test_the_story(
    tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("tickets.jsonl", "tickets.yaml", "questions.jsonl", "comparison.yaml")
    }
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "my-llama").symlink_to(tiny_llama_folder)
    for words in (["train", "demo"], *OURS):  # `make demo` comes first
        if words[0] == "submit" or (words[0] == "compare" and "--dry-run" not in words):
            continue  # a cluster, and forty runs: see test_ray.py and test_compare.py
        target = Path(words.pop()) if ">" in words else None
        outcome = run(capsys, *small([word for word in words if word != ">"], tiny_llama_folder))
        assert outcome.code == 0, (words, outcome.err)
        assert outcome.out
        if target:
            target.write_text(outcome.out)
    folders = {path.parent.name for path in (tmp_path / "runs").glob("*/result.json")}
    assert folders == {
        "demo",
        "tickets",
        "mine",
        "my-llama",
        "independent",
        "shared",
        *("told", "demo-tickets", "both", "torchrun", "local"),
    }
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert answers[0]["prediction"] in ("positive", "negative")
    assert [row["task"] for row in answers] == ["tweets", "plural"]
    assert (tmp_path / "bundles" / "tweets" / "adapter_config.json").is_file()
    (program,) = (text for kind, text in BLOCKS if kind == "python")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Form of mouse:")


def test_cluster_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(run(capsys, "validate", "demo", "--show").out)
    submitted = [words for words in OURS if words[0] == "submit"]
    submitted += [words[words.index("--") + 2 :] for words in COMMANDS if words[:3] == ["ray", "job", "submit"]]
    assert [words[0] for words in submitted] == ["submit", "train"]
    for words in submitted:
        options = _parse(words)
        recipe = load_recipe(options.recipe, options.overrides)
        assert recipe.cluster.workers == 16


def test_other_programs() -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    programs = {words[0] for words in COMMANDS}
    assert programs == {"make", "source", "hyperscale", "mlflow", "ray", "vllm", "curl"}
    assert {words[1] for words in COMMANDS if words[0] == "make"} <= set(targets)
    (viewer,) = (words for words in COMMANDS if words[0] == "mlflow")
    program = Path(sys.executable).with_name("mlflow")
    help_text = subprocess.run([program, viewer[1], "--help"], capture_output=True, text=True, check=True).stdout
    assert viewer[2] in help_text
    unmarked = [text for kind, text in BLOCKS if "vllm" in text and kind == "bash" and "hyperscale" in text]
    assert unmarked == []
    assert "were **not run by us**" in README.partition("vllm serve")[0][-200:]


def test_links_and_tree() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []
    (tree,) = (text for kind, text in BLOCKS if kind == "text")
    shown = set(re.findall(r"^  ([a-z_]+)/", tree, flags=re.MULTILINE))
    folders = {path.name for path in (ROOT / "hyperscale").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert shown == folders
    assert [name for name in re.findall(r"^([a-z_]+)/", tree, flags=re.MULTILINE) if not (ROOT / name).is_dir()] == []
