"""The cache of encoded rows: its key, who writes it, what happens when it is damaged."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hyperscale.config.data import DataSettings
from hyperscale.data import file_digest, rendering, workers
from hyperscale.data.cache import cached
from hyperscale.data.corpus import Corpus, load_corpus
from hyperscale.data.encoded import EncodedRows, id_type, pack
from hyperscale.data.fingerprint import ENCODING_VERSION, fingerprint, tokenizer_digest
from hyperscale.data.loader import Share, TrainLoader
from hyperscale.data.tasks import Task
from hyperscale.data.tokenization import Encoded
from hyperscale.errors import AssetError, DataError

ROOT = Path(__file__).resolve().parent.parent
TASK = 'source: rows.jsonl\ninput: "Review: {text}"\nlabels: {0: bad, 1: good}\nlabel_column: label\n'


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama_folder)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a cache of its own."""
    monkeypatch.setenv("HYPERSCALE_DATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_task(folder: Path, count: int = 60, text: str = TASK) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"text": f"the film number {number}", "label": number % 2} for number in range(count)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "film.yaml").write_text(text)
    return str(folder / "film.yaml")


def load(task: str, tokenizer: PreTrainedTokenizerBase, with_test: bool = False, **fields: object) -> Corpus:
    return load_corpus(DataSettings.model_validate({"tasks": [task], **fields}), tokenizer, False, with_test)


def entries(cache: Path) -> list[Path]:
    return sorted(path.parent for path in cache.glob("*/*/info.json"))


def copy(row: Encoded) -> Encoded:
    return Encoded(tuple(map(int, row.source_ids)), tuple(map(int, row.target_ids)), row.candidate_ids, row.spans)


def ids_of(corpus: Corpus) -> list[list[Encoded]]:
    """Copy the rows of a corpus out of its mapped files."""
    loaded = corpus.tasks[0]
    return [[copy(row) for row in split.encoded] for split in (loaded.train, loaded.validation)]


def test_the_second_start_reuses_what_the_first_encoded(
    tokenizer: PreTrainedTokenizerBase, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, logger="hyperscale")
    first = load(write_task(tmp_path / "here"), tokenizer)
    (entry,) = entries(cache)
    assert f"60 rows of task film encoded into {cache} (" in caplog.text
    times = {path: path.stat().st_mtime_ns for path in entry.iterdir()}
    second = load(write_task(tmp_path / "there"), tokenizer)  # the same content in another place
    assert f"60 rows of task film reused from {cache} (" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in entry.iterdir()} == times
    assert ids_of(first) == ids_of(second)
    assert first.tasks[0].validation.examples[0].candidates == ("bad", "good")
    assert list(first.tasks[0].validation.examples) == list(second.tasks[0].validation.examples)
    assert (second.tasks[0].digest, second.tasks[0].most_common_answer) == (first.tasks[0].digest, "bad")
    assert second.tasks[0].source == f"file:{tmp_path}/there/rows.jsonl"
    # a folder named in the recipe goes first
    load(write_task(tmp_path / "here"), tokenizer, cache_folder=str(tmp_path / "own"))
    assert len(entries(tmp_path / "own")) == 1


KEY: dict[str, Any] = {"content": "c", "tokenizer": "t", "is_encoder_decoder": False, "excluded": ()}


def key(task: dict[str, object] | None = None, settings: dict[str, object] | None = None, **fields: object) -> str:
    known = Task.model_validate({"name": "t", "source": "x", "input": "{x}", "target": "{y}", **(task or {})})
    limits = DataSettings.model_validate({"tasks": ["t"], **(settings or {})})
    return fingerprint(known, settings=limits, **{**KEY, **fields})


