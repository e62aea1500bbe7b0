"""What `steer` refuses, in one line for the person who asked."""

from __future__ import annotations

__all__ = ["InputError", "RewardError", "SteerError", "UnsupportedError", "check"]


class SteerError(Exception):
    """Anything `steer` refuses or cannot finish; the message is one line for the person who asked."""


class InputError(SteerError, ValueError):
    """Bad input: names the field, what was given and what is allowed."""

    def __init__(self, field: str, given: object, allowed: str) -> None:
        shown = repr(given)
        if len(shown) > 120:
            shown = shown[:117] + "..."
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
