"""Advantage rules: rewards of groups of samples in, what each sample (or each step of it) is worth out.

Letters: `N` samples, each of one of `G` groups (prompts); groups may differ in size. Rewards that are NaN are skipped:
they take no part in means, and their advantage is 0. Language models and diffusion models share these rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "ADVANTAGES",
    "batch_std",
    "bundle",
    "entropy_steps",
    "group_means",
    "group_sizes",
    "group_spread",
    "group_std",
    "kl_weight",
    "leave_one_out",
    "length_factor",
    "mean_only",
    "sample_weights",
    "turns",
    "weighted",
]


def group_sizes(group: Tensor) -> Tensor:
    """How many rows there are of each row's group `[N]`."""
    return group.bincount()[group]


def group_means(x: Tensor, group: Tensor) -> Tensor:
    """For each row the mean of its group's `x` `[..., N]`."""
    sums = x.new_zeros(*x.shape[:-1], int(group.max()) + 1).index_add_(-1, group, x)
    return sums[..., group] / group_sizes(group).to(x)


def mean_only(reward: Tensor, group: Tensor) -> Tensor:
    """`r - mean` of the group, of gains `[..., N]` (Dr. GRPO): `(n - 1) / n` of `leave_one_out`."""
    return reward - group_means(reward, group)


def leave_one_out(reward: Tensor, group: Tensor) -> Tensor:
    """How far each row's gain `[..., N]` lies above the mean of the *other* rows of its group `[N]` (RLOO, P3O).

    A row's own gain is no part of what it is compared with, so that the expected gradient is that of the mean gain
    whatever the size of the group; the mean of all n rows would shrink it to (n - 1) / n.
    """
    size = group_sizes(group).to(reward)
    return (reward - group_means(reward, group)) * (size / (size - 1).clamp_min(1))


def group_std(reward: Tensor, group: Tensor, *, ddof: int = 1, epsilon: float = 1e-4) -> Tensor:
    """`(r - mean) / (std + epsilon)` of the group (GRPO, Shao et al. 2024); 0 where a group is constant. Biased: the
    expected direction is not that of the mean reward.
    """
    return mean_only(reward, group) / (group_spread(reward, group, ddof) + epsilon)


def group_spread(reward: Tensor, group: Tensor, ddof: int = 1) -> Tensor:
    """Standard deviation of each row's group `[N]`."""
    size = group_sizes(group).to(reward)
    square = group_means(mean_only(reward, group).square(), group) * size / (size - ddof).clamp_min(1)
    return square.sqrt()


def batch_std(reward: Tensor, group: Tensor, *, epsilon: float = 1e-4, centred: bool = False) -> Tensor:
    """`(r - mean of the group) / (std of the batch + epsilon)` (Lite PPO); the standard deviation of all rewards, or of
    the centred ones, with one degree of freedom less.
    """
    found = mean_only(reward, group)
    return found / ((found if centred else reward).std() + epsilon)


def none(reward: Tensor, group: Tensor) -> Tensor:
    """The reward itself."""
    return reward


def good(reward: Tensor, group: Tensor) -> Tensor:
    """The probability `sigmoid(r)` that a row is good: as weights of a likelihood they lead to `ref sigmoid(r) / Z`."""
    return reward.sigmoid()


def best(reward: Tensor, group: Tensor) -> Tensor:
    """1 for the first best row of each group whose rewards differ, 0 for the others (RAFT)."""
    found = torch.zeros_like(reward)
    for b in group.unique().tolist():
        mine = (group == b).nonzero().flatten()
        if bool(reward[mine].max() > reward[mine].min()):
            found[mine[reward[mine].argmax()]] = 1.0
    return found


