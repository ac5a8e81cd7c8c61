"""Encoded rows in the cache: bytes on disk, memory of a rank, seconds of the first and of a later start.

`python -m benchmarks rows` writes rows of about 100 tokens of the packaged backbone's vocabulary as JSON lines, encodes
them, and starts two processes at once on what was encoded. Each builds the loader and takes steps. `--stored` skips the
texts: it writes the encoded rows themselves, for numbers of rows whose encoding would take hours.

Memory is what a process has more than after its imports and its tokenizer: private (anonymous) pages, and pages of
mapped files, which the page cache holds once for all processes.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import AutoTokenizer

from benchmarks.machine import forget_peak, resident_bytes, write_report
from hyperscale.assets.backbones import resolve_packaged
from hyperscale.config.data import DataSettings
from hyperscale.data.corpus import Corpus, load_corpus
from hyperscale.data.encoded import pack
from hyperscale.data.encoding import INFO, read_info
from hyperscale.data.file_digest import checksum
from hyperscale.data.loader import Share, TrainLoader
from hyperscale.data.tokenization import Encoded

MIB = 2**20
BACKBONE = "smollm2-135m-instruct"
STEPS = 50
BATCH = 64
_WORDS = ("time", "year", "people", "way", "day", "man", "thing", "life", "child", "world", "school", "state", "family")


def write_rows(folder: Path, rows: int) -> Path:
    """Write a task and its rows; return the task file."""
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(rows):
            row = {
                "text": f"{number} {' '.join(draw.choices(_WORDS, k=90))}",
                "answer": " ".join(draw.choices(_WORDS, k=4)),
            }
            stream.write(json.dumps(row) + "\n")
    task = folder / "rows.yaml"
    task.write_text('source: rows.jsonl\ninput: "{text}"\ntarget: "{answer}"\n', encoding="utf-8")
    return task


def multiply_rows(cache: Path, rows: int) -> None:
    """Replace the training rows of the one entry in `cache` by `rows` random ones of 100 tokens."""
    (entry,) = (path.parent for path in cache.glob("*/*/info.json"))
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 49_000, length) for length in draw.integers(60, 131, 5_000)]
    batch = pack([Encoded(prompt, (7, 8, 9, 10, 2)) for prompt in prompts], pa.uint16())
    path, repeats = entry / "train.arrow", rows // batch.num_rows
    path.unlink()
    with path.open("wb") as stream, pa.ipc.new_stream(stream, batch.schema) as writer:
        for _ in range(repeats):
            writer.write_batch(batch)
    info = asdict(read_info(entry))
    tokens = repeats * len(batch.column("ids").values)
    info["splits"]["train"] |= {"rows": repeats * batch.num_rows, "tokens": tokens}
    info["splits"]["train"] |= {"bytes": path.stat().st_size, "xxh3": checksum(path)}
    (entry / INFO).write_text(json.dumps(info), encoding="utf-8")


def memory() -> dict[str, int]:
    """Return bytes of private and of file-backed resident pages."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {name: int(fields[key].split()[0]) * 1024 for name, key in (("private", "RssAnon"), ("mapped", "RssFile"))}


def start(task: str, encodes: bool) -> dict[str, Any]:
    """Open the rows as a rank does, build its loader and take steps; return seconds and bytes above the start."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_packaged(BACKBONE))
    tokenizer(["a first call"])
    forget_peak()
    before, resident, started = memory(), resident_bytes("VmRSS"), time.perf_counter()
    corpus = load_corpus(DataSettings(tasks=(task,)), tokenizer, is_encoder_decoder=False)
    opened = time.perf_counter() - started
    figures: dict[str, Any] = {"seconds": opened, "peak": resident_bytes("VmHWM") - resident}
    if not encodes:
        loader = loader_of(corpus)
        loader.next_step()
        figures["seconds"] = time.perf_counter() - started
        for _ in range(STEPS):
            loader.next_step()
        figures["peak"] = resident_bytes("VmHWM") - resident
    figures |= {name: amount - before[name] for name, amount in memory().items()}
    rows = corpus.tasks[0].train.encoded
    figures |= {"rows": len(rows), "tokens": int(rows.num_tokens.astype(np.int64).sum())}
    return figures | {"children_peak": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024}


def loader_of(corpus: Corpus) -> TrainLoader:
    """Return the loader of one rank of two."""
    settings = DataSettings(tasks=("rows",), bucket_steps=8)
    return TrainLoader([corpus.tasks[0].train.encoded], settings, BATCH, BATCH // 2, 1, Share(0, 2, corpus.layout))


def started_apart(task: Path, cache: Path, processes: int, encodes: bool) -> list[dict[str, Any]]:
    """Start processes at once; return the figures of each."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.rows", "--start", str(task)]
    command += ["--encodes"] if encodes else []
    environment = {**os.environ, "HYPERSCALE_DATA_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "false"}
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    answers = [process.communicate()[0] for process in running]
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def measure(rows: int, stored: bool, folder: Path) -> dict[str, Any]:
    """Return the figures of one number of rows."""
    task, cache = write_rows(folder, 5_000 if stored else rows), folder / "cache"
    (first,) = started_apart(task, cache, 1, encodes=True)
    if stored:
        multiply_rows(cache, rows)
    later = started_apart(task, cache, 2, encodes=False)
    size = sum(path.stat().st_size for path in cache.rglob("*.arrow"))
    return {
        "stored": stored,
        "first": first,
        "later": later,
        "bytes": size,
        "source": (folder / "rows.jsonl").stat().st_size,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the Markdown table; memory is that of the larger of the two processes."""
    lines = [
        "| rows | tokens | encoding s | disk MiB | bytes a token | later s | private MiB | mapped MiB | peak MiB |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in results:
        later = {name: max(process[name] for process in one["later"]) for name in one["later"][0]}
        encoding = "not run" if one["stored"] else f"{one['first']['seconds']:.0f}"
        lines.append(
            f"| {later['rows']:,} | {later['tokens']:,} | {encoding} | {one['bytes'] / MIB:.0f} "
            f"| {one['bytes'] / later['tokens']:.2f} | {later['seconds']:.1f} | {later['private'] / MIB:.0f} "
            f"| {later['mapped'] / MIB:.0f} | {later['peak'] / MIB:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure each number of rows and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows", description=__doc__)
    parser.add_argument("--rows", type=int, action="append", help="rows to encode; may be repeated (default 100000)")
    parser.add_argument("--stored", type=int, action="append", help="rows to write as encoded; may be repeated")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    parser.add_argument("--encodes", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(options.start, options.encodes)))
        return
    cases = [(rows, False) for rows in options.rows or ([] if options.stored else [100_000])]
    cases += [(rows, True) for rows in options.stored or []]
    results = []
    for rows, stored in cases:
        with tempfile.TemporaryDirectory(prefix="rows-") as folder:
            results.append(measure(rows, stored, Path(folder)))
    print(table(results))
    write_report("rows", {"cases": results})


if __name__ == "__main__":
    main()
