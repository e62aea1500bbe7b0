"""Progress on standard error, so that standard output holds results only."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def ticking(shown: bool | Watch, what: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar over `total` units of work, or, where standard error is no terminal, a line every 30 s; the function that
    it gives advances it by a count, and shows a text such as a loss beside it. Shows nothing unless asked. A function
    in place of True is called with the units done and their total instead; what it raises ends the work.
    """
    if callable(shown):
        yield _watched(shown, total)
    elif not shown:
        yield lambda count, seen="": None
    elif not sys.stderr.isatty():
        yield _lines(what, total)
    else:
        with bar() as progress:
            task = progress.add_task(what, total=total)

            def advance(count: int, seen: str = "") -> None:
                progress.update(task, advance=count, description=f"{what}, {seen}" if seen else what)

            yield advance


def note(shown: bool, text: str) -> None:
    """A line on standard error, such as where a run goes on. Shows nothing unless asked."""
    if shown:
        print(f"steer: {text}", file=sys.stderr, flush=True)


def _watched(watch: Watch, total: int) -> Callable[..., None]:
    done = 0

    def tick(count: int, seen: str = "") -> None:
        nonlocal done
        done += count
        watch(done, total)

    return tick


def _lines(what: str, total: int) -> Callable[..., None]:
    began = last = time.monotonic()
    done = 0

    def tick(count: int, seen: str = "") -> None:
        nonlocal done, last
        done, now = done + count, time.monotonic()
        if now - last >= EVERY:
            last, left = now, (now - began) / max(done, 1) * max(total - done, 0)
            told = f", {seen}" if seen else ""
            passed = f"{now - began:.0f} s, {left:.0f} s left"
            print(f"{what}: {done} of {total}{told}, {passed}", file=sys.stderr, flush=True)

    return tick