def bundle(
    reward: Tensor,
    group: Tensor,
    *,
    quantiles: tuple[float, float] | None = None,
    levels: tuple[float, float] = (0.2, 0.8),
    risk_weight: float = 1.5,
    risk_credit: str = "uniform",
    constant: bool = True,
    bundle_size: int = 5,
) -> Tensor:
    """RiskPO: the j-th samples of `bundle_size` groups are added up to `S_j`, and a mixture of tail means of S says
    what they are worth: `(w c_j + a_j) / (w + 1)` with `a_j` the part between two quantiles and `c_j` that below the
    lower.

    Args:
        quantiles: at `levels`, as tracked over batches; None takes the bundle's own.
        risk_credit: what of it each sample gets: "uniform" all; "std" divided by the standard deviation of its group;
            "score" half if it is right, one and a half if not; "sum-mean" its share of the sum of deviations, which
            turns the sign around where that sum is negative.
        constant: add `(q_a - q_b) / (b - a)`, the constant of the exact score function.
    """
    found = torch.zeros_like(reward)
    numbers = group.unique().tolist()
    sizes = group.bincount()
    for at in range(0, len(numbers), bundle_size):
        members = numbers[at : at + bundle_size]
        width = int(min(sizes[b] for b in members))
        rows = torch.stack([(group == b).nonzero().flatten()[:width] for b in members])
        found[rows] = _bundled(
            reward[rows], quantiles, levels, risk_weight=risk_weight, credit=risk_credit, constant=constant
        )
    return found


def bundle_totals(reward: Tensor, group: Tensor, bundle_size: int = 5) -> Tensor:
    """`S_j` of every bundle, one after another."""
    numbers, sizes, found = group.unique().tolist(), group.bincount(), []
    for at in range(0, len(numbers), bundle_size):
        members = numbers[at : at + bundle_size]
        width = int(min(sizes[b] for b in members))
        found.append(torch.stack([reward[(group == b).nonzero().flatten()[:width]] for b in members]).sum(0))
    return torch.cat(found)


def _bundled(
    r: Tensor,
    quantiles: tuple[float, float] | None,
    levels: tuple[float, float],
    *,
    risk_weight: float,
    credit: str,
    constant: bool,
) -> Tensor:
    """Credits `[B, n]` of rewards `[B, n]`."""
    low, high = levels
    total = r.sum(0)
    own = total.quantile(torch.tensor(levels, dtype=r.dtype)).tolist()
    at_low, at_high = quantiles or (own[0], own[1])
    middle = ((total - at_low).clamp_min(0) - (total - at_high).clamp_min(0)) / (high - low + 1e-6)
    middle = middle + ((at_low - at_high) / (high - low + 1e-6) if constant else 0.0)
    below = -(at_low - total).clamp_min(0) / (low + 1e-6)
    worth = (risk_weight * below + middle) / (risk_weight + 1)
    spread = total.std() if len(total) > 1 else torch.zeros(())
    worth = worth / spread if float(spread) > 1e-8 else torch.zeros_like(worth)
    if credit == "uniform":
        return worth.expand_as(r)
    if credit == "std":
        spreads = r.std(1, keepdim=True)
        return worth / torch.where(spreads < 1e-3, 1.0, spreads)
    if credit == "score":
        return worth * torch.where(r > 0, 0.5, 1.5)
    deviation = r - r.mean(1, keepdim=True)
    sums = deviation.sum(0)
    return torch.where(sums.abs() < 1e-6, worth / len(r), worth * deviation / torch.where(sums == 0, 1.0, sums))


def tracked(quantile: float, level: float, values: Tensor, rate: float = 0.1) -> float:
    """A quantile after one more batch: `q + rate (level - share of values below q)`."""
    return quantile + rate * (level - float((values < quantile).double().mean()))


def length_factor(
    reward: Tensor, group: Tensor, *, length: Tensor, base: float = 1.00001, epsilon: float = 1e-9
) -> Tensor:
    """Asymmetric PO: GRPO's advantages, those of wrong samples (reward 0 or less) that are longer than the mean right
    one times `2 - base^-(excess)`.
    """
    found = group_std(reward, group, epsilon=epsilon)
    right = (reward > 0).to(reward)
    share = group_means(right, group)
    mean = group_means(right * length.to(reward), group) / share.clamp_min(1e-12)
    excess = (length.to(reward) - mean).clamp_min(0)
    factor = 2 - torch.tensor(base, dtype=reward.dtype) ** -excess
    return torch.where((right == 0) & (share > 0), found * factor, found)


def kl_weight(reward: Tensor, group: Tensor) -> Tensor:
    """Asymmetric PO's weight of each sample's KL `[N]`: `1 - exp(-e accuracy)` for right samples of a group that is
    not all right or all wrong, 1 for others.
    """
    right = (reward > 0).to(reward)
    accuracy = group_means(right, group)
    mixed = (accuracy > 0) & (accuracy < 1) & (right > 0)
    return torch.where(mixed, 1 - (-math.e * accuracy).exp(), 1.0)


