"""What a server does once nobody is inside any more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

__all__ = ["Idle"]

log = logging.getLogger(__name__)


class Idle:
    """Calls `rest` in a thread when nobody has come for `seconds` after the last one left. Belongs to an event loop."""

    def __init__(self, rest: Callable[[], object], seconds: float = 3.0) -> None:
        self._rest, self._seconds = rest, seconds
        self._timer: asyncio.TimerHandle | None = None

    def begins(self) -> None:
        """The last one has left."""
        self.ends()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._seconds, lambda: loop.run_in_executor(None, self._safely))

    def ends(self) -> None:
        """Somebody has come."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _safely(self) -> None:
        try:
            self._rest()
        except Exception:  # an engine that is being shut down
            log.debug("no rest", exc_info=True)
