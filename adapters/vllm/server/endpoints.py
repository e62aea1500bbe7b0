"""Steering in vLLM's own server, `vllm serve`: the entry point `vllm.endpoint_plugins`.

Loaded where `VLLM_PLUGINS=steer,steer_http` names it, for an engine with `additional_config={"steer": {}}`:

| request                                                           | answered by |
|-------------------------------------------------------------------|-------------|
| `/v1/chat/completions` and `/v1/completions` with a `steer` field | steer, as `steer serve` answers it |
| `/v1/steer/...`                                                   | steer: artifacts, rewards, metrics, description |
| the same with a preset, `SERVED:NAME`, as `model`                 | steer; `/v1/models` lists presets too |
| everything else, also with `vllm_xargs={"steer": "<JSON text>"}`  | vLLM |

What is registered over HTTP, or lies in the folder of artifacts, goes by the same name in all of them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp

from steer.adapters.vllm.server.dispatch import Dispatch
from steer.adapters.vllm.settings import SERVER_PLUGIN, ServerSettings, settings_of
from steer.core import InputError, SteerError, UnsupportedError
from steer.serving.artifact_store import Store, UnknownArtifactError
from steer.serving.engine import Sampling
from steer.serving.protocol import Model, SteerRequest
from steer.serving.wire import is_loopback

if TYPE_CHECKING:
    from fastapi import FastAPI

    from steer.adapters.language.prompts import PromptReader
    from steer.adapters.vllm.model import VLLMModel
    from steer.serving.server import Server

__all__ = ["SteerEndpoints"]


log = logging.getLogger("vllm.steer")


class SteerEndpoints:
    """Steer's part of one server; vLLM makes it and calls its two methods (see vLLM's `EndpointPlugin`)."""

    name = SERVER_PLUGIN
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._app: FastAPI | None = None
        self._reader: PromptReader | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Stand before vLLM's routes, and behind what vLLM puts there afterwards, such as its check of keys."""
        app.add_middleware(Dispatch, ours=self._ours, presets=self._presets, spelled=self._spelled)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Make steer's application over vLLM's engine. Ends the process with one line where it cannot be."""
        names = [model.name for model in state.openai_serving_models.base_model_paths]
        loop = asyncio.get_running_loop()
        try:
            # Off the event loop: artifacts that are there are sent to the engine, through that same loop.
            self._app = await asyncio.to_thread(_application, engine_client, loop, names, args)
        except SteerError as error:
            raise SystemExit(f"steer: {error}") from None
        reader = self._app.state.server.engine.model.reader
        self._reader = reader if reader.split_special_tokens else None
        _drain_before_shutdown(self._app.state.server, engine_client, loop)

    def _spelled(self, texts: list[str]) -> list[str]:
        return [] if self._reader is None else self._reader.spelled(texts)

    def _presets(self) -> dict[str, Any]:
        if self._app is None:
            return {}
        server: Server = self._app.state.server
        length = server.engine.context_length
        return {
            name: Model(id=name, created=server.created, max_model_len=length).model_dump() for name in server.presets
        }

    def _ours(self) -> ASGIApp:
        assert self._app is not None, "the server takes requests once init_state is done"
        return self._app


def _drain_before_shutdown(server: Server, client: Any, loop: asyncio.AbstractEventLoop) -> None:
    """Have `client.shutdown` first let steer's requests finish, for as long as it was given, and end the others: an
    engine that shuts down takes no new requests, which searches need, and answers none that it dropped.
    """
    shut_down, here = client.shutdown, threading.get_ident()

    def shutdown(timeout: float | None = None) -> None:
        began = time.monotonic()
        if threading.get_ident() != here and loop.is_running():
            asyncio.run_coroutine_threadsafe(server.gate.drain(timeout or 0), loop).result()
        server.gate.draining = True
        server.engine.close()
        shut_down(timeout=None if timeout is None else max(0, timeout - (time.monotonic() - began)))

    client.shutdown = shutdown


def _application(client: Any, loop: asyncio.AbstractEventLoop, names: Sequence[str], args: Any) -> FastAPI:
    """Raises `SteerError`."""
    from steer.adapters.vllm.server.engine import VLLMEngine
    from steer.serving.app import AppSettings, create_app
    from steer.serving.reward_store import Rewards

    settings = _settings(client.vllm_config)
    rewards = Rewards(settings.allow_reward, settings.artifacts)
    engine = VLLMEngine(client, loop, name=names[0], split_special_tokens=settings.split_special_tokens)
    engine.warm()
    own = AppSettings(
        artifacts=settings.artifacts,
        keys=_keys(args),
        local=_is_local(args),
        origins=_origins(args),
        limits=settings.limits,
        unsaid=_unsaid(client.vllm_config.model_config),
        names=names,
        presets=_read_presets(settings.presets),
        alone=False,
        require=settings.require,
        inline_vectors=settings.inline_vectors,
    )
    app = create_app(engine, own, rewards)
    store = app.state.server.store
    for name, why in {**store.refused, **rewards.refused}.items():
        log.warning("not registered: %s: %s", name, why)
    store.changed = _Names(store, engine.model)
    for entry in store.entries():
        store.changed(entry.name)
    if store.folder is not None:
        threading.Thread(target=_follow, args=(app.state.server,), name="steer-folder", daemon=True).start()
    return app


def _read_presets(given: Mapping[str, Any]) -> dict[str, SteerRequest]:
    found = {}
    for name, asked in given.items():
        try:
            found[name] = SteerRequest.parse(asked)
        except InputError as error:
            raise InputError(f"presets.{name}: {error.field}", error.given, error.allowed) from None
    return found


_EVERY = 0.5
"""Seconds between looks at the folder of artifacts."""


def _follow(server: Server) -> None:
    """Keep the names that vLLM's own requests use those of the folder, which other processes change, too."""
    while not server.gate.draining:
        time.sleep(_EVERY)
        try:
            server.store.sync()
        except Exception as error:
            log.warning("the folder of artifacts: %s", error)


