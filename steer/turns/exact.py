"""Exact values of small decision problems: the oracle of planning, and of what tilting episodes does to it.

A problem is finite when its episodes can be enumerated. `V` and `Q` are expected returns from a state on, without
discount.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

__all__ = ["Finite", "Policy"]

State = Hashable
Policy = Callable[[Any], Mapping[str, float]]
"""Probabilities of actions in a state."""


@dataclass(frozen=True, eq=False)
class Finite:
    """A decision problem.

    Attributes:
        start: its first state.
        actions: legal actions of a state.
        moves: `(probability, reward, next state)` of a state and an action; None ends the episode.
    """

    start: State
    actions: Callable[[Any], Sequence[str]]
    moves: Callable[[Any, str], Sequence[tuple[float, float, Any]]]

    def uniform(self, state: Any) -> dict[str, float]:
        """The policy that takes every legal action as often."""
        legal = self.actions(state)
        return {a: 1 / len(legal) for a in legal}

    def q(self, state: Any, action: str, value: Callable[[Any], float]) -> float:
        """Expected reward and value of what follows."""
        return sum(p * (r + (0.0 if after is None else value(after))) for p, r, after in self.moves(state, action))

    def value(self, policy: Policy) -> Callable[[Any], float]:
        """`V` of a policy."""

        @cache
        def v(state: Any) -> float:
            return sum(p * self.q(state, a, v) for a, p in policy(state).items() if p > 0)

        return v

    def best(self) -> Callable[[Any], float]:
        """`V*`, of the best policy."""

        @cache
        def v(state: Any) -> float:
            return max(self.q(state, a, v) for a in self.actions(state))

        return v

    def greedy(self, value: Callable[[Any], float]) -> Policy:
        """The policy that takes the best action by the values of what follows, the first of equals."""

        def policy(state: Any) -> dict[str, float]:
            return {max(self.actions(state), key=lambda a: self.q(state, a, value)): 1.0}

        return policy

    def soft(self, beta: float) -> tuple[Callable[[Any], float], Policy]:
        """Soft control against uniform actions, where chance is not tilted: `V = beta log mean_a exp(Q / beta)`, and
        its policy.
        """

        @cache
        def v(state: Any) -> float:
            q = [self.q(state, a, v) / beta for a in self.actions(state)]
            return beta * (_logsumexp(q) - math.log(len(q)))

        return v, lambda state: _softmax({a: self.q(state, a, v) / beta for a in self.actions(state)})

    def tilted(self, beta: float) -> tuple[Callable[[Any], float], Policy]:
        """What samplers of whole episodes aim at, `p(actions, chance) exp(return / beta)` with uniform actions:
        `beta log Z` from each state on, and the law of the next action. It chooses luck, too.
        """

        @cache
        def v(state: Any) -> float:
            logs = [self._lucky(state, a, v, beta) for a in self.actions(state)]
            return beta * (_logsumexp(logs) - math.log(len(logs)))

        return v, lambda state: _softmax({a: self._lucky(state, a, v, beta) for a in self.actions(state)})

    def _lucky(self, state: Any, action: str, value: Callable[[Any], float], beta: float) -> float:
        moves = self.moves(state, action)
        return _logsumexp(
            [math.log(p) + (r + (0.0 if after is None else value(after))) / beta for p, r, after in moves if p > 0]
        )

    def episodes(self, policy: Policy) -> list[tuple[float, float, str]]:
        """Probability, return and first action of every episode."""
        found: list[tuple[float, float, str]] = []

        def walk(state: Any, p: float, total: float, first: str) -> None:
            if state is None:
                found.append((p, total, first))
                return
            for action, share in policy(state).items():
                for chance, reward, after in self.moves(state, action):
                    if share * chance > 0:
                        walk(after, p * share * chance, total + reward, first or action)

        walk(self.start, 1.0, 0.0, "")
        return found

    def among(self, policy: Policy, k: int, q: Callable[[Any, str], float], beta: float | None) -> Policy:
        """The policy that draws `k` actions from `policy` with replacement and takes one by its value: in proportion to
        `exp(q / beta)` among the draws, or the best where `beta` is None, any draw among equals.
        """

        def chosen(state: Any) -> dict[str, float]:
            law = {a: p for a, p in policy(state).items() if p > 0}
            found = dict.fromkeys(law, 0.0)
            for counts, p in _draws(list(law.items()), k):
                drawn = {a: n for a, n in counts.items() if n}
                top = max(q(state, a) for a in drawn)
                weights = {
                    a: n * (math.exp((q(state, a) - top) / beta) if beta else float(q(state, a) >= top - 1e-12))
                    for a, n in drawn.items()
                }
                total = sum(weights.values())
                for a, w in weights.items():
                    found[a] += p * w / total
            return found

        return chosen


def _draws(law: list[tuple[str, float]], k: int) -> list[tuple[dict[str, int], float]]:
    """Every count of k draws with replacement, and its probability."""
    (name, p), rest = law[0], law[1:]
    if not rest:
        return [({name: k}, p**k)]
    return [
        ({name: n, **counts}, math.comb(k, n) * p**n * share)
        for n in range(k + 1)
        for counts, share in _draws(rest, k - n)
    ]


def _logsumexp(x: Sequence[float]) -> float:
    top = max(x)
    return top + math.log(sum(math.exp(v - top) for v in x))


def _softmax(x: Mapping[str, float]) -> dict[str, float]:
    total = _logsumexp(list(x.values()))
    return {a: math.exp(v - total) for a, v in x.items()}
