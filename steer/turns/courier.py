"""The courier: three turns to reach a door, sure and slow or quick by luck. Small enough to be solved."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from steer.core import Prompt, check_whole
from steer.turns.environment import Environment, Outcome
from steer.turns.exact import Finite

__all__ = ["Courier", "named"]

_ACTIONS = ("walk", "ride", "wait")


def named(action: str, names: Sequence[str]) -> str | None:
    """The one name that an action consists of, or holds as a word; None where it holds none, or several."""
    text = action.strip().strip(".!\"'*`").lower()
    known = {name.lower(): name for name in names}
    if text in known:
        return known[text]
    found = {known[word] for word in re.findall(r"[\w-]+", text) if word in known}
    return found.pop() if len(found) == 1 else None


class Courier(Environment):
    """From 0 to a door at 3 in three turns. walk: one step, costs 1; ride: two steps with probability 1/2 or none,
    costs 1; wait: nothing. Arriving pays 5 and ends the episode. An action that names none, or several, waits, and
    `info` says so. The best policy earns 2.
    """

    name = "courier"
    instant = True

    def __init__(self, turns: int = 3, goal: int = 3) -> None:
        check_whole("turns", turns)
        check_whole("goal", goal)
        self.turns, self.goal = turns, goal
        self.at, self.left = 0, turns
        self.rng = random.Random(0)

    def reset(self, prompt: Prompt, seed: int) -> str:
        self.at, self.left = 0, self.turns
        self.reseed(seed)
        return (
            f"You carry a parcel to a door {self.goal} steps away and have {self.turns} turns. Arriving pays 5. Each "
            "turn choose one word: walk (one step, costs 1), ride (two steps half of the time, otherwise none, costs "
            f"1) or wait (costs nothing). {self._shown()} Answer with one word."
        )

    def _shown(self) -> str:
        return f"You are at step {self.at} of {self.goal}, {self.left} turn{'s' * (self.left != 1)} left."

    def fork(self, seed: int | None = None) -> Courier:
        twin = Courier(self.turns, self.goal)
        twin.at, twin.left = self.at, self.left
        if seed is None:
            twin.rng.setstate(self.rng.getstate())
        else:
            twin.reseed(seed)
        return twin

    def actions(self) -> list[str]:
        return list(_ACTIONS)

    def step(self, action: str) -> Outcome:
        chosen = named(action, _ACTIONS)
        info = {"unparsed": chosen is None}
        if chosen == "walk":
            self.at += 1
        elif chosen == "ride" and self.rng.random() < 0.5:
            self.at += 2
        self.left -= 1
        arrived = self.at >= self.goal
        reward = (5.0 if arrived else 0.0) - (0.0 if chosen in (None, "wait") else 1.0)
        text = "You arrived." if arrived else f"{self._shown()} walk, ride or wait?" if self.left else "Too late."
        return Outcome(text, reward, done=arrived or self.left == 0, info=info | {"success": arrived})

    def finite(self) -> Finite:
        """The problem, for `steer.turns.exact`; a state is (position, turns left)."""

        def moves(state: Any, action: str) -> list[tuple[float, float, Any]]:
            at, left = state
            steps = {"walk": [(1.0, 1)], "ride": [(0.5, 2), (0.5, 0)], "wait": [(1.0, 0)]}[action]
            cost, found = float(action != "wait"), []
            for p, by in steps:
                over = at + by >= self.goal
                reward = (5.0 if over else 0.0) - cost
                found.append((p, reward, None if over or left == 1 else (at + by, left - 1)))
            return found

        return Finite((0, self.turns), lambda state: _ACTIONS, moves)

    def solve(self) -> float:
        problem = self.finite()
        return problem.best()(problem.start)