def _settings(config: Any) -> ServerSettings:
    settings = settings_of(config)
    if settings is None:
        raise UnsupportedError("steering is off: start the engine with --additional-config '{\"steer\": {}}'")
    given = config.additional_config["steer"].get("server", {})
    return ServerSettings.of(given, settings.artifacts, settings.artifact_bytes)


def _unsaid(model_config: Any) -> Sampling:
    """How tokens are drawn where a request does not say: as vLLM draws in its own requests, by `--generation-config`,
    whose default is the checkpoint's. What steered requests have no setting for is named in the log.
    """
    given = dict(model_config.get_diff_sampling_param())
    given.pop("max_tokens", None)
    sampling = {field.name: given.pop(field.name) for field in fields(Sampling) if field.name in given}
    if given and given != {"repetition_penalty": 1.0}:
        log.warning("steered requests do not follow these of the server's default sampling parameters: %s", given)
    sampling["top_k"] = max(0, sampling.get("top_k", 0))
    return Sampling(**sampling)


def _keys(args: Any) -> list[str]:
    """The keys that vLLM checks itself, before requests come here."""
    return [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]


def _origins(args: Any) -> list[str]:
    """Web pages that `--allowed-origins` lets in by name. vLLM's default lets all in, which says nothing."""
    given = list(getattr(args, "allowed_origins", None) or ())
    return [] if given == ["*"] else given


def _is_local(args: Any) -> bool:
    return bool(args.host) and not args.uds and is_loopback(args.host)


class _Names:
    """Keeps the engine's names those of the store. Called with a name that changed, by any thread but the loop's."""

    def __init__(self, store: Store, model: VLLMModel) -> None:
        self._store, self._model = store, model
        self._lock = threading.Lock()

    def __call__(self, name: str) -> None:
        with self._lock:  # the last of several changes finds what is there by then
            try:
                path = self._store.get(name).path
            except UnknownArtifactError:
                if name in self._model.registered:
                    self._model.unregister(name)
                return
            try:
                self._model.register(name, path)
            except (InputError, OSError):
                if path.exists():
                    raise
