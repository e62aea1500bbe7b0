"""Rounds: which reference a loss has, which pairs are made of what was sampled, and what the next round starts from.

Letters: `K` completions of one prompt. Functions of scores and roles, numbers and weights; nothing is sampled here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random

import torch
from torch import Tensor

__all__ = [
    "PAIRINGS",
    "ROLL_INS",
    "extrapolated",
    "gap_split",
    "kept",
    "mixed",
    "rolled_in",
    "soup",
    "trailing",
]

Pairs = list[tuple[int, int]]


def mixed(ref: Tensor, prev: Tensor | None, beta: float, prox: float) -> Tensor:
    """`m` with `c log m = beta log ref + prox log prev`, `c = beta + prox`: `beta KL(pi || ref) + prox KL(pi || prev)`
    is `c KL(pi || m)` and a constant, so that no loss needs two references.
    """
    if prev is None or prox == 0:
        return ref
    return (beta * ref + prox * prev) / (beta + prox)


# ------------------------------------------------------------------------------------------------------------- pairings


def best_worst(scores: Sequence[float], roles: Sequence[str], draw: Random) -> Pairs:
    """The highest score against the lowest; none where all are the same."""
    high, low = (pick(range(len(scores)), key=scores.__getitem__) for pick in (max, min))
    return [(high, low)] if scores[high] > scores[low] else []


def gold_own(scores: Sequence[float], roles: Sequence[str], draw: Random) -> Pairs:
    """Each completion of the data against each of the policy's own (SPIN); scores do not matter."""
    gold = [i for i, role in enumerate(roles) if role == "gold"]
    return [(i, j) for i in gold for j, role in enumerate(roles) if role != "gold"]


def margin(
    scores: Sequence[float],
    roles: Sequence[str],
    draw: Random,
    *,
    top: float = 5.0,
    gap_gold: float = 2.0,
    gap_own: float = 1.0,
) -> Pairs:
    """Completions that score `top` or more against own ones that score lower by `gap_gold` (where the better one is the
    data's) or `gap_own` (where it is the policy's own), at least (DNO, Rosset et al. 2024).
    """
    good = [i for i, score in enumerate(scores) if score >= top]
    gap = {i: gap_gold if roles[i] == "gold" else gap_own for i in good}
    own = [j for j, role in enumerate(roles) if role != "gold"]
    return [(i, j) for i in good for j in own if i != j and scores[i] - scores[j] >= gap[i]]


def every(scores: Sequence[float], roles: Sequence[str], draw: Random) -> Pairs:
    """All pairs, the higher score first; ties in the order of the completions."""
    count = range(len(scores))
    return [(i, j) if scores[i] >= scores[j] else (j, i) for i in count for j in count if i < j]


def ranked(scores: Sequence[float], roles: Sequence[str], draw: Random) -> Pairs:
    """All pairs whose scores differ, the higher one first (LiPO)."""
    return [(i, j) for i, j in every(scores, roles, draw) if scores[i] > scores[j]]


def random_two(scores: Sequence[float], roles: Sequence[str], draw: Random) -> Pairs:
    """Two completions as they come, not sorted."""
    i, j = draw.sample(range(len(scores)), 2)
    return [(i, j)]


def disagree(scores: Sequence[float], roles: Sequence[str], draw: Random, *, second: Sequence[float] = ()) -> Pairs:
    """The pair of which two judges differ most about how much better one is (preferences by randomisation); the
    first judge says which is better.
    """
    gap = [a - b for a, b in zip(scores, second, strict=True)]
    high, low = (pick(range(len(gap)), key=gap.__getitem__) for pick in (max, min))
    if gap[high] == gap[low]:
        return []
    return [(high, low) if scores[high] >= scores[low] else (low, high)]


PAIRINGS: dict[str, Callable[..., Pairs]] = {
    "best_worst": best_worst,
    "gold_own": gold_own,
    "margin": margin,
    "all": every,
    "ranked": ranked,
    "random_two": random_two,
    "disagree": disagree,
}


def gap_split(gaps: Sequence[float], threshold: float | None = None) -> tuple[list[int], list[int]]:
    """Numbers of easy and hard pairs by their gap in reward, at least `threshold` or below it (default: the median), of
    mixed preference optimisation: the easy ones for DPO, the prompts of the hard ones for a policy gradient.
    """
    at = float(torch.tensor(gaps, dtype=torch.float64).quantile(0.5)) if threshold is None else threshold
    easy = [i for i, gap in enumerate(gaps) if gap >= at]
    return easy, [i for i, gap in enumerate(gaps) if gap < at]


# ----------------------------------------------------------------------------------------- references of the next round

Weights = Mapping[str, Tensor]


def extrapolated(now: Weights, before: Weights, alpha: float) -> dict[str, Tensor]:
    """`now + alpha (now - before)`: Nesterov's step of accelerated preference optimisation. Of weights, not of the two
    factors of an adapter, whose product is what a step moves.
    """
    return {name: value + alpha * (value - before[name]) for name, value in now.items()}


def soup(parts: Sequence[Weights], shares: Sequence[float]) -> dict[str, Tensor]:
    """The average of several policies' weights (SALSA), `shares` of them."""
    total = sum(shares)
    return {name: sum(w / total * part[name] for w, part in zip(shares, parts, strict=True)) for name in parts[0]}  # type: ignore[misc]


def trailing(average: Weights, now: Weights, decay: float) -> dict[str, Tensor]:
    """A moving average of weights: `decay average + (1 - decay) now`."""
    return {name: decay * value + (1 - decay) * now[name] for name, value in average.items()}


def kept(rounds: Sequence[Sequence[int]], shares: Sequence[float], draw: Random) -> list[tuple[int, int]]:
    """`(round, row)` of what is trained on after the last of `rounds`: a share of each one's rows, the last round's
    first (`(1, .3, .15)` keeps all of it, 30 % of the one before); rounds beyond the shares are left out.
    """
    found = []
    for age, share in enumerate(shares[: len(rounds)]):
        number = len(rounds) - 1 - age
        rows = list(rounds[number])
        count = len(rows) if share >= 1 else int(share * len(rows))
        found += [(number, row) for row in sorted(draw.sample(range(len(rows)), count))]
    return found


# ------------------------------------------------------------------------------------------------------------- roll-ins


def rolled_in(length: int, share: float, draw: Random) -> int:
    """Tokens that are taken over from another completion of `length` tokens: with probability `share` uniform from 1 to
    `length - 1`, else none (RLGF, Chang et al. 2023).
    """
    return draw.randint(1, length - 1) if length > 1 and draw.random() < share else 0


def _after(count: int, start: int) -> list[bool]:
    return [t >= start for t in range(count)]


def _before(count: int, start: int) -> list[bool]:
    return [t < start for t in range(count)]


ROLL_INS: dict[str, Callable[[int, int], list[bool]]] = {"ppo++": _after, "aggrevated": _before}
"""Which of `count` tokens are learnt from, where the first `start` are another's: "ppo++" starts from the guide's
tokens and learns from the policy's, "aggrevated" starts from the policy's and lets the guide finish.
"""
