"""Composites under several constraints, and the points beyond which more of a proxy hurts.

    p_mu ∝ p exp((objective + sum_i mu_i r_i) / beta)         mu = argmin  log Z(mu) - mu . target / beta

with mu_i free for "=", of 0 or more for ">=" and of 0 or less for "<=": the law that is closest to the target law of
the objective and meets the constraints in the mean. The dual is convex. Without an objective it is the law closest to
the model itself (Moskovitz et al. 2023, 2310.04373, whose multipliers are learnt during training).

Letters: `N` samples, `K` constraints or components, `P` prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steer.core import InputError, Samples, SteerError, check
from steer.methods.best_of_n import reward_curve
from steer.progress import note
from steer.rewards.algebra import Composable, lift, scores_of

__all__ = ["Constraints", "ProxyPoint", "proxy_points", "solve_multipliers"]

SENSES = ("=", ">=", "<=")
_MOST = 8
_FEW = 0.1
"""Effective share of the samples below which fitted multipliers are doubtful."""


@dataclass(frozen=True, repr=False)
class Constraints(Composable):
    """`objective + sum_i mu_i r_i`, with the multipliers under which every constraint holds in the mean.

    Args:
        objective: what is raised besides; None raises nothing, so that the KL alone is kept low.
        constraints: `(reward, sense, target)`, the sense one of "=", ">=", "<=".
        multipliers: found by `fitted` on samples of the base model; until then scoring raises `SteerError`.
    """

    objective: Composable | None
    constraints: tuple[tuple[Composable, str, float], ...]
    multipliers: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "objective", None if self.objective is None else lift(self.objective))
        given = tuple(self.constraints)
        check(0 < len(given) <= _MOST, "constraints", f"{len(given)}", f"1 to {_MOST}")
        made = []
        for i, (reward, sense, target) in enumerate(given):
            check(sense in SENSES, f"constraints[{i}] sense", sense, ", ".join(SENSES))
            check(math.isfinite(target), f"constraints[{i}] target", target, "a finite number")
            made.append((lift(reward), sense, float(target)))
        object.__setattr__(self, "constraints", tuple(made))

    def bind(self, model: Any) -> Constraints:
        rewards = tuple((reward.bind(model), sense, target) for reward, sense, target in self.constraints)
        objective = None if self.objective is None else self.objective.bind(model)
        return replace(self, objective=objective, constraints=rewards)  # type: ignore[arg-type]

    def fitted(self, samples: Samples, beta: float = 1.0) -> Constraints:
        """The reward with its multipliers solved on samples of the base model (weighted or not), at KL coefficient
        `beta`. Says so where few of the samples carry the fitted law. Raises as `solve_multipliers`.
        """
        scores = torch.stack([reward(samples).double() for reward, _, _ in self.constraints])
        base = torch.zeros(scores.shape[1]).double() if self.objective is None else self.objective(samples).double()
        found = solve_multipliers(
            base,
            scores,
            [(sense, target) for _, sense, target in self.constraints],
            beta,
            log_weight=samples.log_weight,
            group=samples.group,
            names=[repr(reward) for reward, _, _ in self.constraints],
        )
        logs = samples.log_weight.double() + (base + torch.tensor(found, dtype=torch.float64) @ scores) / beta
        share = min(_effective(logs[samples.group == b]) for b in samples.group.unique())
        note(share < _FEW, f"warning: the fitted constraints leave {share:.1%} effective samples: take more")
        return replace(self, multipliers=tuple(found))

    def score(self, samples: Samples) -> Tensor:
        if self.multipliers is None:
            raise SteerError(f"reward {self}: its multipliers are not known yet; call .fitted(samples, beta=...) first")
        total = torch.zeros(len(samples.group)).double()
        if self.objective is not None:
            total = total + scores_of(self.objective, samples)
        for mu, (reward, _, _) in zip(self.multipliers, self.constraints, strict=True):
            total = total + mu * scores_of(reward, samples)
        return total

    def __repr__(self) -> str:
        shown = ", ".join(f"{reward!r} {sense} {target:g}" for reward, sense, target in self.constraints)
        return f"Constraints({self.objective!r}, {shown})"


def _effective(logs: Tensor) -> float:
    weights = logs.softmax(0)
    return float(1 / weights.square().sum()) / len(weights)


def solve_multipliers(
    objective: Tensor,
    scores: Tensor,
    wanted: Sequence[tuple[str, float]],
    beta: float = 1.0,
    *,
    log_weight: Tensor | None = None,
    group: Tensor | None = None,
    names: Sequence[str] = (),
) -> list[float]:
    """The `mu` `[K]` of constraints `wanted` (sense and target) on `scores` `[K, N]` beside `objective` `[N]`.

    Every set of active constraints is tried, by Newton's method, until one meets the conditions of Karush, Kuhn and
    Tucker; the dual is convex, so it is the solution. `log_weight` and `group` are as for `solve_multiplier`.

    Raises `InputError`: a target that no weighing of the samples attains, or targets that contradict each other.
    """
    check(math.isfinite(beta) and beta > 0, "beta", beta, "a finite number > 0")
    labels = list(names) or [f"constraint {i + 1}" for i in range(len(wanted))]
    base = objective.double() / beta + (0 if log_weight is None else log_weight.double())
    rows = torch.zeros(len(base), dtype=torch.long) if group is None else group
    parts = [
        (base[at], scores[:, at].double()) for b in rows.unique() if (at := (rows == b) & (base > -math.inf)).any()
    ]
    targets = torch.tensor([target for _, target in wanted], dtype=torch.float64)
    for i, (sense, target) in enumerate(wanted):
        low = sum(float(r[i].min()) for _, r in parts) / len(parts)
        high = sum(float(r[i].max()) for _, r in parts) / len(parts)
        inside = {"=": low < target < high, ">=": target < high, "<=": target > low}[sense]
        check(
            inside, f"target of {labels[i]}", target, f"strictly between {low:.6g} and {high:.6g}, what samples attain"
        )
    choices = [(True,) if sense == "=" else (False, True) for sense, _ in wanted]
    for active in sorted(product(*choices), key=sum):
        at = [i for i, on in enumerate(active) if on]
        mu = _newton(parts, targets, at, beta)
        if mu is not None and _optimal(parts, targets, wanted, mu, beta):
            return mu.tolist()
    raise InputError(
        "constraints", ", ".join(labels), "targets that hold together: no weighing of the samples has them"
    )


def _moments(parts: list[tuple[Tensor, Tensor]], mu: Tensor, beta: float) -> tuple[float, Tensor, Tensor]:
    """Log Z, means `[K]` and covariance `[K, K]` of the scores under the law of `mu`, averaged over prompts."""
    log_z, mean, spread = 0.0, torch.zeros(len(mu)).double(), torch.zeros(len(mu), len(mu)).double()
    for logs, scores in parts:
        tilted = logs + mu @ scores / beta
        weights = tilted.softmax(0)
        middle = scores @ weights
        log_z += float(tilted.logsumexp(0)) / len(parts)
        mean += middle / len(parts)
        gap = scores - middle.unsqueeze(1)
        spread += (gap * weights) @ gap.T / len(parts)
    return log_z, mean, spread


def _newton(parts: list[tuple[Tensor, Tensor]], targets: Tensor, at: list[int], beta: float) -> Tensor | None:
    """Multipliers that meet the targets of the constraints `at`, the others 0; None where there are none."""
    mu = torch.zeros(len(targets)).double()
    if not at:
        return mu
    for _ in range(200):
        log_z, mean, spread = _moments(parts, mu, beta)
        slope = (mean - targets)[at] / beta
        if float(slope.abs().max()) < 1e-12:
            return mu
        curve = spread[at][:, at] / beta**2
        step = torch.linalg.lstsq(curve + 1e-14 * torch.eye(len(at)).double(), slope.unsqueeze(1)).solution.squeeze(1)
        size, value, gain = 1.0, log_z - float(mu @ targets) / beta, float(slope @ step)
        while size > 1e-12:
            trial = mu.clone()
            trial[at] -= size * step
            new = _moments(parts, trial, beta)[0] - float(trial @ targets) / beta
            # So close to the minimum values differ by rounding alone, and Newton's step is right.
            if new <= value - 1e-4 * size * gain or gain < 1e-10:
                break
            size /= 2
        if size <= 1e-12 or not bool(trial.isfinite().all()):
            return mu if float(slope.abs().max()) < 1e-8 else None
        mu = trial
    return None


def _optimal(
    parts: list[tuple[Tensor, Tensor]], targets: Tensor, wanted: Sequence[tuple[str, float]], mu: Tensor, beta: float
) -> bool:
    """Whether every constraint holds and every multiplier has its sign."""
    _, mean, _ = _moments(parts, mu, beta)
    for i, (sense, _) in enumerate(wanted):
        gap, sign = float(mean[i] - targets[i]), {"=": 0, ">=": 1, "<=": -1}[sense]
        if sign == 0 and abs(gap) > 1e-7:
            return False
        if sign and (sign * gap < -1e-7 or sign * float(mu[i]) < -1e-9):
            return False
    return True


# --------------------------------------------------------------------------------------------------------- proxy points


class ProxyPoint(NamedTuple):
    """Where more of a component stops to help."""

    n: int
    """The size of best-of-n by the component at which the gold score is highest."""
    value: float
    """Mean of the component there: the target of a constraint."""
    low: float
    high: float
    """95% interval of the value, by resampling prompts."""


def proxy_points(
    scores: Tensor, gold: Tensor, sizes: Sequence[int], *, resamples: int = 500, seed: int = 0
) -> list[ProxyPoint]:
    """Of each component its proxy point, from one pool of `N` samples for each prompt.

    Args:
        scores: of the components `[K, P, N]`.
        gold: what is really wanted `[P, N]`.
        sizes: of best-of-n, at most N.
        resamples: of the prompts, for the interval.
    """
    check(scores.dim() == 3 and scores.shape[1:] == gold.shape, "scores", tuple(scores.shape), "[K, *gold.shape]")
    prompts = gold.shape[0]
    draws = torch.randint(prompts, (resamples, prompts), generator=torch.Generator().manual_seed(seed))
    found = []
    for component in scores:
        judged, own = reward_curve(component, sizes, gold), reward_curve(component, sizes)
        at = int(judged.mean(0).argmax())
        best = judged[draws].mean(1).argmax(1)
        values = own[draws].mean(1)[torch.arange(resamples), best]
        low, high = values.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
        found.append(ProxyPoint(int(sizes[at]), float(own.mean(0)[at]), low, high))
    return found
