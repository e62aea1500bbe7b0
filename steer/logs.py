"""Logs of training: the figures of every step, as lines of a file or in an experiment tracker, while it runs.

Trainers say their figures where they advance their progress (`steer.progress.ticking`); `logging_to` says where these
go. Trackers are those of accelerate: tensorboard, wandb, trackio, mlflow and others, each if it is installed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from steer.core.errors import InputError, check
from steer.core.names import meant
from steer.files import replacing
from steer.ranks import ranks

__all__ = ["check_targets", "logging_to", "record"]

Sink = Callable[[str, int, Mapping[str, float]], None]
"""Takes a phase, a step of it and its figures."""

_SINKS: ContextVar[tuple[Sink, ...]] = ContextVar("sinks", default=())


def record(phase: str, step: int, figures: Mapping[str, float]) -> None:
    """Hand the figures of step `step` of a phase, such as "training", to where `logging_to` says."""
    for sink in _SINKS.get():
        sink(phase, step, figures)


@contextmanager
def logging_to(
    *targets: Path | str, folder: Path | str | None = None, settings: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Log all training within the block; of several ranks the first alone does.

    A line of a file is `{"phase", "step", "seconds", figure: number, ...}`; a training that goes on from a checkpoint
    writes the steps after it anew. Trackers get the figures as `phase/figure`.

    Args:
        targets: files `FILE.jsonl`, and names of trackers, such as "tensorboard".
        folder: where trackers that write files do; default: the current one.
        settings: of the run, for trackers that show them.

    Raises:
        InputError: a target that is neither, or a tracker that is not installed.
    """
    check_targets(targets)
    targets = targets if ranks().first else ()
    names = [str(t) for t in targets if not _is_file(t)]
    with ExitStack() as stack:
        sinks: list[Sink] = [_Lines(Path(t)) for t in targets if _is_file(t)]
        if names:
            sinks.append(stack.enter_context(_trackers(names, Path(folder or "."), settings or {})))
        token = _SINKS.set((*_SINKS.get(), *sinks))
        try:
            yield
        finally:
            _SINKS.reset(token)


def check_targets(targets: Sequence[Path | str]) -> None:
    """Raise `InputError` unless each target is a file `FILE.jsonl` in a folder that is there, or a tracker that is."""
    for target in targets:
        if _is_file(target):
            folder = Path(target).absolute().parent
            check(folder.is_dir(), "log", str(target), f"a file in a folder that exists ({folder} does not)")
        else:
            _check_tracker(str(target))


def _is_file(target: Path | str) -> bool:
    return Path(target).suffix == ".jsonl"


def _check_tracker(name: str) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(LOGGER_TYPE_TO_CLASS)
    check(name in known, "log", name, f"FILE.jsonl, {', '.join(known)}{meant(name, known)}")
    installed = [str(kind.value) for kind in get_available_trackers()]
    if name not in installed:
        raise InputError(
            "log", name, f"FILE.jsonl, or a tracker that is installed ({', '.join(installed) or 'none is'})"
        )


class _Lines:
    """Lines of JSON at the end of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._began = time.monotonic()
        self._met: set[str] = set()

    def __call__(self, phase: str, step: int, figures: Mapping[str, float]) -> None:
        if phase not in self._met:
            self._met.add(phase)
            self._forget(phase, step)
        plain = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        entry = {"phase": phase, "step": step, "seconds": round(time.monotonic() - self._began, 3), **plain}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")

    def _forget(self, phase: str, step: int) -> None:
        """Drop lines of a phase from a step on, which an interrupted run has left, and a line that was cut."""
        if not self.path.is_file():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _is_before(line, phase, step)]
        if kept != lines:
            with replacing(self.path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _is_before(line: str, phase: str, step: int) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return not (isinstance(entry, dict) and entry.get("phase") == phase and entry.get("step", 0) >= step)


@contextmanager
def _trackers(names: list[str], folder: Path, settings: Mapping[str, Any]) -> Iterator[Sink]:
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=names, project_dir=str(folder / "logs"))
    plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.items()}
    accelerator.init_trackers("steer", config=plain)

    def sink(phase: str, step: int, figures: Mapping[str, float]) -> None:
        accelerator.log({f"{phase}/{name}": value for name, value in figures.items()}, step=step)

    try:
        yield sink
    finally:
        accelerator.end_training()
