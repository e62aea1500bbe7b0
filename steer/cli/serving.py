"""`steer serve`: an OpenAI-compatible server."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from steer.cli import checks
from steer.cli.checks import Coming
from steer.cli.options import GenerateOptions, ListenOptions, ServeOptions
from steer.cli.session import Run, Session
from steer.cli.values import pairs, typed
from steer.core import SteerError, check
from steer.core.names import check_known
from steer.edits import split_spec
from steer.hub import PREFIX, download
from steer.methods.samplers import SAMPLERS
from steer.progress import note
from steer.serving.artifact_store import check_name
from steer.serving.limits import Limits
from steer.serving.reward_store import Rewards
from steer.serving.wire import NAME, EditRequest, SteerRequest, is_loopback

if TYPE_CHECKING:
    from steer.serving.engine import Engine
    from steer.serving.traces import Traces

__all__ = ["Default", "check_engine", "default_steering", "keys_of", "serve", "start_engine"]


_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "multipart")
_TRACING = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")
_ENGINES = ("transformers", "vllm")


@dataclass(frozen=True)
class Default:
    """How requests are steered that ask for nothing, and the files which that takes."""

    model: str
    request: SteerRequest
    files: tuple[Path, ...]


def serve(options: ServeOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to serve."""
    check(0 <= options.port <= 65_535, "port", options.port, "0 (any that is free) to 65535")
    check(options.drain >= 0, "drain", options.drain, "seconds, 0 or more")
    for origin in options.allow_origin:
        right = origin == "*" or re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin) is not None
        check(right, "allow_origin", origin, "an origin as browsers send it, such as https://chat.example, or *")
    check(not options.require or options.artifacts is not None, "require", options.require, "unset without --artifacts")
    for name in options.require:
        check_name(name)
    check(0 < options.search_share < 1, "search_share", options.search_share, "a share of the time between 0 and 1")
    keys = keys_of(options)
    default = None if options.recipe is None else _from_recipe(options.recipe)
    named = options.model or ("" if default is None else default.model)
    check(bool(named), "model", "", "a model, or a --recipe that names one")
    options = replace(options, model=named)
    if _is_pool(options.model):
        _check_pool(options)
    else:
        checks.check_model(options)
        checks.check_causal(options)
    checks.check_generation_config(options.generation_config)
    presets, files = _presets(options.preset)
    rewards = Rewards(options.allow_reward, options.artifacts)
    if default is not None and default.request.reward is not None:
        rewards.parse(default.request.reward)
    _check_installed()
    _check_traces(options)
    check_engine(options)
    _limits(options)

    def run(session: Session) -> None:
        from steer.serving.app import AppSettings, create_app
        from steer.serving.engine import Sampling
        from steer.serving.run import listen
        from steer.serving.run import run as serve_until_told

        sockets = listen(options.host, options.port)
        engine = start_engine(options, session)
        settings = AppSettings(
            artifacts=options.artifacts,
            files=tuple(dict.fromkeys([*(() if default is None else default.files), *files])),
            presets=presets,
            keys=keys,
            local=is_loopback(options.host),
            origins=options.allow_origin,
            limits=_limits(options),
            default=None if default is None else default.request,
            unsaid=Sampling() if options.generation_config is None else engine.own_sampling(),
            require=options.require,
            inline_vectors=options.inline_vectors,
            traces=_traces(options),
        )
        app = create_app(engine, settings, rewards)
        if options.artifacts is not None and not options.artifacts.exists():
            note(True, f"artifacts: {options.artifacts} is not there; the first that a client registers makes it")
        for name, why in {**app.state.server.store.refused, **rewards.refused}.items():
            print(f"steer: not registered: {name}: {why}", file=sys.stderr)
        serve_until_told(app, sockets, options.drain, options.log_requests)

    return run


def keys_of(options: ListenOptions) -> tuple[str, ...]:
    """The keys in the environment, separated by white space; a server that others can reach has one."""
    if options.api_key_env is not None:
        keys = tuple(os.environ.get(options.api_key_env, "").split())
        check(bool(keys), "api_key_env", options.api_key_env, "an environment variable that holds a key")
        return keys
    check(
        is_loopback(options.host) or options.no_key,
        "host",
        options.host,
        "127.0.0.1, or --api-key-env NAME beside it; --no-key lets everybody in who can reach it",
    )
    return ()


def _check_installed() -> None:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise SteerError(f"steer serve needs {', '.join(missing)}: pip install steer-engine[serve]")


def _check_traces(options: ServeOptions) -> None:
    if options.otlp is None:
        check(not options.otlp_text, "otlp_text", True, "unset, or with --otlp URL")
        return
    at = re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", options.otlp)
    check(at is not None, "otlp", options.otlp, "the address of a collector over HTTP, such as http://127.0.0.1:4318")
    try:
        missing = any(find_spec(name) is None for name in _TRACING)
    except ModuleNotFoundError:  # of a package that they are in
        missing = True
    if missing:
        raise SteerError("--otlp needs opentelemetry: pip install 'steer-engine[otel]'")


def check_engine(options: ServeOptions) -> None:
    """The engine of a language model, and settings of its own."""
    check(options.engine in _ENGINES, "engine", options.engine, ", ".join(_ENGINES))
    _engine_settings(options)
    if options.engine == "vllm":
        from steer.adapters.vllm.settings import check_version

        check_version()


