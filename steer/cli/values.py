"""Typed settings from text and YAML, with errors that name what is allowed."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from steer.core import InputError, check
from steer.train.settings import check_known

__all__ = ["build", "check_known", "coerce", "pairs", "settings_of", "spelled", "typed"]


T = TypeVar("T")


def pairs(given: Iterable[str], where: str = "--set") -> dict[str, str]:
    """`key=value` texts as a dictionary."""
    found: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        check(bool(key) and bool(equals), where, text, "key=value")
        check(key not in found, where, text, f"each key once ({key}={found.get(key)} was given too)")
        found[key] = value
    return found


def typed(given: Mapping[str, str], hints: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings from text, with the types of `hints`; unknown ones are refused."""
    check_known(where, given, list(hints))
    return {key: coerce(key, value, hints[key]) for key, value in given.items()}


def spelled(field_name: str) -> str:
    """How people write the option of a field: `class` for `class_`."""
    return field_name.rstrip("_")


def build(kind: type[T], settings: Mapping[str, Any], where: str) -> T:
    """A dataclass of options from a mapping, checked key by key."""
    hints = get_type_hints(kind)
    declared = {spelled(f.name): f for f in fields(kind)}  # type: ignore[arg-type]
    check_known(where, settings, list(declared))
    for name, option in declared.items():
        required = option.default is MISSING and option.default_factory is MISSING
        if required and name not in settings:
            raise InputError(where, sorted(settings), f"also needed: {name}")
    given = {declared[key].name: (key, value) for key, value in settings.items()}
    return kind(**{name: coerce(key, value, hints[name]) for name, (key, value) in given.items()})


def settings_of(options: Any) -> dict[str, Any]:
    """What `build` makes the options from again: the settings that differ from their defaults, as plain data."""
    found = {}
    for option in fields(options):
        value = getattr(options, option.name)
        default = option.default if option.default_factory is MISSING else option.default_factory()
        if value != default:
            found[spelled(option.name)] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return str(value) if isinstance(value, Path) else value


def coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotation `hint` wants it; text is read, and nothing is guessed beyond that."""
    origin = get_origin(hint)
    if origin is Annotated:
        return coerce(name, value, get_args(hint)[0])
    if origin in (Union, types.UnionType):
        return _one_of(name, value, get_args(hint))
    if origin is Literal:
        check(value in get_args(hint), name, value, ", ".join(map(str, get_args(hint))))
        return value
    if origin in (list, tuple, AbstractSequence):
        return _several(name, value, hint, tuple if origin is tuple else list)
    if hint in _READERS:
        return _READERS[hint](name, value)
    raise InputError(name, value, "nothing: this setting can only be given from Python")


def _one_of(name: str, value: Any, members: tuple[Any, ...]) -> Any:
    if type(None) in members and (value is None or str(value).lower() in ("none", "null")):
        return None
    error: InputError | None = None
    for member in (m for m in members if m is not type(None)):
        try:
            return coerce(name, value, member)
        except InputError as refused:
            error = refused
    raise error or InputError(name, value, "none")


def _several(name: str, value: Any, hint: Any, kind: Callable[[Any], Any]) -> Any:
    inner = next((a for a in get_args(hint) if a is not Ellipsis), str)
    if isinstance(value, Mapping):
        items: list[Any] = [f"{k}={_flat(k, v)}" for k, v in value.items()]
    elif isinstance(value, str) and inner is not str:
        items = [part.strip() for part in value.split(",")]
    else:
        items = list(value) if isinstance(value, list | tuple) else [value]
    return kind(coerce(name, item, inner) for item in items)


def _flat(name: str, value: Any) -> str:
    """A setting of a recipe as the command line writes it."""
    if value is None or isinstance(value, bool | int | float | str):
        return str(value)
    return _text(name, value)


def _text(name: str, value: Any) -> str:
    # In YAML a list of numbers stands for what the command line writes with commas.
    if isinstance(value, list) and value and all(isinstance(x, int | float) for x in value):
        return ",".join(map(str, value))
    check(isinstance(value, str), name, value, "text")
    return str(value)


def _whole(name: str, value: Any) -> int:
    try:
        if isinstance(value, str):
            return int(value)
    except ValueError:
        value = str(value)
    check(isinstance(value, int) and not isinstance(value, bool), name, value, "an integer")
    return int(value)


def _number(name: str, value: Any) -> float:
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise InputError(name, value, "a number")


def _flag(name: str, value: Any) -> bool:
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    check(isinstance(value, bool | str) and str(value).lower() in known, name, value, "true, false")
    return known[str(value).lower()]


def _path(name: str, value: Any) -> Path:
    check(isinstance(value, str | Path) and bool(str(value)), name, value, "a path")
    return Path(value)


_READERS: dict[Any, Callable[[str, Any], Any]] = {
    str: _text,
    int: _whole,
    float: _number,
    bool: _flag,
    Path: _path,
    Any: lambda name, value: value,
}
