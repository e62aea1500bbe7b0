"""Admission of requests: how many run or wait, whether more come at all, and clients that go away."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from steer.serving.errors import Refused
from steer.serving.idle import Idle

__all__ = ["Gate", "Gone", "while_wanted"]


T = TypeVar("T")


class Gone(Exception):
    """The client has left; there is nobody to answer."""


class Gate:
    """Counts requests that run or wait. Belongs to one event loop. `idle` is told when the last one leaves."""

    def __init__(self, limit: int, idle: Idle | None = None) -> None:
        self.limit, self.idle = limit, idle
        self.inside = 0
        self.draining = False
        self._seconds = 1.0
        """Moving average of what a request takes."""

    def enter(self) -> float:
        """Take a place; returns the time, for `leave`. Raises `Refused` with 429 or 503."""
        if self.draining:
            raise Refused(503, "the server is shutting down", code="draining", retry_after=30)
        if self.inside >= self.limit:
            message = f"{self.limit} requests are running or waiting already; try again later"
            raise Refused(429, message, code="queue_full", retry_after=self._retry_after())
        self.inside += 1
        if self.idle is not None:
            self.idle.ends()
        return time.monotonic()

    def leave(self, since: float) -> None:
        """Give the place back."""
        self.inside -= 1
        self._seconds += 0.1 * (time.monotonic() - since - self._seconds)
        if self.idle is not None and not (self.inside or self.draining):
            self.idle.begins()

    async def drain(self, timeout: float) -> bool:
        """Let nobody in, and wait until all have left; False where some are still there after `timeout` seconds."""
        self.draining = True
        if self.idle is not None:
            self.idle.ends()
        end = time.monotonic() + timeout
        while self.inside and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return not self.inside

    def _retry_after(self) -> int:
        return max(1, min(60, math.ceil(self._seconds / 2)))


async def while_wanted(work: Coroutine[Any, Any, T], receive: Callable[[], Awaitable[Any]]) -> T:
    """The result of `work`, which is cancelled where the client goes away first. Raises `Gone` then."""
    doing = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise Gone
        return doing.result()
    finally:
        for task in (doing, watching):
            task.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
