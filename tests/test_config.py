"""Recipes: read, overridden and checked as a whole; every problem is one line."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from hyperscale.config.loading import (
    change_recipe,
    dump_recipe,
    find_recipe,
    load_recipe,
    packaged_recipes,
    parse_recipe,
    recipe_without_destinations,
    shareable_recipe,
    with_tracking_secrets,
)
from hyperscale.config.run import Recipe
from hyperscale.config.training import TrainingSettings
from hyperscale.errors import ConfigError

MINIMAL: dict[str, Any] = {
    "name": "mine",
    "output": "runs/mine",
    "backbone": {"name": "owner/model"},
    "data": {"tasks": ["movies", "plural"]},
    "training": {"steps": 20, "batch_size": 16, "micro_batch_size": 8},
}
HYPERNETWORK = {
    "generator": {"kind": "hypernetwork", "code_dim": 32, "hidden_dim": 48},
    "adapters": [{"kind": "lora", "rank": 4}, {"kind": "bottleneck"}],
}


def write(folder: Path, **sections: Any) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | sections))
    return str(path)


def problems(path: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).splitlines()


def without_line(problem: str, path: str) -> str:
    return re.sub(rf"^{re.escape(path)}:\d+: ", "", problem)


def test_every_packaged_recipe_is_right():
    assert "demo" in packaged_recipes()
    for name, path in packaged_recipes().items():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe == load_recipe(str(path))
        jsonschema.validate(yaml.safe_load(path.read_text()), Recipe.model_json_schema())


def test_a_recipe_survives_json_and_cannot_be_changed(tmp_path: Path):
    tracking = {"mlflow": {"tags": {"team": "a"}, "uri": "sqlite:////data/x.db"}}
    optimizer = {"betas": [0.9, 0.98], "clip_norm": None}
    recipe = load_recipe(write(tmp_path, adaptation=HYPERNETWORK, tracking=tracking), ["training.label_smoothing=0.1"])
    for one in (recipe, load_recipe(write(tmp_path, training=MINIMAL["training"] | {"optimizer": optimizer}))):
        dumped = dump_recipe(one)
        assert parse_recipe(json.loads(json.dumps(dumped)), "again") == one
        assert parse_recipe(yaml.safe_load(yaml.safe_dump(dumped)), "again") == one
    with pytest.raises(ValueError, match="frozen"):
        recipe.training.steps = 3


def test_schema():
    schema = Recipe.model_json_schema()
    validator = jsonschema.validators.validator_for(schema)(schema)
    validator.check_schema(schema)
    assert validator.is_valid(MINIMAL)
    assert not validator.is_valid(MINIMAL | {"trainings": {}})
    assert not validator.is_valid(MINIMAL | {"adaptation": {"generator": {"kind": "hypernet"}}})
    assert not validator.is_valid({key: value for key, value in MINIMAL.items() if key != "data"})


def test_every_problem_is_reported_at_once(tmp_path: Path):
    path = write(
        tmp_path,
        name="two words",
        trainings={"steps": 3},
        training={"steps": "many", "batchsize": 4, "optimizer": {"learning_rate": -1}},
        engine={"kind": "zeroo"},
        adaptation={"generator": {"kind": "independents"}, "adapters": [{"kind": "lora", "rnak": 3}, {"rank": 2}]},
        data={"tasks": []},
    )
    sections, training = ", ".join(Recipe.model_fields), ", ".join(TrainingSettings.model_fields)
    lora = "kind, rank, alpha, rslora, targets"
    generator = "one of hypernetwork, per_layer, independent, shared. Did you mean 'independent'?"
    assert [without_line(line, path) for line in problems(path)] == [
        "name: 'two words' is not allowed: must be text that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$",
        f"adaptation.generator.kind: 'independents' is not allowed: must be {generator}",
        f"adaptation.adapters[0].rnak: unknown key (value 3). Did you mean 'rank'? Known: {lora}",
        "adaptation.adapters[1].kind: required, but missing: one of lora, vera, bottleneck, ia3, norm_delta, prefix",
        "data.tasks: needs at least 1 entry, has 0",
        "training.steps: 'many' is not allowed: must be a valid integer",
        "training.optimizer.learning_rate: -1 is not allowed: must be greater than 0",
        f"training.batchsize: unknown key (value 4). Did you mean 'batch_size'? Known: {training}",
        "engine.kind: 'zeroo' is not allowed: must be one of zero, local. Did you mean 'zero'?",
        f"trainings: unknown key (value {{'steps': 3}}). Did you mean 'training'? Known: {sections}",
    ]
    missing = problems(write(tmp_path, training={}, backbone={}))
    assert [without_line(line, path) for line in missing] == [
        "backbone.name: required, but missing",
        "training.steps: required, but missing",
    ]


MISTAKEN = """\
name: bad
output: runs/bad
backbone: {}

