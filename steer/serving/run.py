"""Runs the application until it is told to stop, and lets running work finish then."""

from __future__ import annotations

import asyncio
import logging
import sys
from contextlib import suppress
from types import FrameType

import uvicorn
from fastapi import FastAPI

__all__ = ["run"]


class _Draining(uvicorn.Server):
    """The first signal to stop lets nobody in and waits for those inside; the second stops at once."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, patience: float) -> None:
        super().__init__(config)
        self._gate, self._patience = app.state.server.gate, patience
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Future[None] | None = None

    async def startup(self, sockets: object = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)  # type: ignore[arg-type]
        for server in self.servers:
            for socket in server.sockets:
                host, port = socket.getsockname()[:2]
                shown = f"[{host}]" if ":" in host else host
                _say(f"serving on http://{shown}:{port}/v1")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or self._gate.draining:
            super().handle_exit(sig, frame)
            return
        self._gate.draining = True
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._drain = asyncio.ensure_future(self._drained())

    async def _drained(self) -> None:
        _say("stopping once running requests are done; stop again to end them")
        await self._gate.drain(self._patience)
        self.should_exit = True


def _say(text: str) -> None:
    with suppress(OSError):  # who listened may have gone
        print(f"steer: {text}", file=sys.stderr, flush=True)


def run(app: FastAPI, host: str, port: int, patience: float) -> None:
    """Serve until SIGTERM or SIGINT; running requests then get `patience` seconds to finish.

    Requests that are still there are ended, and others refused with 503 meanwhile.
    """
    # Its one warning here is that a client left while something was being sent, which is theirs to do.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", access_log=False, server_header=False, lifespan="on",
        timeout_graceful_shutdown=5, h11_max_incomplete_event_size=65_536,
    )  # fmt: skip
    _Draining(config, app, patience).run()