def test_every_part_of_the_key_changes_it_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch):
    same = [
        key(),
        key({"source": "y", "description": "d", "metrics": "token_f1", "max_new_tokens": 9}),
        key({"not_with": ["u"], "shares_texts_with": ["u"]}),
        key(settings={"bucket_steps": 9, "mixed_tasks": False, "cache_folder": "/x", "mixture": {"temperature": 2}}),
    ]
    assert len(set(same)) == 1
    others = [
        *(key({name: value}) for name, value in (("input", "{x}!"), ("target", "{y}!"), ("version", "2"))),
        *(key({name: value}) for name, value in (("name", "u"), ("chat", True), ("round_to", 0.5))),
        *(key(settings={name: 7}) for name in ("max_source_tokens", "max_target_tokens")),
        *(key(settings={name: 7}) for name in ("train_limit", "validation_limit", "test_limit")),
        key(settings={"too_long": "truncate_source"}),
        *(
            key(content="d"),
            key(tokenizer="u"),
            key(is_encoder_decoder=True),
            key(excluded=(b"x",)),
            key(excluded=(b"y",)),
        ),
    ]
    monkeypatch.setattr("hyperscale.data.fingerprint.ENCODING_VERSION", ENCODING_VERSION + 1)
    assert len({same[0], *others, key()}) == len(others) + 2
    assert key(excluded=(b"x", b"y")) == key(excluded=(b"y", b"x"))


def test_a_tokenizers_digest_follows_what_decides_its_ids(tiny_llama_folder: Path, tmp_path: Path):
    def fresh(folder: Path = tiny_llama_folder) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(folder)

    first, copied = fresh(), shutil.copytree(tiny_llama_folder, tmp_path / "copy")
    digest = tokenizer_digest(first)
    first(["a", "b c"], padding=True, truncation=True, max_length=2)  # leaves its settings behind
    assert tokenizer_digest(first) == tokenizer_digest(fresh()) == tokenizer_digest(fresh(copied)) == digest
    changed = [fresh() for _ in range(3)]
    changed[0].add_tokens(["<new>"])
    changed[1].chat_template = "{{ messages }}"
    changed[2].eos_token = changed[2].convert_ids_to_tokens(5)
    assert len({digest, *map(tokenizer_digest, changed)}) == 4


def test_a_large_files_digest_is_remembered_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(file_digest, "_REMEMBERED_SIZE", 1)
    path, memory = tmp_path / "rows", tmp_path / "memory"
    path.write_text("one")
    fresh = file_digest.file_digest(path, memory)
    assert not memory.exists()  # just written: another write could leave the same time
    os.utime(path, ns=(10**18, 10**18))
    assert file_digest.file_digest(path, memory) == fresh
    (note,) = memory.iterdir()
    note.write_text(json.dumps({**json.loads(note.read_text()), "digest": "remembered"}))
    assert file_digest.file_digest(path, memory) == "remembered"
    path.write_text("two")
    os.utime(path, ns=(10**18, 10**18))
    assert file_digest.file_digest(path, memory) == file_digest.checksum(path) != fresh
    note.write_text("no JSON")
    assert file_digest.file_digest(path, memory) == file_digest.checksum(path)


SCRIPT = """
import os, signal, sys
from hyperscale.logger import set_up_logging
set_up_logging("INFO")
from transformers import AutoTokenizer
from hyperscale.config.data import DataSettings
from hyperscale.data import cache
from hyperscale.data.corpus import load_corpus
if sys.argv[3] == "killed":
    cache.publish = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
load_corpus(DataSettings(tasks=(sys.argv[1],)), AutoTokenizer.from_pretrained(sys.argv[2]), False)
"""


