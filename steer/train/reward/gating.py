"""Weights of attributes by the prompt, and attributes freed of length, as in ArmoRM (Wang et al. 2024, 2406.12845).

    r'_k = r_k - penalty_k r_verbosity        score = sum_k g_k(x) r'_k        g = softmax over k of (MLP(psi(x)) / 10)

psi is the standardised state at the last token before the reply. The heads are frozen while the gate learns from pairs
by the Bradley-Terry loss on r' g. The paper's released second stage takes its softmax over the two texts of a pair, so
that every gate is 1/2; here it is over the attributes, once a pair.

Letters: `N` samples, `K` attributes, `D` width, `H` inner units.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steer.rewards.heads import GATE_TEMPERATURE
from steer.train.loop import fit
from steer.train.reward.heads import bradley_terry
from steer.train.reward.measures import spearman

__all__ = ["PENALTY_GRID", "Gating", "debiased", "fit_gate", "gated", "penalties"]

PENALTY_GRID = (0, 0.01, 0.025, 0.05, 0.075, *(k / 100 for k in range(10, 100, 5)))
_ENOUGH = 0.03
"""Rank correlation with verbosity that is left, at most."""


def penalties(ratings: Tensor, verbosity: int) -> Tensor:
    """`[K]` for scores `[N, K]`: the first of the grid at which the rank correlation with verbosity is .03 or less, 1
    where none is; verbosity's own is 1, so that it is not in the score. One-sided: what falls with length is left.
    """
    long = ratings[:, verbosity]
    found = []
    for k, column in enumerate(ratings.T):
        enough = (c for c in PENALTY_GRID if spearman(column - c * long, long) <= _ENOUGH)
        found.append(1.0 if k == verbosity else next(enough, 1.0))
    return torch.tensor(found, dtype=torch.float64)


def debiased(penalty: Tensor, verbosity: int) -> Tensor:
    """The transform `[K, K]` of scores: `r' = r T^T`."""
    made = torch.eye(len(penalty), dtype=torch.float64)
    made[:, verbosity] -= penalty
    return made


def gated(logits: Tensor) -> Tensor:
    """Weights `[N, K]` of the attributes, one row a prompt, from a gate's outputs."""
    return (logits / GATE_TEMPERATURE).softmax(-1)


class Gating(nn.Module):
    """The network of the gate: `[N, D]` to `[N, K]` weights."""

    def __init__(self, width: int, attributes: int, hidden: int = 64) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, attributes)
        self.dropout = nn.Dropout(0.2)

    def forward(self, psi: Tensor) -> Tensor:
        weights: Tensor = gated(self.outer(self.dropout(torch.relu(self.inner(psi)))))
        return weights


def fit_gate(
    psi: Tensor,
    scores: Tensor,
    *,
    hidden: int = 64,
    steps: int = 2000,
    seed: int = 0,
    work: Path | None = None,
    run: Mapping[str, Any] | None = None,
) -> Gating:
    """A gate for prompts `psi` `[B, D]` with transformed scores of the chosen and the rejected text `[B, 2, K]`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = Gating(psi.shape[1], scores.shape[2], hidden)
        order = torch.randperm(len(psi), generator=torch.Generator().manual_seed(seed))
        batches = list(order.split(min(1024, len(psi))))
        gap = (scores[:, 0] - scores[:, 1]).float()

        def loss(module: nn.Module, batch: Tensor, epoch: int) -> Tensor:
            return bradley_terry((module(psi[batch].float()) * gap[batch]).sum(1))

        fit(
            made.train(),
            batches,
            loss,
            epochs=max(1, steps // len(batches)),
            learning_rate=1e-3,
            run={**(run or {}), "seed": seed},
            work=work,
            what="learning the gate",
        )
    return made.eval().requires_grad_(False)
