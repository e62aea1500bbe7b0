"""Dispatch of requests: steered ones to steer's application, all others to vLLM's."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steer.serving.errors import TEXT_ROUTES, Refused, answer

__all__ = ["Dispatch"]


_OURS = "/v1/steer/"
_MODELS = "/v1/models"
_INSIDE = (*TEXT_ROUTES, "/v1/responses", "/v1/messages", "/invocations")
"""Routes of vLLM that pass `vllm_xargs` on; others would drop it without a word."""


class Dispatch:
    """ASGI middleware. Steer's application answers `/v1/steer/...` and requests for text with a `steer` field; all
    others reach the server as they came.

    Args:
        app: the server's own application.
        ours: steer's, asked for with each request.
        spelled: control tokens that some of these texts spell out. vLLM's own routes would read them as what they are
            to the model, so that steered requests to them are refused where a user's text holds one.
        presets: models that stand for steering, as `/v1/models` tells them, by name; asked for with each request.
            Other routes than those for text refuse them, since they would answer without it.
    """

    def __init__(
        self,
        app: ASGIApp,
        ours: Callable[[], ASGIApp],
        spelled: Callable[[list[str]], list[str]] = lambda texts: [],
        presets: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self.app, self.ours, self.spelled, self.presets = app, ours, spelled, presets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        app = self.app
        if scope["type"] == "http" and path.startswith(_OURS):
            app = self._at(path)
        elif scope["type"] == "http" and scope["method"] == "GET" and path.startswith(_MODELS) and self.presets():
            one = self.presets().get(unquote(path.removeprefix(_MODELS).removeprefix("/")))
            app = app if one is None else JSONResponse(one)
            send = _Listing(send, list(self.presets().values())) if path == _MODELS else send
        elif scope["type"] == "http" and scope["method"] == "POST" and not _is_form(scope):
            body, receive = await _read(receive)
            try:
                if _is_steered(body, path, self.presets(), self.spelled):
                    app = self._at(path)
            except Refused as error:
                app = answer(error)
        await app(scope, receive, send)

    def _at(self, path: str) -> ASGIApp:
        """Steer's application at its own root, whatever the path of the server's is."""

        async def at(scope: Scope, receive: Receive, send: Send) -> None:
            await self.ours()({**scope, "path": path, "root_path": ""}, receive, send)

        return at


def _is_form(scope: Scope) -> bool:
    """Whether the body is files and fields, which no route that steers takes."""
    kind = dict(scope["headers"]).get(b"content-type", b"")
    return kind.lower().startswith((b"multipart/", b"application/octet-stream"))


async def _read(receive: Receive) -> tuple[bytes, Receive]:
    """A request's body, and a `receive` that gives it again. An application that reads JSON holds all of it anyway."""
    messages: deque[Message] = deque()
    pieces = []
    more = True
    while more:
        message = await receive()
        messages.append(message)
        pieces.append(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)

    async def again() -> Message:
        return messages.popleft() if messages else await receive()

    return b"".join(pieces), again


class _Listing:
    """Sends a list of models with more of them in it; anything else as it comes."""

    def __init__(self, send: Send, more: list[Any]) -> None:
        self._send, self._more = send, more
        self._start: Message = {}
        self._pieces: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._pieces.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        body = b"".join(self._pieces)
        if self._start["status"] == 200:
            listed = json.loads(body)
            body = json.dumps({**listed, "data": [*listed["data"], *self._more]}).encode()
        headers = [(name, value) for name, value in self._start["headers"] if name.lower() != b"content-length"]
        await self._send({**self._start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})


def _is_steered(body: bytes, path: str, presets: Collection[str], spelled: Callable[[list[str]], list[str]]) -> bool:
    """Whether the request asks for steering on top. Raises `Refused` where it would be lost."""
    marks = (b'"steer"', b"\\u00", *(f":{name.rpartition(':')[2]}".encode() for name in presets))
    if not any(mark in body for mark in marks):  # letters may be written as their numbers
        return False
    try:
        given: Any = json.loads(body)
    except (ValueError, RecursionError):
        return False
    if not isinstance(given, dict):
        return False
    model = given.get("model")
    if given.get("steer") is not None or (isinstance(model, str) and model in presets):
        if path not in TEXT_ROUTES and given.get("steer") is None:
            raise Refused(400, f"model: got {model!r} for {path}; allowed: {', '.join(TEXT_ROUTES)}", "model")
        if path not in TEXT_ROUTES:
            raise Refused(400, f"steer: got a request for {path}; allowed: {', '.join(TEXT_ROUTES)}", "steer")
        return True
    inside = given.get("vllm_xargs")
    if not isinstance(inside, dict) or inside.get("steer") is None:
        return False
    if path not in _INSIDE:
        raise Refused(400, f"vllm_xargs.steer: got a request for {path}; allowed: {', '.join(_INSIDE)}", "vllm_xargs")
    if given.get("use_beam_search"):
        allowed = "unset with steering, which beam search would lose"
        raise Refused(400, f"use_beam_search: got {given['use_beam_search']!r}; allowed: {allowed}", "use_beam_search")
    field = "input" if path == "/v1/responses" else "messages"
    control = spelled(list(_of_users(given.get(field))))
    if control:
        allowed = 'text without it with vllm_xargs; with a "steer" field it is read as text'
        raise Refused(400, f"{field}: got the control token {control[0]!r} in a user's text; allowed: {allowed}", field)
    return False


def _of_users(messages: Any) -> Iterator[str]:
    """Texts of users and tools in messages of any of vLLM's routes."""
    if isinstance(messages, str):
        yield messages
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict) and message.get("role") not in ("system", "developer", "assistant"):
            yield from _texts(message)


def _texts(part: Any) -> Iterator[str]:
    """Every text in a part of a message."""
    waiting = [part]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict | list):
            waiting += one.values() if isinstance(one, dict) else one