def _traces(options: ServeOptions) -> Traces | None:
    if options.otlp is None:
        return None
    from steer.serving.traces import exported

    return exported(options.otlp, options.otlp_text)


def _is_pool(model: str) -> bool:
    """Whether a file describes several models behind a router."""
    return model.endswith((".yaml", ".yml"))


def _check_pool(options: ServeOptions) -> None:
    check(Path(options.model).is_file(), "model", options.model, "a file that is there")
    check(options.engine == "transformers", "engine", options.engine, "transformers, for models behind a router")
    for name in ("recipe", "generation_config"):
        check(
            getattr(options, name) is None, name, getattr(options, name), "unset: several models are behind the router"
        )


def _limits(options: ServeOptions) -> Limits:
    return Limits(**{entry.name: getattr(options, f"max_{entry.name}") for entry in fields(Limits)})


def start_engine(options: ServeOptions, session: Session) -> Engine:
    """The engine that `options` ask for, with its model."""
    if _is_pool(options.model):
        from steer.serving.pool import PoolEngine

        return PoolEngine(session.load(options), _served_name(options))
    if options.engine == "vllm":
        from steer.adapters.vllm.server.own_engine import serving_engine

        return serving_engine(
            options.model,
            name=_served_name(options),
            dtype=options.dtype,
            max_rows=options.max_rows,
            searches=options.searches,
            settings=_engine_settings(options),
            split_special_tokens=options.split_special_tokens,
        )
    from steer.adapters.transformers.serving.engine import TransformersEngine

    return TransformersEngine(
        session.load(options),
        name=_served_name(options),
        max_rows=options.max_rows,
        cache_tokens=options.cache_tokens,
        searches=options.searches,
        search_share=options.search_share,
        split_special_tokens=options.split_special_tokens,
    )


def _engine_settings(options: ServeOptions) -> dict[str, Any]:
    """Settings of vLLM: JSON where it is, text elsewhere."""
    given = pairs(options.engine_set, "engine_set")
    check(not given or options.engine == "vllm", "engine_set", options.engine_set, "unset: settings of engine vllm")
    return {key: _json_or_text(value) for key, value in given.items()}


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _served_name(options: ServeOptions) -> str:
    """A folder or a file goes by its last part: clients need not know where it lies."""
    model = options.model
    return options.name or (Path(model).resolve().name if Path(model).exists() else model)


# ------------------------------------------------------------------------------------------------------------ recipe


def _from_recipe(source: str) -> Default:
    """The steering of a recipe's last `generate` job."""
    from steer.cli.recipe import load_recipe

    recipe = load_recipe(source)
    jobs = [step.options for step in recipe.steps if isinstance(step.options, GenerateOptions)]
    check(bool(jobs), "recipe", source, "a recipe with a generate job, whose steering is served")
    job = jobs[-1]
    check(not checks.draws_images(job), "recipe", source, "a recipe of a language model")
    for text in job.edit:
        path = split_spec(text)[0]
        check(Path(path).is_file(), "recipe", path, f"a file that is there: steer run {source} makes it")
    return default_steering(job)


def default_steering(job: GenerateOptions) -> Default:
    """A `generate` job's steering, as requests say it."""
    edits = [_edit(text) for text in job.edit]
    settings: dict[str, Any] = {}
    candidates = job.n
    if job.sampler != "ancestral":
        check_known("sampler", job.sampler, SAMPLERS)
        kind = SAMPLERS[job.sampler]
        given = pairs(job.set)
        preset = {"preset": given.pop("preset")} if "preset" in given else {}
        settings = typed(given, get_type_hints(kind), f"setting of {job.sampler}") | preset
        candidates = settings.pop(kind.population, candidates)
    request = SteerRequest.parse(
        {
            "edits": [edit for edit, _ in edits],
            "sampler": job.sampler,
            "settings": settings,
            "candidates": None if job.sampler == "ancestral" else candidates,
            "reward": job.reward,
            "critic": job.critic,
            "beta": job.beta,
        }
    )
    return Default(job.model, request, tuple(path for _, path in edits))


def _presets(given: list[str]) -> tuple[dict[str, SteerRequest], list[Path]]:
    """`NAME=FILE[:STRENGTH][:KEY=VALUE]` as steering by name, several edits where a name comes again; and the files.
    Raises `InputError`.
    """
    edits: dict[str, list[dict[str, Any]]] = {}
    files: list[Path] = []
    for text in given:
        name, equals, spec = text.partition("=")
        check(bool(equals) and NAME.fullmatch(name) is not None, "preset", text, "NAME=FILE[:STRENGTH][:KEY=VALUE]")
        made, path = _edit(spec)
        edits.setdefault(name, []).append(made)
        files.append(path)
    names = {path.stem: path for path in files}
    twice = [str(path) for path in files if names[path.stem] != path]
    check(not twice, "preset", twice, "files of different names")
    return {name: SteerRequest.parse({"edits": mine}) for name, mine in edits.items()}, files


def _edit(text: str) -> tuple[dict[str, Any], Path]:
    path, strength, options = split_spec(text)
    path = str(download(path)) if path.startswith(PREFIX) else path
    check(Path(path).is_file(), "edit", path, "a file that is there")
    hints = {k: v for k, v in get_type_hints(EditRequest).items() if k in EditRequest.model_fields}
    del hints["name"], hints["vector"], hints["strength"]
    made = {"name": Path(path).stem, "strength": strength, **typed(options, hints, "edit")}
    return {k: v for k, v in made.items() if v is not None}, Path(path)
