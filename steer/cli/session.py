"""Session of a command: where results go, and the models that are loaded."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from steer.cli.options import ModelOptions
from steer.loading import is_endpoint, load
from steer.progress import note

__all__ = ["Run", "Session", "kept_on_interrupt", "silent"]


@dataclass
class Session:
    """Where results go, and the models that are loaded, each once."""

    out: TextIO
    progress: bool = True
    verbose: bool = False
    models: dict[tuple[str, str, str | None, bool], Any] = field(default_factory=dict)

    def say(self, text: str, end: str = "\n") -> None:
        """Write to the results."""
        print(text, file=self.out, end=end, flush=True)

    def load(self, options: ModelOptions) -> Any:
        """The model that `options` name."""
        key = (options.model, options.dtype, options.device, options.check)
        if key not in self.models:
            given = {"dtype": options.dtype, "device": options.device} | ({} if options.check else {"check": False})
            settings: dict[str, Any] = {} if is_endpoint(options.model) else given
            note(self.verbose, f"loading {options.model}")
            began = time.monotonic()
            self.models[key] = load(options.model, **settings)
            note(self.verbose, f"loaded {options.model} in {time.monotonic() - began:.1f} s")
        return self.models[key]


def silent() -> TextIO:
    """Where the results of all ranks but the first go: they are the same."""
    return open(os.devnull, "w", encoding="utf-8")


@contextmanager
def kept_on_interrupt(out: Path | None) -> Iterator[None]:
    """Say what an interrupted job has kept, and how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        work = None if out is None else out.with_name(out.name + ".work")
        kept = work is not None and work.exists()
        lines = out is not None and out.suffix == ".jsonl" and out.is_file()
        where = work if kept else out if lines else None
        on = "finished files are kept"
        if where is not None:
            on = f"what was done is kept in {where}; the same command goes on from there"
        print(f"steer: {on}", file=sys.stderr)
        raise


Run = Callable[[Session], None]
"""A job that is checked and left to run."""
