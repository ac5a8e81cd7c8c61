"""From a run to bundles: what they hold, and what is refused."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file

from hyperscale.checkpoint.store import find_checkpoint, load_checkpoint
from hyperscale.cli import main
from hyperscale.config.run import Recipe
from hyperscale.errors import BundleError
from hyperscale.export.bundle import read_manifest
from hyperscale.export.exporter import TrainedGenerator, export_bundles, restore_generator
from hyperscale.export.peft_format import peft_limitation, require_peft_support
from hyperscale.export.remote import put_bundle
from hyperscale.export.replacement import recover_folder
from hyperscale.launch.local import train_in_process
from hyperscale.places import Place
from tests import tiny
from tests.runs import TASKS, make_recipe, write_tasks

LORA = {"adapters": [{"kind": "lora", "rank": 4, "alpha": 10, "targets": ["q", "v", "down"]}]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished run of LoRA, whose backbone has lost its weights since."""
    folder = tmp_path_factory.mktemp("run")
    backbone = tiny.tiny_llama(folder / "backbone")
    recipe = make_recipe(
        backbone, write_tasks(folder / "tasks"), folder / "run", adaptation=LORA, export={"enabled": False}
    )
    train_in_process(recipe, resume=False)
    (backbone / "model.safetensors").unlink()
    return recipe


@pytest.fixture(scope="module")
def trained(run: Recipe) -> TrainedGenerator:
    return restore_generator(load_checkpoint(find_checkpoint(run.output), only=("generator",)))


def test_the_command_line_exports(run: Recipe, capsys: pytest.CaptureFixture[str]):
    assert main(["export", run.output, "--task", "past"]) == 0
    bundle = Path(run.output) / "bundles" / "past"
    assert capsys.readouterr().out == f"past\t{bundle}\n"
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["past"]
    # What PEFT 0.19 to 0.21, vLLM, SGLang and LoRAX all read: no scale but 1, every layer, nothing but LoRA.
    config = json.loads((bundle / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert config["r"] == config["lora_alpha"] == 4
    assert config["modules_to_save"] is None
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == run.backbone.name
    assert not config.keys() & {"use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform"}
    tensors = load_file(bundle / "adapter_model.safetensors")
    layers = [f"self_attn.{name}_proj" for name in "qv"] + ["mlp.down_proj"]
    assert tensors.keys() == {
        f"base_model.model.model.layers.{layer}.{module}.lora_{letter}.weight"
        for layer in range(2)
        for module in layers
        for letter in "AB"
    }
    assert all(tensor.numel() and tensor.abs().max() > 0 for tensor in tensors.values())
    manifest = read_manifest(bundle)
    assert (manifest.format, manifest.task.name, manifest.step) == ("peft", "past", 5)
    assert manifest.files.keys() == {"adapter_config.json", "adapter_model.safetensors", "recipe.yaml"}
    assert manifest.backbone.name == run.backbone.name
    assert os.stat(bundle).st_mode & 0o777 == 0o755  # noqa: PTH116 (as a server of another user sees it)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--task", "pasd"], "no task 'pasd'. Did you mean 'past'"),
        (["--output", "{file}/bundles"], "cannot be written to {file}/bundles: Not a directory; choose another"),
    ],
)
def test_wrong_options_of_export_are_errors(
    run: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
):
    file = tmp_path / "file"
    file.touch()
    assert main(["export", run.output, *(word.format(file=file) for word in arguments)]) != 0
    error = capsys.readouterr().err.strip()
    assert reason.format(file=file) in error
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1


