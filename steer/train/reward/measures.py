"""Measures of heads on rows that they have not seen."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from steer.train.reward.heads import Fit
from steer.train.reward.rows import Rows

__all__ = ["auroc", "measured", "spearman", "wilson"]

_ALIKE = 0.98
"""Mean rank correlation of members above which an ensemble is one model."""


def measured(rows: Rows, states: Tensor, held: list[int], fitted: Fit, heads: Tensor, bias: Tensor) -> dict[str, Any]:
    """How well the heads do on rows that they have not seen."""
    if not held:
        return {}
    at = torch.tensor(held)
    found = torch.einsum("nd,mkd->nmk", fitted.z[at], heads) + (0 if rows.objective == "pairs" else bias)
    scores, targets = found.mean(1), rows.targets[at]
    metrics: dict[str, Any] = {}
    if rows.objective == "ratings":
        for k, name in enumerate(rows.names):
            there = ~targets[:, k].isnan()
            y, x = targets[there, k], scores[there, k]
            if len(y) >= 3:
                left = (y - x).square().sum() / (y - y.mean()).square().sum().clamp_min(1e-12)
                metrics[name] = {"r2": round(float(1 - left), 4), "spearman": round(spearman(x, y), 4)}
    else:
        right = (scores[:, 0] > 0) == (targets > 0.5 if rows.objective == "binary" else torch.ones(len(at)).bool())
        low, high = wilson(int(right.sum()), len(at))
        metrics |= {"accuracy": round(float(right.double().mean()), 4), "interval": [round(low, 4), round(high, 4)]}
        if rows.objective == "binary" and 0 < float(targets.mean()) < 1:
            metrics["auroc"] = round(auroc(scores[:, 0], targets > 0.5), 4)
    z = (states.double() - fitted.mean) / fitted.std
    texts = (z @ heads.mean(0).T)[:, 0].reshape(len(rows.group), -1)[at].flatten()
    metrics["length_correlation"] = round(spearman(texts, rows.words.reshape(len(rows.group), -1)[at].flatten()), 4)
    if len(heads) > 1:
        pairs = [(a, b) for a in range(len(heads)) for b in range(a)]
        alike = sum(spearman(found[:, a, 0], found[:, b, 0]) for a, b in pairs) / len(pairs)
        metrics["members_alike"] = round(alike, 4)
        if alike > _ALIKE:
            metrics["warning"] = f"members rank alike ({alike:.3f}): the ensemble is one model"
    return metrics


def ranks(x: Tensor) -> Tensor:
    """Ranks, the mean of them for ties."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


def spearman(x: Tensor, y: Tensor) -> float:
    a, b = ranks(x) - ranks(x).mean(), ranks(y) - ranks(y).mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12))


def auroc(scores: Tensor, positive: Tensor) -> float:
    """The share of pairs of a positive and a negative that are ranked right; ties count half."""
    ranked, count = ranks(scores), int(positive.sum())
    return float((ranked[positive].sum() - count * (count + 1) / 2) / (count * (len(scores) - count)))


def wilson(right: int, count: int) -> tuple[float, float]:
    """95% interval of a share."""
    z, share = 1.96, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half
