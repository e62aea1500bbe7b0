"""Rows of a bulk job's file, read one by one: JSON lines, CSV or Parquet, here or behind a URL that fsspec opens."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from steer.core import Cost, InputError, SteerError, check
from steer.core.errors import first_line
from steer.data import csv_row

__all__ = ["MOST_BYTES", "Row", "Rows", "Shard", "Survey", "is_remote", "opened", "read_rows", "spent", "survey"]

MOST_BYTES = 4 << 20
"""Of one line."""
_ALLOWED = "a file of rows: .jsonl, .json (a list), .csv, .tsv or .parquet; the first four also .gz"
_KINDS = ("jsonl", "ndjson", "json", "csv", "tsv", "parquet")
_GZIP = b"\x1f\x8b"
_MOST_ID = 256


@dataclass(frozen=True)
class Row:
    """One row; `number` counts from 1 in the whole file. A row that cannot be read has an `error` and no `data`."""

    number: int
    id: str
    data: dict[str, Any] | None
    error: str = ""


@dataclass(frozen=True)
class Shard:
    """Every `count`-th row, beginning at `index` (from 0). Raises `InputError`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From `i/n`."""
        index, slash, count = text.partition("/")
        right = bool(slash) and index.isdecimal() and count.isdecimal() and len(count) < 8
        check(right and int(index) < int(count), "shard", text, "I/N with I from 0 to N-1, such as 0/2")
        return cls(int(index), int(count))

    def holds(self, row: Row) -> bool:
        """Whether a row is one of this shard's."""
        return (row.number - 1) % self.count == self.index


@dataclass(frozen=True)
class Survey:
    """What a first reading found: how many rows there are for this shard, and the names of their fields."""

    rows: int
    fields: frozenset[str]


def spent(cost: Cost) -> dict[str, int]:
    """What a row took, without the time, in which no two runs are equal."""
    return {name: value for name, value in asdict(cost).items() if name != "seconds"}


def is_remote(path: str) -> bool:
    """Whether a path is a URL, such as `s3://bucket/rows.jsonl`."""
    return "://" in path


@contextmanager
def opened(path: str, mode: str = "rb") -> Iterator[Any]:
    """A file, here or behind a URL. Raises `SteerError` that says why it cannot be had."""
    try:
        if is_remote(path):
            import fsspec

            with fsspec.open(path, mode) as file:
                yield file
        else:
            with Path(path).open(mode) as file:
                yield file
    except (OSError, ImportError, ValueError) as error:
        if isinstance(error, SteerError):
            raise
        why = getattr(error, "strerror", None) or first_line(error)
        raise SteerError(f"cannot {'read' if mode == 'rb' else 'write'} {path}: {why}") from error


Rows = str | Sequence[Any]
"""A file's path or URL; or rows in memory, each an object, a text or a list of messages."""


def read_rows(path: Rows) -> Iterator[Row]:
    """The rows of a file in order. One that is not JSON, is too long or has a bad id comes with its error."""
    if not isinstance(path, str):
        yield from (_row(n, data) for n, data in enumerate(path, 1))
        return
    kind, packed = _kind(path)
    with opened(path) as file, _unpacked(path, file, packed) as file:
        if kind == "parquet":
            yield from (_row(n, data) for n, data in enumerate(_parquet(path, file), 1))
        elif kind in ("csv", "tsv"):
            yield from (_row(n, data) for n, data in enumerate(_csv(path, file, "\t" if kind == "tsv" else ","), 1))
        elif kind == "json":
            yield from (_row(n, data) for n, data in enumerate(_json(path, file), 1))
        else:
            yield from _json_lines(path, file)


def survey(path: Rows, shard: Shard | None = None) -> Survey:
    """Read a file once before anything is drawn. Raises `InputError` for an id that two rows have."""
    shard = shard or Shard()
    seen: dict[int, int] = {}
    names: set[str] = set()
    mine = total = 0
    for row in read_rows(path):
        total += 1
        if shard.holds(row):
            mine += 1
            names |= (row.data or {}).keys()
        mark = int.from_bytes(blake2b(row.id.encode(), digest_size=8).digest(), "big")
        before = seen.setdefault(mark, row.number)
        check(
            before == row.number, "id", f"{row.id} in rows {before} and {row.number}", "an id of its own for each row"
        )
    check(total > 0, "source", f"{path} (no rows)" if isinstance(path, str) else "no rows", _ALLOWED)
    return Survey(mine, frozenset(names))


