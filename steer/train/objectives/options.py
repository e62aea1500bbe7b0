"""Options of pieces: the keyword-only parameters of the functions that a run is made of, and no second list of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, get_type_hints

from pydantic import TypeAdapter, ValidationError

from steer.core import InputError
from steer.train.objectives import advantages, losses, rounds, surrogates
from steer.train.settings import describe

__all__ = ["Pieces", "chosen", "options_of", "taken"]


class Pieces(Protocol):
    """What settings say of pieces."""

    @property
    def link(self) -> str | None: ...

    @property
    def surrogate(self) -> str | None: ...

    @property
    def pairing(self) -> str: ...

    @property
    def advantage(self) -> str | None: ...

    @property
    def credit(self) -> str: ...

    @property
    def options(self) -> dict[str, Any]: ...


def _parts(settings: Pieces) -> list[Callable[..., Any]]:
    """The functions whose keyword-only parameters are options of these settings."""
    found: list[Callable[..., Any]] = []
    if settings.link:
        found.append(losses.Loss)
    if settings.surrogate:
        found.append(surrogates.SURROGATES[settings.surrogate])
    if settings.pairing == "margin":
        found.append(rounds.margin)
    rule = "group_std" if settings.advantage in ("weighted",) else settings.advantage
    if rule in advantages.ADVANTAGES:
        found.append(advantages.ADVANTAGES[rule])
    if settings.advantage == "weighted":
        found.append(advantages.weighted)
    if settings.credit == "entropy_steps":
        found.append(advantages.entropy_steps)
    if settings.credit == "turns":
        found.append(advantages.turns)
    return found


_TAKEN = {
    "beta",
    "prox",
    "score",
    "target",
    "link",
    "weight",
    "anchor",
    "weights",
    "length",
    "seed",
    "quantiles",
    "levels",
    "ddof",
}
"""Parameters that are settings of their own, or that the driver fills in."""


@cache
def _declared(piece: Callable[..., Any]) -> dict[str, Any]:
    hints = get_type_hints(piece)
    parameters = inspect.signature(piece).parameters.values()
    return {p.name: hints[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _TAKEN}


def options_of(settings: Pieces) -> dict[str, Any]:
    """Names and types of the options that the chosen pieces take."""
    return {name: hint for piece in _parts(settings) for name, hint in _declared(piece).items()}


def chosen(settings: Pieces, piece: Callable[..., Any]) -> dict[str, Any]:
    """The options among `settings` that belong to one piece."""
    return {name: value for name, value in settings.options.items() if name in _declared(piece)}


def taken(name: str, value: Any, hint: Any) -> Any:
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise InputError(name, value, describe(hint) or error.errors()[0]["msg"]) from None
