"""Routes about the server itself: models, health, counters."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse

import steer
from steer.methods.samplers import SAMPLERS
from steer.serving.errors import Refused
from steer.serving.protocol import Capabilities, ErrorAnswer, Health, Model, ModelList
from steer.serving.server import Server
from steer.serving.tasks import sampler_settings

_UNREADY: dict[int | str, dict[str, Any]] = {
    503: {"model": Health, "description": "The server is shutting down, or waits for artifacts."}
}
_DENIED: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorAnswer, "description": "The API key is wrong or missing."},
    403: {"model": ErrorAnswer, "description": "A server without a key was asked from elsewhere."},
}


def router(server: Server) -> APIRouter:
    """What every server of OpenAI's kind has."""
    routes, engine = APIRouter(), server.engine

    def model(name: str) -> Model:
        return Model(id=name, created=server.created, max_model_len=engine.context_length)

    @routes.get("/v1/models", response_model=ModelList, responses=_DENIED, tags=["openai"])
    async def models() -> ModelList:
        """The model that is served, and its presets: the same model under edits of their own."""
        return ModelList(data=[model(name) for name in (engine.name, *server.presets)])

    @routes.get(
        "/v1/models/{name:path}",
        response_model=Model,
        tags=["openai"],
        responses={**_DENIED, 404: {"model": ErrorAnswer, "description": "No such model."}},
    )
    async def one_model(name: str) -> Model:
        """One model."""
        known = (engine.name, *server.presets)
        if name not in known:
            raise Refused(404, f"model: got {name!r}; allowed: {', '.join(known)}", "model", "model_not_found")
        return model(name)

    @routes.get("/health", response_model=Health, tags=["server"], responses=_UNREADY)
    async def health() -> JSONResponse:
        """Whether requests are taken."""
        return await _health(server)

    @routes.get("/metrics", response_class=PlainTextResponse, responses=_DENIED, tags=["server"])
    async def metrics() -> PlainTextResponse:
        """Counters in Prometheus's text format."""
        return _counters(server)

    return routes


def own_router(server: Server) -> APIRouter:
    """The same under steer's own path, where it is not the server's only application."""
    routes = APIRouter(prefix="/v1/steer")

    @routes.get("/metrics", response_class=PlainTextResponse, responses=_DENIED, tags=["steer"])
    async def metrics() -> PlainTextResponse:
        """Counters of steering in Prometheus's text format."""
        return _counters(server)

    @routes.get("/health", response_model=Health, responses=_UNREADY, tags=["steer"])
    async def health() -> JSONResponse:
        """Whether steered requests are taken: the artifacts that the server was told to wait for are there."""
        return await _health(server)

    @routes.get("/capabilities", response_model=Capabilities, responses=_DENIED, tags=["steer"])
    async def capabilities() -> Capabilities:
        """What this server can do: samplers, rewards, edits, limits, versions."""
        return await asyncio.to_thread(_capabilities, server)

    @routes.get("/openapi.json", include_in_schema=False)
    async def description(request: Request) -> JSONResponse:
        return JSONResponse(request.app.openapi())

    return routes


async def _health(server: Server) -> JSONResponse:
    waiting = await asyncio.to_thread(server.waiting)
    status = "draining" if server.gate.draining else "waiting" if waiting else "ok"
    told = {"status": status} | ({"waiting": waiting} if waiting else {})
    return JSONResponse(told, 200 if status == "ok" else 503)


def _capabilities(server: Server) -> Capabilities:
    engine, store = server.engine, server.store
    return Capabilities(
        version=steer.__version__,
        engine=engine.kind,
        model=engine.name,
        max_model_len=engine.context_length,
        samplers={name: sampler_settings(name) for name in SAMPLERS},
        edits=list(engine.edit_kinds),
        own_edits=list(engine.own_edits),
        inline_vectors=server.tasks.inline is not None,
        rewards=sorted(server.tasks.rewards.usages()),
        limits=asdict(server.tasks.limits),
        registering=store.folder is not None,
        shared=store.folder is not None,
    )


def _counters(server: Server) -> PlainTextResponse:
    return PlainTextResponse(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
