"""Errors of the server, each in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from steer.core import InputError, RewardError, SteerError, UnsupportedError
from steer.serving.engine import TooLargeError
from steer.serving.wire import field_of, nearest, wanted

__all__ = ["TEXT_ROUTES", "Refused", "answer", "install"]


log = logging.getLogger("steer.serving")

TEXT_ROUTES = ("/v1/chat/completions", "/v1/completions")

_TYPES = {
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", None),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    409: ("invalid_request_error", "conflict"),
    413: ("invalid_request_error", "too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    429: ("rate_limit_error", "queue_full"),
    500: ("server_error", None),
    503: ("server_error", "unavailable"),
}


class Refused(Exception):
    """A request that is refused with this status; `code` is OpenAI's short word for why."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after


def answer(error: Exception) -> JSONResponse:
    """What a client is told about an error."""
    if isinstance(error, Refused):
        return _json(error.status, str(error), error.param, error.code, error.retry_after)
    if isinstance(error, TooLargeError):
        return _json(413, str(error), error.field)
    if isinstance(error, InputError):
        return _json(400, str(error), error.field, _context_code(error))
    if isinstance(error, UnsupportedError):
        return _json(400, str(error), "steer")
    if isinstance(error, RewardError):
        return _json(400, str(error), "steer.reward")
    if isinstance(error, SteerError):
        return _json(503, str(error))
    log.error("a request failed", exc_info=error)
    return _json(500, "the server made a mistake; its log says which")


def body(error: Exception) -> dict[str, Any]:
    """The same as data, for streams that have begun."""
    return json.loads(bytes(answer(error).body))


def install(app: FastAPI) -> None:
    """Have the application answer all its errors so."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid(error.errors())

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        nowhere = error.status_code == 404 and error.detail == "Not Found"
        return _json(error.status_code, _no_route(request) if nowhere else str(error.detail))

    async def told(request: Request, error: Exception) -> JSONResponse:
        return answer(error)

    for kind in (Refused, SteerError, Exception):
        app.add_exception_handler(kind, told)


def _no_route(request: Request) -> str:
    return f"no route {request.method} {request.url.path[:200]!r} here; texts come from {' and '.join(TEXT_ROUTES)}"


def _context_code(error: InputError) -> str | None:
    return "context_length_exceeded" if "the model's context" in error.allowed else None


def _json(
    status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int | None = None
) -> JSONResponse:
    kind, usual = _TYPES.get(status, ("invalid_request_error", None))
    content = {"error": {"message": message, "type": kind, "param": param, "code": code or usual}}
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(content, status, headers)


def _invalid(errors: Sequence[Any]) -> JSONResponse:
    """One line about the first thing that is wrong with a body."""
    first = nearest(errors)
    named = ".".join(field_of(first["loc"])) or None
    if first["type"] == "json_invalid":
        return _json(400, "the body is not JSON")
    if first["type"] == "extra_forbidden":
        return _json(400, f"{named}: unknown field", named, "unknown_parameter")
    if first["type"] == "missing":
        return _json(400, f"{named or 'body'}: missing", named, "missing_required_parameter")
    shown = repr(first.get("input"))
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return _json(400, f"{named or 'body'}: got {shown}; {wanted(first)}", named, "invalid_value")