def test_a_killed_encoder_leaves_nothing_and_of_two_processes_one_encodes(
    tiny_llama_folder: Path, cache: Path, tmp_path: Path
):
    task = write_task(tmp_path / "task")

    def start(word: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, task, str(tiny_llama_folder), word]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    killed = start("killed")
    killed.communicate(timeout=120)
    assert killed.returncode == -9
    assert entries(cache) == []
    (scratch,) = cache.glob("*/.*.partial")
    assert (scratch / "entry" / "info.json").is_file()
    # the scratch folder of another key, which nobody will write again
    stray = scratch.rename(scratch.with_name(".other.partial"))
    both = [start("whole"), start("whole")]
    logs = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], logs
    assert sorted(log.count("encoded into") for log in logs) == [0, 1]
    assert sorted(log.count("reused from") for log in logs) == [0, 1]
    assert len(entries(cache)) == 1
    assert not stray.exists()
    assert list(cache.glob("*/.*.partial")) == []


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: _flip(entry / "train.arrow"),
        lambda entry: (entry / "train.arrow").write_bytes(b""),
        lambda entry: (entry / "validation.arrow").unlink(),
        lambda entry: (entry / "info.json").write_text("{"),
        lambda entry: (entry / "info.json").write_text('{"splits": {"train": {}}}'),
    ],
    ids=["a bit", "cut short", "a missing file", "half an info", "an info of another version"],
)
def test_a_damaged_entry_is_noticed_and_encoded_again(
    damage: Callable[[Path], object],
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    task = write_task(tmp_path / "task")
    first = ids_of(load(task, tokenizer))
    (entry,) = entries(cache)
    damage(entry)
    assert ids_of(load(task, tokenizer)) == first
    assert f"the encoded rows in {entry} are damaged and are encoded again" in caplog.text
    caplog.clear()
    assert ids_of(load(task, tokenizer)) == first
    assert "are damaged and are encoded again" not in caplog.text


def test_a_folder_that_cannot_be_written_and_a_full_disk_are_named(
    tokenizer: PreTrainedTokenizerBase, cache: Path, tmp_path: Path
):
    task = write_task(tmp_path / "task")
    cache.write_text("a file")
    remedy = "Set data.cache_folder or HYPERSCALE_DATA_CACHE to a writable folder"
    with pytest.raises(AssetError, match=rf"^Cannot prepare {cache}/film/\w+: Not a directory\. {remedy}"):
        load(task, tokenizer)

    def write(folder: Path, scratch: Path) -> Any:
        rows = pack([Encoded(tuple(range(1000)), ())] * 100, pa.uint16())
        with Path("/dev/full").open("wb") as stream, pa.ipc.new_stream(stream, rows.schema) as writer:
            writer.write_batch(rows)

    with pytest.raises(AssetError, match=rf"No space left on device\. {remedy}"):
        cached(tmp_path / "other", "film", "key", write)
    assert [path.name for path in (tmp_path / "other" / "film").iterdir()] == [".key.lock"]


def test_a_streamed_data_set_gives_the_rows_of_a_file(
    tokenizer: PreTrainedTokenizerBase, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    file = load(write_task(tmp_path / "task"), tokenizer)
    datasets.Dataset.from_json(str(tmp_path / "task" / "rows.jsonl"), cache_dir=str(tmp_path / "hub")).to_parquet(
        tmp_path / "set" / "train.parquet"
    )
    loaded = []
    for streaming in ("false", "true"):
        source = f"source: {{kind: hub, path: {tmp_path / 'set'}, streaming: {streaming}}}"
        path = tmp_path / "task" / "film.yaml"
        path.write_text(TASK.replace("source: rows.jsonl", source))
        loaded.append(load(str(path), tokenizer, cache_folder=str(tmp_path / streaming)))
    for corpus in loaded:
        assert ids_of(corpus) == ids_of(file)
        assert corpus.tasks[0].digest == file.tasks[0].digest
    for streaming in ("false", "true"):
        assert len(entries(tmp_path / streaming)) == 1


def test_processes_encode_what_one_process_does(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    task = write_task(tmp_path / "task", 200)
    alone = load(task, tokenizer, cache_folder=str(tmp_path / "alone"))
    monkeypatch.setattr(rendering, "CHUNK", 16)
    monkeypatch.setattr(workers, "_OWN_CHUNKS", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    together = load(task, tokenizer, cache_folder=str(tmp_path / "together"))
    assert ids_of(together) == ids_of(alone)
    assert together.tasks[0].digest == alone.tasks[0].digest
    # an error in another process arrives with its file and line
    with (tmp_path / "task" / "rows.jsonl").open("a") as rows:
        rows.write('{"text": "x", "label": 7}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:201: unknown label '7'"):
        load(task, tokenizer, cache_folder=str(tmp_path / "wrong"))
    assert entries(tmp_path / "wrong") == []


def test_a_row_is_a_slice_of_the_mapped_file(tokenizer: PreTrainedTokenizerBase, cache: Path, tmp_path: Path):
    rows = load(write_task(tmp_path / "task"), tokenizer).tasks[0].train.encoded
    (entry,) = entries(cache)
    assert str(entry / "train.arrow") in Path("/proc/self/maps").read_text()
    ids = rows[3].source_ids
    assert isinstance(ids, np.ndarray)
    assert ids.base is not None
    assert not ids.flags.owndata
    assert not ids.flags.writeable
    assert ids.dtype == np.uint16
    assert (id_type(2**16 - 1), id_type(2**16)) == (pa.uint16(), pa.uint32())
    assert rows[-1] == rows[len(rows) - 1]
    assert rows[3:5] == [rows[3], rows[4]]
    with pytest.raises(IndexError):
        rows[len(rows)]
    assert rows.num_tokens.tolist() == [row.num_tokens for row in rows]
    assert rows.num_tokens.dtype == np.uint8


def test_rows_read_back_as_they_were_from_any_number_of_batches():
    candidates = ((1, 2), (3,))
    rows = [
        Encoded(tuple(range(row, row + 97)), (7, 60_000 + row, 1), candidates, ((3, 5), (97, 100)) if row % 3 else ())
        for row in range(1000)
    ]
    batches = [pack(rows[first : first + 300], pa.uint16()) for first in range(0, 1000, 300)]
    table = pa.Table.from_batches([*batches[:2], batches[0].slice(0, 0), *batches[2:]])
    assert list(EncodedRows(table, candidates)) == rows
    assert list(EncodedRows.of(rows)) == rows
    assert table.nbytes / sum(row.num_tokens for row in rows) < 2.3  # 2 of them are the id
    assert len(EncodedRows.of([])) == 0
    with pytest.raises(OverflowError):
        pack([Encoded((2**16,), ())], pa.uint16())


def test_batches_of_mapped_rows_are_those_of_rows_in_memory(
    tokenizer: PreTrainedTokenizerBase, cache: Path, tmp_path: Path
):
    corpus = load(write_task(tmp_path / "task"), tokenizer)
    mapped = corpus.tasks[0].train.encoded
    settings = DataSettings(tasks=("t",), bucket_steps=4)
    loaders = [
        TrainLoader([rows], settings, 8, 4, 3, Share(0, 1, corpus.layout))
        for rows in (mapped, EncodedRows.of(map(copy, mapped)))
    ]
    for _ in range(12):
        for one, other in zip(*(loader.next_step() for loader in loaders), strict=True):
            assert one.input_ids.equal(other.input_ids)
            assert one.labels.equal(other.labels)
            assert one.attention_mask.equal(other.attention_mask)
    assert loaders[0].state() == loaders[1].state()


def test_test_rows_that_are_too_long_matter_only_where_they_are_scored(
    tokenizer: PreTrainedTokenizerBase, cache: Path, tmp_path: Path
):
    folder = tmp_path / "task"
    write_task(folder, text=TASK.replace("rows.jsonl", "{train: rows.jsonl, test: test.jsonl}"))
    (folder / "test.jsonl").write_text(json.dumps({"text": "word " * 300, "label": 1}) + "\n")
    limits: dict[str, object] = {"too_long": "error", "max_source_tokens": 60}
    assert load(str(folder / "film.yaml"), tokenizer, **limits).tasks[0].test is None
    for _ in range(2):  # also where the rows come from the cache
        with pytest.raises(DataError, match=r"a row has \d+ source and \d target tokens"):
            load(str(folder / "film.yaml"), tokenizer, with_test=True, **limits)
