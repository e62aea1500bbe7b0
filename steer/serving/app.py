"""The application: one engine, its artifacts and rewards, behind OpenAI's routes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from steer.serving import errors
from steer.serving.artifact_store import Store, check_name
from steer.serving.engine import Engine, Sampling
from steer.serving.gate import Gate
from steer.serving.guard import Guard
from steer.serving.idle import Idle
from steer.serving.limits import Limits
from steer.serving.metrics import CountedRequests, Metrics
from steer.serving.protocol import RegisterRequest
from steer.serving.reward_store import Rewards
from steer.serving.routes import completions, docs, models, registry
from steer.serving.server import Server
from steer.serving.tasks import Tasks
from steer.serving.wire import SteerRequest

__all__ = ["create_app"]


def create_app(
    engine: Engine,
    *,
    artifacts: Path | None = None,
    files: Sequence[Path] = (),
    keys: Sequence[str] = (),
    local: bool = True,
    origins: Sequence[str] = (),
    limits: Limits | None = None,
    rewards: Rewards | None = None,
    default: SteerRequest | None = None,
    unsaid: Sampling | None = None,
    names: Sequence[str] = (),
    presets: Mapping[str, SteerRequest] | None = None,
    alone: bool = True,
    require: Sequence[str] = (),
) -> FastAPI:
    """An OpenAI-compatible application.

    Args:
        engine: what generates, such as `steer.adapters.transformers.serving.engine.TransformersEngine`.
        artifacts: folder of registered vectors, controllers and value heads.
        files: artifacts elsewhere, registered under their names.
        keys: API keys, any of which opens; without one everybody may ask.
        local: without keys, answer only requests that name this machine as localhost.
        origins: web pages of other sites that may ask, such as `https://chat.example`; `*` for all.
        limits: see `Limits`.
        rewards: those that requests may name; default: the shipped ones that load nothing.
        default: steering of requests that ask for none.
        unsaid: how tokens are drawn where a request does not say; default: by the whole law at temperature 1.
        names: further names of the model.
        presets: steering by name, each of which is a model `NAME:PRESET` of its own, for clients that send no more.
        require: artifacts that must be registered before `/health` says that the server is ready.
        alone: False leaves the models, health and metrics to a server that this application is part of; its own metrics
            are at `/v1/steer/metrics`.
    """
    limits = limits or Limits()
    store = Store(
        artifacts, engine.check_artifact, files=files, limit=limits.artifacts, limit_bytes=limits.artifact_bytes
    )
    gate = Gate(limits.requests, Idle(engine.give_back_memory))
    metrics = Metrics(engine, gate, store)
    rewards = rewards or Rewards(folder=artifacts)
    rewards.follow(lambda name: store.get(name).path)
    tasks = Tasks(store, rewards, limits, default, engine.own_edits, unsaid or Sampling())
    reading = ThreadPoolExecutor(1, "steer-files")
    steered = {f"{engine.name}:{name}": asked for name, asked in (presets or {}).items()}
    known = tuple(dict.fromkeys((engine.name, *names, *steered)))
    for name, asked in steered.items():
        tasks.check_edits(asked, f"preset {name}")
    for name in require:
        check_name(name)
    server = Server(
        engine, store, tasks, gate, metrics, reading, int(time.time()), known, steered, require=tuple(require)
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        gate.draining = True
        reading.shutdown(wait=False, cancel_futures=True)
        engine.close()

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
    for routes in (completions.router, registry.router, *([models.router] if alone else []), models.own_router):
        app.include_router(routes(server))
    if alone:
        app.include_router(docs.router())
    app.add_middleware(
        Guard,
        keys=tuple(keys),
        local=local and not keys,
        body_bytes=limits.body_bytes,
        artifact_bytes=limits.artifact_bytes,
        origins=tuple(origins),
    )
    app.add_middleware(CountedRequests, metrics=metrics)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    _describe(app, server.names, bool(keys))
    return app


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
