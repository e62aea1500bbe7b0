"""Rollouts of a process: rows drawn from their prompts to their ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from steer.core import Run, Samples

__all__ = ["rollouts"]


def rollouts(run: Run, n: int, narrow: Callable[[Any], Any] | None = None) -> Samples:
    """`n` outputs for each prompt with their rewards. `narrow` gives rows up between steps."""
    process = run.process
    state = process.init(run.prompts, n, run.generator)
    while not process.done(state):
        state = process.propose(state, run.generator)
        if narrow is not None and not process.done(state):
            state = narrow(state)
        run.step(state)
    samples = process.decode(state)
    return samples if run.given is None else replace(samples, reward=run.score(samples))
