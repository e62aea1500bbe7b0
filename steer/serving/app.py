"""The application: one engine, its artifacts and rewards, behind OpenAI's routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from steer.serving import errors
from steer.serving.artifact_store import Store, check_name
from steer.serving.engine import Engine, Sampling
from steer.serving.gate import Gate
from steer.serving.guard import Guard
from steer.serving.idle import Idle
from steer.serving.inline import Inline
from steer.serving.limits import Limits
from steer.serving.metrics import CountedRequests, Metrics
from steer.serving.protocol import RegisterRequest
from steer.serving.reward_store import Rewards
from steer.serving.routes import completions, docs, models, registry
from steer.serving.server import Server
from steer.serving.tasks import Tasks
from steer.serving.wire import SteerRequest

if TYPE_CHECKING:
    from steer.serving.traces import Traces

__all__ = ["AppSettings", "create_app"]


@dataclass(frozen=True, kw_only=True)
class AppSettings:
    """What an application allows, and how it behaves where a request does not say.

    Attributes:
        artifacts: folder of registered vectors, controllers and value heads.
        files: artifacts elsewhere, registered under their names.
        keys: API keys, any of which opens; without one everybody may ask.
        local: without keys, answer only requests that name this machine as localhost.
        origins: web pages of other sites that may ask, such as `https://chat.example`; `*` for all.
        limits: see `Limits`.
        default: steering of requests that ask for none.
        unsaid: how tokens are drawn where a request does not say; default: by the whole law at temperature 1.
        names: further names of the model.
        presets: steering by name, each of which is a model `NAME:PRESET` of its own, for clients that send no more.
        inline_vectors: whether a request may bring a vector of its own.
        traces: begins a span for each request, such as `steer.serving.traces.exported(url)`; closed with the server.
        require: artifacts that must be registered before `/health` says that the server is ready.
        alone: False leaves the models, health and metrics to a server that this application is part of; its own metrics
            are at `/v1/steer/metrics`.
    """

    artifacts: Path | None = None
    files: Sequence[Path] = ()
    keys: Sequence[str] = ()
    local: bool = True
    origins: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)
    default: SteerRequest | None = None
    unsaid: Sampling = field(default_factory=Sampling)
    names: Sequence[str] = ()
    presets: Mapping[str, SteerRequest] = field(default_factory=dict)
    alone: bool = True
    inline_vectors: bool = False
    traces: Traces | None = None
    require: Sequence[str] = ()


def create_app(engine: Engine, settings: AppSettings | None = None, rewards: Rewards | None = None) -> FastAPI:
    """An OpenAI-compatible application.

    Args:
        engine: what generates, such as `steer.adapters.transformers.serving.engine.TransformersEngine`.
        settings: default: everything open to this machine, and nothing registered.
        rewards: those that requests may name; default: the shipped ones that load nothing.
    """
    settings = settings or AppSettings()
    server = _server(engine, settings, rewards or Rewards(folder=settings.artifacts))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        server.gate.draining = True
        server.files.shutdown(wait=False, cancel_futures=True)
        engine.close()
        if settings.traces is not None:
            await asyncio.to_thread(settings.traces.close)

    app = FastAPI(
        title="steer",
        summary="OpenAI-compatible generation with steering.",
        lifespan=lifespan,
        docs_url=None,  # the framework's page loads its script from elsewhere; `routes/docs.py` has ours
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server = server
    errors.install(app)
    alone = settings.alone
    for routes in (completions.router, registry.router, *([models.router] if alone else []), models.own_router):
        app.include_router(routes(server))
    if alone:
        app.include_router(docs.router())
    _guard(app, settings, server.metrics)
    _describe(app, server.names, bool(settings.keys))
    return app


def _server(engine: Engine, settings: AppSettings, rewards: Rewards) -> Server:
    """What the routes share."""
    limits = settings.limits
    store = Store(
        settings.artifacts,
        engine.check_artifact,
        files=settings.files,
        limit=limits.artifacts,
        limit_bytes=limits.artifact_bytes,
    )
    gate = Gate(limits.requests, Idle(engine.give_back_memory))
    rewards.follow(lambda name: store.get(name).path)
    inline = Inline(lambda: engine.info, limits.vector_bytes) if settings.inline_vectors else None
    tasks = Tasks(store, rewards, limits, settings.default, engine.own_edits, settings.unsaid, inline)
    steered = {f"{engine.name}:{name}": asked for name, asked in settings.presets.items()}
    known = tuple(dict.fromkeys((engine.name, *settings.names, *steered)))
    for name, asked in steered.items():
        tasks.check_edits(asked, f"preset {name}")
    for name in settings.require:
        check_name(name)
    return Server(
        engine,
        store,
        tasks,
        gate,
        Metrics(engine, gate, store),
        ThreadPoolExecutor(1, "steer-files"),
        int(time.time()),
        known,
        steered,
        require=tuple(settings.require),
        traces=settings.traces,
    )


def _guard(app: FastAPI, settings: AppSettings, metrics: Metrics) -> None:
    """Put what every request passes around the routes: keys, sizes, origins, counts."""
    app.add_middleware(
        Guard,
        keys=tuple(settings.keys),
        local=settings.local and not settings.keys,
        body_bytes=settings.limits.body_bytes,
        artifact_bytes=settings.limits.artifact_bytes,
        origins=tuple(settings.origins),
    )
    app.add_middleware(CountedRequests, metrics=metrics)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )


def _describe(app: FastAPI, names: Sequence[str], keys: bool) -> None:
    """The OpenAPI description as the server behaves: bad input is 400, and keys are named where they are needed."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = made()
            schemas = schema["components"]["schemas"]
            schemas["RegisterRequest"] = RegisterRequest.model_json_schema()
            for name in ("ChatRequest", "CompletionRequest"):
                schemas[name]["properties"]["model"]["enum"] = list(names)
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for path, methods in schema["paths"].items():
                for operation in methods.values():
                    operation["responses"].pop("422", None)
                    if keys and not path.endswith("/health"):
                        operation["security"] = [{"key": []}]
            if keys:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
