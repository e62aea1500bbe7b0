"""Distances between a population and a target, both as features of a network that took no part in the sampling.

Letters: `N` samples, `M` target points with weights, `D` features, `C` classes. Everything is in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Target", "frechet_distance", "interval", "mmd", "total_variation", "unique_share"]


@dataclass(frozen=True)
class Target:
    """Weighted points that stand for the law to be reached."""

    features: Tensor
    """`[M, D]`."""
    weights: Tensor
    """`[M]`, sum 1."""
    labels: Tensor
    """Class of each point `[M]` int64."""

    @classmethod
    def tilted(cls, features: Tensor, labels: Tensor, log_weights: Tensor) -> Target:
        """Base samples, weighted by `exp(log_weights)`: self-normalised importance sampling of the tilted law."""
        return cls(features.double(), torch.softmax(log_weights.double(), 0), labels)

    @property
    def ess(self) -> float:
        """Effective number of points."""
        return float(1 / self.weights.square().sum())

    def mean(self, values: Tensor) -> float:
        """Weighted mean of `values` `[M]`."""
        return float(self.weights @ values.double())


def _moments(x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean `[D]` and unbiased covariance `[D, D]`."""
    w = torch.full((len(x),), 1 / len(x), dtype=torch.float64) if weights is None else weights
    mean = w @ x
    gap = x - mean
    return mean, (w.unsqueeze(1) * gap).T @ gap / (1 - w.square().sum())


def frechet_distance(samples: Tensor, target: Target) -> float:
    """Squared Frechet distance between Gaussians fitted to `samples` `[N, D]` and to the target (Heusel et al. 2017).
    Biased upwards by O(D / N): compare populations of one size.
    """
    (m, s), (n, t) = _moments(samples.double()), _moments(target.features, target.weights)
    values, vectors = torch.linalg.eigh(s)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ t @ root).clamp_min(0).sqrt().sum()
    return float((m - n).square().sum() + s.trace() + t.trace() - 2 * cross)


def mmd(samples: Tensor, target: Target, bandwidth: float | None = None) -> float:
    """Squared maximum mean discrepancy with a Gaussian kernel, unbiased in `samples` `[N, D]` (Gretton et al. 2012);
    the bandwidth is the target's median distance by default.
    """
    x, y, w = samples.double(), target.features, target.weights
    if bandwidth is None:
        some = y[torch.linspace(0, len(y) - 1, min(len(y), 1000)).long()]
        bandwidth = float(torch.pdist(some).median())

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a, b).square() / (2 * bandwidth**2))

    xx = (kernel(x, x).sum() - len(x)) / (len(x) * (len(x) - 1))
    outer = w.unsqueeze(1) * w
    outer.fill_diagonal_(0)
    yy = (outer * kernel(y, y)).sum() / outer.sum()
    return float(xx + yy - 2 * (kernel(x, y) @ w).mean())


def total_variation(labels: Tensor, target: Target, classes: int) -> float:
    """Half the L1 distance between histograms of classes; `labels` `[N]` int64."""
    mine = torch.bincount(labels, minlength=classes).double() / len(labels)
    theirs = torch.zeros(classes, dtype=torch.float64).index_add(0, target.labels, target.weights)
    return 0.5 * float((mine - theirs).abs().sum())


def unique_share(outputs: Tensor) -> float:
    """Share of distinct rows among `outputs` `[N, ...]`, bit for bit."""
    return len(torch.unique(outputs.flatten(1), dim=0)) / len(outputs)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95% interval by Student's t, over independent repetitions."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, math.nan
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    return mean, (table[n - 2] if n - 2 < len(table) else 1.96 + 2.5 / n) * spread / math.sqrt(n)
