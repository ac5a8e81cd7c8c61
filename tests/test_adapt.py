"""New tasks on an earlier run's generator: what learns, and what must not change by a bit."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hyperscale.run.adapt import adapted_recipe
from hyperscale.run.context import read_result
from tests.command import Outcome, run, tree

LABELS = {"good": "positive", "bad": "negative"}


@pytest.fixture
def place(tmp_path: Path, tiny_llama_folder: Path) -> Path:
    for name in ("mood", "tone", "style"):
        rows = [
            {"text": f"a {label} {name} number {number}", "label": label} for number in range(20) for label in LABELS
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {"source": f"{name}.jsonl", "input": "{text}\nIs:", "labels": LABELS, "label_column": "label"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    recipe = {
        "name": "base",
        "output": str(tmp_path / "base"),
        "backbone": {"name": str(tiny_llama_folder), "dtype": "float32"},
        "adaptation": {
            "adapters": [
                {"kind": "lora", "rank": 2, "alpha": 2},
                {"kind": "bottleneck", "reduction": 8},
                {"kind": "norm_delta"},
            ]
        },
        "data": {"tasks": ["mood.yaml", "tone.yaml"]},
        "training": {
            "steps": 4,
            "batch_size": 4,
            "micro_batch_size": 2,
            "evaluate_untouched": False,
            # Strong enough to move what it must not.
            "optimizer": {"warmup_steps": 1, "weight_decay": 0.1, "learning_rate": 0.01},
        },
        "engine": {"kind": "local"},
        "tracking": {"mlflow": {"enabled": False}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def train(place: Path, generator: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind = f"adaptation.generator.kind={generator}"
    done = run(capsys, "train", place / "recipe.yaml", "--launcher", "local", kind)
    assert done.code == 0, done.err


def adapt(place: Path, capsys: pytest.CaptureFixture[str], *more: object, base: str = "base", task: str = "style"):
    words = ("--task", place / f"{task}.yaml", "--launcher", "local")
    return run(capsys, "adapt", place / base, *words, *more)


def generator_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(Path(read_result(str(folder)).checkpoint) / "generator.safetensors")


@pytest.mark.parametrize("kind", ["hypernetwork", "independent"])
def test_known_tasks_do_not_change_by_a_bit(kind: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(place, kind, capsys)
    done = adapt(place, capsys)
    assert done.code == 0, done.err
    before, after = generator_of(place / "base"), generator_of(place / "base-style")
    assert before.keys() == after.keys()
    grown = {name for name in after if after[name].shape != before[name].shape}
    assert grown == ({"generated.task_encoder.embedding.weight"} if kind == "hypernetwork" else set(after))
    for name, tensor in after.items():
        assert torch.equal(tensor[:2] if name in grown else tensor, before[name]), name
    bundles = {task: tree(place / "base/bundles" / task) for task in ("mood", "tone")}
    assert all(bundles.values())
    for task, files in bundles.items():
        assert tree(place / "base-style/bundles" / task) == files
    assert "nearest to style: " in done.out if kind == "hypernetwork" else "nearest" not in done.out

    # The new task has learnt: its weights are not those of an untrained row.
    untrained = adapt(place, capsys, "training.optimizer.learning_rate=1e-30", f"output={place / 'still'}")
    assert untrained.code == 0, untrained.err
    still = generator_of(place / "still")
    assert all(not torch.equal(still[name][2], after[name][2]) for name in grown)

    # A third run on top leaves all three: each bundle still names the run that made it.
    third = "third"
    (place / "third.yaml").write_text((place / "style.yaml").read_text().replace("style.jsonl", "tone.jsonl"))
    again = adapt(place, capsys, base="base-style", task=third)
    assert again.code == 0, again.err
    for task in ("mood", "tone", "style"):
        assert tree(place / "base-style-third/bundles" / task) == tree(place / "base-style/bundles" / task)
    made_by = {
        task: json.loads((place / "base-style-third/bundles" / task / "hyperscale.json").read_text())["run"]
        for task in ("mood", "style", "third")
    }
    assert made_by == {"mood": "base", "style": "base-style", "third": "base-style-third"}


def test_the_whole_generator_trains_on_with_a_share_of_the_known_tasks(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(place, "hypernetwork", capsys)
    more = ("--train", "everything", "--old-share", "0.5", "training.steps=12")
    done = adapt(place, capsys, *more)
    assert done.code == 0, done.err
    before, after = generator_of(place / "base"), generator_of(place / "base-style")
    assert all(not torch.equal(after[name][: len(before[name])], before[name]) for name in after)
    recipe = yaml.safe_load((place / "base-style/recipe.yaml").read_text())
    assert recipe["data"]["mixture"]["weights"] == [0.25, 0.25, 0.5]
    steps = [json.loads(line) for line in (place / "base-style/metrics.jsonl").read_text().splitlines()]
    trained_tasks = {task for step in steps if step["event"] == "step" for task in step["task_losses"]}
    assert trained_tasks == {"mood", "tone", "style"}
    assert json.loads((place / "base-style/bundles/mood/hyperscale.json").read_text())["run"] == "base-style"

    # It is an ordinary run: it resumes.
    longer = adapt(place, capsys, *more, "--resume", "training.steps=14")
    assert longer.code == 0, longer.err
    assert read_result(str(place / "base-style")).steps == 14


def test_wrong_options_of_adapt_are_errors(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error_of(outcome: Outcome) -> str:
        assert outcome.code != 0
        assert "Traceback" not in outcome.err
        return "\n".join(outcome.errors)

    assert "nothing does not exist" in error_of(adapt(place, capsys, base="nothing"))
    train(place, "shared", capsys)
    assert "--task " + str(place / "tone.yaml") in error_of(adapt(place, capsys, task="tone"))
    assert "which has no weights of one task alone; use start.train=everything" in error_of(adapt(place, capsys))
    message = error_of(adapt(place, capsys, "--old-share", "0.5"))
    assert message.startswith("--old-share 0.5: must be at least 0 and less than 1. Without --train everything")
    message = error_of(adapt(place, capsys, "--train", "everything", "data.mixture.weights=[0.5, 0.5]"))
    assert "mixture.weights has 2 values for 3 tasks" in message
    message = error_of(adapt(place, capsys, "--train", "everything", "adaptation.adapters.0.rank=4"))
    assert "The checkpoint belongs to another run" in message
    assert adapt(place, capsys, "--train", "everything", f"output={place / 'fine'}").code == 0


def test_a_run_on_an_object_store_is_adapted_beside_itself(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    done = run(capsys, "train", "recipe.yaml", "--launcher", "local", "output=memory://bucket/runs/base")
    assert done.code == 0, done.err
    before = tree(place)
    adapted = adapted_recipe("memory://bucket/runs/base", [str(place / "style.yaml")], "new_tasks", 0.0)
    assert adapted.output == "memory:///bucket/runs/base-style"
    assert adapted.start is not None
    assert adapted.start.checkpoint == "memory:///bucket/runs/base"
    words = ("--task", place / "style.yaml", "--launcher", "local")
    done = run(capsys, "adapt", "memory://bucket/runs/base", *words)
    assert done.code == 0, done.err
    assert read_result("memory://bucket/runs/base-style").steps == 4
    assert tree(place) == before

    # The commands of its last page work as they are printed.
    commands = [line.split("#")[0].split()[1:] for line in done.out.splitlines() if line.startswith("  hyperscale ")]
    export, predict = (next(one for one in commands if one[0] == name) for name in ("export", "predict"))
    exported = run(capsys, *export)
    assert exported.code == 0, exported.err
    assert (place / predict[1] / "hyperscale.json").is_file()
