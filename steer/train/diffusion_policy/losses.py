"""Losses and objectives of tuned diffusion policies, as formulas. Letters: `N` rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from steer.diffusion import DiffusionProcess


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


def advantages(gain: Tensor, reward: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """What a row brings beyond the mean of its group, and the scale of its group `[N]`.

    Both are for one division: by the standard deviation of the group's rewards (GRPO), 1 where they are all the same.
    A KL term that is divided by the same scale leaves every prompt's optimum where it was.

    Args:
        gain: `[..., N]`, what is compared: the reward, less what the KL of later steps costs.
        reward: `[N]`.
        group: `[N]`.
    """
    excess, scale = torch.empty_like(gain), torch.ones_like(reward)
    for g in group.unique():
        rows = group == g
        excess[..., rows] = gain[..., rows] - gain[..., rows].mean(-1, keepdim=True)
        spread = reward[rows].std(correction=0)
        if spread > 1e-8:
            scale[rows] = spread
    return excess / scale, scale


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
