"""Guards before the application: the key, foreign web pages, and bodies that are too large."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steer.serving.errors import Refused, answer
from steer.serving.wire import is_loopback

__all__ = ["Guard", "json_body"]


_OPEN = ("/health", "/v1/steer/health")
"""Paths that need no key."""


def _host(address: str) -> str:
    """The host in `HOST:PORT`, "" where it cannot be read."""
    try:
        return urlsplit(f"//{address}").hostname or ""
    except ValueError:
        return ""


@dataclass(frozen=True)
class Guard:
    """ASGI middleware. Without keys, `local` servers answer only who asks for this machine by its own name, so that no
    web page can reach them through a browser.
    """

    app: ASGIApp
    keys: Sequence[str]
    local: bool
    body_bytes: int
    artifact_bytes: int
    origins: Sequence[str] = ()
    """Web pages of other sites that may ask, `*` for all."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit = self.artifact_bytes + 65_536 if scope["path"] == "/v1/steer/artifacts" else self.body_bytes
        try:
            self._check_caller(scope["path"], headers)
            _check_length(headers, limit)
        except Refused as error:
            await answer(error)(scope, receive, send)
            return
        await self.app(scope, _counted(receive, limit), send)

    def _check_caller(self, path: str, headers: Headers) -> None:
        if path in _OPEN:
            return
        if self.keys:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            # Every key is compared, and each in constant time.
            right = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in self.keys]
            if scheme.lower() != "bearer" or not any(right):
                raise Refused(401, "wrong or missing API key: send it as Authorization: Bearer KEY")
            return
        origin = headers.get("origin")
        asked = headers.get("host", "")
        if self.local and not is_loopback(_host(asked or "localhost")):
            raise Refused(403, f"this server without a key answers as localhost alone, not as {asked!r}")
        welcome = origin is None or origin.partition("://")[2] == asked or not {"*", origin}.isdisjoint(self.origins)
        if not welcome:
            raise Refused(403, "this server without a key answers no web pages of other sites: see --allow-origin")


async def json_body(request: Request) -> None:
    """Raise `HTTPException` where a body does not say that it is JSON. A dependency of routes."""
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise HTTPException(415, f"Content-Type: got {given[:80]!r}; allowed: application/json")


def _check_length(headers: Headers, limit: int) -> None:
    length = headers.get("content-length", "0")
    if not length.isdecimal():
        raise Refused(400, f"Content-Length: got {length!r}; allowed: a number of bytes")
    if int(length) > limit:
        raise Refused(413, f"body: got {length} bytes; allowed: at most {limit}")


def _counted(receive: Receive, limit: int) -> Receive:
    """`receive` for bodies that do not say how long they are."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message: Any = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise HTTPException(413, f"body: got more than {limit} bytes; allowed: at most {limit}")
        return message

    return counted