# ---------------------------------------------------------------------------------------------------------- formats


def _kind(path: str) -> tuple[str, bool]:
    """What a file holds by its name, and whether it is packed by gzip."""
    packed = path.lower().endswith(".gz")
    kind = path.lower().removesuffix(".gz").rsplit(".", 1)[-1]
    check(kind in _KINDS and not (packed and kind == "parquet"), "source", path, _ALLOWED)
    return kind, packed


@contextmanager
def _unpacked(path: str, file: Any, packed: bool) -> Iterator[Any]:
    """The file, or what gzip packed in it. Raises `InputError` where the name says otherwise than the bytes."""
    if not packed:
        start = file.read(len(_GZIP))
        check(start != _GZIP, "source", f"{path} (packed by gzip)", f"{path}.gz as its name, or the file unpacked")
        file.seek(0)
        yield file
        return
    try:
        with gzip.open(file) as inside:
            yield inside
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError("source", f"{path} ({first_line(error)})", "a whole file that gzip wrote") from error


def _row(number: int, data: Any) -> Row:
    usual = f"row-{number}"
    if isinstance(data, str):
        data = {"prompt": data}
    elif isinstance(data, list):
        data = {"messages": data}
    if not isinstance(data, dict):
        return Row(number, usual, None, "not an object, a text or a list of messages")
    given = data.get("id", data.get("custom_id", usual))
    if isinstance(given, bool) or not isinstance(given, str | int) or not 1 <= len(str(given)) <= _MOST_ID:
        return Row(number, usual, None, f"id: a text or a whole number of at most {_MOST_ID} characters")
    try:
        json.dumps(data, ensure_ascii=False, default=str).encode()
    except (UnicodeEncodeError, ValueError):
        return Row(number, usual, None, "text that cannot be written as UTF-8")
    return Row(number, str(given), data)


def _json(path: str, file: BinaryIO) -> list[Any]:
    """The rows of one JSON list, which is read whole."""
    try:
        found = json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError("source", f"{path} (not JSON: {first_line(error)})", _ALLOWED) from error
    check(isinstance(found, list), "source", f"{path} ({type(found).__name__})", "a JSON list of rows, or .jsonl")
    return list(found)


def _json_lines(path: str, file: BinaryIO) -> Iterator[Row]:
    """Lines end at line feeds alone; empty ones are no rows."""
    number = 0
    for line in _lines(file):
        if line is not None and not (line := line.removeprefix(codecs.BOM_UTF8) if not number else line).strip():
            continue
        number += 1
        if line is None:
            yield Row(number, f"row-{number}", None, f"a line of more than {MOST_BYTES} bytes")
            continue
        if number == 1 and line.lstrip().startswith(b"[") and not _is_whole(line):
            raise InputError("source", f"{path} (a JSON list over several lines)", "JSON lines: one row a line")
        try:
            yield _row(number, json.loads(line))
        except (ValueError, RecursionError) as error:
            yield Row(number, f"row-{number}", None, f"not JSON: {first_line(error)}")


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Lines; None in place of one that is too long, of which no more than that is ever held."""
    while line := file.readline(MOST_BYTES + 1):
        if len(line) > MOST_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(MOST_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield None
        else:
            yield line


def _csv(path: str, file: BinaryIO, delimiter: str) -> Iterator[dict[str, Any]]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        yield from (csv_row(row) for row in csv.DictReader(text, delimiter=delimiter))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError("source", f"{path} ({first_line(error)})", _ALLOWED) from error


def _parquet(path: str, file: BinaryIO) -> Iterable[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError("source", path, "JSON lines or CSV: parquet needs pyarrow (pip install pyarrow)") from None
    try:
        for batch in parquet.ParquetFile(file).iter_batches(1024):
            yield from ({k: v for k, v in row.items() if v is not None} for row in batch.to_pylist())
    except (OSError, ValueError) as error:
        raise InputError("source", f"{path} ({first_line(error)})", _ALLOWED) from error
