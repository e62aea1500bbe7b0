"""Losses and objectives of tuned diffusion policies, as formulas. Letters: `N` rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.diffusion import DiffusionProcess
from steer.train.objectives.advantages import group_means, group_sizes, group_spread, mean_only

MEMORY = 0.9
"""How much less each earlier round counts in the scale of rewards than the one after it."""


def dpo_loss(winner: Tensor, loser: Tensor, winner_ref: Tensor, loser_ref: Tensor, beta: float) -> Tensor:
    """`-log sigmoid(-beta/2 [(L+ - L+_ref) - (L- - L-_ref)])` `[N]` from mean squared errors `[N]` (Wallace et al.
    2023, eq. 14, the number of noise levels folded into `beta`). Exact in the tails: neither 0 nor infinity gives NaN.
    """
    return -nn.functional.logsigmoid(-0.5 * beta * ((winner - winner_ref) - (loser - loser_ref)))


def seppo_loss(winner: Tensor, loser: Tensor, winner_ref: Tensor, loser_ref: Tensor, beta: float) -> Tensor:
    """As `dpo_loss`, but `+ (L- - L-_ref)` where the policy predicts the winner no better than the reference does: then
    the reference's sample is taken for a good one (SePPO's anchor; Zhang et al. 2024). Errors `[N]`; gives `[N]`.
    """
    sign = torch.where(winner.detach() < winner_ref, 1.0, -1.0).to(winner.dtype)
    return -nn.functional.logsigmoid(-0.5 * beta * ((winner - winner_ref) - sign * (loser - loser_ref)))


def spreads(reward: Tensor, group: Tensor, earlier: Sequence[float] = ()) -> tuple[Tensor, float]:
    """What each row's gain and KL are divided by `[N]`, and the standard deviation of this round inside its groups.

    The divisor is the standard deviation inside groups, pooled over earlier rounds, whose figures `earlier` holds (the
    last one counts most), and over all rows of this one but the row itself. It never depends on the row that it divides
    and has no say in where the gradient is zero: with the deviation s of the row's own group, `E[1 / s] > 1 / E[s]`
    makes the KL count for more than was asked. 1 where nothing tells a scale.

    Args:
        reward: `[N]`.
        group: `[N]`.
    """
    size = group_sizes(group).double()
    square = (reward.double() - group_means(reward.double(), group)).square()
    degrees = len(reward) - len(group.unique())
    spread = float((square.sum() / max(1, degrees)).sqrt())
    weights = [MEMORY**age for age in range(len(earlier), 0, -1)]
    before = degrees * sum(w * std * std for w, std in zip(weights, earlier, strict=True))
    known = degrees * (1 + sum(weights)) - 1
    if known < 0.5:
        return torch.ones_like(reward), spread
    # Without a row, the squares of its group add up to n / (n - 1) of the row's square less.
    rest = square.sum() - square * size / (size - 1).clamp_min(1)
    found = ((rest.clamp_min(0) + before) / known).sqrt()
    return torch.where(found > 1e-8, found, 1.0).to(reward), spread


def advantages(rule: str, gain: Tensor, reward: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """What a row brings beyond the mean of its group, and the scale that it is divided by `[N]`; 1 where rewards are
    all the same.

    The scale is the standard deviation of the row's group (`rule` "grpo", Shao et al. 2024) or of all rewards of the
    round ("batch-std", Lite PPO). Both hold the row itself. With rewards that are normal in a group of n the KL of
    "grpo" then counts for n / (n - 2) of `beta`: 4/3 in groups of 8, without bound in groups of 2.

    Args:
        gain: `[..., N]`, what is compared: the reward, less what the KL of later steps costs.
        reward: `[N]`.
        group: `[N]`.
    """
    scale = group_spread(reward, group, ddof=0) if rule == "grpo" else reward.std().expand_as(reward)
    scale = torch.where(scale > 1e-8, scale, 1.0)
    return mean_only(gain, group) / scale, scale


def clipped_objective(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """PPO's `min(ratio A, clip(ratio) A)`, elementwise; its gradient at ratio 1 is REINFORCE's."""
    ratio = log_ratio.clamp(max=20).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)


def step_kl(mean: Tensor, other: Tensor, std: float) -> Tensor:
    """KL of two Gaussians with these means `[N, ...]` and the same standard deviation, summed over dimensions: `[N]` in
    float64, nats.
    """
    return (mean.double() - other.double()).flatten(1).square().sum(1) / (2 * std * std)


def errors(process: DiffusionProcess, x0: Tensor, noise: Tensor, level: Tensor, group: Tensor, encoded: Any) -> Tensor:
    """Mean squared error of the noise that is predicted in `alpha x0 + sigma noise`, `[N]`.

    Args:
        x0: finished rows `[N, ...]`.
        noise: `[N, ...]`.
        level: number of each row's noise level `[N]`, on the CPU.
        group: prompt of each row `[N]`.
        encoded: of the denoiser's `encode`.
    """
    schedule, wide = process.schedule, (-1, *[1] * (x0.dim() - 1))
    alpha = torch.tensor(schedule.alpha, dtype=x0.dtype)[level].to(x0.device).view(wide)
    sigma = torch.tensor(schedule.sigma, dtype=x0.dtype)[level].to(x0.device).view(wide)
    x = alpha * x0 + sigma * noise
    if getattr(process.denoiser, "per_row", False):
        found = process.denoiser.predict(x, level, group, encoded)  # type: ignore[arg-type]
    else:
        found = torch.empty_like(x)
        for one in level.unique().tolist():
            rows = level == one
            found[rows.to(x.device)] = process.predict(x[rows.to(x.device)], one, group[rows], encoded)
    # eps_hat - eps = alpha / sigma (x0 - x0_hat)
    return ((alpha / sigma) * (found - x0)).flatten(1).square().mean(1)
