"""Session of a command: where results go, and the models that are loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from steer.cli.options import ModelOptions
from steer.loading import is_endpoint, load

__all__ = ["Run", "Session", "kept_on_interrupt"]


@dataclass
class Session:
    """Where results go, and the models that are loaded, each once."""

    out: TextIO
    progress: bool = True
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
            self.models[key] = load(options.model, **settings)
        return self.models[key]


@contextmanager
def kept_on_interrupt(out: Path | None) -> Iterator[None]:
    """Say what an interrupted job has kept, and how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        work = None if out is None else out.with_name(out.name + ".work")
        kept = work is not None and work.exists()
        on = (
            f"what was done is kept in {work}; the same command goes on from there"
            if kept
            else "finished files are kept"
        )
        print(f"steer: {on}", file=sys.stderr)
        raise


Run = Callable[[Session], None]
"""A job that is checked and left to run."""
