"""The checkpoint store, the manifest check and the run folder's rules, with real kills."""

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from hyperscale.checkpoint import run_folder
from hyperscale.checkpoint.manifest import build_manifest, check_manifest
from hyperscale.checkpoint.run_folder import claim, read_owner
from hyperscale.checkpoint.store import Checkpoint, CheckpointStore, find_checkpoint, load_checkpoint
from hyperscale.config.adaptation import AdaptationSettings
from hyperscale.errors import CheckpointError, RunFolderError
from hyperscale.places import Place, open_place


def make_checkpoint(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    weights = {"trunk.weight": torch.randn(7, 5, generator=generator), "codes": torch.randn(3, generator=generator)}
    moments = {"exp_avg": torch.randn(7, 5, generator=generator).to(torch.bfloat16), "step": torch.tensor(float(step))}
    return Checkpoint(
        step=step,
        tensors={"generator": weights, "optimizer": moments},
        state={"schedule": {"last_step": step}, "seed": 17, "tracking": {"mlflow_run_id": "abc"}},
        manifest={"tasks": ["sst2", "cola"]},
        recipe={"name": "größer", "training": {"learning_rate": 3e-4, "steps": 100}},
    )


def assert_same(loaded: Checkpoint, saved: Checkpoint) -> None:
    assert loaded.step == saved.step
    assert (loaded.state, loaded.manifest, loaded.recipe) == (saved.state, saved.manifest, saved.recipe)
    assert loaded.tensors.keys() == saved.tensors.keys()
    for key, tensors in saved.tensors.items():
        assert loaded.tensors[key].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded.tensors[key][name].dtype == tensor.dtype
            assert torch.equal(loaded.tensors[key][name], tensor)


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"memory://{uuid4().hex}/run"


def test_saved_checkpoints_load_and_the_newest_are_kept(folder: str) -> None:
    store = CheckpointStore(folder, keep=2)
    assert store.latest() is None
    assert store.list() == ()
    for step in (50, 100, 150, 1_000_000):
        path = store.save(make_checkpoint(step))
        assert store.latest() == path
        assert_same(store.load(path), make_checkpoint(step))
    assert [path.rpartition("/")[2] for path in store.list()] == ["step-000150", "step-1000000"]
    assert find_checkpoint(folder) == find_checkpoint(path) == path
    assert set(load_checkpoint(path, only=("generator",)).tensors) == {"generator"}
    fs, root = fsspec.url_to_fs(path)
    names = {entry.rpartition("/")[2] for entry in fs.ls(root, detail=False)}
    assert names == {
        "generator.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
        "recipe.yaml",
        "COMMITTED",
    }


def test_a_step_saved_anew_replaces_the_old_one_only_when_it_is_whole(folder: str) -> None:
    store = CheckpointStore(folder, keep=1)
    paths = []
    for attempt in range(3):
        saved = replace(make_checkpoint(100), state={"attempt": attempt})
        paths.append(store.save(saved))
        assert store.list() == (paths[-1],)
        assert_same(store.load(paths[-1]), saved)
    # Where there is a rename the newest takes the plain name; an object store has none.
    assert len(set(paths)) == (3 if "://" in folder else 1)
    assert paths[0].endswith("/step-000100")


def test_a_new_state_leaves_the_other_files_as_they_are(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(folder, keep=2)
    store.save(make_checkpoint(50))
    path = store.save(make_checkpoint(100))
    monkeypatch.setattr("hyperscale.checkpoint.store.save_file", None)
    updated = store.update_state(path, {"evaluations": [1]})
    assert_same(store.load(updated), replace(make_checkpoint(100), state={"evaluations": [1]}))
    assert [name.rpartition("/")[2][:11] for name in store.list()] == ["step-000050", "step-000100"]
    again = store.update_state(updated, {"evaluations": [1, 2]})
    assert store.load(again).state == {"evaluations": [1, 2]}
    assert find_checkpoint(folder) == again


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_with_numbers_that_are_not_finite_removes_nothing(folder: str, value: float) -> None:
    store = CheckpointStore(folder, keep=1)
    good = store.save(make_checkpoint(50))
    fs, root = fsspec.url_to_fs(folder)
    before = sorted(fs.find(root))
    ruined = make_checkpoint(100)
    ruined.tensors["optimizer"]["exp_avg"][3, 2] = value
    with pytest.raises(CheckpointError, match="'exp_avg' of the optimizer holds NaN or infinity") as error:
        store.save(ruined)
    assert f"The last whole one is {good}. Continue from there" in str(error.value)
    assert not error.value.is_transient
    assert store.list() == (good,)
    assert sorted(fs.find(root)) == before
    assert_same(store.load(good), make_checkpoint(50))


def test_leftovers_of_a_killed_save_do_not_count_and_are_swept(folder: str) -> None:
    store = CheckpointStore(folder, keep=3)
    whole = store.save(make_checkpoint(10))
    fs, root = fsspec.url_to_fs(folder)
    for left in ("step-000020", ".step-000030.partial"):
        fs.makedirs(f"{root}/checkpoints/{left}", exist_ok=True)
        fs.pipe_file(f"{root}/checkpoints/{left}/generator.safetensors", b"half")
    fs.pipe_file(f"{root}/checkpoints/notes.txt", b"a user's own")
    assert store.list() == (whole,)
    with pytest.raises(CheckpointError, match=r"step-000020 is not a whole checkpoint.*step-000010"):
        store.load(f"{folder}/checkpoints/step-000020")
    store.save(make_checkpoint(40))
    names = {entry.rstrip("/").rpartition("/")[2] for entry in fs.ls(f"{root}/checkpoints", detail=False)}
    assert names == {"step-000010", "step-000040", "notes.txt"}


def test_a_damaged_or_missing_file_is_named_with_the_checkpoint_to_use_instead(folder: str) -> None:
    store = CheckpointStore(folder, keep=3)
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(folder)
    store.save(make_checkpoint(1))
    newest = store.save(make_checkpoint(2))
    fs, root = fsspec.url_to_fs(newest)
    file = f"{root}/generator.safetensors"
    content = fs.cat_file(file)
    flipped = bytes([content[-1] ^ 1])
    for damaged in (content[:-1] + flipped, content[:100], b""):
        fs.pipe_file(file, damaged)
        with pytest.raises(CheckpointError, match=r"generator.safetensors is damaged.*previous.*step-000001") as caught:
            store.load(newest)
        assert "\n" not in str(caught.value)
    fs.rm_file(file)
    with pytest.raises(CheckpointError, match=r"generator.safetensors is missing.*step-000001"):
        store.load(newest)
    fs.pipe_file(f"{root}/COMMITTED", b"{")
    with pytest.raises(CheckpointError, match="COMMITTED is damaged"):
        store.load(newest)
    assert_same(store.load(store.list()[0]), make_checkpoint(1))


def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    for step in (1, 2):
        CheckpointStore(str(tmp_path), keep=2).save(make_checkpoint(step))
    store = CheckpointStore(str(tmp_path), keep=1)
    newest = store.latest()
    store.sweep()
    assert store.list() == (newest,)


class FlakyFileSystem(MemoryFileSystem):
    """A memory file system whose next writes fail, as an object store's do that answers 500."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures: ClassVar[int] = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://"))

    def put_file(self, *arguments: Any, **options: Any) -> None:
        if FlakyFileSystem.failures:
            FlakyFileSystem.failures -= 1
            raise OSError("500 Internal Server Error")
        super().put_file(*arguments, **options)


@pytest.fixture
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperscale.checkpoint.store._PAUSES", (0, 0))


@pytest.mark.usefixtures("without_pauses")
def test_a_save_outlives_two_failures_and_reports_a_third_as_transient() -> None:
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    store = CheckpointStore("flaky://bucket/run", keep=2)
    FlakyFileSystem.failures = 2
    path = store.save(make_checkpoint(1))
    assert_same(store.load(path), make_checkpoint(1))
    FlakyFileSystem.failures = 3
    with pytest.raises(
        CheckpointError, match=r"step 2 cannot be written.*500.*The last whole one is .*step-000001"
    ) as e:
        store.save(make_checkpoint(2))
    assert e.value.is_transient
    assert pickle.loads(pickle.dumps(e.value)).is_transient
    assert FlakyFileSystem.failures == 0
    with pytest.raises(CheckpointError) as missing:
        store.load("flaky://bucket/run/checkpoints/step-000009")
    assert not missing.value.is_transient


@pytest.mark.usefixtures("without_pauses")
def test_an_unwritable_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"step 5 cannot be written.*Free some space or fix the location"):
        CheckpointStore(str(tmp_path / "file"), keep=1).save(make_checkpoint(5))
    with pytest.raises(RunFolderError, match="nosuch://x: Protocol not known"):
        CheckpointStore("nosuch://x", keep=1)


# A nursery process imports torch once and forks savers, so that hundreds of kills take seconds.
_NURSERY = textwrap.dedent(
    """
    import os, random, signal, sys, time
    from hyperscale.checkpoint.store import Checkpoint, CheckpointStore
    import torch

    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    folder, mode = sys.argv[1:]
    store = CheckpointStore(folder, keep=1)

    def checkpoint(step):
        weights = {"w": torch.full((64, 1024), float(step))}
        return Checkpoint(step, {"generator": weights, "optimizer": weights}, {"at": step}, {}, {"name": "x"})

    def fork(work):
        pid = os.fork()
        if pid == 0:
            work()
            os._exit(0)
        return pid

    def check(least):
        path = store.latest()
        loaded = store.load(path)
        assert loaded.step >= least, (loaded.step, least)
        assert torch.equal(loaded.tensors["generator"]["w"], checkpoint(loaded.step).tensors["generator"]["w"])
        assert loaded.state in ({"at": loaded.step}, {"scored": loaded.step})
        return loaded.step

    store.save(checkpoint(1))
    step = kills = 1
    if mode == "every-operation":
        # The saver kills itself at its n-th file operation, for every n until a save gets through.
        watched = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.listdir", "shutil.rmtree")
        survived = False
        while not survived:
            def work(n=kills):
                seen = 0
                def hook(event, args):
                    nonlocal seen
                    if event in watched:
                        seen += 1
                        if seen == n:
                            os.kill(os.getpid(), signal.SIGKILL)
                sys.addaudithook(hook)
                path = store.save(checkpoint(step + 1))
                store.update_state(path, {"scored": step + 1})
            _, status = os.waitpid(fork(work), 0)
            survived = os.WIFEXITED(status)
            assert survived or os.WTERMSIG(status) == signal.SIGKILL
            now = check(least=step)
            step, kills = now, kills + 1
    else:
        for kills in range(1, 31):
            read, write = os.pipe()
            def work():
                for number in range(step + 1, step + 1000):
                    store.save(checkpoint(number))
                    os.write(write, b"%d\\n" % number)
            pid = fork(work)
            os.close(write)
            time.sleep(random.uniform(0.01, 0.12))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            with os.fdopen(read) as stream:
                printed = [int(line) for line in stream.read().split()]
            step = check(least=printed[-1] if printed else step)
    store.sweep()
    assert sorted(os.listdir(folder + "/checkpoints")) == [os.path.basename(store.latest())]
    print(kills, step)
    """
)


@pytest.mark.parametrize("mode", ["every-operation", "any-moment"])
def test_a_kill_at_any_moment_leaves_the_last_whole_checkpoint(mode: str, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _NURSERY, str(tmp_path), mode], capture_output=True, text=True, timeout=240, check=False
    )
    assert ran.returncode == 0, ran.stderr
    kills, step = map(int, ran.stdout.split())
    assert kills >= 20
    assert step >= 2


def make_manifest() -> dict[str, object]:
    sites = [
        {
            "name": f"layers.{layer}.q_proj",
            "stack": "decoder",
            "layer": layer,
            "position": 0,
            "kind": "lora",
            "in_features": 64,
            "out_features": 64,
        }
        for layer in range(6)
    ]
    return build_manifest(
        site_map=sites,
        generator={"kind": "hypernetwork", "trunk": {"width": 64}},
        tasks=["sst2", "cola"],
        backbone={"name": "smollm2", "digest": "a" * 64},
        versions={"torch": "2.13"},
    )


def test_settings_that_came_after_a_checkpoint_have_their_defaults_in_it() -> None:
    present = make_manifest() | {"generator": AdaptationSettings().model_dump(mode="json")}
    stored: Any = json.loads(json.dumps(present))
    del stored["generator"]["adapters"][0]["rslora"]
    check_manifest(stored, present)
    present["generator"]["adapters"][0]["rslora"] = True
    with pytest.raises(CheckpointError, match=r"generator\.adapters\.0: rslora was False, is True"):
        check_manifest(stored, present)


def test_manifest_differences_are_described() -> None:
    stored = make_manifest()
    assert json.loads(json.dumps(stored)) == stored
    same = make_manifest() | {"versions": {"torch": "3.0"}, "backbone": {"name": "/moved", "digest": "a" * 64}}
    check_manifest(stored, same)

    def complaint(**changes: object) -> str:
        with pytest.raises(CheckpointError) as caught:
            check_manifest(stored, make_manifest() | changes)
        assert "recipe.yaml" in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    sites = stored["site_map"]
    narrower = [site | {"out_features": 32} for site in sites]
    assert "site 0 (layers.0.q_proj): out_features was 64, is 32" in complaint(site_map=narrower)
    assert "and 3 more differences" in complaint(site_map=narrower)
    assert "had 6 sites, has 5; site 5 (layers.5.q_proj: lora 64 -> 64) is gone" in complaint(site_map=sites[:5])
    other = [sites[0] | {"name": "layers.0.v_proj"}, *sites[1:]]
    assert "site 0 was layers.0.q_proj: lora 64 -> 64, is layers.0.v_proj" in complaint(site_map=other)
    assert "not trained for the tasks mrpc" in complaint(tasks=["sst2", "cola", "mrpc"])
    assert "order sst2, cola, are cola, sst2" in complaint(tasks=["cola", "sst2"])
    assert "generator.trunk: width was 64, is 8" in complaint(generator={"kind": "hypernetwork", "trunk": {"width": 8}})
    integers = {"name": "smollm2", "digest": "a" * 64, "quantization": "int8"}
    assert "backbone.quantization was none, is int8" in complaint(backbone=integers)
    assert "the backbone was smollm2 (sha256 aaaaaaaaaaaa…)" in complaint(backbone={"name": "t5", "digest": "b" * 64})


def test_one_run_at_a_time_and_none_over_an_earlier_one(folder: str) -> None:
    with claim(folder, resume=False) as claimed:
        with pytest.raises(RunFolderError, match=r"busy: this very process.*output="):
            claim(folder, resume=True)
        CheckpointStore(claimed.path, keep=1).save(make_checkpoint(7))
    with pytest.raises(RunFolderError, match=r"earlier run.*step-000007.*--resume.*output="):
        claim(folder, resume=False)
    # The refusal did not keep the folder busy.
    again = claim(folder, resume=True)
    again.release()
    again.release()
    claim(folder, resume=True).release()


def test_the_lock_of_a_dead_process_is_taken_over_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    script = (
        "import sys, time; from hyperscale.checkpoint.run_folder import claim\n"
        "claim(sys.argv[1], resume=False); print('claimed', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(RunFolderError, match=f"busy: process {other.pid} .*Stop it first"):
            claim(str(tmp_path), resume=True)
        os.kill(other.pid, signal.SIGKILL)
        # Not reaped yet: a zombie does not write any more.
        deadline = time.monotonic() + 10
        while Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        claim(str(tmp_path), resume=False).release()
    finally:
        other.kill()
        other.communicate()


def test_a_lock_of_another_host_is_respected_and_a_torn_one_is_not(tmp_path: Path) -> None:
    lock = tmp_path / "run.lock"
    lock.write_text('{"host": "elsewhere", "pid": 1, "started": "9", "since": "yesterday"}')
    with pytest.raises(RunFolderError, match=r"process 1 on elsewhere.*since yesterday.*delete .*run.lock"):
        claim(str(tmp_path), resume=False)
    lock.write_text('{"host": "elsewh')
    claim(str(tmp_path), resume=False).release()
    assert lock.read_text() == ""


def foreign_lock(folder: str, lease: float | None) -> Place:
    """Lock a run folder for a process of another host and return the lock."""
    lock = open_place(folder).child("run.lock")
    lock.fs.makedirs(lock.parent.path, exist_ok=True)
    owner = {"host": "elsewhere", "pid": 1, "started": "9", "since": "yesterday"}
    lock.fs.pipe_file(lock.path, json.dumps(owner | ({} if lease is None else {"lease": lease})).encode())
    return lock


def test_the_lock_of_another_host_ends_with_its_lease(folder: str) -> None:
    foreign_lock(folder, lease=600)
    with pytest.raises(RunFolderError, match=r"on elsewhere.*wait 10 minutes or delete .*run.lock"):
        claim(folder, resume=False)
    foreign_lock(folder, lease=0.2)
    foreign_lock(f"{folder}-older", lease=None)
    time.sleep(0.3)
    with claim(folder, resume=False) as claimed:
        assert read_owner(open_place(folder)) == claimed.owner
    with pytest.raises(RunFolderError, match=r"on elsewhere.*delete .*run.lock"):
        claim(f"{folder}-older", resume=False)
    assert [place.name for place in open_place(folder).children() if place.name.startswith(".clock")] == []


def test_the_owner_refreshes_its_lock_and_stops_when_it_is_taken(
    folder: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_folder, "_REFRESH_SECONDS", 0.02)
    place = open_place(folder)
    lock = place.child("run.lock")
    with claim(folder, resume=False):
        store = CheckpointStore(folder, keep=2)
        store.save(make_checkpoint(1))
        first = lock.fs.modified(lock.path)
        deadline = time.monotonic() + 10
        while lock.fs.modified(lock.path) == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert [thread for thread in threading.enumerate() if thread.name == "hyperscale-lease"] == []

    def lose() -> None:
        with claim(folder, resume=True):
            late = CheckpointStore(folder, keep=2)
            foreign_lock(folder, lease=600)
            with pytest.raises(RunFolderError, match=r"taken over: process 1 on elsewhere.*output="):
                late.save(make_checkpoint(2))
            while any(thread.name == "hyperscale-lease" for thread in threading.enumerate()):
                time.sleep(0.02)

    with pytest.raises(RunFolderError, match=r"was taken over: process 1 on elsewhere"):
        lose()
    assert len(CheckpointStore(folder, keep=2).list()) == 1
    assert b"elsewhere" in lock.fs.cat_file(lock.path)


def test_the_error_for_an_unusable_place_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    # Root ignores permission bits, but not these.
    for place, words in ((file, "is a file"), (file / "run", "cannot be written"), (Path("/proc/run"), "cannot be")):
        with pytest.raises(RunFolderError, match=words) as caught:
            claim(str(place), resume=False)
        assert "\n" not in str(caught.value)
        assert "output=" in str(caught.value)
    assert file.read_text() == "text"
    assert sorted(tmp_path.iterdir()) == [file]
