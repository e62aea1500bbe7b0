"""The loop of a bulk job: rows are read as the engine has room, and records are written as they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, TypeVar

from steer.bulk.results import Results
from steer.bulk.source import Row, Rows, Shard, read_rows, survey
from steer.core import InputError, SteerError, UnsupportedError, check_whole
from steer.core.errors import RewardError, first_line
from steer.progress import note, ticking

__all__ = ["Elsewhere", "Later", "Summary", "Worker", "answer_all", "answered", "run_job"]

T = TypeVar("T")

_FAULTS = 10
"""Rows in a row that fail through no fault of their own, after which the job ends."""


class Worker(Protocol):
    """What answers rows: `Requests` or `Outputs`."""

    capacity: int

    def check_fields(self, names: frozenset[str]) -> None: ...

    def prepare(self, row: Row) -> Any: ...

    def rows(self, asked: Any) -> int: ...

    async def answer(self, row: Row, asked: Any) -> dict[str, Any]: ...

    def failure(self, row: Row, message: str, field: str | None) -> dict[str, Any]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Elsewhere:
    """What answers rows in other processes, such as a cluster's: rows in, records out as they are done."""

    check_fields: Callable[[frozenset[str]], None]
    records: Callable[[Iterator[Row]], Iterator[dict[str, Any]]]


@dataclass(frozen=True)
class Later:
    """A worker that is made once everything else was found to be right, since it loads a model."""

    check_fields: Callable[[frozenset[str]], None]
    make: Callable[[], Worker]


@dataclass(frozen=True)
class Summary:
    """What a job came to: rows that were done now, that had been done before, and that have failed in all."""

    done: int
    before: int
    failed: int
    seconds: float


