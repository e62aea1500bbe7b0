"""Memory that a burst of work leaves behind.

A C library keeps what was freed for the next allocation: after a few hundred requests of many sizes that is hundreds of
megabytes of a server's resident memory, which look like a leak and are missed elsewhere.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
from collections.abc import Callable

__all__ = ["Idle", "give_back_memory"]


def give_back_memory() -> bool:
    """Return this process's freed pages to the system. False, and nothing done, where the C library is not glibc."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return False
    trim(0)
    return True


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
