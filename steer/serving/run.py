"""The run of an application until it is told to stop, and the end of work that is running then."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

import uvicorn
from fastapi import FastAPI

from steer.core import InputError

__all__ = ["listen", "run", "server_of"]


_GRACE = 0.25
"""Seconds in which a request that was sent before a signal is let in after it."""


class _Draining(uvicorn.Server):
    """The first signal to stop lets nobody in and waits for those inside; the second stops at once."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, patience: float) -> None:
        super().__init__(config)
        self._gate, self._patience = app.state.server.gate, patience
        self._named = _named(app)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Future[None] | None = None
        self._told = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        first, *others = _urls(sockets or [])
        also = f", also at {', '.join(others)}" if others else ""
        _say(f"serving on {first}/v1{also}; health {first}/health, description {first}/openapi.json; {self._named}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or self._told:
            super().handle_exit(sig, frame)
            return
        self._told = True
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._drain = asyncio.ensure_future(self._drained())

    async def _drained(self) -> None:
        _say(f"stopping: running requests have {self._patience:g} s to finish; stop again to end them")
        # What was sent before the signal is on its way through the loop, and is let in.
        await asyncio.sleep(_GRACE)
        await self._gate.drain(self._patience)
        self.should_exit = True


def _say(text: str) -> None:
    with suppress(OSError):  # who listened may have gone
        print(f"steer: {text}", file=sys.stderr, flush=True)


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets on every address of `host`, made before anything that takes long: those who ask meanwhile wait. `port` 0
    is any that is free, the same for all. Raises `InputError` where the address is not to be had.
    """
    made: list[socket.socket] = []
    failed: OSError | None = None
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((entry[0], entry[4]) for entry in found):
            at = (address[0], made[0].getsockname()[1] if made else port)
            try:
                made.append(socket.create_server(at, family=family, backlog=2048))
            except OSError as error:  # such as an address of IPv6 where there is none
                failed = error
    except OSError as error:
        failed = error
    taken = failed is not None and failed.errno == errno.EADDRINUSE
    if failed is not None and (taken or not made):
        for one in made:
            one.close()
        raise InputError("port", f"{host}:{port}", f"an address that is free ({failed.strerror or failed})")
    return made


def _urls(sockets: Sequence[socket.socket]) -> list[str]:
    """Where they listen, without a path."""
    shown = []
    for one in sockets:
        host, port = one.getsockname()[:2]
        shown.append(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    return shown


def server_of(app: FastAPI, patience: float, log_requests: bool = False) -> uvicorn.Server:
    """The server that `run` runs."""
    # Its one warning here is that a client left while something was being sent, which is theirs to do.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    config = uvicorn.Config(
        app,
        log_level="info" if log_requests else "warning",
        access_log=log_requests,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=65_536,
    )
    return _Draining(config, app, patience)


def run(app: FastAPI, sockets: list[socket.socket], patience: float, log_requests: bool = False) -> None:
    """Serve until SIGTERM or SIGINT, which mean the same: who was let in, or had sent a request by then, has `patience`
    seconds to finish; others are refused with 503. Who is still there afterwards is ended, and so is everybody at the
    second signal. `log_requests` writes a line for each request.
    """
    server_of(app, patience, log_requests).run(sockets)


def _named(app: FastAPI) -> str:
    """What requests may name."""
    server = app.state.server
    names = sorted([*server.engine.own_edits, *(entry.name for entry in server.store.entries())])
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    own = [entry.name for entry in server.tasks.rewards.registered()]
    rewards = f"; rewards beside the shipped ones: {', '.join(own)}" if own else ""
    return f"model {server.names[0]}, edits: {shown or 'none is registered'}{rewards}"
