"""Regret of an agent on bandits: its curve, how fast it grows, and whether it falls behind ever more slowly."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from steer.core import check
from steer.measure.tables import aligned, number, ranged

__all__ = ["RegretReport", "growth", "regret_report", "trend"]

_FROM = 10
"""The first pull at which growth is measured."""


def growth(curve: Sequence[float], start: int = _FROM) -> float:
    """Slope of log regret on log t by least squares from pull `start` on: 1 is linear, less is sublinear."""
    points = [(math.log(t), math.log(r)) for t, r in enumerate(curve, 1) if t >= start and r > 0]
    if len(points) < 2:
        return math.nan
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def trend(curve: Sequence[float]) -> tuple[int, float]:
    """How often regret_t / t decreases, and the probability of that often or more under fair coins."""
    rates = [r / t for t, r in enumerate(curve, 1)]
    steps = len(rates) - 1
    falls = sum(b < a - 1e-12 for a, b in pairwise(rates))
    return falls, sum(math.comb(steps, k) for k in range(falls, steps + 1)) / 2**steps


@dataclass(frozen=True)
class RegretReport:
    """Over episodes: mean regret after each pull with half of a 95% interval, and what follows from the curve."""

    mean: list[float]
    half: list[float]
    best_late: float
    """Share of pulls of a best arm in the second half."""
    slope: float
    slope_range: tuple[float, float]
    """95%, by resampling episodes."""
    falls: int
    chance: float
    """Of as many decreases of regret_t / t or more, if each were a fair coin."""
    unparsed: float

    @property
    def sublinear(self) -> bool:
        """Whether the slope and its interval lie below 1, in the range that was played."""
        return self.slope < 1 and self.slope_range[1] < 1

    def __str__(self) -> str:
        low, high = self.slope_range
        rows = [
            ["regret", ranged(self.mean[-1], self.half[-1])],
            ["best arm, last half", number(self.best_late)],
            ["log-log slope", f"{number(self.slope)} [{number(low)}, {number(high)}]"],
            ["falls of regret / t", f"{self.falls} of {len(self.mean) - 1} (p = {self.chance:.3g})"],
            ["not an arm's name", number(self.unparsed)],
        ]
        return aligned(rows)


def regret_report(infos: Sequence[Sequence[dict[str, Any]]], seed: int = 0, draws: int = 300) -> RegretReport:
    """From what a bandit told of every pull, by episode; all episodes are of one length. Raises `InputError`."""
    lengths = {len(episode) for episode in infos}
    check(len(lengths) == 1 and lengths != {0}, "episodes", sorted(lengths), "episodes of one length, with pulls")
    curves = []
    for episode in infos:
        total, curve = 0.0, []
        for info in episode:
            check("regret" in info, "episodes", info, "pulls of a bandit, whose info has regret")
            total += info["regret"]
            curve.append(total)
        curves.append(curve)
    mean = _mean(curves)
    half = [1.96 * _error([c[t] for c in curves]) for t in range(len(mean))]
    rng = random.Random(seed)
    slopes = sorted(x for _ in range(draws) if not math.isnan(x := growth(_mean([rng.choice(curves) for _ in curves]))))
    ends = (slopes[int(0.025 * len(slopes))], slopes[int(0.975 * (len(slopes) - 1))]) if slopes else (math.nan,) * 2
    late = [info["best"] for episode in infos for info in episode[len(episode) // 2 :]]
    lost = [info["unparsed"] for episode in infos for info in episode]
    falls, chance = trend(mean)
    return RegretReport(mean, half, _share(late), growth(mean), (ends[0], ends[1]), falls, chance, _share(lost))


def _share(x: Sequence[bool]) -> float:
    return sum(x) / len(x)


def _mean(curves: Sequence[Sequence[float]]) -> list[float]:
    return [sum(x) / len(x) for x in zip(*curves, strict=True)]


def _error(x: Sequence[float]) -> float:
    if len(x) < 2:
        return math.nan
    mean = sum(x) / len(x)
    return math.sqrt(sum((v - mean) ** 2 for v in x) / (len(x) - 1) / len(x))
