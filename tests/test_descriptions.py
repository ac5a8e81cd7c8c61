"""Tasks known by what is written of them: trained on two sharded ranks, and made for one that was never trained."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hyperscale.config.backbone import BackboneSettings
from hyperscale.data.descriptions import encode_descriptions
from hyperscale.data.tasks import load_task
from hyperscale.model.backbone import load_dense, open_backbone
from hyperscale.model.description import text_features
from hyperscale.run.context import read_result
from tests.cluster import client_environment
from tests.cluster import run as run_process
from tests.command import run

LABELS = {"good": "positive", "bad": "negative"}
DESCRIPTIONS = {
    "mood": "Is the mood of a sentence good or bad?",
    "tone": "Does a text strike a friendly tone, or not?",
    "style": "Whether somebody likes how something is written.",
    "silent": "",
}


def write_task(folder: Path, name: str, **more: object) -> None:
    rows = [{"text": f"a {label} {name} number {number}", "label": label} for number in range(20) for label in LABELS]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"source": f"{name}.jsonl", "input": "{text}\nIs:", "labels": LABELS, "label_column": "label"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | {"description": DESCRIPTIONS[name]} | more))


def place(folder: Path, backbone: Path) -> Path:
    for name in DESCRIPTIONS:
        write_task(folder, name)
    recipe = {
        "name": "described",
        "output": str(folder / "run"),
        "backbone": {"name": str(backbone), "dtype": "float32"},
        "adaptation": {"task_encoder": {"kind": "text", "dim": 16}, "adapters": [{"kind": "lora", "rank": 2}]},
        "data": {"tasks": ["mood.yaml", "tone.yaml"], "validation_limit": 4},
        "training": {"steps": 3, "batch_size": 4, "micro_batch_size": 2, "optimizer": {"warmup_steps": 1}},
        "cluster": {"workers": 2},
        "tracking": {"mlflow": {"enabled": False}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_task_that_was_never_trained(
    family: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone: Path = request.getfixturevalue(f"tiny_{family}_folder")
    folder = place(tmp_path, backbone)
    trained = run_process(
        *("train", folder / "recipe.yaml", "--launcher", "torchrun"), environment=client_environment(), folder=tmp_path
    )
    assert trained.returncode == 0, trained.stderr

    # What the sharded ranks made of the descriptions is what the whole backbone makes of them.
    stored = load_file(Path(read_result(str(folder / "run")).checkpoint) / "generator.safetensors")
    settings = BackboneSettings(name=str(backbone), dtype="float32")
    base = open_backbone(settings)
    tasks = [load_task(str(folder / f"{name}.yaml")) for name in ("mood", "tone", "style")]
    batch = encode_descriptions(tasks, AutoTokenizer.from_pretrained(backbone), 0)
    dense = text_features(load_dense(base, settings), base.architecture, batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(stored["task_encoder.features"], dense[:2], rtol=1e-4, atol=1e-5)
    alone = encode_descriptions(tasks[:1], AutoTokenizer.from_pretrained(backbone), 0)
    one = text_features(load_dense(base, settings), base.architecture, alone.input_ids, alone.attention_mask)
    torch.testing.assert_close(one[0], dense[0], rtol=1e-4, atol=1e-5)  # padding says nothing

    words = ("--describe", folder / "style.yaml", "--output", folder / "bundles")
    exported = run(capsys, "export", folder / "run", *words)
    assert exported.code == 0, exported.err
    assert exported.out.startswith("style\t")
    assert [path.name for path in (folder / "bundles").iterdir()] == ["style"]
    ours, trained_one = (
        load_file(bundle / "adapter_model.safetensors")
        for bundle in (folder / "bundles/style", folder / "run/bundles/mood")
    )
    assert ours.keys() == trained_one.keys()
    assert any(not torch.equal(ours[name], trained_one[name]) for name in ours)
    answered = run(
        *(capsys, "predict", folder / "bundles/style", "--input", folder / "style.jsonl"),
        *("--output", folder / "answers.jsonl"),
    )
    assert answered.code == 0, answered.err
    answers = [json.loads(line)["prediction"] for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert set(answers) <= set(LABELS.values())


def test_a_description_that_cannot_be_read_is_an_error(
    tmp_path: Path, tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place(tmp_path, tiny_llama_folder)
    local = ("--launcher", "local", "engine.kind=local", "cluster.workers=1")
    silent = run(
        capsys, "train", folder / "recipe.yaml", *local, f"data.tasks=[{folder}/mood.yaml, {folder}/silent.yaml]"
    )
    assert silent.errors == [
        "task 'silent' has no description, which adaptation.task_encoder.kind=text reads; write one in its file"
    ]
    assert not (folder / "run").exists()
    assert run(capsys, "train", folder / "recipe.yaml", *local).code == 0
    write_task(folder, "style", labels=None, metrics=["accuracy"])
    for task, reason in (
        ("mood", "task 'mood' was trained; export it without --describe"),
        ("silent", "task 'silent' has no description"),
        ("style", "task 'style' takes its labels from its rows, which are not read here; list labels"),
    ):
        outcome = run(capsys, "export", folder / "run", "--describe", folder / f"{task}.yaml")
        assert outcome.code != 0
        assert outcome.errors[0].startswith(reason)
    table = ("output=" + str(folder / "table"), "adaptation.task_encoder.kind=table")
    assert run(capsys, "train", folder / "recipe.yaml", *local, *table).code == 0
    outcome = run(capsys, "export", folder / "table", "--describe", folder / "style.yaml")
    assert "descriptions need a generator trained with adaptation.task_encoder.kind=text" in outcome.errors[0]
