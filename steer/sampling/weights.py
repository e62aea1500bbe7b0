"""Log-weights, effective sample size and resampling: pure functions on the last axis of a tensor.

`N` is the number of particles in one population; leading axes are populations that never mix.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from steer.core import check

__all__ = [
    "RESAMPLERS",
    "effective_sample_size",
    "gained",
    "log_mean_exp",
    "normalise",
    "resample",
    "temper",
]


def normalise(log_weights: Tensor) -> Tensor:
    """Weights `[..., N]` that sum to one. A population whose weights are all zero becomes uniform."""
    dead = torch.isneginf(log_weights).all(-1, keepdim=True)
    return torch.softmax(torch.where(dead, torch.zeros_like(log_weights), log_weights), -1)


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """`log(mean(exp(log_weights)))` over the last axis: the increment of log Z at a resampling step."""
    return torch.logsumexp(log_weights, -1) - math.log(log_weights.shape[-1])


def gained(after: Tensor, before: Tensor) -> Tensor:
    """`after - before` of running sums of log-weights; a sum that has reached -infinity stays there."""
    return torch.where(after.isneginf(), after, after - before)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """`1 / sum w^2` of the normalised weights, between 1 and N."""
    return 1 / normalise(log_weights).square().sum(-1)


def temper(log_weights: Tensor, target: float) -> Tensor:
    """The largest power in [0, 1] (to 1e-6) at which the ESS of `power * log_weights` is at least `target` particles.

    Shape `[...]`. Bisection: the ESS falls monotonically with the power.
    """
    low, high = torch.zeros(log_weights.shape[:-1], dtype=torch.float64), torch.ones(log_weights.shape[:-1]).double()
    whole = effective_sample_size(log_weights.double()) >= target
    for _ in range(21):
        middle = (low + high) / 2
        good = effective_sample_size(log_weights.double() * middle.unsqueeze(-1)) >= target
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(whole, torch.ones_like(low), low)


def _by_cdf(weights: Tensor, points: Tensor) -> Tensor:
    """First index whose cumulative weight exceeds each of `points` in [0, 1)."""
    cdf = weights.double().cumsum(-1)
    cdf = cdf / cdf[..., -1:]
    return torch.searchsorted(cdf, points, right=True).clamp_max(weights.shape[-1] - 1)


def _uniform(weights: Tensor, generator: torch.Generator, count: int) -> Tensor:
    shape = (*weights.shape[:-1], count)
    return torch.rand(shape, dtype=torch.float64, generator=generator, device=generator.device).to(weights.device)


def _multinomial(weights: Tensor, generator: torch.Generator, count: int) -> Tensor:
    return _by_cdf(weights, _uniform(weights, generator, count))


def _stratified(weights: Tensor, generator: torch.Generator, count: int) -> Tensor:
    return _by_cdf(weights, (torch.arange(count, device=weights.device) + _uniform(weights, generator, count)) / count)


def _systematic(weights: Tensor, generator: torch.Generator, count: int) -> Tensor:
    return _by_cdf(weights, (torch.arange(count, device=weights.device) + _uniform(weights, generator, 1)) / count)


def _ssp(weights: Tensor, generator: torch.Generator, count: int) -> Tensor:
    """Srinivasan sampling process (Gerber, Chopin & Whiteley 2019): every count is the floor or the ceiling of `N w`,
    counts are negatively associated, and, unlike systematic resampling, no order of the particles is special.
    """
    flat = weights.double().reshape(-1, weights.shape[-1])
    draws = _uniform(flat, generator, flat.shape[-1]).cpu()
    rows = [_ssp_row(w.tolist(), u.tolist(), count) for w, u in zip(flat.cpu(), draws, strict=True)]
    return torch.tensor(rows).reshape(*weights.shape[:-1], count).to(weights.device)


def _ssp_row(weights: list[float], draws: list[float], count: int) -> list[int]:
    n, mass = len(weights), sum(weights)
    expected = [w / mass * count for w in weights]
    counts = [int(e + 1e-9) for e in expected]
    rest = [max(e - c, 0.0) for e, c in zip(expected, counts, strict=True)]
    first = 0
    for second in range(1, n):
        a, b = rest[first], rest[second]
        up, down = min(1 - a, b), min(a, 1 - b)
        # Move mass between the two until one is whole, so that each keeps its expectation.
        if up + down > 0 and draws[second] * (up + down) < down:
            rest[first], rest[second] = a + up, b - up
        else:
            rest[first], rest[second] = a - down, b + down
        for j in (first, second):
            if rest[j] > 1 - 1e-9:
                counts[j], rest[j] = counts[j] + 1, 0.0
        if rest[first] < 1e-9:
            first = second
    # Rounding can leave one particle over or missing; the fractional part that is left decides.
    missing = count - sum(counts)
    for j in sorted(range(n), key=lambda j: -rest[j])[: max(missing, 0)]:
        counts[j] += 1
    return [j for j, times in enumerate(counts) for _ in range(times)][:count]


RESAMPLERS: dict[str, Callable[[Tensor, torch.Generator, int], Tensor]] = {
    "multinomial": _multinomial,
    "stratified": _stratified,
    "systematic": _systematic,
    "ssp": _ssp,
}
"""Each maps weights `[..., N]` to `count` ancestors `[..., count]` with `E[times of i] = count * w_i`."""


def resample(log_weights: Tensor, generator: torch.Generator, how: str = "ssp", count: int | None = None) -> Tensor:
    """Ancestors `[..., count]` of an equally weighted population drawn from `log_weights` `[..., N]`; N by default."""
    check(how in RESAMPLERS, "resampler", how, ", ".join(RESAMPLERS))
    return RESAMPLERS[how](normalise(log_weights), generator, count or log_weights.shape[-1])
