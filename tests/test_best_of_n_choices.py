"""What best-of-n keeps of its candidates: laws of soft, majority and weighted choice against enumeration."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from steer.core import InputError, Samples
from steer.methods.best_of_n import BestOfN
from steer.rewards import as_reward
from steer.toy import markov_lm

CHAIN = markov_lm()
SEQUENCES = torch.cartesian_prod(*[torch.arange(3)] * 3)
WORTH = (SEQUENCES * torch.tensor([0.3, 0.5, 0.4])).sum(1).double()
TRIALS = 2000


def base() -> Tensor:
    log_prob = CHAIN.initial.double().log()[SEQUENCES[:, 0]]
    for t in range(2):
        log_prob = log_prob + CHAIN.transition.double().log()[SEQUENCES[:, t], SEQUENCES[:, t + 1]]
    return log_prob.exp()


def number(rows: Tensor) -> Tensor:
    return (torch.as_tensor(rows).long() * torch.tensor([9, 3, 1])).sum(-1)


def drawn(sampler: BestOfN, beta: float = 1.0) -> Samples:
    def reward(rows: Any) -> Tensor:
        return WORTH[number(torch.as_tensor(rows))]

    return sampler.run(
        CHAIN, ["x"] * TRIALS, generator=torch.Generator().manual_seed(0), reward=as_reward(reward), beta=beta
    )


def assert_law(samples: Samples, law: Tensor) -> None:
    """Frequencies within five standard errors."""
    share = torch.bincount(number(samples.outputs), minlength=27).double() / TRIALS
    assert abs(float(law.sum()) - 1) < 1e-9
    assert bool(((share - law).abs() <= 5 * (law * (1 - law) / TRIALS).sqrt() + 1e-12).all())


def test_soft_choice_is_its_law_and_tends_to_the_target() -> None:
    p, beta = base(), 0.5
    tilt = (WORTH / beta).exp()
    law = torch.zeros(27).double()
    for i, j in product(range(27), repeat=2):
        for k in (i, j):
            law[k] += p[i] * p[j] * tilt[k] / (tilt[i] + tilt[j])
    samples = drawn(BestOfN(2, choose="soft"), beta)
    assert_law(samples, law)
    assert float((law / p).max()) <= 2 and samples.kl is not None
    assert float(samples.kl.mean()) == pytest.approx(math.log(2), abs=1e-9)
    target = p * tilt / (p * tilt).sum()
    worth = WORTH[number(drawn(BestOfN(32, choose="soft"), beta).outputs)]
    expected, error = float(target @ WORTH), float(worth.std()) / math.sqrt(TRIALS)
    assert abs(float(worth.mean()) - expected) < 5 * error + 0.02


@pytest.mark.parametrize("choose", ["majority", "weighted"])
def test_votes_are_their_law(choose: str) -> None:
    """Three candidates: each answer, a whole text, has its votes or the sum of its rewards; ties are drawn."""
    p, worth = base().tolist(), WORTH.tolist()
    law = [0.0] * 27
    for rows in product(range(27), repeat=3):
        votes = {i: (rows.count(i) if choose == "majority" else rows.count(i) * worth[i]) for i in rows}
        most = max(votes.values())
        first = [i for i, count in votes.items() if count >= most - 1e-12]
        for i in first:
            law[i] += math.prod(p[row] for row in rows) / len(first)
    assert_law(drawn(BestOfN(3, choose=choose)), torch.tensor(law, dtype=torch.float64))


def test_answers_are_found_in_texts() -> None:
    sampler = BestOfN(5, choose="majority", answer=r"answer: (\w+)")
    texts = ["so answer: 4", "answer: 5, no, answer: 4", "answer: 5", "answer: 7", "nothing"]
    scores = torch.tensor([0.1, 0.7, 0.9, 0.2, 1.0])
    elected = sampler._elected(torch.arange(5), texts, scores, torch.Generator())
    assert elected.tolist() == [0, 1]
    weighted = BestOfN(5, choose="weighted", answer=r"answer: (\w+)")
    assert weighted._elected(torch.arange(5), texts, scores, torch.Generator()).tolist() == [2]
    assert sampler._elected(torch.arange(1), ["nothing"], scores, torch.Generator()).tolist() == [0]


def test_bad_choices() -> None:
    for wrong, field in (({"choose": "worst"}, "choose"), ({"answer": "x"}, "answer")):
        with pytest.raises(InputError, match=field):
            BestOfN(4, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="regular expression"):
        BestOfN(4, choose="majority", answer="(")
