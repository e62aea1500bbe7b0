"""Changes that a run makes to a pipeline object, and their undoing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_OFFLOAD = ("_all_hooks", "_offload_device", "_offload_gpu_id")
"""What offloading keeps in the object: it is neither kept from before a run nor put back."""
_MISSING = object()


class Session:
    """Opens a pipeline for a run under another scheduler; it can be opened again within itself."""

    def __init__(self, pipeline: Any, scheduler: Any) -> None:
        self._pipeline, self._scheduler = pipeline, scheduler
        self._depth = 0
        self._kept: dict[str, Any] = {}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The scheduler in place, progress bars off; everything is put back at the end."""
        held = self._pipeline.__dict__
        if self._depth == 0:
            self._kept = {name: value for name, value in held.items() if name not in _OFFLOAD}
            # Past __setattr__, which would rewrite the pipeline's configuration.
            held["scheduler"], held["_progress_bar_config"] = self._scheduler, {"disable": True}
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for name in [n for n in held if n not in self._kept and n not in _OFFLOAD]:
                    del held[name]
                held.update(self._kept)
                self._kept = {}


@contextmanager
def swapped(pipeline: Any, **parts: Any) -> Iterator[None]:
    """Parts of the pipeline replaced for a moment."""
    held, old = pipeline.__dict__, {}
    for name, part in parts.items():
        old[name] = held.get(name, _MISSING)
        held[name] = part
    try:
        yield
    finally:
        for name, part in old.items():
            if part is _MISSING:
                del held[name]
            else:
                held[name] = part


def free(pipeline: Any) -> None:
    """Weights that offloading had brought to the device go back."""
    hooks = getattr(pipeline, "maybe_free_model_hooks", None)
    if hooks is not None:
        hooks()
