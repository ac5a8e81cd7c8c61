"""The command line itself: help, exit codes, where overrides may stand, what each small command prints."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from hyperscale.config.loading import load_recipe
from hyperscale.data.tasks import list_tasks
from hyperscale.run.context import RunResult
from hyperscale.run.outcome import show
from tests.command import run

ROOT = Path(__file__).resolve().parent.parent
VERBS = (
    "train",
    "adapt",
    "submit",
    "evaluate",
    "compare",
    "predict",
    "export",
    "tasks",
    "models",
    "validate",
    "plan",
    "schema",
    "doctor",
    "stop",
    "track",
    "completion",
)


def test_help_fits_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    whole = run(capsys, "--help")
    assert whole.code == 0
    assert tuple(re.findall(r"^    ([a-z]+) ", whole.out, flags=re.MULTILINE)) == VERBS
    for verb in VERBS:
        text = run(capsys, verb, "--help")
        assert text.code == 0
        assert text.out.startswith(f"usage: hyperscale {verb}")
        assert max(map(len, (whole.out + text.out).splitlines())) <= 80
        (line,) = (line for line in whole.out.splitlines() if line.startswith(f"    {verb} "))
        sentence = line.split(maxsplit=1)[1]
        assert f"{sentence[0].upper()}{sentence[1:]}." in text.out  # on one line there, as a sentence here
    assert "demo" in run(capsys, "train", "--help").out


COMPLETE = """
source "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_shtab_hyperscale hyperscale "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
echo "${COMPREPLY[*]}"
"""
"""Asks the function that `complete -F` binds, as bash does at a Tab."""


def test_bash_completes_commands_options_and_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "completion", "bash")
    script = tmp_path / "hyperscale.bash"
    script.write_text(printed.out)
    (tmp_path / "mine.yaml").touch()

    def complete(*words: str) -> list[str]:
        command = ["bash", "--norc", "-c", COMPLETE, "bash", str(script), "hyperscale", *words]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert ended.stderr.replace("bash: line 1: compopt: not currently executing completion function\n", "") == ""
        return sorted(ended.stdout.split())

    assert complete("tr") == ["track", "train"]
    assert complete("train", "demo", "training.steps=5", "--re") == ["--resume"]
    assert complete("train", "--launcher", "") == ["local", "ray", "torchrun"]
    assert complete("train", "de") == ["demo"]
    assert complete("train", "mi") == ["mine.yaml", "mistral_7b"]
    assert complete("predict", "bundle", "--input", "mi") == ["mine.yaml"]


@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh"])
def test_other_shells_have_a_script_with_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = run(capsys, "completion", shell)
    assert script.code == 0
    assert all(verb in script.out for verb in VERBS)
    assert "launcher" in script.out


def test_wrong_words_are_met_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (["trian", "demo"], "no command 'trian'. Did you mean 'train'?"),
        (["train", "demo", "--lanucher", "local"], "unknown: --lanucher local. Did you mean '--launcher'?"),
        (["train", "demo", "--launcher", "slurm"], "invalid choice: 'slurm'"),
        (["train"], "the following arguments are required: recipe\n"),
        (["export", "runs/demo", "seed=1"], "unknown: seed=1"),
        (["validate", "demo", "seed"], "override 'seed' is not of the form dotted.key=value"),
    ]
    for arguments, fragment in cases:
        outcome = run(capsys, *arguments)
        assert outcome.code == 2
        assert outcome.out == ""
        assert fragment in outcome.err
        assert "Traceback" not in outcome.err
    bare = run(capsys)
    assert bare.code == 2
    assert bare.err == run(capsys, "--help").out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(r"hyperscale \d+\.\d+\.\d+\n", run(capsys, "--version").out)


def test_overrides_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    first = run(capsys, "validate", "demo", "seed=7", "training.steps=50", "--show")
    assert first.code == 0
    assert yaml.safe_load(first.out)["seed"] == 7
    for arguments in (
        ("validate", "demo", "--show", "seed=7", "training.steps=50"),
        ("validate", "--show", "demo", "seed=7", "training.steps=50"),
        ("validate", "demo", "seed=7", "--show", "training.steps=50"),
        ("--debug", "validate", "demo", "seed=7", "--show", "training.steps=50"),
    ):
        assert run(capsys, *arguments).out == first.out


def test_a_shown_recipe_is_the_same_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["adaptation.generator.kind=independent", "training.optimizer.learning_rate=3e-4"]
    shown = run(capsys, "validate", "demo", "--show", *overrides)
    (tmp_path / "mine.yaml").write_text(shown.out)
    assert load_recipe("mine.yaml") == load_recipe("demo", overrides)
    assert run(capsys, "validate", "mine.yaml", "--show").out == shown.out


def test_schema_is_a_schema(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(run(capsys, "schema").out)
    jsonschema.validators.validator_for(schema).check_schema(schema)
    with pytest.raises(jsonschema.ValidationError, match="stpes"):
        jsonschema.validate({"training": {"stpes": 1}}, schema)


def test_tasks_lists_all(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYPERSCALE_TASK_DATA", raising=False)
    lines, _, notes = run(capsys, "tasks").out.partition("\n\n")
    listed = {line.split()[0]: re.split(r"  +", line) for line in lines.splitlines()}
    assert list(listed) == [task.name for task in list_tasks()]
    assert listed["tweets"][:4] == ["tweets", "classification", "accuracy", "packaged"]
    assert listed["glue_stsb"][:4] == ["glue_stsb", "number", "pearson, spearman", "hub"]
    assert listed["mit_movie"][:4] == ["mit_movie", "tagging", "span_f1", "unset"]
    assert [note.partition(":")[0] for note in notes.splitlines()] == ["hub", "unset"]

    (tmp_path / "stsb").mkdir()
    monkeypatch.setenv("HYPERSCALE_TASK_DATA", str(tmp_path))
    (tmp_path / "mine.csv").touch()
    (tmp_path / "mine.yaml").write_text("source: mine.csv\ninput: '{a}'\ntarget: '{b}'\ndescription: Mine.\n")
    (tmp_path / "recipe.yaml").write_text("name: x\noutput: runs/x\n")  # a recipe beside tasks is none
    mine = run(capsys, "tasks", "--folder", tmp_path)
    assert mine.code == 0, mine.err
    columns = {line.split()[0]: re.split(r"  +", line) for line in mine.out.partition("\n\n")[0].splitlines()}
    assert columns["mine"] == ["mine", "text", "exact_match", "file", "Mine."]
    assert columns["glue_stsb"][3] == "folder"
    assert columns["mit_movie"][3] == "missing"


def test_tasks_shows_one(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"tokens": ["to", f"town{number}"], "tags": ["O", "B-city"]} for number in range(20)]
    (tmp_path / "snips").mkdir()
    (tmp_path / "snips" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("HYPERSCALE_TASK_DATA", str(tmp_path))
    shown = run(capsys, "tasks", "snips")
    assert shown.code == 0, shown.err
    assert shown.err == ""
    assert f"rows from          {tmp_path / 'snips'}\n" in shown.out
    assert "rows               train 18, validation 2\n" in shown.out
    assert "prompt, encoder-decoder\n  <extra_id_0> to <extra_id_1> town" in shown.out
    assert "answer\n  <extra_id_0> O <extra_id_1> city <extra_id_2>\n" in shown.out
    assert re.search(r"prompt, decoder-only\n  to town(\d+)\n  Tags:\nanswer\n  to O\n  town\1 city\n", shown.out)

    monkeypatch.delenv("HYPERSCALE_TASK_DATA")
    unset = run(capsys, "tasks", "snips")
    assert unset.code == 1
    assert "kind               tagging\n" in unset.out
    assert unset.errors[0].endswith("is not set; set it to the folder that contains the rows")
    assert "Did you mean 'snips'?" in run(capsys, "tasks", "snisp").errors[0]


def test_doctor_lists_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERSCALE_CACHE", "/nowhere/yet")
    outcome = run(capsys, "doctor")
    assert outcome.code == 0, outcome.out
    for word in ("python", "torch", "deepspeed", "ray", "mlflow", "/nowhere/yet", "nothing is missing"):
        assert word in outcome.out


IMPORT = """
import sys
import hyperscale.cli
print(*sorted(sys.modules))
"""


def test_the_command_line_imports_little() -> None:
    """Help and errors come at once: a vendor's package is imported by the command that needs it."""
    result = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = result.stdout.split()
    slow = {"torch", "transformers", "numpy", "scipy", "mlflow", "ray", "deepspeed", "wandb", "rich", "fsspec"}
    assert slow & {module.partition(".")[0] for module in modules} == set()
    assert len(modules) < 600  # 280 when this was written


