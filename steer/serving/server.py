"""State that the routes of one server share."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from steer.serving.artifact_store import Store
from steer.serving.engine import Engine
from steer.serving.gate import Gate
from steer.serving.metrics import Metrics
from steer.serving.tasks import Tasks
from steer.serving.wire import SteerRequest

if TYPE_CHECKING:
    from steer.serving.traces import Traces

__all__ = ["Server"]


@dataclass(frozen=True)
class Server:
    """One engine with its artifacts and rewards, and who is inside."""

    engine: Engine
    store: Store
    tasks: Tasks
    gate: Gate
    metrics: Metrics
    files: ThreadPoolExecutor
    """One thread, in which what clients register is read: beside those that prepare requests for text, however many
    uploads there are.
    """
    created: int
    names: tuple[str, ...]
    """What requests may call the model; the first is its own."""
    presets: Mapping[str, SteerRequest] = field(default_factory=dict)
    """Steering of the names that stand for a steered model."""
    require: tuple[str, ...] = ()
    """Artifacts that must be registered before the server says that it is ready."""
    traces: Traces | None = None
    """What begins the span of each request, where there are spans."""

    def waiting(self) -> list[str]:
        """Those that are not yet."""
        return [name for name in self.require if not self.store.has(name)]
