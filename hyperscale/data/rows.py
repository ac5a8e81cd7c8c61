"""Readers of rows from JSON lines, CSV, TSV and Parquet. Every row knows its file and line."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet

from hyperscale.errors import DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One row: column -> value, and its place (`file:line`; `file:row n` in Parquet)."""

    values: Mapping[str, Any]
    where: str


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file; its suffix chooses the reader, and blank lines are skipped.

    Raises:
        DataError: the file is missing, its suffix is unknown, or a line is malformed.
    """
    check_file(path)
    return READERS[path.suffix.lower()](path)


def check_file(path: Path) -> Path:
    """Return the path of a file of rows.

    Raises:
        DataError: the file is missing, or its suffix is unknown.
    """
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path}: unknown kind of file '{path.suffix}'; rows are read from {', '.join(READERS)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return path


@dataclass(frozen=True)
class FileRows:
    """The rows of a file, read again at every iteration."""

    path: Path

    def __iter__(self) -> Iterator[Row]:
        return read_rows(self.path)


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            if line.strip():
                yield Row(_parse_json(line, where), where)


def _parse_json(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8-sig"))
        if b"\\u" in line:  # JSON parses half of a surrogate pair, but no tokenizer accepts it
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise DataError(f"{where}: not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        hint = "; a JSON array is not JSON lines: write one object a line" if line.lstrip().startswith(b"[") else ""
        raise DataError(f"{where}: not valid JSON: {error.msg} at character {error.colno}{hint}") from error
    if not isinstance(values, dict):
        raise DataError(
            f"{where}: a row must be a JSON object, not {type(values).__name__}; write one object on each line"
        )
    return values


def _delimited(delimiter: str) -> Callable[[Path], Iterator[Row]]:
    def read(path: Path) -> Iterator[Row]:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            try:
                header = next(reader, [])
                for fields in reader:
                    if fields:
                        yield Row(_by_column(header, fields, f"{path}:{reader.line_num}"), f"{path}:{reader.line_num}")
            except csv.Error as error:
                raise DataError(f"{path}:{reader.line_num}: malformed: {error}") from error
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{reader.line_num + 1}: not UTF-8: {error.reason}") from error

    return read


def _by_column(header: list[str], fields: list[str], where: str) -> dict[str, str]:
    if len(fields) != len(header):
        raise DataError(f"{where}: {len(fields)} fields where the header has {len(header)}: {', '.join(header)}")
    return dict(zip(header, fields, strict=True))


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{path}:row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".parquet": _read_parquet,
}
