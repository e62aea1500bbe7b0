"""Benchmarks of bulk jobs: rows a second against a plain loop over `generate`, and on two processes.

    python -m steer.bench.bulk ROWS I/N

answers a share of so many rows and prints the CPU time that this took, loading and a first warm-up aside.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from steer.bench.harness import Bench, Figure, Task, ratios
from steer.bulk import Requests, run_job
from steer.bulk.source import Shard
from steer.serving.artifact_store import Store
from steer.serving.limits import Limits
from steer.serving.reward_store import Rewards
from steer.serving.tasks import Tasks

BATCH, TOKENS = 8, 32
_MOST = 1 << 30


def rate(bench: Bench, rows: int = 32) -> Iterator[Figure]:
    """Rows a second of a bulk job over those of a loop over `generate`, with batches and texts of the same sizes."""
    given = _rows(bench, rows)
    with tempfile.TemporaryDirectory() as folder, _endless(bench.model.network):
        loop, job = bench.compare([_loop(bench, given), _job(bench.model, given, Path(folder))])
    yield Figure("batch", f"steer batch / loop over generate, rows/s, batch {BATCH}", ratios(loop, job), at_least=0.97)


def spread(bench: Bench, rows: int = 64) -> Iterator[Figure]:
    """Rows a second of two processes at one time over those of one, each with one thread. Seconds are CPU time, of the
    slower of the two, so that what else the machine does is no part of it; what they take from each other's caches and
    memory is.
    """
    one: list[float] = []
    two: list[float] = []
    for repeat in range(bench.repeats):
        for count in (1, 2) if repeat % 2 == 0 else (2, 1):
            (one if count == 1 else two).append(_processes(rows, count))
    yield Figure("batch", "two processes / one, rows/s", ratios(one, two), at_least=1.8)


@contextmanager
def _endless(network: Any) -> Iterator[None]:
    """No text ends early."""
    config = network.generation_config
    kept, config.eos_token_id = config.eos_token_id, []
    try:
        yield
    finally:
        config.eos_token_id = kept


def _rows(bench: Bench, count: int) -> list[dict[str, Any]]:
    prompts = bench.prompts(count)
    return [{"id": str(i), "prompt": str(prompts[i % len(prompts)])} for i in range(count)]


def _loop(bench: Bench, given: Sequence[dict[str, Any]]) -> Task:
    def run() -> None:
        for first in range(0, len(given), BATCH):
            prompts = [row["prompt"] for row in given[first : first + BATCH]]
            bench.model.generate(prompts, seed=0, max_new_tokens=TOKENS, max_rows=BATCH, eos_token_id=[])

    return run


def _job(model: Any, given: Sequence[dict[str, Any]], folder: Path, shard: Shard | None = None) -> Task:
    """The whole of a job: its file is read twice, and its records are written."""
    from steer.adapters.transformers.serving.engine import TransformersEngine

    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    limits = Limits(choices=_MOST, candidates=_MOST, tokens=_MOST, total_tokens=_MOST)

    def run() -> None:
        engine = TransformersEngine(model, max_rows=BATCH, cache_tokens=_MOST)
        try:
            tasks = Tasks(Store(None, engine.check_artifact), Rewards(), limits)
            worker = Requests(engine, tasks, fields={"max_tokens": TOKENS}, capacity=2 * BATCH)
            run_job(worker, str(source), str(folder / "records.jsonl"), {}, shard=shard, overwrite=True)
        finally:
            engine.close()

    return run


def _processes(rows: int, count: int) -> float:
    """CPU seconds of the slowest of `count` processes that share the rows at one time."""
    command = [sys.executable, "-m", "steer.bench.bulk", str(rows)]
    started = [subprocess.Popen([*command, f"{i}/{count}"], stdout=subprocess.PIPE, text=True) for i in range(count)]
    return max(float(process.communicate()[0]) for process in started)


def main(rows: str, shard: str) -> None:
    """What `spread` starts."""
    torch.set_num_threads(1)
    bench = Bench()
    given = _rows(bench, int(rows))
    with tempfile.TemporaryDirectory() as folder, _endless(bench.model.network):
        _job(bench.model, given[:BATCH], Path(folder))()
        run = _job(bench.model, given, Path(folder), Shard.parse(shard))
        began = time.process_time()
        run()
        print(time.process_time() - began)


if __name__ == "__main__":
    main(*sys.argv[1:])
