"""Fleets on paper: how long a job takes on many workers, by a model in closed form and by a simulation of the queue.

    python -m steer.bench.fleet --calls 100000 --workers 1 8 1000 --mean 4 --spread 0.5 --failures 1e-4 --restart 60

A call is what a worker does at one time: a batch of rows that decode together. Its length is drawn from a gamma law.
Workers take the next call from one queue (Ray, a balancer), or each has its share from the start (`--shards`, array
jobs). They fail at a rate in time, memorylessly; what was at work is lost, the worker comes back after a while and does
that call again, which is what `steer batch` does: records that were written stay.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from steer.core import check, check_whole

__all__ = ["Job", "Outcome", "main", "predicted", "simulate"]


@dataclass(frozen=True)
class Job:
    """What is to be done. Times are in seconds. Raises `InputError`."""

    calls: int
    workers: int = 1
    mean: float = 1.0
    """Of a call."""
    spread: float = 0.0
    """Standard deviation over mean of a call: 0 all alike, 1 exponential."""
    failures: float = 0.0
    """Of one worker, for each second of work."""
    restart: float = 0.0
    """Until a worker that has failed is there again."""
    shards: bool = False
    """Whether each worker has its share from the start."""

    def __post_init__(self) -> None:
        check_whole("calls", self.calls)
        check_whole("workers", self.workers)
        check(self.mean > 0, "mean", self.mean, "a number above 0")
        for name in ("spread", "failures", "restart"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "a number of 0 or more")
        stuck = self.failures * self.mean * self.spread**2
        check(stuck < 1, "failures", self.failures, "fewer: the longest calls would never end between two failures")


@dataclass(frozen=True)
class Outcome:
    """How a job went."""

    seconds: float
    """Until the last record."""
    redone: int
    """Calls that failures made the workers begin again."""
    efficiency: float
    """Calls times their mean length, over what all workers were there for."""


def simulate(job: Job, seed: int = 0) -> Outcome:
    """One run of the queue, event by event."""
    drawn = random.Random(seed)
    redone = 0

    def length() -> float:
        """Of a call from its first try to its end."""
        nonlocal redone
        shape = math.inf if job.spread == 0 else job.spread**-2
        own = job.mean if shape == math.inf else drawn.gammavariate(shape, job.mean / shape)
        spent = 0.0
        while job.failures and (lost := drawn.expovariate(job.failures)) < own:
            spent, redone = spent + lost + job.restart, redone + 1
        return spent + own

    free = [0.0] * job.workers
    for i in range(job.calls):
        if job.shards:
            free[i % job.workers] += length()
        else:  # whoever is free first takes the next call
            heapq.heapreplace(free, free[0] + length())
    seconds = max(free)
    return Outcome(seconds, redone, job.calls * job.mean / (seconds * job.workers))


def predicted(job: Job) -> float:
    """Seconds by the model: calls times their mean length with failures, over the workers, and what the last ones wait.

    A call of length s that fails at rate f and comes back after c takes `(1 / f + c) (exp(f s) - 1)` on average, over
    the gamma law of s. The wait is that of exponential calls for one queue (their drain, `H_W - 1` calls), scaled by
    the spread, and that of the largest of W normal sums for shards.
    """
    f, c, m, v = job.failures, job.restart, job.mean, job.spread**2
    each = m
    if f:
        grown = math.exp(f * m) if v == 0 else (1 - f * m * v) ** (-1 / v)
        each = (1 / f + c) * (grown - 1)
    workers = min(job.workers, job.calls)
    share = job.calls / workers
    if job.shards:
        return share * each + job.spread * m * math.sqrt(2 * share * math.log(workers))
    waits = job.spread * m * (sum(1 / k for k in range(1, workers + 1)) - 1)
    return max(math.ceil(share) if job.spread == 0 else share, 1) * each + waits


def main(arguments: Sequence[str] | None = None) -> int:
    """Print model and simulation beside each other."""
    parser = argparse.ArgumentParser(prog="python -m steer.bench.fleet", description="How long a job takes on a fleet.")
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 1000])
    for name, default in (("mean", 4.0), ("spread", 0.5), ("failures", 1e-4), ("restart", 60.0)):
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--shards", action="store_true", help="shares from the start, in place of one queue")
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args(arguments))
    seed, sizes = given.pop("seed"), given.pop("workers")
    print("workers  model, s  simulated, s  calls redone  efficiency")
    for workers in sizes:
        job = replace(Job(**given), workers=workers)
        found = simulate(job, seed)
        print(
            f"{workers:7}  {predicted(job):8.0f}  {found.seconds:12.0f}  {found.redone:12}  {found.efficiency:10.3f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
