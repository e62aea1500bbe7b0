"""Records of a bulk job: whole lines that are only ever appended, so that a job which is killed anywhere goes on.

OUT             JSON lines, one record a row; a Parquet file is made from OUT.part.jsonl when the job ends
OUT.job.json    what the records were made with; another job is refused, and what differs is named
OUT.parts/      of a URL, whose files cannot be appended to: finished pieces, joined into OUT when the job ends
"""

from __future__ import annotations

import io
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from steer.bulk.source import is_remote, opened
from steer.core import InputError, SteerError, check
from steer.files import as_json, replacing, write_text

__all__ = ["Results"]

_PIECE, _EVERY = 500, 30.0
"""Records in a piece behind a URL, and seconds after which one is written with fewer."""
_SYNC = 2.0
"""Seconds between calls that have the system write what it holds."""


class Results:
    """The records of one job. Use as a context manager: it holds a lock, so that no second job writes the same file.

    Args:
        out: `.jsonl` or `.parquet`, a path or a URL.
        job: settings that change records; a file that was begun with others is refused.
        overwrite: begin anew, in place of what is there.
        retry_failed: forget records of rows that failed.
        known: raises where a record that is there is not one of this job.

    Raises:
        InputError: another kind of file, another job's file, or a line that is no record.
        SteerError: the file cannot be written, or another job writes it.
    """

    def __init__(
        self,
        out: str,
        job: Mapping[str, Any],
        *,
        overwrite: bool = False,
        retry_failed: bool = False,
        known: Callable[[Mapping[str, Any]], None] = lambda record: None,
    ) -> None:
        kind = out.rsplit(".", 1)[-1].lower()
        check(kind in ("jsonl", "parquet"), "out", out, "a file .jsonl or .parquet")
        self.out, self._parquet, self._job = out, kind == "parquet", json.loads(as_json(dict(job)))
        self._overwrite, self._retry, self._known = overwrite, retry_failed, known
        self._lines: _Lines = (
            _Pieces(out) if is_remote(out) else _File(Path(f"{out}.part.jsonl" if self._parquet else out))
        )
        self._lock = None if is_remote(out) else FileLock(f"{out}.lock")
        self.done: set[str] = set()
        """Ids of rows that have a record."""
        self.failed = 0
        """Records of rows that failed, those of runs before among them."""

    def __enter__(self) -> Results:
        try:
            if self._lock is not None:
                Path(self.out).absolute().parent.mkdir(parents=True, exist_ok=True)
                self._lock.acquire(timeout=0)
            self._begin()
        except Timeout:
            raise SteerError(f"another job writes {self.out}") from None
        except OSError as error:
            self._release()
            raise SteerError(f"cannot write {self.out}: {error.strerror or error}") from error
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._lines.close()
        except OSError as error:
            raise SteerError(f"cannot write {self.out}: {error.strerror or error}") from error
        finally:
            self._release()

    def _release(self) -> None:
        if self._lock is not None and self._lock.is_locked:
            # Before it is let go: who waits for the old file sees that it has no name any more.
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record, whole. Raises `SteerError` where it cannot be written; those before it are kept."""
        try:
            self._lines.write(f"{as_json(dict(record))}\n".encode())
        except OSError as error:
            raise SteerError(
                f"cannot write {self.out}: {error.strerror or error}; the records so far are kept"
            ) from error
        self.done.add(str(record["id"]))
        self.failed += record.get("error") is not None

    def finish(self) -> None:
        """Make the file that was asked for of what was appended."""
        try:
            self._lines.finish(self._parquet)
        except OSError as error:
            raise SteerError(f"cannot write {self.out}: {error.strerror or error}; the records are kept") from error

    # ---- going on

    def _begin(self) -> None:
        if self._overwrite:
            self._lines.clear()
        before = self._lines.read_job()
        if before is None:
            begun = next(self._lines.records(), None) is not None
            allowed = "a new file, the file of a job like this one, or --overwrite"
            check(not begun, "out", f"{self.out} (no {Path(self.out).name}.job.json beside it)", allowed)
            self._lines.write_job(self._job)
        elif before != self._job:
            names = sorted(k for k in before.keys() | self._job.keys() if before.get(k) != self._job.get(k))
            differs = ", ".join(f"{k} was {before.get(k)!r}, now {self._job.get(k)!r}" for k in names)
            raise InputError("out", f"{self.out} ({differs})", "the same settings, another file, or --overwrite")
        if self._retry:
            self._lines.keep(lambda record: record.get("error") is None)
        for record in self._lines.records():
            self._known(record)
            self.done.add(str(record["id"]))
            self.failed += record.get("error") is not None
        self._lines.start()


class _Lines(ABC):
    """Where whole lines are kept until the job ends."""

    @abstractmethod
    def read_job(self) -> dict[str, Any] | None: ...

    @abstractmethod
    def write_job(self, job: dict[str, Any]) -> None: ...

    @abstractmethod
    def clear(self) -> None: ...

    @abstractmethod
    def blocks(self) -> Iterator[bytes]:
        """The lines there are. One that was cut, at the end, is left out."""

    @abstractmethod
    def keep(self, wanted: Any) -> None:
        """Forget the records that are not wanted."""

    @abstractmethod
    def start(self) -> None:
        """Get ready to write."""

    @abstractmethod
    def write(self, line: bytes) -> None: ...

    @abstractmethod
    def finish(self, parquet: bool) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    def records(self) -> Iterator[dict[str, Any]]:
        """The records there are. Raises `InputError` for a line that is none."""
        for number, line in enumerate(self.blocks(), 1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or "id" not in record:
                raise InputError("out", f"line {number} is no record", "the file of a bulk job, or --overwrite")
            yield record


class _File(_Lines):
    """A file of this machine. Lines are appended to it; the last, where a killed job left half of one, is cut off."""

    def __init__(self, path: Path) -> None:
        self.path, self._synced = path, 0.0
        self._file: io.FileIO | None = None
        self.final = path.with_name(path.name.removesuffix(".part.jsonl"))
        self.job = self.final.with_name(f"{self.final.name}.job.json")

    def read_job(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.job.read_text()) if self.job.is_file() else None
        except ValueError:
            return {}

    def write_job(self, job: dict[str, Any]) -> None:
        write_text(self.job, as_json(job) + "\n")

    def clear(self) -> None:
        for path in (self.path, self.final, self.job):
            path.unlink(missing_ok=True)

    def blocks(self) -> Iterator[bytes]:
        if not self.path.is_file():
            yield from self._finished()
            return
        with self.path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))

    def _finished(self) -> Iterator[bytes]:
        """The records of a Parquet file that a job like this one has finished."""
        if self.final != self.path and self.final.is_file():
            for record in _from_parquet(self.final):
                yield f"{as_json(record)}\n".encode()

    def keep(self, wanted: Any) -> None:
        kept = [record for record in self.records() if wanted(record)]
        with replacing(self.path) as temporary:
            temporary.write_bytes(b"".join(f"{as_json(record)}\n".encode() for record in kept))

    def start(self) -> None:
        if not self.path.is_file() and self.path != self.final and self.final.is_file():
            with replacing(self.path) as temporary:
                temporary.write_bytes(b"".join(self._finished()))
        whole = sum(map(len, self.blocks()))
        self._file = io.FileIO(self.path, "r+" if self.path.is_file() else "w")
        self._file.truncate(whole)
        self._file.seek(whole)

    def write(self, line: bytes) -> None:
        assert self._file is not None
        at = self._file.tell()
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError:
            self._file.truncate(at)
            raise
        if time.monotonic() - self._synced > _SYNC:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def finish(self, parquet: bool) -> None:
        assert self._file is not None
        os.fsync(self._file.fileno())
        if parquet:
            with replacing(self.final) as temporary:
                _to_parquet(str(self.path), str(temporary))
            self.path.unlink()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _Pieces(_Lines):
    """Pieces behind a URL, each written whole, with one line a record."""

    def __init__(self, out: str) -> None:
        import fsspec

        self.out, self._held, self._since = out, list[bytes](), time.monotonic()
        try:
            self._files, self._path = fsspec.core.url_to_fs(out)
        except (ImportError, ValueError, OSError) as error:
            raise InputError("out", f"{out} ({error})", "a path, or a URL that fsspec opens") from error
        self._folder, self._job = f"{self._path}.parts", f"{self._path}.job.json"

    def read_job(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._files.cat_file(self._job)) if self._files.exists(self._job) else None
        except ValueError:
            return {}

    def write_job(self, job: dict[str, Any]) -> None:
        self._files.pipe_file(self._job, f"{as_json(job)}\n".encode())

    def clear(self) -> None:
        for path in (self._folder, self._path, self._job):
            if self._files.exists(path):
                self._files.rm(path, recursive=True)

    def _pieces(self) -> list[str]:
        """Whole pieces, in order. One that was being written when its job was killed has another name."""
        if not self._files.exists(self._folder):
            return []
        return sorted(p for p in self._files.ls(self._folder, detail=False) if p.endswith(".jsonl"))

    def blocks(self) -> Iterator[bytes]:
        pieces = self._pieces()
        finished = [] if pieces or not self._files.exists(self._path) else [self._path]
        for path in pieces or finished:
            yield from self._files.cat_file(path).splitlines(keepends=True)

    def keep(self, wanted: Any) -> None:
        kept = [record for record in self.records() if wanted(record)]
        for path in self._pieces():
            self._files.rm(path)
        self._put([f"{as_json(record)}\n".encode() for record in kept])

    def start(self) -> None:
        check(not self.out.endswith(".parquet"), "out", self.out, "a file .jsonl behind a URL")
        if not self._pieces() and self._files.exists(self._path):
            self._put(list(self.blocks()))

    def write(self, line: bytes) -> None:
        self._held.append(line)
        if len(self._held) >= _PIECE or time.monotonic() - self._since > _EVERY:
            self._flush()

    def _flush(self) -> None:
        self._put(self._held)
        self._held, self._since = [], time.monotonic()

    def _put(self, lines: list[bytes]) -> None:
        if not lines:
            return
        self._files.makedirs(self._folder, exist_ok=True)
        number = 1 + max((int(Path(p).stem) for p in self._pieces()), default=0)
        unfinished = f"{self._folder}/{number:08}.tmp"
        self._files.pipe_file(unfinished, b"".join(lines))
        self._files.mv(unfinished, f"{self._folder}/{number:08}.jsonl")

    def finish(self, parquet: bool) -> None:
        self._flush()
        pieces = self._pieces()
        with opened(self.out, "wb") as file:
            for path in pieces:
                file.write(self._files.cat_file(path))
        if pieces:
            self._files.rm(self._folder, recursive=True)

    def close(self) -> None:
        self._flush()


def _to_parquet(source: str, target: str) -> None:
    """Make a Parquet file of JSON lines, which are held in memory for it. A field of several kinds, such as a label
    that is a number here and a text there, is the text of its JSON.
    """
    import pyarrow
    from pyarrow import parquet

    with Path(source).open("rb") as file:
        records = [json.loads(line) for line in file]
    columns: list[Any] = []
    fields: list[Any] = []
    for name in dict.fromkeys(name for record in records for name in record) or ("id",):
        values = [record.get(name) for record in records]
        try:
            column, about = pyarrow.array(values), None
            if pyarrow.types.is_struct(column.type) and not column.type.num_fields:
                raise pyarrow.ArrowInvalid("a struct without fields")  # which Parquet does not have
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError):
            column, about = pyarrow.array([None if x is None else as_json(x) for x in values], pyarrow.string()), _JSON
        columns.append(column)
        fields.append(pyarrow.field(name, column.type, metadata=about))
    parquet.write_table(pyarrow.table(columns, pyarrow.schema(fields)), target)


_JSON = {b"encoding": b"json"}


def _from_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The records that `_to_parquet` wrote."""
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    coded = [field.name for field in file.schema_arrow if (field.metadata or {}).items() >= _JSON.items()]
    for batch in file.iter_batches(1024):
        for record in batch.to_pylist():
            yield record | {name: json.loads(record[name]) for name in coded if record[name] is not None}
