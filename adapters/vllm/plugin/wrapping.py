"""Wrapping of vLLM's functions: once each, and only those that exist."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

_MARK = "_steer_wrapped"


def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace `owner.name` by `make(owner.name)`, once."""
    original = getattr(owner, name)
    if getattr(original, _MARK, False):
        return
    wrapped = wraps(original)(make(original))
    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped)


def optional(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        return None


def worker_of(runner: Any) -> Any:
    from steer.adapters.vllm.plugin.worker import of_config

    held = runner.__dict__.get("steer", False)
    if held is False:
        held = runner.__dict__["steer"] = of_config(runner.vllm_config)
    return held
