"""The end of an engine's processes: with the process that started them, however that one ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

__all__ = ["ending_with_us", "watch_parent"]


_WATCHED = "STEER_ENDS_WITH_PARENT"
_PATIENCE = 30.0
"""Seconds that a process gets to end by itself."""


@contextmanager
def ending_with_us() -> Iterator[None]:
    """Processes that are started inside end when this one does."""
    before = os.environ.get(_WATCHED)
    os.environ[_WATCHED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WATCHED]
        else:
            os.environ[_WATCHED] = before


@cache
def watch_parent() -> None:
    """Watch the parent where it asked for it."""
    parent = multiprocessing.parent_process()
    if parent is None or _WATCHED not in os.environ:
        return

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_PATIENCE)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="steer-watch").start()
