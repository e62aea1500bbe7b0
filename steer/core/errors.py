"""Errors of `steer`, in one line for the person who asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "InputError",
    "RewardError",
    "SteerError",
    "UnsupportedError",
    "check",
    "check_unicode",
    "check_whole",
    "first_line",
]


class SteerError(Exception):
    """Anything `steer` refuses or cannot finish; the message is one line for the person who asked."""


class InputError(SteerError, ValueError):
    """Bad input: names the field, what was given and what is allowed."""

    def __init__(self, field: str, given: object, allowed: str) -> None:
        shown = repr(given)
        if len(shown) > 160:  # the end often says what is wrong with what the beginning names
            shown = f"{shown[:57]}...{shown[-100:]}"
        self.field, self.given, self.allowed = field, given, allowed
        super().__init__(f"{field}: got {shown}; allowed: {allowed}")


class UnsupportedError(SteerError):
    """A method asks a process for something that it cannot do; the message says which engine can."""


class RewardError(SteerError):
    """A reward raised, or returned NaN or the wrong number of scores."""


def check(condition: bool, field: str, given: object, allowed: str) -> None:
    """Raise `InputError` unless `condition` holds."""
    if not condition:
        raise InputError(field, given, allowed)


def check_whole(field: str, given: Any, least: int = 1, allowed: str | None = None) -> None:
    """Raise `InputError` for what is not an integer of `least` or more."""
    fits = isinstance(given, int) and not isinstance(given, bool) and given >= least
    check(fits, field, given, allowed or f"an integer of {least} or more")


def check_unicode(field: str, given: Any) -> None:
    """Raise `InputError` for text with half a surrogate pair, such as a cut emoji, which no tokenizer takes: for a text
    itself, or named by its place in lists and dictionaries.
    """
    waiting = [(field, given)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, str):
            _check_characters(place, value)
        elif isinstance(value, Mapping):
            waiting += [(place, key) for key in value] + [(f"{place}.{key}", x) for key, x in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(f"{place}[{i}]", x) for i, x in enumerate(value)]


def _check_characters(field: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        allowed = f"whole characters: the one at {error.start} is half a surrogate pair, perhaps of a cut emoji"
        raise InputError(field, str(text), allowed) from None


def first_line(error: Exception) -> str:
    """What a library's error says: the first line of it that is not blank; its class where there is none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