def test_ctrl_c_stops_with_one_line_and_the_run_resumes(
    tmp_path: Path,
    tiny_llama_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    programs = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")  # an activated environment
    rows = [{"word": f"word{number}", "form": f"words{number}"} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text("source: rows.jsonl\ninput: '{word}:'\ntarget: '{form}'\nmax_new_tokens: 4\n")
    recipe = {
        "name": "stopped",
        "output": "run",
        "backbone": {"name": str(tiny_llama_folder), "dtype": "float32"},
        "data": {"tasks": ["task.yaml"], "validation_limit": 4},
        "training": {"steps": 100_000, "batch_size": 2, "micro_batch_size": 2, "checkpoint_every": 2},
        "engine": {"kind": "local"},
        "tracking": {"mlflow": {"enabled": False}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    # A background job of a shell ignores Ctrl-C, and so would its children, this suite's among them.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "hyperscale.cli", "train", "recipe.yaml"]
    command += ["--launcher", "local"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
            end = time.monotonic() + 120
            while not list(checkpoint.parent.glob("step-*")) and process.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, log = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in log
    newest = max(int(path.name.removeprefix("step-")) for path in checkpoint.parent.glob("step-*"))
    saved = checkpoint.with_name(f"step-{newest:06d}")
    assert log.splitlines()[-1] == f"stopped by SIGINT after step {newest}; {saved} is saved: continue with --resume"
    more = ["--launcher", "local", "--resume", f"training.steps={newest + 2}", "training.optimizer.warmup_steps=0"]
    resumed = run(capsys, "train", "recipe.yaml", *more)
    assert resumed.code == 0, resumed.err
    assert f"from step {newest}" in resumed.err

    assert "activate" not in resumed.out
    page = resumed.out.splitlines()  # what lies where, short enough to read and whole enough to copy
    assert max(map(len, page)) <= 80
    assert f"checkpoint  run/checkpoints/step-{newest + 2:06d}" in page
    assert "  # answer your own rows, which need word" in page
    command = next(line for line in page if line.startswith("  hyperscale predict run/bundles/task "))
    answered = run(capsys, *command.split()[1:])
    assert answered.out == "40 rows answered in answers.jsonl\n"

    monkeypatch.setenv("PATH", str(tmp_path))  # as after `make demo`
    again = run(capsys, "train", "recipe.yaml", *more)
    assert again.code == 0, again.err
    assert f"  source {programs / 'activate'}" in again.out


def test_the_last_page_of_a_remote_run_can_be_followed(capsys: pytest.CaptureFixture[str]) -> None:
    folder = "memory://bucket/run"
    scores = {"mood": {"accuracy": 50.0}}
    record = {"step": 2, "stage": "validation", "scores": scores, "samples": {"mood": 8}, "seconds": 1.0}
    result = RunResult(
        name="far",
        folder=folder,
        steps=2,
        seconds=1.0,
        evaluations=(record,),
        bundles={"mood": f"{folder}/bundles/mood"},
        checkpoint=f"{folder}/checkpoints/step-000002",
        trained_parameters=1,
        total_parameters=100,
    )
    capsys.readouterr()
    show(result)
    page = capsys.readouterr().out
    assert "memory:/bucket" not in page
    assert re.search(r"bundles +memory:///?bucket/run/bundles\n", page), page
    assert "hyperscale export memory://bucket/run --output bundles" in page
    assert "hyperscale predict bundles/mood --input" in page
