"""The README is followed to the letter: its files are written, its commands run on a tiny backbone or are parsed."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hyperscale.cli import _parse
from hyperscale.config.loading import load_recipe
from hyperscale.launch.resources import several_nodes_problem
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
    """Shrink a command that trains or validates, so that a test can run it."""
    if words[0] == "adapt":
        return [*words, "training.steps=2", "--launcher", "local"]
    if words[0] not in ("train", "validate", "plan") or "--show" in words:
        return words
    overridden = {word.partition("=")[0] for word in words}
    steps = 3 if "training.steps" in overridden else 2
    launcher = ["--launcher", "local"] if words[0] == "train" else []
    named = [] if "backbone.name" in overridden else [f"backbone.name={backbone}"]
    named += [] if "data.tasks" in overridden else ["data.tasks=[tweets, plural]"]
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
        *("described", "demo-tickets", "both", "torchrun", "local"),
    }
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert answers[0]["prediction"] in ("positive", "negative")
    assert [row["task"] for row in answers] == ["tweets", "plural"]
    assert (tmp_path / "bundles" / "tweets" / "adapter_config.json").is_file()
    outputs = []
    for program in (text for kind, text in BLOCKS if kind == "python"):
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout)
    with_peft, with_hyperscale = outputs
    assert with_peft.startswith("Form of mouse:")
    assert ast.literal_eval(with_hyperscale) == [answer["prediction"] for answer in answers]


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
        assert several_nodes_problem(recipe.output, recipe.tracking, []) is None


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


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "cluster" / "README.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    broken = []
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    assert broken == []


def test_tree_names_every_room() -> None:
    (tree,) = (text for kind, text in BLOCKS if kind == "text")
    shown = set(re.findall(r"^  ([a-z_]+)/", tree, flags=re.MULTILINE))
    folders = {path.name for path in (ROOT / "hyperscale").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert shown == folders
    assert [name for name in re.findall(r"^([a-z_]+)/", tree, flags=re.MULTILINE) if not (ROOT / name).is_dir()] == []


def test_every_environment_variable_is_listed() -> None:
    """docs/environment.md names each variable of ours that the program, its tests or its benchmarks read."""
    sources = [*(ROOT / "hyperscale").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), ROOT / "tests/long_run.py"]
    read = {name for path in sources for name in re.findall(r"HYPERSCALE_[A-Z_]+", path.read_text())}
    read |= {
        name
        for path in (ROOT / "hyperscale").rglob("*.yaml")
        for name in re.findall(r"HYPERSCALE_[A-Z_]+", path.read_text())
    }
    listed = set(
        re.findall(r"^\| `(HYPERSCALE_[A-Z_]+)`", (ROOT / "docs/environment.md").read_text(), flags=re.MULTILINE)
    )
    assert read == listed
