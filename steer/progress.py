"""Progress on standard error, so that standard output holds results only."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from steer.logs import record

EVERY = 30.0
"""Seconds between lines where standard error is no terminal."""


def bar() -> Any:
    """A `rich` progress bar with time and rate."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


Watch = Callable[[int, int], None]

SHOWN = ("loss", "reward", "kl", "accuracy", "tokens/s")
"""Figures that stand beside a bar; all of them go to the log."""


class Tick(Protocol):
    """Advances a bar by a count of units, with a text or with figures beside it, which go to the log too."""

    def __call__(self, count: int, seen: str = "", /, **figures: float) -> None: ...


def untold(count: int, seen: str = "", /, **figures: float) -> None:
    """A `Tick` for work that nobody watches."""


@contextmanager
def ticking(shown: bool | Watch, what: str, total: int) -> Iterator[Tick]:
    """A bar over `total` units of work, or, where standard error is no terminal, a line every 30 s. Shows nothing
    unless asked; figures go to the log that `steer.logs.logging_to` set up all the same. A function in place of True is
    called with the units done and their total instead; what it raises ends the work.
    """
    done = 0
    with _shown(shown, what, total) as advance:

        def tick(count: int, seen: str = "", /, **figures: float) -> None:
            nonlocal done
            done += count
            if figures:
                record(what, done, figures)
                seen = ", ".join(f"{name} {figures[name]:.4g}" for name in SHOWN if name in figures)
            advance(count, seen)

        yield tick


@contextmanager
def _shown(shown: bool | Watch, what: str, total: int) -> Iterator[Callable[[int, str], None]]:
    if callable(shown):
        yield _watched(shown, total)
    elif not shown:
        yield lambda count, seen: None
    elif not sys.stderr.isatty():
        yield _lines(what, total)
    else:
        with bar() as progress:
            task = progress.add_task(what, total=total)

            def advance(count: int, seen: str) -> None:
                progress.update(task, advance=count, description=f"{what}, {seen}" if seen else None)

            yield advance


def note(shown: bool, text: str) -> None:
    """A line on standard error, such as where a run goes on. Shows nothing unless asked."""
    if shown:
        print(f"steer: {text}", file=sys.stderr, flush=True)


def _watched(watch: Watch, total: int) -> Callable[[int, str], None]:
    done = 0

    def tick(count: int, seen: str) -> None:
        nonlocal done
        done += count
        watch(done, total)

    return tick


def _lines(what: str, total: int) -> Callable[[int, str], None]:
    began = last = time.monotonic()
    done, told = 0, ""

    def tick(count: int, seen: str) -> None:
        nonlocal done, last, told
        done, now = done + count, time.monotonic()
        told = f", {seen}" if seen else told
        if now - last >= EVERY:
            last, left = now, (now - began) / max(done, 1) * max(total - done, 0)
            passed = f"{now - began:.0f} s, {left:.0f} s left"
            print(f"{what}: {done} of {total}{told}, {passed}", file=sys.stderr, flush=True)

    return tick