data:
  tasks:
    - movies
    - 3
training: &budget
  # not a key
  steps: many
  stpes: 30
adaptation:
  adapters:
    - kind: lora
      rank: 4
    - kind: lora
      # no key either
      rnk: 4
tracking:
  mlflow:
    tags:
      a.dotted.key: [1]
engine:
  <<: *budget
"""


def test_every_problem_has_its_line(tmp_path: Path):
    path = tmp_path / "bad.yaml"
    path.write_text(MISTAKEN)
    assert [line.split(": ")[:2] for line in problems(str(path))] == [
        [f"{path}:3", "backbone.name"],
        [f"{path}:19", "adaptation.adapters[1].rnk"],
        [f"{path}:8", "data.tasks[1]"],
        [f"{path}:11", "training.steps"],
        [f"{path}:12", "training.stpes"],
        [f"{path}:11", "engine.steps"],
        [f"{path}:12", "engine.stpes"],
        [f"{path}:23", "tracking.mlflow.tags.a.dotted.key"],
    ]
    lines = problems(str(path), "training.steps=0", "data={tasks: [3]}", "backbone.nmae=x")
    assert [line.split(": ")[:2] for line in lines][:5] == [
        [f"{path}:3", "backbone.name"],
        ["override 'backbone.nmae=x'", "backbone.nmae"],
        [f"{path}:19", "adaptation.adapters[1].rnk"],
        ["override 'data={tasks", "[3]}'"],
        ["override 'training.steps=0'", "training.steps"],
    ]


def test_contradicting_sections_are_reported_together(tmp_path: Path):
    path = write(tmp_path, adaptation={"adapters": [{"kind": "bottleneck"}, {"kind": "bottleneck"}]})
    (line,) = problems(
        path, "export.format=peft", "cluster.workers=3", "training.optimizer.warmup_steps=21", "training.batch_size=50"
    )
    assert line == (
        f"{path}: adaptation.adapters lists the kind 'bottleneck' more than once; put all its targets in one entry; "
        "export.format 'peft' cannot express bottleneck; use 'native' or 'auto', or keep only lora, only vera, only "
        "ia3 or only prefix adapters; "
        "training.batch_size 50 is not a multiple of cluster.workers × training.micro_batch_size = 3 × 8; use 48 or 72"
        "; training.optimizer.warmup_steps 21 is more than training.steps 20, so the full learning rate would never be "
        "reached; set training.optimizer.warmup_steps=2"
    )
    message = "training.batch_size 16 is not a multiple of cluster.workers × training.micro_batch_size = 4 × 8; use 32"
    assert problems(path, "adaptation.adapters=[{kind: lora}]", "cluster.workers=4") == [f"{path}: {message}"]
    path = write(tmp_path)
    assert "tasks lists movies more than once" in problems(path, "data.tasks=[movies, plural, movies]")[0]
    assert "is relative to the folder in which a worker" in problems(path, "tracking.mlflow.uri=sqlite:///mlflow.db")[0]
    assert "MLflow no longer keeps runs in folders" in problems(path, "tracking.mlflow.uri=./mlruns")[0]


def test_overrides(tmp_path: Path):
    path = write(tmp_path, adaptation=HYPERNETWORK)
    recipe = load_recipe(
        path,
        [
            "training.steps=7",
            "training.optimizer.warmup_steps=0",
            "training.optimizer.learning_rate=5e-4",
            "training.optimizer.clip_norm=null",
            "adaptation.adapters.0.rank=16",
            "data.tasks.1=news",
            "backbone.dtype=float32",
            "tracking.mlflow.enabled=no",
            "tracking.mlflow.tags={team: a=b}",
            "name=other",
        ],
    )
    assert recipe.training.steps == 7
    assert recipe.training.optimizer.learning_rate == 5e-4
    assert recipe.training.optimizer.clip_norm is None
    assert [getattr(adapter, "rank", None) for adapter in recipe.adaptation.adapters] == [16, None]
    assert recipe.data.tasks == ("movies", "news")
    assert (recipe.backbone.dtype, recipe.name) == ("float32", "other")
    assert recipe.tracking.mlflow.enabled is False
    assert recipe.tracking.mlflow.tags == {"team": "a=b"}
    assert load_recipe(path) == load_recipe(path, ["training.steps=3", "training.steps=20"])  # the last one counts


def test_methods_are_compared_by_one_word(tmp_path: Path):
    path = write(tmp_path, adaptation=HYPERNETWORK, engine={"kind": "zero", "activation_checkpointing": True})
    independent = load_recipe(path, ["adaptation.generator.kind=independent"])
    assert dump_recipe(independent)["adaptation"]["generator"] == {"kind": "independent"}
    assert independent.adaptation.adapters == load_recipe(path).adaptation.adapters
    # naming the kind that is there loses nothing, and other overrides of that section may stand before it
    assert load_recipe(path, ["adaptation.generator.kind=hypernetwork"]) == load_recipe(path)
    back = write(tmp_path, adaptation={"generator": {"kind": "shared"}})
    overrides = ["adaptation.generator.code_dim=32", "adaptation.generator.kind=hypernetwork"]
    assert dump_recipe(load_recipe(back, overrides))["adaptation"]["generator"]["code_dim"] == 32
    adapter = load_recipe(
        write(tmp_path, adaptation=HYPERNETWORK | {"adapters": [{"kind": "lora", "rank": 4}]}),
        ["adaptation.adapters.0.kind=bottleneck"],
    )
    assert [one.kind for one in adapter.adaptation.adapters] == ["bottleneck"]
    # an engine's settings are those of both kinds, and stay
    path = write(tmp_path, engine={"kind": "zero", "activation_checkpointing": True})
    assert load_recipe(path, ["engine.kind=local"]).engine.activation_checkpointing


def test_an_invalid_override_is_an_error(tmp_path: Path):
    path = write(tmp_path, adaptation=HYPERNETWORK)
    for override, message in {
        "training.steps": "override 'training.steps' is not of the form dotted.key=value",
        "=3": "override '=3' is not of the form dotted.key=value",
        "training.steps=[": "override 'training.steps=[': the value is not valid YAML",
        "training.steps.x=1": "override 'training.steps.x=1': 'training.steps' is 20, not a section",
        "data.tasks.2=news": "override 'data.tasks.2=news': 'data.tasks.2' must end in a position from 0 to 1",
        "adaptation.adapters.x.rank=1": "override 'adaptation.adapters.x.rank=1': "
        "'adaptation.adapters.x' must end in a position from 0 to 1",
        "trainings.steps=3": f"{path} with 'trainings.steps=3': trainings: unknown key (value {{'steps': 3}}). "
        "Did you mean 'training'? Known: " + ", ".join(Recipe.model_fields),
        "training.steps=ten": "override 'training.steps=ten': training.steps: 'ten' is not allowed: "
        "must be a valid integer",
        "training.optimizer.learning_rate=.inf": "override 'training.optimizer.learning_rate=.inf': "
        "training.optimizer.learning_rate: inf is not allowed: must be a finite number",
    }.items():
        assert problems(path, override) == [message]
    assert "no position: the list is empty" in problems(write(tmp_path, data={"tasks": []}), "data.tasks.0=x")[0]


def test_paths_are_relative_to_the_recipe_and_overrides_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home / "model", home / "movies", home / "zero3", here / "model"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("TASKS", str(tmp_path / "of a variable"))
    path = write(
        home,
        backbone={"name": "model"},
        engine={"ds_config": "own.json"},
        data={"tasks": ["movies", "sub/mine.yaml", "../other.yml"], "task_folders": ["tasks", "$TASKS", "~/tasks"]},
    )
    recipe = load_recipe(path)
    assert recipe.output == str(here / "runs/mine")
    assert recipe.backbone.name == str(home / "model")
    assert recipe.engine.ds_config == str(home / "own.json")
    # a name is a name, also where a folder of that name lies beside the recipe
    assert recipe.data.tasks == ("movies", str(home / "sub/mine.yaml"), str(tmp_path / "other.yml"))
    assert recipe.data.task_folders == (
        str(home / "tasks"),
        str(tmp_path / "of a variable"),
        str(Path("~/tasks").expanduser()),
    )
    assert load_recipe(path, ["engine.ds_config=zero3"]).engine.ds_config == "zero3"
    for overrides in (["backbone.name=model"], ["backbone={name: model}"]):
        assert load_recipe(path, overrides).backbone.name == str(here / "model")
    changed = load_recipe(path, ["data.tasks.1=mine.yaml", "data.task_folders=[tasks]", "output=s3://bucket/run"])
    assert changed.data.tasks == ("movies", str(here / "mine.yaml"), str(tmp_path / "other.yml"))
    assert changed.data.task_folders == (str(here / "tasks"),)
    assert changed.output == "s3://bucket/run"
    for name in ("google/t5-v1_1-base", "smollm2-135m-instruct"):
        assert load_recipe(path, [f"backbone.name={name}"]).backbone.name == name
    assert load_recipe(path, ["backbone.name=./gone"]).backbone.name == str(here / "gone")
    # what was resolved once means the same anywhere
    monkeypatch.chdir("/")
    again = home / "resolved.yaml"
    again.write_text(yaml.safe_dump(dump_recipe(recipe)))
    assert load_recipe(str(again)) == recipe


def test_a_file_without_a_recipe_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^recipe file 'gone.yaml' does not exist \(looked in .*\)$"):
        find_recipe("gone.yaml")
    with pytest.raises(ConfigError, match=r"^no recipe 'dmeo': not a file, .*\. Did you mean 'demo'\?$"):
        find_recipe("dmeo")
    file = tmp_path / "recipe.yaml"
    file.write_text("name: x\ntraining: {steps: 1\ndata: 3\n")
    (line,) = problems("recipe.yaml")
    assert line.startswith(f"{file}:3: not valid YAML: ")
    file.write_text("- a\n- b\n")
    assert problems("recipe.yaml") == [f"{file}: a recipe is a mapping of keys to values, not list"]
    file.write_text("")
    assert problems("recipe.yaml") == [f"{file}: a recipe is a mapping of keys to values, not NoneType"]
    file.write_bytes(b"name: \xff\xfe")
    assert problems("recipe.yaml")[0].startswith(f"{file}: cannot be read: ")


def test_a_duplicate_key_is_an_error_and_a_merge_key_is_not(tmp_path: Path):
    twice = tmp_path / "twice.yaml"
    twice.write_text(f"{yaml.safe_dump(MINIMAL)}seed: 1\nseed: 2\n")
    [line] = problems(str(twice))
    assert f"{twice}:{len(twice.read_text().splitlines())}" in line
    assert "'seed' is given twice" in line
    merged = tmp_path / "merged.yaml"
    merged.write_text(f"{yaml.safe_dump(MINIMAL)}cluster: &small {{workers: 1}}\nexport: {{<<: {{enabled: false}}}}\n")
    assert load_recipe(str(merged)).export.enabled is False


def test_values_of_a_program_are_taken_as_they_are(tmp_path: Path):
    # JSON read as YAML made two lone surrogates of a character beyond the basic plane, and folded U+2028 to a space.
    tags = {"icon": "\U0001f680", "break": "a\u2028b", "number": "5e-4"}
    path = write(tmp_path)
    loaded = load_recipe(path, {"tracking.mlflow.tags": tags, "output": f"{tmp_path}/\U0001f680"})
    changed = change_recipe(load_recipe(path), {"tracking.mlflow.tags": tags}, (), "changed")
    assert dict(loaded.tracking.mlflow.tags) == dict(changed.tracking.mlflow.tags) == tags
    assert loaded.output == f"{tmp_path}/\U0001f680"
    with pytest.raises(ConfigError, match=r"override 'training.steps=0': training.steps: 0 is not allowed"):
        load_recipe(path, {"training.steps": 0})


@pytest.mark.parametrize("uri", ["postgresql://ml:hun/t@er2@db/mlflow", "https://ml:hun/t@er2@host:5000"])
def test_a_recipe_that_others_read_has_no_password(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD", raising=False)
    recipe = load_recipe(write(tmp_path, tracking={"mlflow": {"uri": uri}}))
    for values in (shareable_recipe(recipe), recipe_without_destinations(recipe)):
        assert "er2" not in json.dumps(values)
    assert recipe_without_destinations(recipe).keys() == dump_recipe(recipe).keys() - {"output", "tracking"}
    stored = parse_recipe(shareable_recipe(recipe), "stored")
    with pytest.raises(ConfigError, match=r"run folders hold no passwords.*Set MLFLOW_TRACKING_URI"):
        with_tracking_secrets(stored)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert with_tracking_secrets(stored) == with_tracking_secrets(recipe) == recipe
    # What a child process is given suffices it.
    assert recipe.tracking.secret_variables() == {"MLFLOW_TRACKING_URI": uri}
