"""What a command's work is given: where results go, and the models that are loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

from steer.cli.options import ModelOptions
from steer.loading import is_endpoint, load

__all__ = ["Run", "Session"]


@dataclass
class Session:
    """Where results go, and the models that are loaded, each once."""

    out: TextIO
    progress: bool = field(default_factory=lambda: sys.stderr.isatty())
    models: dict[tuple[str, str, str | None], Any] = field(default_factory=dict)

    def say(self, text: str, end: str = "\n") -> None:
        """Write to the results."""
        print(text, file=self.out, end=end, flush=True)

    def load(self, options: ModelOptions) -> Any:
        """The model that `options` name."""
        key = (options.model, options.dtype, options.device)
        if key not in self.models:
            given = {"dtype": options.dtype, "device": options.device}
            settings: dict[str, Any] = {} if is_endpoint(options.model) else given
            self.models[key] = load(options.model, **settings)
        return self.models[key]


Run = Callable[[Session], None]
"""A job that is checked and left to run."""