def weighted(
    rewards: Tensor, group: Tensor, *, weights: Sequence[float], normalize_first: bool = False, epsilon: float = 1e-4
) -> Tensor:
    """GRPO of several objectives `[M, N]`: the weighted sum standardised in its group, or each standardised in its
    group, added up and standardised over the batch.
    """
    w = torch.tensor(weights, dtype=rewards.dtype).unsqueeze(1)
    if not normalize_first:
        return group_std((w * rewards).sum(0), group, epsilon=epsilon)
    total = (w * torch.stack([group_std(r, group, epsilon=epsilon) for r in rewards])).sum(0)
    return (total - total.mean()) / (total.std() + epsilon)


ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "none": none,
    "best": best,
    "good": good,
    "mean_only": mean_only,
    "leave_one_out": leave_one_out,
    "group_std": group_std,
    "batch_std": batch_std,
    "bundle": bundle,
    "length_factor": length_factor,
}
"""Rules of one reward a sample: `rule(reward [N], group [N], **options) -> [N]`."""


# ---------------------------------------------------------------------------------------------------------- whole steps


def entropy_steps(
    advantage: Sequence[float],
    entropy: Sequence[Sequence[float]],
    *,
    sharpness: float = 1.0,
    bonus_sharpness: float = 1.0,
    bonus: float = 0.05,
) -> list[list[float]]:
    """EMPG: each step's advantage, times a weight that falls with the step's mean entropy and has mean 1 over the
    batch, with a bonus for a next step that is sure; less the mean over all steps of the batch.
    """
    flat = torch.tensor([h for row in entropy for h in row], dtype=torch.float64)
    span = flat.max() - flat.min()
    scaled = (flat - flat.min()) / span if float(span) > 0 else torch.zeros_like(flat)
    gain = (-sharpness * scaled).exp()
    gain = gain / gain.mean()
    sure = bonus * (-bonus_sharpness * scaled).exp()
    found, at = [], 0
    for worth, row in zip(advantage, entropy, strict=True):
        for t in range(len(row)):
            found.append(worth * gain[at + t] + (sure[at + t + 1] if t + 1 < len(row) else 0.0))
        at += len(row)
    every = torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in found])
    every = every - every.mean()
    parts = every.split([len(row) for row in entropy])
    return [part.tolist() for part in parts]


def turns(
    gold: Sequence[Sequence[float]], start: float, final: Sequence[float], *, discount: float = 1.0
) -> list[list[float]]:
    """IGPO: advantages of each sample's turns and of its answer. A turn is worth how much more likely it makes the
    right answer, the answer its own reward; summed with a discount to the end, less the mean of the group at that turn
    (of those that have it; answers are compared with answers).

    Args:
        gold: probability of the right answer after each turn of each sample.
        start: before the first turn.
        final: reward of each answer.
    """
    returns = []
    for row, last in zip(gold, final, strict=True):
        ahead, found = last, [last]
        for now, before in zip(reversed(row), reversed([start, *row][:-1]), strict=True):
            ahead = now - before + discount * ahead
            found.append(ahead)
        returns.append(found[::-1])
    answers = sum(row[-1] for row in returns) / len(returns)
    width = max(len(row) for row in returns) - 1
    means = []
    for t in range(width):
        here = [row[t] for row in returns if t < len(row) - 1]
        means.append(sum(here) / len(here))
    return [[*(x - m for x, m in zip(row[:-1], means, strict=False)), row[-1] - answers] for row in returns]


def sample_weights(reward: Tensor, rule: str) -> Tensor:
    """Probabilities `[K]` with which the samples of one prompt are drawn again (PF-PPO): "best" alone; "bw" the best
    and the worst; "br" the best with 0.4 and others with 0.1, over their sum; "pow" by the square of the reward.
    """
    high, low = int(reward.argmax()), int(reward.argmin())
    found = torch.zeros_like(reward)
    if rule == "best":
        found[high] = 1.0
    elif rule == "bw":
        found[[high, low]] = 1.0
    elif rule == "br":
        found += 0.1
        found[high] = 0.4
    else:
        found = reward.square()
    return found / found.sum() if float(found.sum()) > 0 else torch.full_like(found, 1 / len(found))
