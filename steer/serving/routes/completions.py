"""`/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from steer.serving import errors
from steer.serving.answers import Answer, Chat, Completion
from steer.serving.engine import Delta, Finished, Started, Task
from steer.serving.errors import Refused
from steer.serving.gate import Gone, while_wanted
from steer.serving.guard import json_body
from steer.serving.protocol import ChatAnswer, ChatRequest, CompletionAnswer, CompletionRequest, ErrorAnswer

if TYPE_CHECKING:
    from steer.serving.server import Server
    from steer.serving.traces import Trace

__all__ = ["router"]


_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "A field is wrong; `param` names it."},
    401: {"model": ErrorAnswer, "description": "The API key is wrong or missing."},
    403: {"model": ErrorAnswer, "description": "A server without a key was asked from elsewhere."},
    404: {"model": ErrorAnswer, "description": "No such model."},
    413: {"model": ErrorAnswer, "description": "The body is too large, or asks for too much."},
    415: {"model": ErrorAnswer, "description": "The body does not say that it is JSON."},
    429: {"model": ErrorAnswer, "description": "Too many requests; `Retry-After` says when to try again."},
    500: {"model": ErrorAnswer, "description": "The server's mistake."},
    503: {"model": ErrorAnswer, "description": "The server is shutting down."},
}
_STREAM = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "description": "One event: `data` is a chunk as JSON, in the end [DONE].",
            "properties": {"data": {"type": "string"}},
        }
    }
}


def router(server: Server) -> APIRouter:
    """The routes of one server."""
    routes = APIRouter(tags=["openai"], dependencies=[Depends(json_body)])
    answers: dict[int | str, dict[str, Any]] = {**_ERRORS, 200: {"content": _STREAM}}

    @routes.post("/v1/chat/completions", response_model=ChatAnswer, responses=answers)
    async def chat(request: Request, body: ChatRequest) -> Response:
        """Continue a chat, steered by `steer`."""
        return await _written(server, request, body, server.tasks.chat, Chat)

    @routes.post("/v1/completions", response_model=CompletionAnswer, responses=answers)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue texts, steered by `steer`."""
        return await _written(server, request, body, server.tasks.completion, Completion)

    return routes


async def _written(
    server: Server, request: Request, body: Any, read: Callable[[Any], Task], kind: type[Answer]
) -> Response:
    if server.traces is None:
        return await _answered(server, request, body, read, kind)
    trace = server.traces.begin(kind.operation, body.model, request.headers)
    try:
        return await _answered(server, request, body, read, kind, trace)
    except BaseException as error:
        trace.failed(type(error).__name__, str(error))
        raise


async def _answered(
    server: Server,
    request: Request,
    body: Any,
    read: Callable[[Any], Task],
    kind: type[Answer],
    trace: Trace | None = None,
) -> Response:
    if body.model not in server.names:
        allowed = ", ".join(server.names)
        raise Refused(404, f"model: got {body.model!r}; allowed: {allowed}", "model", "model_not_found")
    if (preset := server.presets.get(body.model)) is not None:
        if body.steer is not None:
            raise Refused(400, f"steer: got a field; allowed: none with model {body.model!r}, a preset", "steer")
        body = body.model_copy(update={"steer": preset})
    job = await _Job.begin(server, body, read, kind, trace)
    if job.task.stream:
        return _Stream(job)
    try:
        return await while_wanted(job.whole(), request.receive)
    except Gone:
        job.left()
        return Response(status_code=499)
    finally:
        job.end()


class _Job:
    """One request that was let in. `end` must be called."""

    def __init__(self, server: Server, since: float, trace: Trace | None) -> None:
        self.server, self._since, self.trace = server, since, trace
        self._held = ExitStack()
        self._held.callback(server.gate.leave, since)
        self.kind = "plain"

    @classmethod
    async def begin(
        cls, server: Server, body: Any, read: Callable[[Any], Task], kind: type[Answer], trace: Trace | None
    ) -> _Job:
        job = cls(server, server.gate.enter(), trace)
        try:
            await job._prepare(body, read, kind)
        except BaseException:
            job.end()
            raise
        return job

    async def _prepare(self, body: Any, read: Callable[[Any], Task], kind: type[Answer]) -> None:
        server = self.server
        asked = body.steer or server.tasks.default
        if asked is not None:
            self.kind = "steered" if asked.token_level else "search"
            self._held.enter_context(server.store.using(asked.names))

        def work() -> tuple[Task, Any]:
            task = read(body)
            return task, server.engine.prepare(task)

        self.task, self.prepared = await asyncio.to_thread(work)
        usage = body.stream_options is not None and body.stream_options.include_usage
        named = body.model if body.model in server.presets else server.engine.name
        self.answer = kind(named, self.task, usage)
        server.metrics.requests.labels(self.kind).inc()
        if self.trace is not None:
            self.trace.prepared(self.task, asked)

    def end(self) -> None:
        """Give everything back."""
        self._held.close()

    def left(self) -> None:
        """The client went away."""
        self.server.metrics.left.inc()
        if self.trace is not None:
            self.trace.failed("client_left")

    async def events(self) -> AsyncGenerator[Any]:
        """The engine's events, counted."""
        metrics, first = self.server.metrics, True
        async with aclosing(self.server.engine.run(self.prepared)) as events:
            async for event in events:
                if isinstance(event, Started):
                    metrics.prompt_tokens.inc(event.prompt_tokens)
                elif isinstance(event, Delta) and first:
                    first = False
                    metrics.first_token.labels(self.kind).observe(time.monotonic() - self._since)
                    if self.trace is not None and self.task.stream:
                        self.trace.began(time.monotonic() - self._since)
                elif isinstance(event, Finished):
                    metrics.seconds.labels(self.kind).observe(time.monotonic() - self._since)
                    metrics.generated_tokens.inc(event.cost.generated_tokens)
                    metrics.reward_calls.inc(event.cost.reward_calls)
                yield event

    async def whole(self) -> Response:
        async with aclosing(self.events()) as events:
            async for event in events:
                self.answer.collect(event)
        answer = self.answer.whole()
        if self.trace is not None:
            self.trace.ended(self.answer)
        self.server.metrics.returned_tokens.inc(answer.usage.completion_tokens)
        return JSONResponse(answer.model_dump(exclude_none=False))

    async def chunks(self) -> AsyncGenerator[dict[str, Any]]:
        try:
            async with aclosing(self.events()) as events:
                async for event in events:
                    for chunk in self.answer.add(event):
                        yield chunk
        except Exception as error:
            if self.trace is not None:
                self.trace.failed(type(error).__name__, str(error))
            yield errors.body(error)
            return
        if self.trace is not None:
            self.trace.ended(self.answer)
        self.server.metrics.returned_tokens.inc(self.answer.usage().completion_tokens)


class _Stream(Response):
    """Server-sent events; the work stops where the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, job: _Job) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_wanted(self._send(send), receive)
        except (Gone, OSError):
            self._job.left()
        except BaseException as error:
            if self._job.trace is not None:
                self._job.trace.failed(type(error).__name__, str(error))
            raise
        finally:
            self._job.end()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._job.chunks()) as chunks:
            async for chunk in chunks:
                data = f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
