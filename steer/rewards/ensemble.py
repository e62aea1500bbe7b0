"""Rewards made of several: ensembles that resist over-optimisation, and constraints with a solved multiplier.

Axis letters: `N` samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steer.core import Samples, SteerError, check
from steer.rewards.algebra import Composable, lift, scores_of

__all__ = ["Constrained", "Ensemble", "solve_multiplier"]


@dataclass(frozen=True, repr=False)
class Ensemble(Composable):
    """Several rewards as one: their `mean`; the `worst` (WCO, the minimum); or `uncertainty` (UWO).

        UWO = mean - coefficient * variance over members, with divisor k - ddof

    Members on different scales should be `fitted` first. Coste et al., "Reward model ensembles help mitigate
    overoptimization" (2310.02743); their best-of-N code uses ddof 0 and coefficient 0.5.
    """

    members: tuple[Composable, ...]
    how: str = "mean"
    coefficient: float = 0.5
    ddof: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(lift(member) for member in self.members))
        check(len(self.members) > 0, "ensemble members", self.members, "at least one reward")
        check(self.how in ("mean", "worst", "uncertainty"), "ensemble how", self.how, "mean, worst, uncertainty")
        check(math.isfinite(self.coefficient), "ensemble coefficient", self.coefficient, "a finite number")
        enough = self.ddof in (0, 1) and (self.how != "uncertainty" or len(self.members) > self.ddof)
        check(enough, "ensemble ddof", self.ddof, "0, or 1 with at least two members")

    def score(self, samples: Samples) -> Tensor:
        scores = torch.stack([scores_of(member, samples) for member in self.members])
        if self.how == "worst":
            return scores.amin(0)
        mean = scores.mean(0)
        return mean if self.how == "mean" else mean - self.coefficient * scores.var(0, correction=self.ddof)

    def fitted(self, samples: Samples) -> Ensemble:
        """The ensemble of members standardised on reference samples (divisor N; constant members: std 1)."""
        return replace(self, members=tuple(_standardised_on(member, samples) for member in self.members))

    def __repr__(self) -> str:
        return f"Ensemble([{', '.join(map(repr, self.members))}], how={self.how!r})"


def _standardised_on(member: Composable, samples: Samples) -> Composable:
    scores = member(samples)
    check(len(scores) > 0, "reference samples", len(scores), "at least one sample")
    mean, std = float(scores.mean()), float(scores.std(correction=0))
    negligible = std <= 1e-12 * max(1.0, abs(mean))
    return member.standardised(mean, 1.0 if negligible else std)


@dataclass(frozen=True, repr=False)
class Constrained(Composable):
    """`objective + multiplier * constraint`, with the multiplier for which E[constraint] = target under the target law.

    `fitted` finds the multiplier on samples of the base model; until then scoring raises `SteerError`.
    """

    objective: Composable
    constraint: Composable
    target: float
    multiplier: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "objective", lift(self.objective))
        object.__setattr__(self, "constraint", lift(self.constraint))
        check(math.isfinite(self.target), "constraint target", self.target, "a finite number")

    def fitted(self, samples: Samples, beta: float = 1.0) -> Constrained:
        """The reward with its multiplier solved on samples of the base model (weighted or not), at KL coefficient
        `beta`; over several prompts it is the average of the prompts' means that meets the target.
        """
        objective, constraint = self.objective(samples), self.constraint(samples)
        multiplier = solve_multiplier(
            objective, constraint, self.target, beta, log_weight=samples.log_weight, group=samples.group
        )
        return replace(self, multiplier=multiplier)

    def score(self, samples: Samples) -> Tensor:
        if self.multiplier is None:
            raise SteerError(f"reward {self}: its multiplier is not known yet; call .fitted(samples, beta=...) first")
        return scores_of(self.objective, samples) + self.multiplier * scores_of(self.constraint, samples)

    def __repr__(self) -> str:
        return f"Constrained({self.objective!r}, {self.constraint!r}, target={self.target:g})"


def solve_multiplier(
    objective: Tensor,
    constraint: Tensor,
    target: float,
    beta: float = 1.0,
    *,
    log_weight: Tensor | None = None,
    group: Tensor | None = None,
) -> float:
    """The `mu` for which the mean of `constraint` `[N]` is `target` under `w exp((objective + mu constraint) / beta)`.

    `log_weight` `[N]` are the rows' base log-weights (log-probabilities, for an enumeration; None: equal) and `group`
    `[N]` their prompts: weights are normalised within a prompt, means averaged over prompts. The mean grows with
    `mu`, so bisection finds it. `InputError` where no `mu` attains the target.
    """
    check(math.isfinite(beta) and beta > 0, "beta", beta, "a finite number > 0")
    check(len(objective) == len(constraint) > 0, "constraint scores", len(constraint), f"{len(objective)}, at least 1")
    base = objective.double() / beta + (0 if log_weight is None else log_weight.double())
    scores, rows = constraint.double(), torch.zeros(len(base)) if group is None else group
    finite = base > -math.inf
    parts = [(base[at], scores[at]) for b in rows.unique() if (at := (rows == b) & finite).any()]
    low = sum(float(r.min()) for _, r in parts) / max(len(parts), 1)
    high = sum(float(r.max()) for _, r in parts) / max(len(parts), 1)
    if low == high == target:
        return 0.0
    check(low < target < high, "constraint target", target, f"strictly between {low:.6g} and {high:.6g}")

    def mean(multiplier: float) -> float:
        return sum(float(torch.softmax(a + multiplier / beta * r, 0) @ r) for a, r in parts) / len(parts)

    return _bisect(mean, target, beta / (high - low))


def _bisect(mean: Callable[[float], float], target: float, reach: float) -> float:
    low, high = -reach, reach
    for _ in range(200):
        if mean(low) <= target <= mean(high):
            break
        low, high = 2 * low, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < target else (low, middle)
    return (low + high) / 2
