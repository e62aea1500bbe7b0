"""Wrapping of vLLM's functions: once each, and only those that exist."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

_MARK = "_steer_wrapped"


def wrap(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Have `owner.name(...)` call `replacement(original, ...)`; a second call changes nothing."""
    original = getattr(owner, name)
    if getattr(original, _MARK, False):
        return

    @wraps(original)
    def wrapped(*args: Any, **more: Any) -> Any:
        return replacement(original, *args, **more)

    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped)


def optional(name: str) -> Any:
    """A module, or None where this vLLM has no such module."""
    try:
        return import_module(name)
    except ImportError:
        return None


def worker_of(runner: Any) -> Any:
    """The `Worker` of a model runner, None where steering is off; looked up once."""
    from steer.adapters.vllm.plugin.worker import of_config

    held = runner.__dict__.get("steer", False)
    if held is False:
        held = runner.__dict__["steer"] = of_config(runner.vllm_config)
    return held


def tokens_of(ids: Any, count: int) -> Callable[[], list[int]]:
    """The first `count` of a pass's token ids, once they are asked for: that waits for the device."""
    return lambda: [int(token) for token in ids[:count].tolist()]
