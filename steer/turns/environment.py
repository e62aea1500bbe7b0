"""Environments: what an agent acts in, turn by turn."""

from __future__ import annotations

import copy
import json
import math
import random
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

from steer.core import Prompt, SteerError
from steer.core.errors import first_line

__all__ = ["Environment", "EnvironmentFailure", "Outcome", "call_in", "guarded"]


@dataclass(frozen=True)
class Outcome:
    """What an action led to."""

    text: str
    """What the agent is shown."""
    reward: float = 0.0
    done: bool = False
    truncated: bool = False
    """Whether the episode was cut off, rather than coming to its own end."""
    info: dict[str, Any] = field(default_factory=dict)
    """For people and measurements; the agent sees none of it."""


class EnvironmentFailure(SteerError):
    """An environment that raised, did not answer in time, or returned nonsense."""


class Environment(ABC):
    """Something to act in. One object plays one episode at a time, from `reset` on.

    Everything random comes from `self.rng`, so that `reseed` starts fresh randomness; a class with another source of
    chance overrides `reseed`, one that cannot be copied sets `forks = False`.
    """

    name: str = "environment"
    tools: ClassVar[list[dict[str, Any]]] = []
    """OpenAI's tool schemas; an action is then the JSON of a call, `{"name": ..., "arguments": {...}}`."""
    chance: bool = True
    """Whether `step` draws. Without chance every sampler plans by episodes."""
    hidden: bool = False
    """Whether the state knows what the agent must not (cards, a secret word): a copy for planning would leak it."""
    forks: bool = True
    instant: bool = False
    """Whether `step` certainly returns, so that it needs no watch."""
    irreversible: frozenset[str] = frozenset()
    """Tools, or actions where there are none, that are never tried on a copy."""
    rng: random.Random

    @abstractmethod
    def reset(self, prompt: Prompt, seed: int) -> str | list[dict[str, Any]]:
        """Begin an episode for a prompt: the first observation, a text or messages."""

    @abstractmethod
    def step(self, action: str) -> Outcome:
        """Do what an action says."""

    def reseed(self, seed: int) -> None:
        """Start fresh randomness."""
        self.rng = random.Random(seed)

    def fork(self, seed: int | None = None) -> Self:
        """A copy that goes on from here: with the same randomness, or from `seed` on with fresh one."""
        twin = copy.deepcopy(self)
        if seed is not None:
            twin.reseed(seed)
        return twin

    def actions(self) -> list[str] | None:
        """Legal actions, where they can be listed."""
        return None

    def solve(self) -> float | None:
        """The best expected return from the start, where it is known."""
        return None

    def known_as(self, action: str) -> str:
        """What `irreversible` and allow lists call an action: the tool that it calls, or itself."""
        call = call_in(action) if self.tools else None
        return action.strip() if call is None else call[0]


def call_in(action: str) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of the first JSON object in an action that is a tool call; None where there is none."""
    decoder = json.JSONDecoder()
    at = action.find("{")
    while at >= 0:
        try:
            found, _ = decoder.raw_decode(action, at)
        except (ValueError, RecursionError):
            found = None
        call = found.get("function", found) if isinstance(found, dict) else None
        if isinstance(call, dict) and isinstance(call.get("name"), str):
            given = call.get("arguments", call.get("parameters", {}))
            try:
                given = json.loads(given) if isinstance(given, str) else given
            except ValueError:
                given = None
            return (call["name"], given) if isinstance(given, dict) else None
        at = action.find("{", at + 1)
    return None


T = TypeVar("T")


def guarded(what: str, call: Callable[[], T], seconds: float | None) -> T:
    """The result of a call into somebody's environment. Raises `EnvironmentFailure` where it raises, and where it has
    not returned after `seconds` (None waits): its thread is then left behind, with the object that it holds.
    """
    found: list[T] = []
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            found.append(call())
        except Exception as error:
            wrong.append(error)

    if seconds is None:
        work()
    else:
        thread = threading.Thread(target=work, daemon=True, name="steer-environment")
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            raise EnvironmentFailure(f"{what} did not return within {seconds:g} s")
    if wrong:
        raise EnvironmentFailure(f"{what} raised {type(wrong[0]).__name__}: {first_line(wrong[0])}")  # type: ignore[arg-type]
    return found[0]


def checked(outcome: Any) -> Outcome:
    """What `step` returned, if it is an outcome. Raises `EnvironmentFailure`."""
    if not isinstance(outcome, Outcome):
        raise EnvironmentFailure(f"step returned {type(outcome).__name__}; allowed: Outcome")
    if not isinstance(outcome.text, str):
        raise EnvironmentFailure(f"step returned text {outcome.text!r:.60}; allowed: text")
    number = isinstance(outcome.reward, int | float) and math.isfinite(outcome.reward)
    if not number:
        raise EnvironmentFailure(f"step returned reward {outcome.reward!r:.60}; allowed: a finite number")
    return outcome
