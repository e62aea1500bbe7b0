"""Losses of linear heads, and their minima.

Letters: `B` rows, `K` attributes, `D` width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.train.reward.rows import Rows

__all__ = ["Fit", "bradley_terry", "log_loss", "minimised", "prior_correction", "ridge"]


def bradley_terry(margins: Tensor, wanted: Tensor | float = 0.0) -> Tensor:
    """Mean of `-log sigmoid(margin - wanted)` over score differences chosen minus rejected `[B]`."""
    return torch.nn.functional.softplus(wanted - margins).mean()


def log_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of `log(1 + exp(-y logit))` for labels 0 and 1 `[B]`."""
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (losses * weights).sum() / weights.sum()


def ridge(z: Tensor, y: Tensor, penalty: float) -> Tensor:
    """The minimiser `[K, D]` of `|y_k - z w_k|^2 + penalty |w_k|^2` for each column of `y` `[B, K]`, whose NaN are left
    out with their rows; `z` is `[B, D]`.
    """
    found = []
    for column in y.T:
        there = ~column.isnan()
        mine = z[there]
        gram = mine.T @ mine + penalty * torch.eye(z.shape[1], dtype=z.dtype)
        found.append(torch.linalg.solve(gram, mine.T @ column[there]))
    return torch.stack(found)


def prior_correction(keep: float) -> float:
    """What is added to a logit that was fitted with a share `keep` of the negatives: `log keep`."""
    return math.log(keep)


@dataclass(frozen=True)
class Fit:
    """Features as heads see them: of pairs the difference of the two."""

    z: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, rows: Rows, states: Tensor, learnt: Sequence[int]) -> Fit:
        x = states.double()
        each = x.reshape(len(rows.group), -1, x.shape[1])
        mine = each[list(learnt)].flatten(0, 1)
        std = mine.std(0, correction=0)
        std = torch.where(std < 1e-6, 1.0, std)
        z = (each - mine.mean(0)) / std
        return cls(z[:, 0] - z[:, 1] if rows.objective == "pairs" else z[:, 0], mine.mean(0), std)

    @property
    def width(self) -> int:
        return len(self.mean)

    def head(self, rows: Rows, seen: Tensor, penalty: float, dims: Tensor | None) -> tuple[Tensor, Tensor]:
        """A member `[K, D]` and its bias `[K]`."""
        z = self.z[seen] if dims is None else self.z[seen] * dims
        targets = rows.targets[seen]
        if rows.objective == "ratings":
            return ratings_heads(z, targets, penalty)
        weights, binary = rows.weights[seen], rows.objective == "binary"

        def loss(w: Tensor, b: Tensor) -> Tensor:
            scores = z @ w + b
            fit = log_loss(scores, targets, weights) if binary else bradley_terry(scores, targets)
            return fit + 0.5 * penalty * w.square().sum()

        w, b = minimised(loss, self.width, binary)
        return w[None], b[None]

    def loss(self, rows: Rows, some: Tensor, head: Tensor, bias: Tensor) -> float:
        """What a head is judged by, lower is better."""
        scores = self.z[some] @ head.T + (0 if rows.objective == "pairs" else bias)
        targets = rows.targets[some]
        if rows.objective == "ratings":
            spread = targets - targets.nanmean(0)
            return float(
                ((scores - targets).square().nanmean(0) / spread.square().nanmean(0).clamp_min(1e-12)).nanmean()
            )
        if rows.objective == "binary":
            return float(log_loss(scores[:, 0], targets, rows.weights[some]))
        return float(bradley_terry(scores[:, 0], targets))


def ratings_heads(z: Tensor, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Heads `[K, D]` with intercepts `[K]`, which carry no penalty: each attribute is centred on its own rows."""
    heads, bias = [], []
    for column in targets.T:
        there = ~column.isnan()
        middle, level = z[there].mean(0), column[there].mean()
        heads.append(ridge(z[there] - middle, (column[there] - level)[:, None], penalty)[0])
        bias.append(level - middle @ heads[-1])
    return torch.stack(heads), torch.stack(bias)


def minimised(loss: Callable[[Tensor, Tensor], Tensor], width: int, biased: bool) -> tuple[Tensor, Tensor]:
    """The minimum of a convex loss of weights `[D]` and, where it is `biased`, a bias."""
    w = torch.zeros(width, dtype=torch.float64, requires_grad=True)
    b = torch.zeros((), dtype=torch.float64, requires_grad=biased)
    free = [w, b] if biased else [w]
    optimizer = torch.optim.LBFGS(
        free, max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(w, b)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    return w.detach(), b.detach()
