"""Bandits: arms that pay with unknown probabilities, shown raw, in a summary, or with guidance; and exact regret.

Observations follow EVOLvE (Nie et al. 2024, 2410.06238): what helps a language model to explore at inference time is
the form in which it sees its past.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache

from steer.core import Prompt, check, check_whole
from steer.turns.courier import named
from steer.turns.environment import Environment, Outcome

__all__ = ["Bandit", "bayes_reward", "expected_regret", "greedy", "thompson", "ucb", "uniform"]

_NAMES = ("blue", "red", "green", "yellow", "white", "black", "orange", "purple", "pink", "brown")
Counts = tuple[tuple[int, int], ...]
"""Successes and failures of every arm."""


class Bandit(Environment):
    """Arms with names of colours, each of which pays 1 with its own probability.

    An action names an arm; one that names none is drawn at random, and `info` says so. `info["regret"]` is what the
    best arm pays more than the one that was pulled.

    Args:
        arms: probabilities.
        horizon: pulls of an episode.
        show: "raw", every pull; "summary", counts and means; "guided", also what exploiting and exploring are worth.
        alpha: of the exploration bonus `sqrt(alpha log t / n)` that guidance shows.
    """

    name = "bandit"
    instant = True

    def __init__(
        self, arms: Sequence[float] = (0.6, 0.4), horizon: int = 20, show: str = "raw", alpha: float = 0.5
    ) -> None:
        fits = isinstance(arms, list | tuple) and 2 <= len(arms) <= len(_NAMES) and all(0 <= p <= 1 for p in arms)
        check(fits, "arms", arms, f"2 to {len(_NAMES)} probabilities")
        check_whole("horizon", horizon)
        check(show in ("raw", "summary", "guided"), "show", show, "raw, summary, guided")
        self.arms, self.horizon, self.show, self.alpha = tuple(arms), horizon, show, alpha
        self.names = _NAMES[: len(arms)]
        self.pulls: list[tuple[int, int]] = []
        self.rng = random.Random(0)

    def reset(self, prompt: Prompt, seed: int) -> str:
        self.pulls = []
        self.reseed(seed)
        return (
            f"There are {len(self.arms)} buttons: {', '.join(self.names)}. Each pays 1 or 0, with a probability of its "
            f"own that you do not know. You press {self.horizon} times and want the highest sum. Answer with the name "
            "of one button."
        )

    def fork(self, seed: int | None = None) -> Bandit:
        twin = Bandit(self.arms, self.horizon, self.show, self.alpha)
        twin.pulls = list(self.pulls)
        if seed is None:
            twin.rng.setstate(self.rng.getstate())
        else:
            twin.reseed(seed)
        return twin

    def actions(self) -> list[str]:
        return list(self.names)

    def step(self, action: str) -> Outcome:
        said = named(action, self.names)
        arm = self.rng.randrange(len(self.arms)) if said is None else self.names.index(said)
        paid = int(self.rng.random() < self.arms[arm])
        self.pulls.append((arm, paid))
        best = max(self.arms)
        info = {"unparsed": said is None, "arm": arm, "regret": best - self.arms[arm], "best": self.arms[arm] == best}
        return Outcome(self._shown(), float(paid), done=len(self.pulls) >= self.horizon, info=info)

    def _shown(self) -> str:
        if self.show == "raw":
            return "\n".join(f"{self.names[arm]} paid {paid}" for arm, paid in self.pulls[-1:]) + "\nWhich button?"
        lines = []
        for i, name in enumerate(self.names):
            paid = [x for arm, x in self.pulls if arm == i]
            mean = sum(paid) / len(paid) if paid else 0.0
            line = f"{name}: pressed {len(paid)} times, mean {mean:.2f}"
            if self.show == "guided":
                bonus = math.sqrt(self.alpha * math.log(len(self.pulls)) / len(paid)) if paid else math.inf
                line += f", exploration bonus {bonus:.2f}, exploitation value {mean:.2f}"
            lines.append(line)
        return "\n".join([*lines, "Which button?"])


# ------------------------------------------------------------------------------------------------------ exact regret

Rule = Callable[[Counts], Mapping[int, float]]
"""Probabilities of arms after successes and failures of each."""


def _first_best(values: Sequence[float]) -> dict[int, float]:
    best = [i for i, v in enumerate(values) if v == max(values)]
    return {i: 1 / len(best) for i in best}


def _unpulled(counts: Counts) -> dict[int, float] | None:
    """Arms that were never pulled come first, each as likely."""
    new = [i for i, (s, f) in enumerate(counts) if s + f == 0]
    return {i: 1 / len(new) for i in new} if new else None


def uniform(counts: Counts) -> dict[int, float]:
    """Every arm alike."""
    return {i: 1 / len(counts) for i in range(len(counts))}


def greedy(counts: Counts) -> dict[int, float]:
    """Each arm once, then the best mean; ties at random."""
    return _unpulled(counts) or _first_best([s / (s + f) for s, f in counts])


def ucb(alpha: float) -> Rule:
    """Each arm once, then the best `mean + sqrt(alpha log t / n)`, t the pulls so far; ties go to the first arm."""

    def rule(counts: Counts) -> Mapping[int, float]:
        if (new := _unpulled(counts)) is not None:
            return new
        t = sum(s + f for s, f in counts)
        values = [s / (s + f) + math.sqrt(alpha * math.log(t) / (s + f)) for s, f in counts]
        return {max(range(len(values)), key=lambda i: values[i]): 1.0}

    return rule


def thompson(counts: Counts) -> dict[int, float]:
    """Thompson sampling for two arms with uniform priors: the exact probability that a draw of the first arm's
    Beta(1 + s, 1 + f) is above one of the second's.
    """
    check(len(counts) == 2, "arms", len(counts), "2")
    (s1, f1), (s2, f2) = counts
    a1, b1, a2, b2 = 1 + s1, 1 + f1, 1 + s2, 1 + f2
    # P(X > Y) = sum_{i < a1} B(a2 + i, b1 + b2) / ((b1 + i) B(1 + i, b1) B(a2, b2))
    log = math.lgamma

    def beta(a: float, b: float) -> float:
        return log(a) + log(b) - log(a + b)

    first = sum(math.exp(beta(a2 + i, b1 + b2) - math.log(b1 + i) - beta(1 + i, b1) - beta(a2, b2)) for i in range(a1))
    return {0: first, 1: 1 - first}


def expected_regret(arms: Sequence[float], rule: Rule, horizon: int) -> list[float]:
    """Exact expected regret after 1 to `horizon` pulls, by enumeration of successes and failures."""
    best, law = max(arms), {tuple((0, 0) for _ in arms): 1.0}
    found, total = [], 0.0
    for _ in range(horizon):
        after: dict[Counts, float] = {}
        for counts, p in law.items():
            for arm, share in rule(counts).items():
                total += p * share * (best - arms[arm])
                s, f = counts[arm]
                for chance, pair in ((arms[arm], (s + 1, f)), (1 - arms[arm], (s, f + 1))):
                    key = (*counts[:arm], pair, *counts[arm + 1 :])
                    after[key] = after.get(key, 0.0) + p * share * chance
        law = after
        found.append(total)
    return found


def bayes_reward(horizon: int) -> float:
    """Expected sum of the best policy for two arms whose probabilities are uniform: by dynamic programming."""

    @cache
    def value(s1: int, f1: int, s2: int, f2: int) -> float:
        left = horizon - s1 - f1 - s2 - f2
        if left == 0:
            return 0.0
        p1, p2 = (s1 + 1) / (s1 + f1 + 2), (s2 + 1) / (s2 + f2 + 2)
        first = p1 * (1 + value(s1 + 1, f1, s2, f2)) + (1 - p1) * value(s1, f1 + 1, s2, f2)
        second = p2 * (1 + value(s1, f1, s2 + 1, f2)) + (1 - p2) * value(s1, f1, s2, f2 + 1)
        return max(first, second)

    return value(0, 0, 0, 0)