def test_a_new_bundle_takes_the_place_of_an_old_one_only_when_it_is_whole(
    trained: TrainedGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    export_bundles(trained, tmp_path, ["past"])
    (tmp_path / "past" / "of-old.txt").touch()
    before = {path.name: path.read_bytes() for path in (tmp_path / "past").iterdir()}

    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("hyperscale.export.exporter.write_manifest", no_room)
        with pytest.raises(BundleError, match=r"past cannot be written: No space left on device"):
            export_bundles(trained, tmp_path, ["past"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "past").iterdir()} == before
    export_bundles(trained, tmp_path, ["past"])
    assert before.keys() - {path.name for path in (tmp_path / "past").iterdir()} == {"of-old.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["past"]


def test_bundles_name_the_revision_and_hold_no_secret(trained: TrainedGenerator, tmp_path: Path):
    mlflow = trained.recipe.tracking.mlflow.model_copy(update={"uri": "postgresql://mlflow:hunter2@db/mlflow"})
    recipe = trained.recipe.model_copy(
        update={
            "tracking": trained.recipe.tracking.model_copy(update={"mlflow": mlflow}),
            "backbone": trained.recipe.backbone.model_copy(update={"revision": "abc123"}),
        }
    )
    hub = {**trained.backbone, "is_local": False, "name": "owner/model"}
    (bundle,) = export_bundles(replace(trained, recipe=recipe, backbone=hub), tmp_path, ["past"]).values()
    assert [path.name for path in bundle.iterdir() if b"hunter2" in path.read_bytes()] == []
    assert not {"output", "tracking"} & yaml.safe_load((bundle / "recipe.yaml").read_text()).keys()
    assert json.loads((bundle / "adapter_config.json").read_text())["revision"] == "abc123"
    assert read_manifest(bundle).backbone.revision == "abc123"
    # A bundle of before has no revision, and is read.
    file = bundle / "hyperscale.json"
    values = json.loads(file.read_text())
    del values["backbone"]["revision"]
    file.write_text(json.dumps(values))
    assert read_manifest(bundle).backbone.revision is None


_REPLACER = """
import os, signal, sys
from pathlib import Path
from hyperscale.export.replacement import replace_folder
last, seen = int(sys.argv[3]), 0
def kill_at(event, _arguments):
    global seen
    if event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        seen += 1
        if seen == last:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill_at)
replace_folder(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_kill_while_a_bundle_is_replaced_loses_none(trained: TrainedGenerator, tmp_path: Path):
    (bundle,) = export_bundles(trained, tmp_path, ["past"]).values()
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    ended = []
    for operation in (1, 2, 3, 4, 5, 100):
        built = shutil.copytree(bundle, tmp_path / f"built-{operation}")
        command = [sys.executable, "-c", _REPLACER, str(built), str(bundle), str(operation)]
        ended.append(subprocess.run(command, check=False).returncode)
        recover_folder(bundle)
        assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
        assert not bundle.with_name(".past.old").exists()
    assert ended == [-signal.SIGKILL] * 5 + [0]


class Interrupted(MemoryFileSystem):
    """Keeps its files in memory, and ends before its n-th change."""

    protocol = "interrupted"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False

    def __init__(self, changes: int = -1) -> None:
        super().__init__()
        self.changes_left = changes

    def _change(self) -> None:
        self.changes_left -= 1
        if self.changes_left == -1:
            raise KeyboardInterrupt

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        self._change()
        super().put_file(lpath, rpath, **options)

    def rm_file(self, path: str) -> None:
        self._change()
        super().rm_file(path)


def test_a_reader_of_an_object_store_sees_a_whole_bundle_or_none(trained: TrainedGenerator, tmp_path: Path):
    """A copy may end before any of its changes. Then a bundle has no entry file, or every file of one export."""
    tensor = next(iter(trained.generator.parameters()))
    (old,) = export_bundles(trained, tmp_path / "old", ["past"]).values()
    with torch.no_grad():
        tensor.add_(1)
    (new,) = export_bundles(trained, tmp_path / "new", ["past"]).values()
    with torch.no_grad():
        tensor.sub_(1)
    (old / "stale.txt").write_text("of an earlier version")
    contents = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in (old, new)]
    assert contents[0]["adapter_model.safetensors"] != contents[1]["adapter_model.safetensors"]

    states = []
    for changes in itertools.count():
        Interrupted.store.clear()
        put_bundle(old, Place(Interrupted(), "/bundles/past"))
        place = Place(Interrupted(changes), "/bundles/past")
        with contextlib.suppress(KeyboardInterrupt):
            put_bundle(new, place)
        present = {file.name: file.fs.cat_file(file.path) for file in place.children()}
        states.append(present in contents)
        assert states[-1] or "hyperscale.json" not in present
        if "adapter_config.json" in present:
            assert present["adapter_model.safetensors"] in (one["adapter_model.safetensors"] for one in contents)
            assert present.keys() >= contents[1].keys() - {"hyperscale.json"}
        put_bundle(new, Place(Interrupted(), "/bundles/past"))  # the next run completes it
        assert {file.name: file.fs.cat_file(file.path) for file in place.children()} == contents[1]
        if place.fs.changes_left >= 0:
            break
    assert states == [True, *[False] * (len(states) - 2), True]
    unchanged = Interrupted(0)
    put_bundle(new, Place(unchanged, "/bundles/past"))  # nothing is written again


def test_native_bundles_name_what_peft_cannot_express(run: Recipe, trained: TrainedGenerator, tmp_path: Path):
    (native,) = export_bundles(trained, tmp_path / "lora", ["plural"], format="native").values()
    weights = trained.weights_of(TASKS.index("plural"))
    stored = load_file(native / "weights.safetensors")
    assert len(stored) == sum(map(len, weights.values()))
    for key, tensor in stored.items():
        group, _, name = key.partition("|")
        assert tensor.equal(weights[group][name][0])

    adapters = [{"kind": "lora"}, {"kind": "bottleneck", "reduction": 4}]
    backbone = tiny.tiny_llama(tmp_path / "backbone")
    mixed = make_recipe(backbone, list(run.data.tasks), tmp_path / "run", adaptation={"adapters": adapters})
    result = train_in_process(mixed, resume=False)
    assert {read_manifest(Path(bundle)).format for bundle in result.bundles.values()} == {"native"}
    both = restore_generator(load_checkpoint(result.checkpoint))
    with pytest.raises(BundleError, match=r"'peft' cannot express bottleneck adapters: PEFT has no.*format=native"):
        export_bundles(both, tmp_path / "none", format="peft")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("family", "adapters", "reason"),
    [
        ("llama", [{"kind": "lora"}], None),
        ("llama", [{"kind": "ia3"}], None),
        ("llama", [{"kind": "prefix"}], None),
        ("t5", [{"kind": "ia3"}], None),
        ("llama", [{"kind": "ia3", "targets": ["down", "feed_forward"]}], "ia3 adapters on both sides of one layer"),
        ("t5", [{"kind": "prefix"}], "prefix adapters of an encoder-decoder: PEFT gives its layers each other's"),
        ("llama", [{"kind": "lora"}, {"kind": "ia3"}], "lora and ia3 adapters together: one PEFT folder is one method"),
        ("t5", [{"kind": "lora"}, {"kind": "norm_delta"}], "norm_delta adapters: PEFT has no such type"),
    ],
)
def test_adapters_that_peft_can_express(
    family: str, adapters: list[dict[str, Any]], reason: str | None, request: pytest.FixtureRequest
):
    adapted = tiny.adapted_model(request.getfixturevalue(f"tiny_{family}_folder"), {"adapters": adapters})
    limitation = peft_limitation(adapted.site_map, adapted.architecture)
    if reason is None:
        require_peft_support(adapted.site_map, adapted.architecture)
        assert limitation is None
    else:
        assert limitation is not None
        assert limitation.startswith(reason)
        with pytest.raises(BundleError, match=rf"^export.format 'peft' cannot express {reason}"):
            require_peft_support(adapted.site_map, adapted.architecture)


def test_a_damaged_bundle_is_an_error(trained: TrainedGenerator, tmp_path: Path):
    (whole,) = export_bundles(trained, tmp_path, ["past"]).values()
    for number, (name, content, reason) in enumerate(
        [
            ("adapter_model.safetensors", b"\0", "adapter_model.safetensors is damaged"),
            ("adapter_config.json", None, "lacks the file adapter_config.json; export it again"),
            ("hyperscale.json", None, "is not a bundle: it has no hyperscale.json"),
            ("hyperscale.json", b"{", "hyperscale.json is not valid JSON"),
            ("hyperscale.json", b"[]", "hyperscale.json"),
            ("hyperscale.json", b'{"version": 7}', "bundle version 7; this hyperscale reads version 1"),
            ("hyperscale.json", b'{"version": 1, "format": "onnx"}', "format: 'onnx'"),
        ]
    ):
        bundle = Path(shutil.copytree(whole, tmp_path / str(number)))
        (bundle / name).unlink()
        if content is not None:
            (bundle / name).write_bytes(content)
        with pytest.raises(BundleError) as error:
            read_manifest(bundle)
        assert reason in str(error.value)
