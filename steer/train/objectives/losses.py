"""Sequence losses: one prompt's completions in, a scalar out, made of score, target, link, weight and anchor.

Letters: `K` completions of one prompt, `P` pairs of them. Log-probabilities are sums over the tokens of a completion,
in nats. Everything but `logp` is a constant of the row. Almost every preference paper is one proximal step `pi(y) ~
m(y) exp(g(y) / c)` with `c = beta + prox` and the mixed reference `m` of `rounds.mixed`; what differs is in the five
names below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

__all__ = [
    "ANCHORS",
    "DIVERGENCES",
    "Group",
    "LINKS",
    "Loss",
    "SCORES",
    "TARGETS",
    "WEIGHTS",
    "sequence_loss",
    "soft_value",
]


@dataclass(frozen=True)
class Group:
    """Completions of one prompt.

    Attributes:
        logp: log-probability under the policy `[K]`, the one tensor with a gradient.
        m: under the (mixed) reference `[K]`.
        ref: under the base policy `[K]`.
        proposal: under the law that they were drawn from `[K]`.
        reward: `[K]`; for the target "advantage" the advantages themselves.
        length: tokens `[K]`.
        pairs: `[P, 2]`, numbers of completions, the preferred one first.
        preference: probability that the first of each pair is preferred `[P]`, as a judge gave it; None asks the
            rewards.
        anchor: number of the completion that the anchor holds.
    """

    logp: Tensor
    m: Tensor
    ref: Tensor
    proposal: Tensor
    reward: Tensor
    length: Tensor
    pairs: Tensor = field(default_factory=lambda: torch.tensor([[0, 1]]))
    preference: Tensor | None = None
    anchor: int = 0

    @property
    def ratio(self) -> Tensor:
        """`v = log(pi / m)` `[K]`."""
        return self.logp - self.m


# --------------------------------------------------------------------------------------------------------------- scores


def _forward(v: Tensor, alpha: float) -> Tensor:
    return -(-v).exp()


def _jensen_shannon(v: Tensor, alpha: float) -> Tensor:
    return math.log(2) - softplus(-v)


def _alpha(v: Tensor, alpha: float) -> Tensor:
    return -(-alpha * v).exp() / alpha


DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda v, alpha: v,
    "forward_kl": _forward,
    "js_divergence": _jensen_shannon,
    "alpha_divergence": _alpha,
}
"""`f'(u)` of `v = log u`, up to a constant, which cancels in differences (Wang et al. 2023)."""


def _ratio(group: Group, c: float, *, f: str = "reverse_kl", f_alpha: float = 0.5) -> Tensor:
    return c * DIVERGENCES[f](group.ratio, f_alpha)


def _mean(group: Group, c: float) -> Tensor:
    return c * group.ratio / group.length


SCORES: dict[str, Callable[..., Tensor]] = {"ratio": _ratio, "mean": _mean}
"""What a completion scores `[K]`: `c f'(pi / m)`, or its mean over tokens (TRL's `ipo` and `sigmoid_norm`)."""


# -------------------------------------------------------------------------------------------------------------- targets


def _difference(group: Group) -> Tensor:
    return group.reward[group.pairs[:, 0]] - group.reward[group.pairs[:, 1]]


def _wins(group: Group, *, smoothing: float = 0.0) -> Tensor:
    return torch.full_like(_difference(group), 1 - smoothing)


def _robust(group: Group, *, smoothing: float = 0.1) -> Tensor:
    return torch.full_like(_difference(group), (1 - smoothing) / (1 - 2 * smoothing))


def _soft(group: Group) -> Tensor:
    return _difference(group).sigmoid() if group.preference is None else group.preference


def _half(group: Group) -> Tensor:
    return torch.full_like(_difference(group), 0.5) if group.preference is None else group.preference - 0.5


TARGETS: dict[str, Callable[..., Tensor]] = {
    "win": _wins,
    "robust": _robust,
    "soft": _soft,
    "half": _half,
    "reward": _difference,
    "advantage": lambda group: group.reward,
}
"""What a pair's difference of scores is to be `[P]`: a probability for the link "logistic", a number for "square"; for
"half" one half, or a judge's `P - 1/2` on pairs that are not sorted; "advantage" is one number a completion `[K]`.
"""


# ---------------------------------------------------------------------------------------------------------------- links


def _logistic(delta: Tensor, target: Tensor, c: float) -> Tensor:
    return -target * logsigmoid(delta) - (1 - target) * logsigmoid(-delta)


def _square(delta: Tensor, target: Tensor, c: float, *, scale: str = "square") -> Tensor:
    return (delta - target).square() / {"square": c * c, "linear": 2 * c, "none": 1.0}[scale]


def _hinge(delta: Tensor, target: Tensor, c: float) -> Tensor:
    return (1 - delta).clamp_min(0)


PAIR_LINKS: dict[str, Callable[..., Tensor]] = {"logistic": _logistic, "square": _square, "hinge": _hinge}


def _single(group: Group, target: Tensor, beta: float, c: float) -> Tensor:
    """`mean 1/2 (v - A / c)^2`: each completion for itself (direct advantage policy optimisation; A2PO)."""
    return 0.5 * (group.ratio - target / c).square().mean()


def _softmax(group: Group, target: Tensor, beta: float, c: float) -> Tensor:
    """KL of the reward-conditioned posterior over the K completions to the policy's (BRAIn, Pandey et al. 2024)."""
    wanted = (group.ref - group.proposal + group.reward / beta).log_softmax(0)
    found = (group.logp - group.proposal).log_softmax(0)
    return (wanted.exp() * (wanted - found)).sum()


F_PRIME: dict[str, Callable[[Tensor], Tensor]] = {
    "forward": lambda log_t: -(-log_t).exp(),
    "reverse": lambda log_t: log_t + 1,
    "js": lambda log_t: math.log(2) - softplus(-log_t),
    "tv": lambda log_t: log_t.sign() / 2,
    "chi2": lambda log_t: 1 - (-2 * log_t).exp(),
}
"""`f'` at `t = pi / p`: KL(p || pi), KL(pi || p), Jensen-Shannon, total variation, chi squared."""


def _weighted(
    group: Group,
    target: Tensor,
    beta: float,
    c: float,
    *,
    divergence: str = "reverse",
    log_z: float | None = None,
    baseline: float = 0.0,
    max_weight: float = math.inf,
) -> Tensor:
    """f-DPG (Go et al. 2023): `mean sg(pi / q' (f'(pi / p) - b)) log pi` towards `p = ref exp(r / beta) / Z`, Z by
    importance sampling over the K completions unless `log_z` says it. Ratios above `max_weight` are cut.
    """
    wanted = group.ref + group.reward / beta
    found = group.logp.detach()
    if log_z is None:
        log_z = float((wanted - group.proposal).logsumexp(0) - math.log(len(wanted)))
    pseudo = F_PRIME[divergence](found + log_z - wanted)
    weight = (found - group.proposal).exp().clamp(max=max_weight)
    return (weight * (pseudo - baseline) * group.logp).mean()


GROUP_LINKS: dict[str, Callable[..., Tensor]] = {"single": _single, "softmax": _softmax, "weighted": _weighted}
LINKS: dict[str, Callable[..., Tensor]] = {**PAIR_LINKS, **GROUP_LINKS}
"""How scores meet targets: pair by pair, or over the whole group."""


# -------------------------------------------------------------------------------------------------- weights and anchors


def _sum(group: Group, score: Tensor) -> Tensor:
    return torch.ones(len(group.pairs), dtype=score.dtype, device=score.device)


def _others(group: Group, score: Tensor) -> Tensor:
    return _sum(group, score) / max(1, len(group.logp) - 1)


def _average(group: Group, score: Tensor) -> Tensor:
    return _sum(group, score) / max(1, len(group.pairs))


def _rank(group: Group, score: Tensor) -> Tensor:
    """LiPO's lambda weights: gain of the labels times the difference of discounts at the ranks by score, best first."""
    order = score.detach().argsort(descending=True)
    place = torch.empty_like(score.detach())
    place[order] = torch.arange(1, len(score) + 1, dtype=score.dtype, device=score.device)
    gain, discount = 2**group.reward, 1 / (1 + place).log()
    i, j = group.pairs.unbind(1)
    return (gain[i] - gain[j]).abs() * (discount[i] - discount[j]).abs()


WEIGHTS: dict[str, Callable[..., Tensor]] = {"sum": _sum, "mean": _average, "others": _others, "rank": _rank}
"""Of each pair `[P]`: "sum" 1, "mean" 1 / P, "others" 1 / (K - 1), "rank" LiPO's."""

ANCHORS: dict[str, Callable[[Group], Tensor | float]] = {
    "none": lambda group: 0.0,
    "chosen": lambda group: group.logp[group.anchor],
    "chosen_mean": lambda group: group.logp[group.anchor] / group.length[group.anchor],
    "greedy": lambda group: group.ratio[group.anchor],
}
"""What is added, times a coefficient and `c`: the log-probability of the chosen completion (RPO, coefficient below 0),
its mean over tokens, or the log-ratio of the reference's own greedy completion (SELM, above 0).
"""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What one sequence loss is made of: names of the tables in this module, and their numbers.

    Attributes:
        beta, prox: coefficients of the pull to the base and to the last iterate; `c` is their sum.
        score, target, link, weight, anchor: names of the tables.
        anchor_weight: coefficient of the anchor, in units of `c`.
        loser: how much the score of the second of a pair counts (CPL's lambda; 1 for all others).
        f, f_alpha: divergence of the score "ratio", and the exponent of its alpha form.
        smoothing: of labels, for "win" (default 0) and "robust" (0.1).
        scale: of the link "square": its square is divided by `c^2`, by `2 c` ("linear") or by nothing.
        divergence, baseline, max_weight: of the link "weighted".
    """

    beta: float
    prox: float = 0.0
    score: str = "ratio"
    target: str = "win"
    link: str = "logistic"
    weight: str = "sum"
    anchor: str = "none"
    anchor_weight: float = 0.0
    loser: float = 1.0
    f: str = "reverse_kl"
    f_alpha: float = 0.5
    smoothing: float | None = None
    scale: str = "square"
    divergence: str = "reverse"
    baseline: float = 0.0
    max_weight: float = math.inf

    @property
    def c(self) -> float:
        return self.beta + self.prox

    def wanted(self, group: Group) -> Tensor:
        """What the target asks of the group."""
        smoothed = self.smoothing is not None and self.target in ("win", "robust")
        return TARGETS[self.target](group, **({"smoothing": self.smoothing} if smoothed else {}))

    def scores(self, group: Group) -> Tensor:
        """Of each completion `[K]`."""
        if self.score == "ratio":
            return _ratio(group, self.c, f=self.f, f_alpha=self.f_alpha)
        return SCORES[self.score](group, self.c)


def sequence_loss(group: Group, loss: Loss) -> Tensor:
    """The loss of one prompt, a scalar with a gradient to `group.logp`."""
    c, wanted = loss.c, loss.wanted(group)
    held = c * loss.anchor_weight * ANCHORS[loss.anchor](group)
    if loss.link in GROUP_LINKS:
        more = {name: getattr(loss, name) for name in ("divergence", "baseline", "max_weight")}
        more = more if loss.link == "weighted" else {}
        return GROUP_LINKS[loss.link](group, wanted, loss.beta, c, **more) + held
    found = loss.scores(group)
    i, j = group.pairs.unbind(1)
    more = {"scale": loss.scale} if loss.link == "square" else {}
    losses = PAIR_LINKS[loss.link](found[i] - loss.loser * found[j], wanted, c, **more)
    return (WEIGHTS[loss.weight](group, found) * losses).sum() + held


def soft_value(reward: Tensor, beta: float, log_weight: Tensor | None = None) -> Tensor:
    """`beta log E exp(r / beta)` over the last dimension, with which `r - V` makes `ref exp((r - V) / beta)` a law;
    `log_weight` are log-probabilities, uniform where there are none.
    """
    count = torch.tensor(float(reward.shape[-1]), dtype=reward.dtype)
    log_weight = -count.log().expand_as(reward) if log_weight is None else log_weight
    return beta * (log_weight + reward / beta).logsumexp(-1)
