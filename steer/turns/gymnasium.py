"""Gymnasium's environments as environments of turns (extra `environments`)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from steer.core import Prompt, SteerError, check
from steer.turns.courier import named
from steer.turns.environment import Environment, Outcome

__all__ = ["Gymnasium"]


class Gymnasium(Environment):
    """An environment of Gymnasium, played by texts.

    Args:
        environment: its id, such as `FrozenLake-v1`, or one that was made.
        describe: an observation as a text; needed but for texts and numbers.
        parse: an action's text as a value of the action space, None where it cannot be read; needed but for Discrete
            spaces, whose actions are the numbers from 0, or `names`.
        names: of the actions of a Discrete space, in order.
        settings: handed to `gymnasium.make`.
    """

    def __init__(
        self,
        environment: Any,
        describe: Callable[[Any], str] | None = None,
        parse: Callable[[str], Any] | None = None,
        names: list[str] | None = None,
        **settings: Any,
    ) -> None:
        try:
            import gymnasium
        except ImportError:
            raise SteerError(
                "gymnasium environments need gymnasium: pip install 'steer-engine[environments]'"
            ) from None
        self.inner = gymnasium.make(environment, **settings) if isinstance(environment, str) else environment
        spec = getattr(self.inner, "spec", None)
        self.name = f"gymnasium:{environment if isinstance(environment, str) else getattr(spec, 'id', 'environment')}"
        spaces = gymnasium.spaces
        shown, acted = self.inner.observation_space, self.inner.action_space
        plain = isinstance(shown, spaces.Text | spaces.Discrete)
        check(
            plain or describe is not None, "describe", None, f"a function of an observation of {type(shown).__name__}"
        )
        discrete = isinstance(acted, spaces.Discrete)
        check(
            discrete or parse is not None, "parse", None, f"a function that reads an action of {type(acted).__name__}"
        )
        self.describe, self.parse, self.first = describe or str, parse, int(acted.start) if discrete else 0
        count = int(acted.n) if discrete else 0
        check(names is None or len(names) == count, "names", names, f"{count} names, one for each action")
        self.names = names or [str(i) for i in range(count)]

    def reset(self, prompt: Prompt, seed: int) -> str:
        seen, _ = self.inner.reset(seed=seed)
        self.reseed(seed)
        allowed = f" Actions: {', '.join(self.names)}." if self.names else ""
        return f"{self.describe(seen)}{allowed}"

    def reseed(self, seed: int) -> None:
        super().reseed(seed)
        from gymnasium.utils import seeding

        generator, _ = seeding.np_random(seed)
        self.inner.unwrapped.np_random = generator

    def fork(self, seed: int | None = None) -> Gymnasium:
        twin = copy.copy(self)
        twin.inner = copy.deepcopy(self.inner)
        twin.rng = copy.deepcopy(self.rng) if hasattr(self, "rng") else None  # type: ignore[assignment]
        if seed is not None:
            twin.reseed(seed)
        return twin

    def actions(self) -> list[str] | None:
        return list(self.names) or None

    def step(self, action: str) -> Outcome:
        value = self._read(action)
        if value is None:
            allowed = f" Allowed: {', '.join(self.names)}." if self.names else ""
            return Outcome(f"This action cannot be read.{allowed}", info={"unparsed": True})
        seen, reward, terminated, truncated, info = self.inner.step(value)
        return Outcome(self.describe(seen), float(reward), bool(terminated), bool(truncated), dict(info))

    def _read(self, action: str) -> Any:
        if self.parse is not None:
            return self.parse(action)
        found = named(action, self.names)
        return None if found is None else self.first + self.names.index(found)
