"""Preference heads that withstand wrong labels: two heads review each other's pairs.

In every mini-batch a head learns from the share kappa of pairs to which the *other* head gives the largest margins;
kappa falls from 1 to `keep` over the first third of the epochs. The result is the mean of the two heads. The two ideas,
peer review and a curriculum, are those of collaborative reward modelling (Zhang et al. 2025, 2505.10597); schedule and
defaults are ours.

It helps against labels that are wrong independently of the pair where a head would follow them: with large steps. Under
small ones a plain head averages such labels out as well, where a head can fit the noise reviewers do nothing, and where
the noise is systematic they hurt, since both share the bias. So both forms are trained, and the plain one is kept
unless the other is better on pairs that neither saw.

Letters: `B` pairs, `D` dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["collaborative", "corrected", "plain", "preferred"]

_EPOCHS, _BATCH, _STEP = 15, 32, 0.05


def plain(z: Tensor, seed: int = 0, epochs: int = _EPOCHS, step: float = _STEP) -> Tensor:
    """A head `[D]` by stochastic gradient descent on the Bradley-Terry loss of differences `z` `[B, D]`."""
    return _descended(z, 1, 1.0, seed, epochs, step)[0]


def collaborative(z: Tensor, keep: float, seed: int = 0, epochs: int = _EPOCHS, step: float = _STEP) -> Tensor:
    """The mean `[D]` of two heads that review each other; in the end they learn from a share `keep` of the pairs."""
    return _descended(z, 2, keep, seed, epochs, step).mean(0)


def _descended(z: Tensor, count: int, keep: float, seed: int, epochs: int, step: float) -> Tensor:
    """Heads `[count, D]`; of one, kappa stays 1."""
    width = z.shape[1]
    x = z.double() / math.sqrt(width)
    draw = torch.Generator().manual_seed(seed)
    heads = 0.1 * torch.randn(count, width, generator=draw, dtype=torch.float64)
    for epoch in range(epochs):
        kappa = 1.0 if count == 1 else 1 - (1 - keep) * min(1.0, epoch / max(1.0, epochs / 3))
        orders = [torch.randperm(len(x), generator=draw) for _ in range(count)]
        for first in range(0, len(x), _BATCH):
            for k in range(count):
                batch = x[orders[k][first : first + _BATCH]]
                if kappa < 1:
                    most = max(1, round(kappa * len(batch)))
                    batch = batch[(batch @ heads[1 - k]).topk(most).indices]
                pull = torch.sigmoid(-(batch @ heads[k]))
                heads[k] += step * math.sqrt(width) * (pull.unsqueeze(1) * batch).mean(0)
    return heads / math.sqrt(width)


def preferred(ours: Tensor, theirs: Tensor) -> bool:
    """Whether margins `theirs` `[B]` are right more often than `ours` by more than one standard error, paired."""
    gap = (theirs > 0).double() - (ours > 0).double()
    error = float(gap.std(correction=0)) / math.sqrt(len(gap))
    return float(gap.mean()) > error


def corrected(accuracy: float, noise: float) -> float:
    """The accuracy on right labels, from that on labels of which a share `noise` is flipped, whatever the pair:
    `accuracy = noise + (1 - 2 noise) true`.
    """
    return min(1.0, max(0.0, (accuracy - noise) / (1 - 2 * noise)))
