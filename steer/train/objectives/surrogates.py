"""Token surrogates: a loss for each token from its log-probability now and when it was sampled, and its advantage.

Letters: `B` sequences, `T` tokens. All but `logp` and `entropy` are constants; `mask` is true where there is a token to
learn from. Lower is better. `aggregate` makes one number of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["AGGREGATES", "SURROGATES", "Tokens", "aggregate", "kl_terms", "smooth_penalty", "token_loss"]


@dataclass(frozen=True)
class Tokens:
    """What a surrogate reads, each `[B, T]`.

    Attributes:
        logp: of the policy.
        old: of the policy that sampled.
        ref: of the base.
        advantage: of each token.
        mask: bool.
        entropy: of the policy's law at each token, where the surrogate asks for it.
        accuracy: of the prompt's group, for "nft".
        refined: bool, tokens of a refinement, for "critique".
        kl: weight of each token's KL.
    """

    logp: Tensor
    old: Tensor
    ref: Tensor
    advantage: Tensor
    mask: Tensor
    entropy: Tensor | None = None
    accuracy: Tensor | None = None
    refined: Tensor | None = None
    kl: Tensor | None = None

    @property
    def log_ratio(self) -> Tensor:
        return self.logp - self.old

    @property
    def ratio(self) -> Tensor:
        return self.log_ratio.clamp(max=20).exp()


def plain(x: Tokens) -> Tensor:
    """`-A rho`."""
    return -x.advantage * x.ratio


def nll(x: Tokens) -> Tensor:
    """`-A log pi`: likelihood weighted by advantages; REINFORCE, and SFT where they are 1."""
    return -x.advantage * x.logp


def dft(x: Tokens) -> Tensor:
    """`-A sg(pi) log pi` (Wu et al. 2025)."""
    return -x.advantage * x.logp.detach().exp() * x.logp


def clip(x: Tokens, *, clip_low: float = 0.2, clip_high: float = 0.2, dual: float | None = None) -> Tensor:
    """PPO's clipped surrogate, DAPO's with a wider upper side; the loss of a token with negative advantage is at most
    `dual` times as much as it was.
    """
    cut = x.ratio.clamp(1 - clip_low, 1 + clip_high)
    found = torch.maximum(-x.advantage * x.ratio, -x.advantage * cut)
    if dual is None:
        return found
    return torch.where(x.advantage < 0, torch.minimum(found, -dual * x.advantage), found)


def _straight(x: Tensor, low: float) -> Tensor:
    """`max(x, low)` with the gradient of `x`."""
    return x + (x.clamp_min(low) - x).detach()


def nft(x: Tokens, *, negative: float = 1.0, prompt_weight: str = "grpo") -> Tensor:
    """Negative-aware fine-tuning: likelihood of right samples; of wrong ones that of the implicit negative policy,
    `(1 - r rho) / (1 - r)` with the group's accuracy r. Weighted by prompt: "grpo" (`sqrt((1 - r) / r)`), "failure"
    (`1 - r`) or "one".
    """
    assert x.accuracy is not None
    r = x.accuracy.clamp(0.02, 0.98)
    weight = {"grpo": ((1 - r) / r).sqrt(), "failure": 1 - r, "one": torch.ones_like(r)}[prompt_weight]
    wrong = -negative * _straight((1 - r * x.ratio) / (1 - r), 1.0).log()
    return weight * torch.where(x.advantage > 0, -x.log_ratio, wrong)


def critique(x: Tokens, *, shape: float = 0.1) -> Tensor:
    """Critique-GRPO: `-A rho` for rollouts, `-A pi / (pi + shape)` for the tokens of refinements."""
    refined = torch.zeros_like(x.mask) if x.refined is None else x.refined
    pi = x.logp.exp()
    return torch.where(refined, -x.advantage * pi / (pi + shape), plain(x))


def mirror(x: Tokens, *, step: float = 1.0) -> Tensor:
    """Mirror descent: `-rho A` and, over `step`, the KL to the policy that sampled."""
    return plain(x) + (x.ratio * x.log_ratio - x.ratio + 1) / step


def _covariance(x: Tokens) -> Tensor:
    """How much each token adds to the covariance of advantage and log-probability; minus infinity off the mask."""
    logp, mask = x.logp.detach(), x.mask
    count = mask.sum()
    mean_a, mean_l = ((y * mask).sum() / count for y in (x.advantage, logp))
    found = (x.advantage - mean_a) * (logp - mean_l)
    return torch.where(mask, found, -math.inf)


def kl_cov(x: Tokens, *, cov_share: float = 2e-3, cov_penalty: float = 1.0) -> Tensor:
    """KL-Cov: unclipped, with a penalty `|log rho|` on the share of tokens with the largest covariance."""
    covariance = _covariance(x)
    count = max(1, int(cov_share * int(x.mask.sum())))
    chosen = torch.zeros_like(x.mask).flatten()
    chosen[covariance.flatten().topk(count).indices] = True
    return plain(x) + torch.where(chosen.view_as(x.mask), cov_penalty * x.log_ratio.abs(), 0.0)


def clip_cov(
    x: Tokens,
    *,
    cov_share: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    seed: int = 0,
) -> Tensor:
    """Clip-Cov: PPO's surrogate without some tokens, drawn at random of those whose covariance lies between two bounds
    and that are not clipped.
    """
    found = clip(x, clip_low=clip_low, clip_high=clip_high)
    clipped = found.detach() > plain(x).detach()
    covariance = _covariance(x)
    eligible = ((covariance > cov_low) & (covariance < cov_high) & ~clipped & x.mask).flatten().nonzero().flatten()
    if not len(eligible):
        return found
    drawn = torch.Generator().manual_seed(seed)
    count = max(1, int(cov_share * int(x.mask.sum())))
    out = torch.zeros_like(x.mask).flatten()
    out[eligible[torch.randperm(len(eligible), generator=drawn)[:count].to(eligible.device)]] = True
    return torch.where(out.view_as(x.mask), 0.0, found)


def change_of_entropy(x: Tokens) -> Tensor:
    """STEER's first-order size of what a token's update does to the entropy, `|A / pi_old pi (1 - pi)(ln pi + H)|`,
    without a gradient. As released: a step along the gradient of log pi would have one factor pi more.
    """
    assert x.entropy is not None
    pi = x.logp.detach().exp()
    return (x.advantage / x.old.exp() * pi * (1 - pi) * (x.logp.detach() + x.entropy.detach())).abs()


def entropy_change(
    x: Tokens,
    *,
    form: str = "linear",
    weight_low: float = 0.8,
    weight_high: float = 1.2,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual: float | None = 10.0,
) -> Tensor:
    """STEER: DAPO's surrogate with less weight on tokens that change the entropy much; "linear" between two weights, or
    "exponential" down to `weight_low`.
    """
    size = change_of_entropy(x)
    real = size[x.mask]
    low, high = real.min(), real.max()
    if form == "exponential":
        weight = (math.log(weight_low) / high.clamp_min(0.02) * size).exp().clamp_min(weight_low)
    elif bool(high > low):
        weight = weight_high - (size - low) * (weight_high - weight_low) / (high - low)
    else:
        weight = torch.full_like(size, (weight_low + weight_high) / 2)
    return weight * clip(x, clip_low=clip_low, clip_high=clip_high, dual=dual)


def smooth_penalty(
    entropy: Tensor,
    mean: Tensor | float,
    *,
    band: tuple[float, float] = (0.5, 1.5),
    penalty: float = 0.1,
    released: bool = False,
) -> Tensor:
    """EPO's penalty of entropies outside `band` times the running mean: how far they lie outside, which has a gradient,
    or the constant `penalty`, as released, which has none.
    """
    low, high = (side * torch.as_tensor(mean, dtype=entropy.dtype, device=entropy.device) for side in band)
    if released:
        inside = (low < entropy) & (entropy < high)
        return penalty * (~inside).to(entropy)
    return (low - entropy).clamp_min(0) + (entropy - high).clamp_min(0)


def phase_weight(epoch: int, total: int) -> float:
    """How much EPO's penalty counts in an epoch: from 1 down to 0.8 in the first half, from 0.8 towards 0 in the
    second (`total` epochs). As released, it jumps in the middle.
    """
    half = total / 2
    x = epoch / half if epoch <= half else (epoch - half) / half
    return 1 - 0.2 * (1 - math.exp(-2 * x)) if epoch <= half else 0.8 * math.exp(-3 * x)


def entropy_smooth(
    x: Tokens,
    *,
    entropy_bonus: float = 1e-3,
    smooth: float = 1.0,
    entropy_mean: float | None = None,
    band_low: float = 0.5,
    band_high: float = 1.5,
    penalty: float = 0.1,
    released: bool = False,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """EPO: PPO's surrogate with a bonus for entropy and a penalty for entropies far from their running mean
    (`entropy_mean`; this batch's where there is none yet).
    """
    assert x.entropy is not None
    mean = x.entropy.detach()[x.mask].mean() if entropy_mean is None else entropy_mean
    outside = smooth_penalty(x.entropy, mean, band=(band_low, band_high), penalty=penalty, released=released)
    return clip(x, clip_low=clip_low, clip_high=clip_high) - entropy_bonus * (x.entropy - smooth * outside)


SURROGATES: dict[str, Callable[..., Tensor]] = {
    "plain": plain,
    "nll": nll,
    "dft": dft,
    "clip": clip,
    "nft": nft,
    "critique": critique,
    "mirror": mirror,
    "kl_cov": kl_cov,
    "clip_cov": clip_cov,
    "entropy_change": entropy_change,
    "entropy_smooth": entropy_smooth,
}


def kl_terms(log_ratio: Tensor, estimator: str = "k3") -> Tensor:
    """Estimates of KL(pi || ref) at tokens of pi from `log(pi / ref)`: k1 the log-ratio, k2 half its square, k3
    `ref/pi - 1 - log(ref/pi)` (Schulman 2020).
    """
    if estimator == "k1":
        return log_ratio
    return log_ratio.square() / 2 if estimator == "k2" else (-log_ratio).exp() - 1 + log_ratio


# --------------------------------------------------------------------------------------------------------- aggregations


def aggregate(loss: Tensor, mask: Tensor, how: str, length: int | None = None) -> Tensor:
    """One number of losses `[B, T]`: "sequence" (mean of each sequence's mean; GRPO), "token" (mean over tokens; DAPO),
    "constant" (sum over a constant `length`, mean over sequences; Dr. GRPO) or "sum" (of each sequence, then the mean).
    """
    kept = torch.where(mask, loss, 0.0)
    if how == "token":
        return kept.sum() / mask.sum().clamp_min(1)
    sums = kept.sum(1)
    if how == "sequence":
        return (sums / mask.sum(1).clamp_min(1)).mean()
    return sums.mean() / (1 if how == "sum" else length or loss.shape[1])


AGGREGATES = ("token", "sequence", "constant", "sum")


def token_loss(
    x: Tokens,
    *,
    surrogate: str = "clip",
    aggregation: str = "token",
    beta: float = 0.0,
    kl: str = "k3",
    length: int | None = None,
    level: str = "token",
    **options: object,
) -> Tensor:
    """The loss of a batch, a scalar: the surrogate's losses and `beta` times the KL to the base, aggregated.

    `level` "sequence" takes the ratio of whole sequences in place of tokens (P3O, GSPO without its root).
    """
    if level == "sequence":
        x = _whole(x)
    found = SURROGATES[surrogate](x, **options)
    if beta:
        terms = kl_terms(x.logp - x.ref, kl)
        found = found + beta * (terms if x.kl is None else x.kl * terms)
    return aggregate(found, x.mask, aggregation, length)


def _whole(x: Tokens) -> Tokens:
    """Each sequence as one token."""

    def total(value: Tensor) -> Tensor:
        return (value * x.mask).sum(1, keepdim=True)

    def first(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[:, :1]

    any_ = x.mask.any(1, keepdim=True)
    worth = total(x.advantage) / x.mask.sum(1, keepdim=True).clamp_min(1)
    entropy = None if x.entropy is None else total(x.entropy)
    return Tokens(
        total(x.logp),
        total(x.old),
        total(x.ref),
        worth,
        any_,
        entropy,
        first(x.accuracy),
        first(x.refined),
        first(x.kl),
    )