def run_job(
    worker: Worker | Later | Elsewhere,
    source: Rows,
    out: str,
    job: Mapping[str, Any],
    *,
    shard: Shard | None = None,
    max_failures: int | None = None,
    retry_failed: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Summary:
    """Answer every row of `source` that has no record in `out` yet.

    Args:
        worker: what answers, here or elsewhere; it is closed by whoever made it, one for `Later` here.
        source: rows, as JSON lines, CSV or Parquet; a path or a URL; or rows in memory.
        out: records, as JSON lines or Parquet, in the order in which they are done.
        job: settings that change records; `out` of a job with others is refused.
        shard: which rows; the union of all shards is the whole job.
        max_failures: rows that may fail; one more ends the job. A row that fails has a record with its error.
        retry_failed: do rows again that failed before.
        overwrite: begin anew.

    Raises:
        InputError: a bad setting, two rows with one id, or an `out` of another job; nothing is drawn.
        SteerError: too many rows failed, or the records cannot be written. What was done is kept.
    """
    if max_failures is not None:
        check_whole("max_failures", max_failures, 0)
    part = shard or Shard()
    found = survey(source, part)
    worker.check_fields(found.fields)
    with Results(out, job, overwrite=overwrite, retry_failed=retry_failed) as results:
        before = len(results.done)
        if before:
            note(progress, f"going on after {before} rows of {out}")
        began = time.monotonic()
        with ticking(progress, "rows", found.rows) as tick:
            tick(before)
            account = _Account(results, max_failures, tick)
            rows = (row for row in read_rows(source) if part.holds(row) and row.id not in results.done)
            _answer(worker, rows, account.keep)
            if account.stopped is not None:
                raise account.stopped
        results.finish()
        return Summary(len(results.done) - before, before, results.failed, time.monotonic() - began)


def _answer(worker: Worker | Later | Elsewhere, rows: Iterator[Row], keep: Keep) -> None:
    if isinstance(worker, Elsewhere):
        for record in worker.records(rows):
            if not keep(record, fault=False):
                break
    elif isinstance(worker, Later):
        first = next(rows, None)
        if first is not None:
            with closing(worker.make()) as made:
                _finished(_Loop(made, keep).run(chain([first], rows)))
    else:
        _finished(_Loop(worker, keep).run(rows))


async def answer_all(worker: Worker, rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Records of the rows, in the order in which they are done; a row that fails has one with its error."""
    found: list[dict[str, Any]] = []

    def keep(record: dict[str, Any], fault: bool) -> bool:
        found.append(record)
        return True

    await _Loop(worker, keep).run(rows)
    return found


def answered(worker: Worker, rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The same for callers that do not wait on a loop of events themselves."""
    return _finished(answer_all(worker, rows))


def _finished(work: Coroutine[Any, Any, T]) -> T:
    """What comes of `work`, which runs in a thread of its own where a loop runs here, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


class Keep(Protocol):
    """What takes a record, which may tell of a `fault` that is none of its row's; False ends the job."""

    def __call__(self, record: dict[str, Any], fault: bool) -> bool: ...


class _Loop:
    """As many rows at work as the worker has room for."""

    def __init__(self, worker: Worker, keep: Keep) -> None:
        self._worker, self._keep = worker, keep
        self._inside = 0
        self._room = asyncio.Condition()
        self._going = True

    async def run(self, rows: Iterable[Row]) -> None:
        async with asyncio.TaskGroup() as group:
            for row in rows:
                asked, size = await self._asked(row)
                if asked is not None:
                    await self._enter(size)
                    group.create_task(self._answered(row, asked, size))
                if not self._going:
                    break

    async def _asked(self, row: Row) -> tuple[Any, int]:
        if row.data is None:
            self._write(self._worker.failure(row, row.error, None))
            return None, 0
        try:
            asked = await asyncio.to_thread(self._worker.prepare, row)
        except Exception as error:
            self._failed(row, error)
            return None, 0
        return asked, self._worker.rows(asked)

    async def _enter(self, rows: int) -> None:
        async with self._room:
            await self._room.wait_for(lambda: not self._inside or self._inside + rows <= self._worker.capacity)
            self._inside += rows

    async def _answered(self, row: Row, asked: Any, rows: int) -> None:
        try:
            if self._going:
                self._write(await self._worker.answer(row, asked))
        except Exception as error:
            self._failed(row, error)
        finally:
            async with self._room:
                self._inside -= rows
                self._room.notify_all()

    def _failed(self, row: Row, error: Exception) -> None:
        mine = isinstance(error, InputError | UnsupportedError | RewardError) or hasattr(error, "field")
        shown = str(error) if isinstance(error, SteerError) else f"{type(error).__name__}: {first_line(error)}"
        self._write(self._worker.failure(row, shown, getattr(error, "field", None)), not mine)

    def _write(self, record: dict[str, Any], fault: bool = False) -> None:
        self._going = self._going and self._keep(record, fault)


class _Account:
    """The records so far: what they came to, and whether the job is to end."""

    def __init__(self, results: Results, max_failures: int | None, tick: Any) -> None:
        self._results, self._most, self._tick = results, max_failures, tick
        self.stopped: SteerError | None = None
        self._faults = self._rewarded = self._tokens = 0
        self._reward = 0.0
        self._began = time.monotonic()

    def keep(self, record: dict[str, Any], fault: bool) -> bool:
        """Write a record; False where the job ends."""
        try:
            self._results.add(record)
        except SteerError as error:
            self.stopped = error
            return False
        self._tick(1, self._seen(record))
        failed, out = self._results.failed, self._results.out
        self._faults = self._faults + 1 if fault else 0
        if self._faults >= _FAULTS:
            last = record["error"]["message"]
            self.stopped = SteerError(f"{_FAULTS} rows failed one after another, the last with {last}; see {out}")
        elif self._most is not None and failed > self._most:
            self.stopped = SteerError(f"max_failures: {failed} rows failed, {self._most} may; see {out}")
        return self.stopped is None

    def _seen(self, record: dict[str, Any]) -> str:
        """Rate, mean reward and failures so far."""
        self._tokens += (record.get("cost") or {}).get("generated_tokens", 0)
        for sample in record.get("samples", ()):
            if sample.get("reward") is not None:
                self._reward, self._rewarded = self._reward + sample["reward"], self._rewarded + 1
        told = [f"{self._tokens / max(time.monotonic() - self._began, 1e-9):.0f} tokens/s"] if self._tokens else []
        told += [f"reward {self._reward / self._rewarded:.3f}"] if self._rewarded else []
        told += [f"{self._results.failed} failed"] if self._results.failed else []
        return ", ".join(told)
