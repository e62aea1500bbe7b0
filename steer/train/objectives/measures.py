"""Figures of preference learning: how many pairs a policy ranks right, and what a perfect DPO could.

Letters: `P` pairs. Log-probabilities are sums over tokens, in nats (Chen et al. 2024, "Preference learning algorithms
do not learn preference rankings").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["Ranking", "dpo_threshold", "ideal_ranking", "ranking_accuracy", "read_ranking"]


def ranking_accuracy(chosen: Tensor, rejected: Tensor, lengths: tuple[Tensor, Tensor] | None = None) -> float:
    """Share of pairs whose chosen completion is the likelier one: by sums `[P]`, or by token with `lengths`."""
    if lengths is not None:
        chosen, rejected = chosen / lengths[0], rejected / lengths[1]
    return float((chosen > rejected).double().mean())


def dpo_threshold(ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """DPO's loss below which a pair is ranked right `[P]`: `-log sigmoid(beta (ref_l - ref_w))`."""
    return -logsigmoid(beta * (ref_rejected - ref_chosen))


def ideal_ranking(ref_chosen: Tensor, ref_rejected: Tensor, beta: float, preference: Tensor | float) -> float:
    """Ranking accuracy of the optimum of DPO for pairs that are preferred with probability `preference`: right where
    `log(p / (1 - p)) / beta` is more than what the base holds against the pair.
    """
    p = torch.as_tensor(preference, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    return float(((p / (1 - p)).log() / beta > ref_rejected - ref_chosen).double().mean())


@dataclass(frozen=True)
class Ranking:
    """Ranking accuracy of base and policy, by sums and by token, and of a perfect DPO."""

    base: float
    policy: float
    base_per_token: float
    policy_per_token: float
    ideal: float


def read_ranking(
    ref: Sequence[Sequence[float]],
    policy: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[int]],
    beta: float,
    preference: Sequence[float],
) -> Ranking:
    """Figures of pairs `[P][2]`, the chosen one first."""
    r, q, n = (torch.tensor(x, dtype=torch.float64).view(-1, 2) for x in (ref, policy, lengths))
    size = (n[:, 0], n[:, 1])
    return Ranking(
        ranking_accuracy(r[:, 0], r[:, 1]),
        ranking_accuracy(q[:, 0], q[:, 1]),
        ranking_accuracy(r[:, 0], r[:, 1], size),
        ranking_accuracy(q[:, 0], q[:, 1], size),
        ideal_ranking(r[:, 0], r[:, 1], beta, torch.tensor(preference, dtype=torch.float64)) if beta > 0 else math.nan,
    )
