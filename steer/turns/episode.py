"""Episodes: what was said and done so far, as messages for the agent and as a text for rewards."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from steer.core import Prompt
from steer.turns.environment import Environment, EnvironmentFailure, Outcome, checked, guarded

__all__ = ["Episode", "Transcript", "Turn", "TurnTaken", "begin"]


class Turn(list[dict[str, Any]]):
    """Messages that an agent answers with its next action, and what is known beside them."""

    actions: list[str] | None = None
    """Legal actions, where the environment lists them."""
    taken: tuple[TurnTaken, ...] = ()
    """The turns before."""


@dataclass(frozen=True)
class TurnTaken:
    """One turn: an action and what came of it."""

    action: str
    observation: str
    reward: float = 0.0
    seed: int = 0
    """The randomness that the environment was given for it."""
    info: dict[str, Any] = field(default_factory=dict)
    """What the environment tells people of it."""


class Transcript(str):
    """The whole episode as a text, which rewards of texts read, with its parts."""

    messages: list[dict[str, Any]]
    actions: list[str]
    rewards: list[float]
    infos: list[dict[str, Any]]
    """What the environment told people of each turn."""
    done: bool
    """Whether it came to its own end."""
    truncated: bool
    failure: str | None
    """What the environment did wrong, which ended the episode."""

    def total(self, gamma: float = 1.0) -> float:
        """The return: `sum_t gamma^t r_t`."""
        return sum(gamma**t * r for t, r in enumerate(self.rewards))

    def __reduce__(self) -> Any:
        return _transcript, (str(self), self.__dict__)


def _transcript(text: str, parts: dict[str, Any]) -> Transcript:
    made = Transcript(text)
    made.__dict__.update(parts)
    return made


@dataclass(frozen=True)
class Episode:
    """An episode in mid-play. It is a value: a step makes a new one; the environment of a `real` one is stepped in
    place, that of a copy is copied again before each step. Every step begins with randomness of its own.
    """

    environment: Environment | None
    prompt: Prompt
    seed: int
    opening: tuple[dict[str, Any], ...]
    taken: tuple[TurnTaken, ...] = ()
    done: bool = False
    truncated: bool = False
    failure: str | None = None
    real: bool = True

    @property
    def ended(self) -> bool:
        return self.done or self.truncated

    @property
    def total(self) -> float:
        """The return so far, without discount."""
        return sum(turn.reward for turn in self.taken)

    def messages(self, last: int | None = None) -> list[dict[str, Any]]:
        """The conversation: the opening, then actions and observations, of the `last` turns alone where that is set."""
        found = list(self.opening)
        for turn in self.taken if last is None else self.taken[max(0, len(self.taken) - last) :]:
            found.append({"role": "assistant", "content": turn.action or "..."})
            found.append({"role": "user", "content": turn.observation or "..."})
        return found

    def turn(self, last: int | None = None) -> Turn:
        """What the agent answers next. Raises `EnvironmentFailure`."""
        found = Turn(self.messages(last))
        found.taken = self.taken
        if self.environment is not None:
            found.actions = guarded("actions()", self.environment.actions, None)
        return found

    @property
    def legal(self) -> list[str]:
        """Legal actions, where they are listed. Raises `EnvironmentFailure`."""
        if self.environment is None or self.ended:
            return []
        return guarded("actions()", self.environment.actions, None) or []

    def copied(self, seconds: float | None = None) -> Episode:
        """A copy that may be tried; an episode that has ended is its own copy."""
        if not self.real or self.ended or self.environment is None:
            return replace(self, real=False)
        watch = None if self.environment.instant else seconds
        environment = self.environment
        return replace(self, environment=guarded("fork", lambda: environment.fork(None), watch), real=False)

    def after(self, action: str, seed: int, most: int, seconds: float | None = None) -> Episode:
        """The episode after an action. Whatever is wrong with the environment ends this episode and no other."""
        environment = self.environment
        assert environment is not None and not self.ended
        watch = None if environment.instant else seconds
        try:
            if not self.real:
                name = environment.known_as(action)
                if name in environment.irreversible:
                    raise EnvironmentFailure(f"{name} is irreversible and was not tried on a copy")
                source = environment
                environment = guarded("fork", lambda: source.fork(seed), watch)
            played = environment
            if self.real:
                guarded("reseed", lambda: played.reseed(seed), watch)
            outcome: Outcome = checked(guarded("step", lambda: played.step(action), watch))
        except EnvironmentFailure as error:
            entry = TurnTaken(action, "", 0.0, seed)
            return replace(
                self, environment=None, taken=(*self.taken, entry), truncated=True, failure=str(error), real=False
            )
        entry = TurnTaken(action, outcome.text, float(outcome.reward), seed, dict(outcome.info))
        taken = (*self.taken, entry)
        cut = outcome.truncated or (not outcome.done and len(taken) >= most)
        return replace(self, environment=environment, taken=taken, done=outcome.done, truncated=cut)

    def noting(self, **info: Any) -> Episode:
        """The episode with more for people to read at its last turn: what of `info` is not empty."""
        told = {name: value for name, value in info.items() if value}
        if not told or not self.taken:
            return self
        last = self.taken[-1]
        return replace(self, taken=(*self.taken[:-1], replace(last, info={**last.info, **told})))

    def transcript(self) -> Transcript:
        """The episode as a text with its parts."""
        messages = self.messages()
        text = Transcript("\n".join(f"{m['role']}: {m['content']}" for m in messages))
        text.messages, text.actions = messages, [turn.action for turn in self.taken]
        text.rewards = [turn.reward for turn in self.taken]
        text.infos = [turn.info for turn in self.taken]
        text.done, text.truncated, text.failure = self.done, self.truncated, self.failure
        return text


def begin(environment: Environment, prompt: Prompt, seed: int, seconds: float | None = None) -> Episode:
    """A new episode; one that could not begin has ended with its failure."""
    watch = None if environment.instant else seconds
    said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    try:
        seen: Any = guarded("reset", lambda: environment.reset(prompt, seed), watch)
        opening = _opening(said, seen)
    except EnvironmentFailure as error:
        return Episode(None, prompt, seed, tuple(said), truncated=True, failure=str(error), real=False)
    return Episode(environment, prompt, seed, tuple(opening))


def _opening(said: list[dict[str, Any]], seen: Any) -> list[dict[str, Any]]:
    """The prompt with the first observation: in its last user message, or the environment's own messages after it."""
    if isinstance(seen, str):
        last = said[-1]
        text = "\n\n".join(part for part in (str(last["content"]), seen) if part)
        return [*said[:-1], {**last, "content": text}]
    fits = isinstance(seen, list) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in seen)
    if not fits or not seen:
        raise EnvironmentFailure(f"reset returned {type(seen).__name__}; allowed: text, or messages")
    return [*(m for m in said if m["content"]), *seen]
