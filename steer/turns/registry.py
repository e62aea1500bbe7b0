"""Environments by name: `courier`, `bandit:arms=.6,.4`, `tools`, `gymnasium:ID`, `module:factory`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

from steer.core import InputError, SteerError, check
from steer.core.names import meant
from steer.rewards.parse import named_function
from steer.turns.environment import Environment

__all__ = ["ENVIRONMENTS", "make", "maker"]

ENVIRONMENTS: dict[str, str] = {
    "courier": "steer.turns.courier:Courier",
    "bandit": "steer.turns.bandit:Bandit",
    "ledger": "steer.turns.ledger:Ledger",
}
"""Where each environment's class is."""

_FORMS = "NAME:KEY=VALUE,..., gymnasium:ID, or module:factory"


def make(name: str, **settings: Any) -> Environment:
    """A new environment. Raises `InputError` for a name or a setting that is not known."""
    return maker(name, **settings)()


def maker(name: str, **settings: Any) -> Callable[[], Environment]:
    """What makes environments of one kind: it has made one, so that what is wrong is told now."""
    check(isinstance(name, str) and bool(name.strip()), "environment", name, _allowed())
    kind, _, more = name.strip().partition(":")
    if kind == "gymnasium":
        from steer.turns.gymnasium import Gymnasium

        return _tried(lambda: Gymnasium(more, **settings), name)
    if kind not in ENVIRONMENTS:
        return _from_module(name, kind, more, settings)
    module, _, cls = ENVIRONMENTS[kind].partition(":")
    factory = getattr(import_module(module), cls)
    given = _settings(more, name) | settings
    known = list(inspect.signature(factory).parameters)
    for key in given:
        check(key in known, f"environment {kind}", key, f"{', '.join(known) or 'no settings'}{meant(key, known)}")
    return _tried(lambda: factory(**given), name)


def _allowed() -> str:
    return f"{', '.join(sorted(ENVIRONMENTS))} ({_FORMS})"


def _from_module(name: str, kind: str, path: str, settings: dict[str, Any]) -> Callable[[], Environment]:
    check(bool(path) and "=" not in path, "environment", name, f"{_allowed()}{meant(kind, ENVIRONMENTS)}")
    factory = named_function("environment", name)
    check(callable(factory), "environment", name, "a class or a function that makes an environment")
    return _tried(lambda: factory(**settings), name)


def _tried(make: Callable[[], Any], name: str) -> Callable[[], Environment]:
    try:
        found = make()
    except SteerError:
        raise
    except Exception as error:
        raise InputError("environment", f"{name} ({type(error).__name__}: {error})", _FORMS) from error
    fits = isinstance(found, Environment)
    check(fits, "environment", f"{name}, which makes {type(found).__name__}", "a subclass of steer.turns.Environment")
    return make


def _settings(text: str, name: str) -> dict[str, Any]:
    """`arms=.6,.4,horizon=20` as settings: what has no key belongs to the one before it."""
    found: dict[str, list[str]] = {}
    last = ""
    for part in (piece.strip() for piece in text.split(",")) if text else ():
        key, equals, value = part.partition("=")
        check(bool(equals) or bool(last), "environment", name, _FORMS)
        if equals:
            last = key.strip()
            found[last] = [value]
        else:
            found[last].append(part)
    return {key: [_value(v) for v in values] if len(values) > 1 else _value(values[0]) for key, values in found.items()}


def _value(text: str) -> Any:
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
        return float(text)
    return {"true": True, "false": False}.get(text.lower(), text)
