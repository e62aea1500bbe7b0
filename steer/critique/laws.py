"""Exact laws of loops of critique: a solver and a critic as rates, and redraws over an enumerated space.

A first draft is right with probability `p0`. The critic accepts right drafts with probability `a` and wrong ones with
`f`. After a rejection a wrong draft becomes right with probability `r`, and a right one stays right with `k`.
"""

from __future__ import annotations

from math import comb

import torch
from torch import Tensor

from steer.core import check, check_whole

__all__ = [
    "critique_accepted",
    "critique_accuracy",
    "critique_drafts",
    "critique_limit",
    "gate_law",
    "majority",
    "redraw_law",
    "select_accuracy",
]


def _open(p0: float, a: float, f: float, r: float, k: float, rounds: int) -> list[tuple[float, float]]:
    """Right and wrong drafts that are judged in each round 0 to `rounds`."""
    for name, value in (("p0", p0), ("a", a), ("f", f), ("r", r), ("k", k)):
        check(0 <= value <= 1, name, value, "a probability")
    check_whole("rounds", rounds, least=0)
    found = [(p0, 1 - p0)]
    for _ in range(rounds):
        c, w = found[-1]
        right = (1 - a) * k * c + (1 - f) * r * w
        found.append((right, (1 - a) * c + (1 - f) * w - right))
    return found


def critique_accuracy(p0: float, a: float, f: float, r: float, k: float, rounds: int) -> float:
    """Probability that the last draft is right after at most `rounds` revisions: `sum_{j<R} a c_j + c_R`.

    One round helps just where `(1 - p0)(1 - f) r > p0 (1 - a)(1 - k)`: a poor critic makes a good solver worse.
    """
    found = _open(p0, a, f, r, k, rounds)
    return sum(a * c for c, _ in found[:-1]) + found[-1][0]


def critique_accepted(p0: float, a: float, f: float, r: float, k: float, rounds: int) -> tuple[float, float]:
    """Probability that some draft is accepted, and accuracy given that: `sum_{j<=R} a c_j + f w_j`."""
    found = _open(p0, a, f, r, k, rounds)
    right, wrong = sum(a * c for c, _ in found), sum(f * w for _, w in found)
    return right + wrong, right / (right + wrong) if right + wrong else 0.0


def critique_drafts(p0: float, a: float, f: float, r: float, k: float, rounds: int) -> float:
    """Expected drafts of an output: `1 + sum_{j<R} (1 - a) c_j + (1 - f) w_j`."""
    return 1 + sum((1 - a) * c + (1 - f) * w for c, w in _open(p0, a, f, r, k, rounds)[:-1])


def critique_limit(p0: float, a: float, f: float, r: float, k: float) -> float:
    """Accuracy without a bound on the rounds: `(a, 0) (I - M)^-1 (p0, 1 - p0)`. Raises `InputError` where loops may go
    on for ever.
    """
    move = torch.tensor([[(1 - a) * k, (1 - f) * r], [(1 - a) * (1 - k), (1 - f) * (1 - r)]], dtype=torch.float64)
    left = torch.eye(2, dtype=torch.float64) - move
    ends = abs(float(torch.linalg.det(left))) > 1e-12
    check(ends, "critic", (a, f), "one that accepts something in the end")
    start = torch.tensor([p0, 1 - p0], dtype=torch.float64)
    return a * float(torch.linalg.solve(left, start)[0])


def select_accuracy(p0: float, a: float, f: float, n: int) -> float:
    """Probability that an accepted draft out of `n` is right, any of them where none is accepted. In the limit
    `p0 a / (p0 a + (1 - p0) f)`. The same as redrawing up to n - 1 times.
    """
    return critique_accuracy(p0, a, f, p0, p0, n - 1)


def majority(rate: float, votes: int) -> float:
    """Probability that more than half of `votes` judgments accept, each with probability `rate`; ties reject."""
    check_whole("votes", votes)
    return sum(comb(votes, i) * rate**i * (1 - rate) ** (votes - i) for i in range(votes // 2 + 1, votes + 1))


def gate_law(g: float, a: float, f: float, redraws: int) -> tuple[float, float, float]:
    """A gate before an action that draws up to `redraws` times again and abstains then: probabilities that a good
    action is executed, that a bad one is, and that none is. `g` is the actor's share of good actions.

    More redraws mean more harm: the second rises to `(1 - g) f / (g a + (1 - g) f)`.
    """
    accepted = g * a + (1 - g) * f
    nothing = (1 - accepted) ** (redraws + 1)
    ever = (1 - nothing) / accepted if accepted else 0.0
    return g * a * ever, (1 - g) * f * ever, nothing


def redraw_law(log_prob: Tensor, accept: Tensor, draws: int) -> tuple[Tensor, float, float]:
    """Exact law `[M]` of the last of at most `draws` independent drafts, ended by the first that is accepted, over an
    enumerated space; the probability that one is accepted; and the expected number of drafts.

    `log_prob` `[M]` is the law of a draft, `accept` `[M]` the probability that the critic accepts each. With
    `alpha = sum p accept`: `p accept (1 - (1 - alpha)^K) / alpha + p (1 - accept) (1 - alpha)^(K - 1)`. Given that one
    was accepted it is the tilt of p by the reward `log accept`.
    """
    check_whole("draws", draws)
    p, accepts = log_prob.double().exp(), accept.double()
    alpha = float((p * accepts).sum())
    never = (1 - alpha) ** draws
    kept = p * accepts * ((1 - never) / alpha if alpha else 0.0)
    drafts = (1 - never) / alpha if alpha else float(draws)
    return kept + p * (1 - accepts) * (1 - alpha) ** (draws - 1), 1 - never, drafts
