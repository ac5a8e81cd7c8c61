"""A trained generator from Python, and the folder that it is saved in."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import hyperscale as hs
from hyperscale.errors import BundleError
from hyperscale.export.bundle import file_digest, read_manifest
from hyperscale.launch.local import train_in_process
from tests import tiny
from tests.command import run as run_command
from tests.command import tree
from tests.hub import local_hub
from tests.runs import TASKS, make_recipe, write_tasks

FILES = ["README.md", "SHA256SUMS", "config.json", "generator.safetensors"]
SECRET = "hunter2/p@ss"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run whose backbone has lost its weights: nothing here may load it."""
    home = tmp_path_factory.mktemp("home")
    backbone = tiny.tiny_llama(home / "my-backbone")
    recipe = make_recipe(
        backbone,
        write_tasks(home / "tasks"),
        home / "run",
        adaptation={"adapters": [{"kind": "lora", "rank": 4, "alpha": 10}]},
        tracking={
            "mlflow": {"enabled": False, "uri": f"postgresql://me:{SECRET}@db/mlflow"},
            "progress": {"enabled": False},
        },
    )
    train_in_process(recipe, resume=False)
    (backbone / "model.safetensors").unlink()
    return home


@pytest.fixture(scope="module")
def generator(home: Path) -> "hs.Generator":
    return hs.Generator.from_pretrained(home / "run")


@pytest.fixture(scope="module")
def saved(generator: "hs.Generator", tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generator.save_pretrained(tmp_path_factory.mktemp("saved") / "ours", licence="apache-2.0")


def equal(left: dict[str, dict[str, torch.Tensor]], right: dict[str, dict[str, torch.Tensor]]) -> bool:
    """Whether two sets of adapters are the same, bit for bit."""
    return left.keys() == right.keys() and all(
        left[module].keys() == right[module].keys()
        and all(left[module][name].equal(right[module][name]) for name in left[module])
        for module in left
    )


def test_properties_of_a_generator(generator: "hs.Generator", home: Path) -> None:
    assert generator.tasks == TASKS
    assert generator.scores.keys() == set(TASKS)
    lines = repr(generator).splitlines()
    assert lines[0].startswith(f"Generator('{home}/run'): hypernetwork, ")
    assert lines[-1] == "  tasks    feeling, past, plural"
    with pytest.raises(BundleError, match=r"no task 'pasd'. Did you mean 'past'\? It has: feeling, past, plural"):
        generator.adapters("pasd")


def test_adapters_have_pefts_names_and_shapes(generator: "hs.Generator") -> None:
    adapters = generator.adapters("past")
    assert next(iter(adapters)) == "model.layers.0.self_attn.q_proj"
    assert {name: tuple(tensor.shape) for name, tensor in adapters["model.layers.0.self_attn.q_proj"].items()} == {
        "lora_A": (4, 32),
        "lora_B": (32, 4),
    }
    assert not equal(adapters, generator.adapters("plural"))


def test_a_saved_generator_is_bitwise_the_checkpoint(generator: "hs.Generator", saved: Path, tmp_path: Path) -> None:
    again = hs.Generator.from_pretrained(saved)
    assert again.tasks == generator.tasks
    assert again.scores == generator.scores
    bundles = again.export(tmp_path / "bundles", format="peft")
    assert list(bundles) == list(TASKS)
    for task in TASKS:
        adapters = again.adapters(task)
        assert equal(adapters, generator.adapters(task))
        exported = load_file(bundles[task] / "adapter_model.safetensors")
        assert len(exported) == sum(map(len, adapters.values()))
        for module, named in adapters.items():
            for name, tensor in named.items():
                assert exported[f"base_model.model.{module}.{name}.weight"].equal(tensor)
    before = generator.export(tmp_path / "before", ["past"])["past"]
    was, now = read_manifest(before), read_manifest(bundles["past"])
    assert (now.sites, now.adapters, now.step, now.run) == (was.sites, was.adapters, was.step, was.run)
    assert now.backbone.digest == was.backbone.digest


def test_a_saved_generator_saves_again_as_it_was(saved: Path, tmp_path: Path) -> None:
    again = hs.Generator.from_pretrained(saved).save_pretrained(tmp_path / "again", licence="apache-2.0")
    assert tree(again) == tree(saved)


def test_the_folder_holds_all_and_nothing_of_the_machine(saved: Path, home: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == FILES
    check = subprocess.run(
        ["sha256sum", "--check", "SHA256SUMS"], cwd=saved, capture_output=True, text=True, check=True
    )
    assert check.stdout.count(": OK") == 3
    config = json.loads((saved / "config.json").read_text())
    assert (config["format"], config["format_version"]) == ("hyperscale-generator", 1)
    assert (config["backbone"]["name"], config["backbone"]["kind"]) == ("my-backbone", "local")
    assert len(config["backbone"]["digest"]) == 64
    assert [entry["task"]["name"] for entry in config["tasks"]] == list(TASKS)
    everything = b"".join(path.read_bytes() for path in saved.iterdir())
    for word in (str(home), home.name, "hunter2", "p@ss"):
        assert word.encode() not in everything, word
    _, front, card = (saved / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    assert "lora" in yaml.safe_load(front)["tags"]
    assert "| feeling |  | accuracy " in card
    program = card.partition("```python\n")[2].partition("```")[0]
    compile(program, "card", "exec")
    assert 'from_pretrained("' in program


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("generator.safetensors", None, r"is incomplete: it has no generator\.safetensors; save it again"),
        ("config.json", None, r"is incomplete: it has no config\.json"),
        ("SHA256SUMS", None, r"is incomplete: it has no SHA256SUMS"),
        ("generator.safetensors", ("", "x"), r"generator\.safetensors is damaged \(its sha256"),
        ("config.json", ('"run": 0', '"run": 1'), r"config\.json is damaged \(its sha256"),
        ("config.json", ("{", ""), r"config\.json is damaged"),
        ("config.json", ('"format_version": 1', '"format_version": 2'), r"format version 2; .* reads version 1"),
    ],
)
def test_damaged_folders(saved: Path, tmp_path: Path, name: str, change: tuple[str, str] | None, message: str) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if change:
        (folder / name).write_bytes(content.replace(change[0].encode(), change[1].encode(), 1))
    with pytest.raises(BundleError, match=message):
        hs.Generator.from_pretrained(folder)


def test_tensors_that_do_not_match_the_config_are_an_error(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    tensors = load_file(folder / "generator.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / "generator.safetensors")
    names = [name for name in FILES if name != "SHA256SUMS"]
    (folder / "SHA256SUMS").write_text("".join(f"{file_digest(folder / name)}  {name}\n" for name in names))
    with pytest.raises(BundleError, match=r"config\.json and generator\.safetensors do not belong together: .*Missing"):
        hs.Generator.from_pretrained(folder)


def test_an_edited_card_is_no_damage(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    (folder / "README.md").write_text("my own words")
    assert hs.Generator.from_pretrained(folder).tasks == TASKS


def test_saving_is_whole_or_not_at_all(
    generator: "hs.Generator", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = generator.save_pretrained(tmp_path / "ours")
    before = tree(folder)

    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("hyperscale.export.generator_folder.render_card", no_room)
        for target in (folder, tmp_path / "new"):
            with pytest.raises(BundleError, match=r"cannot be written: No space left on device"):
                generator.save_pretrained(target)
    assert tree(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    generator.save_pretrained(folder, licence="mit")
    assert tree(folder).keys() == before.keys()
    assert tree(folder)["README.md"] != before["README.md"]
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(BundleError, match=r"holds files that are not a saved generator's \(thesis\.tex\)"):
        generator.save_pretrained(folder)
    assert (folder / "thesis.tex").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_the_command_line_exports_a_saved_generator(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_command(capsys, "export", saved, "--task", "past", "--output", tmp_path / "bundles")
    assert done.code == 0, done.err
    assert done.out == f"past\t{tmp_path}/bundles/past\n"
    outcome = run_command(capsys, "export", saved)
    assert outcome.code != 0
    assert outcome.errors == [f"{saved} is a saved generator, not a run folder: set --output to a bundle folder"]


def test_wrong_folders_and_options_of_from_pretrained_are_errors(tmp_path: Path, home: Path) -> None:
    with pytest.raises(hs.HyperscaleError, match=r"does not exist"):
        hs.Generator.from_pretrained(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"revision='v1' is for a generator on the hub"):
        hs.Generator.from_pretrained(home / "run", revision="v1")
    with pytest.raises(
        BundleError, match=r"descriptions need a generator trained with adaptation\.task_encoder\.kind=text"
    ):
        hs.Generator.from_pretrained(home / "run").describe("a task")


def test_tensor_names_of_every_kind(tmp_path: Path, tiny_llama_folder: Path) -> None:
    kinds = [
        {"kind": "lora", "targets": ["q", "down"]},
        {"kind": "bottleneck", "reduction": 4},
        {"kind": "ia3", "targets": ["down", "feed_forward"]},
        {"kind": "prefix", "length": 3},
        {"kind": "norm_delta"},
    ]
    recipe = make_recipe(
        tiny_llama_folder, write_tasks(tmp_path / "tasks"), tmp_path / "run", adaptation={"adapters": kinds}
    )
    checkpoint = train_in_process(recipe, resume=False).checkpoint
    generator = hs.Generator.from_pretrained(checkpoint)
    adapters = generator.adapters("past")
    assert adapters["model.layers.0.mlp.down_proj"].keys() >= {"lora_A", "lora_B", "ia3_delta", "ia3_delta_input"}
    assert {name: tuple(one.shape) for name, one in adapters["model.layers.1.self_attn"].items()}.items() >= {
        ("prefix_keys", (3, 16)),
        ("prefix_values", (3, 16)),
    }
    assert adapters["model.norm"].keys() == {"norm_delta"}
    names = {name for named in adapters.values() for name in named}
    assert {"bottleneck_down", "bottleneck_down_bias", "bottleneck_up", "bottleneck_up_bias"} <= names
    assert sum(len(named) for named in adapters.values()) == sum(
        len(generator._trained.weights_of(0)[site.group]) for site in generator._trained.site_map.sites
    )
    again = hs.Generator.from_pretrained(generator.save_pretrained(tmp_path / "saved"))
    assert all(equal(again.adapters(task), generator.adapters(task)) for task in TASKS)


def test_descriptions_make_adapters(tmp_path: Path, tiny_llama_folder: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    for file in tasks:
        path = Path(file)
        path.write_text(f"{path.read_text()}description: How to do {path.stem}.\n")
    recipe = make_recipe(
        tiny_llama_folder,
        tasks[:2],
        tmp_path / "run",
        adaptation={"task_encoder": {"kind": "text", "dim": 16}, "adapters": [{"kind": "lora", "rank": 2}]},
    )
    train_in_process(recipe, resume=False)
    saved = hs.Generator.from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "saved")
    with pytest.raises(hs.HyperscaleError, match=r"tiny-llama"):
        hs.Generator.from_pretrained(saved).describe("How to do past.")  # only the folder's last name is kept
    generator = hs.Generator.from_pretrained(saved, backbone=tiny_llama_folder)
    torch.testing.assert_close(generator.describe("How to do past."), generator.adapters("past"), rtol=1e-4, atol=1e-6)
    assert not equal(generator.describe("Something else entirely"), generator.adapters("past"))
    assert generator.tasks == ("feeling", "past")
    more = generator.with_described([tasks[2]])
    assert more.tasks == TASKS
    exported = more.export(tmp_path / "bundles", ["plural"])["plural"]
    config = json.loads((exported / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_llama_folder)
    kept = hs.Generator.from_pretrained(more.save_pretrained(tmp_path / "more"))
    assert equal(kept.adapters("plural"), more.adapters("plural"))
    assert kept.scores.keys() == {"feeling", "past"}
    with pytest.raises(hs.HyperscaleError, match=r"no description"):
        generator.describe("  ")


def test_tasks_that_adapt_left_untouched_keep_their_run(
    tmp_path: Path, tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    recipe = make_recipe(
        tiny_llama_folder, tasks[:2], tmp_path / "run", adaptation={"adapters": [{"kind": "lora", "rank": 2}]}
    )
    train_in_process(recipe, resume=False)
    adapted = run_command(
        capsys, "adapt", tmp_path / "run", "--task", tasks[2], "--launcher", "local", "training.steps=2"
    )
    assert adapted.code == 0, adapted.err
    generator = hs.Generator.from_pretrained(tmp_path / "run-plural")
    saved = generator.save_pretrained(tmp_path / "saved")
    config = json.loads((saved / "config.json").read_text())
    assert [(run["name"], run["step"]) for run in config["runs"]] == [("small-plural", 2), ("small", 5)]
    assert [entry["run"] for entry in config["tasks"]] == [1, 1, 0]
    assert str(tmp_path) not in (saved / "config.json").read_text()
    bundles = hs.Generator.from_pretrained(saved).export(tmp_path / "bundles")
    assert [read_manifest(bundle).step for bundle in bundles.values()] == [5, 5, 2]


PUSH = """
import sys
import hyperscale as hs
generator = hs.Generator.from_pretrained(sys.argv[1])
print(generator.push_to_hub("me/ours", private=True, token="hf_of_nobody", licence="mit"))
copy = hs.Generator.from_pretrained("me/ours", revision="main")
print(copy.tasks)
copy.save_pretrained(sys.argv[2], licence="mit")
"""


def test_the_hub(saved: Path, tmp_path: Path) -> None:
    with local_hub() as hub:
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
        }
        command = [sys.executable, "-c", PUSH, str(saved), str(tmp_path / "copy")]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr + str(hub.requests)
        assert hub.unknown == []
        assert done.stdout.splitlines() == [f"{hub.url}/me/ours/commit/{hub.commit}", repr(TASKS)]
        (repository,) = hub.created
        assert (repository["name"], repository["organization"]) == ("ours", "me")
        assert repository.get("visibility") == "private" or repository.get("private") is True
        assert set(FILES) <= hub.files.keys()
        pushed = tree(tmp_path / "copy")
        assert all(pushed[name] == hub.files[name] for name in FILES)
    missing = "import hyperscale as hs; hs.Generator.from_pretrained('me/ours')"
    environment["HF_HOME"] = str(tmp_path / "empty")
    failed = subprocess.run(
        [sys.executable, "-c", missing], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "me/ours is not a folder on this machine, and the hub does not provide it" in failed.stderr
