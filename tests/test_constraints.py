"""Several constraints at once, and proxy points, against enumerated laws and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from steer.core import InputError, Samples, SteerError
from steer.rewards import Constraints, parse_reward, proxy_points, solve_multiplier, solve_multipliers
from steer.toy import markov_lm


def chain() -> tuple[Tensor, Tensor]:
    """Log-probabilities `[27]` of all texts of the toy chain, and two scores `[2, 27]`: twos, and whether the last
    token is the first.
    """
    process = markov_lm()
    sequences = torch.cartesian_prod(*[torch.arange(3)] * 3)
    log_prob = process.initial.double().log()[sequences[:, 0]]
    for t in range(2):
        log_prob = log_prob + process.transition.double().log()[sequences[:, t], sequences[:, t + 1]]
    return log_prob, torch.stack([(sequences == 2).sum(1), sequences[:, 2] == sequences[:, 0]]).double()


def test_the_closest_law_with_two_means() -> None:
    log_prob, scores = chain()
    mu = solve_multipliers(torch.zeros(27), scores, [("=", 1.5), ("=", 0.6)], log_weight=log_prob)
    assert mu == pytest.approx([0.53782851, 0.85365983], abs=1e-7)
    law = (log_prob + torch.tensor(mu, dtype=torch.float64) @ scores).softmax(0)
    assert (scores @ law).tolist() == pytest.approx([1.5, 0.6], abs=1e-9)
    kl = float((law * (law.log() - log_prob.log_softmax(0))).sum())
    assert kl == pytest.approx(0.28291805, abs=1e-7)


def test_an_objective_under_two_bounds() -> None:
    """Both are active; meeting the first alone breaks the second, and the other way round."""
    log_prob, scores = chain()
    wanted = [("<=", 1.5), (">=", 0.6)]
    mu = solve_multipliers(scores[0], scores, wanted, log_weight=log_prob)
    assert mu == pytest.approx([-0.46217149, 0.85365983], abs=1e-7)
    for at, missed in ((0, 0.39996002), (1, 1.99763753)):
        one = solve_multiplier(scores[0], scores[at], wanted[at][1], log_weight=log_prob)
        law = (log_prob + scores[0] + one * scores[at]).softmax(0)
        assert float(scores[1 - at] @ law) == pytest.approx(missed, abs=1e-7)
    loose = solve_multipliers(scores[0], scores, [("<=", 2.9), (">=", 0.01)], log_weight=log_prob)
    assert loose == [0.0, 0.0]


def test_one_constraint_is_what_it_was() -> None:
    log_prob, scores = chain()
    several = solve_multipliers(scores[0], scores[1:], [("=", 0.6)], 0.7, log_weight=log_prob)
    assert several[0] == pytest.approx(solve_multiplier(scores[0], scores[1], 0.6, 0.7, log_weight=log_prob), abs=1e-8)


def test_targets_that_cannot_be() -> None:
    log_prob, scores = chain()
    with pytest.raises(InputError, match="target of constraint 1"):
        solve_multipliers(torch.zeros(27), scores, [(">=", 3.0), ("=", 0.6)], log_weight=log_prob)
    twice = torch.stack([scores[0], -scores[0]])
    with pytest.raises(InputError, match="hold together"):
        solve_multipliers(torch.zeros(27), twice, [(">=", 2.0), (">=", -1.0)], log_weight=log_prob)
    for wrong, field in (([("length", ">", 1.0)], "sense"), ([("length", "=", math.inf)], "target"), ([], "1 to 8")):
        with pytest.raises(InputError, match=field):
            Constraints(None, tuple((parse_reward(r), s, t) for r, s, t in wrong))  # type: ignore[misc]


def test_the_reward_of_several_constraints(capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["good", "bad day", "a good day", "a very bad day it is"]
    samples = Samples(["p"], texts, torch.zeros(4, dtype=torch.long), torch.zeros(4).double())
    reward = Constraints(None, ((parse_reward("length"), "<=", 2.0), (parse_reward("sentiment"), ">=", 0.2)))  # type: ignore[arg-type]
    with pytest.raises(SteerError, match="not known"):
        reward(samples)
    fitted = reward.fitted(samples, beta=0.5)
    law = (fitted(samples) / 0.5).softmax(0)
    assert float(law @ parse_reward("length")(samples)) <= 2 + 1e-6
    assert float(law @ parse_reward("sentiment")(samples)) >= 0.2 - 1e-6
    assert "length" in repr(fitted) and fitted.multipliers is not None and fitted.multipliers[0] <= 0


def test_proxy_points_of_a_hacked_component() -> None:
    """Ordinary, good and hacked outputs (.6, .35, .05) that the proxy scores 0, 1, 2 and gold 0, 1, -1: gold is highest
    at n = 4, where the proxy's mean is 1.055894.
    """
    drawn = torch.Generator().manual_seed(0)
    kind = torch.multinomial(torch.tensor([0.6, 0.35, 0.05]), 400 * 64, replacement=True, generator=drawn)
    proxy = torch.tensor([0.0, 1.0, 2.0]).double()[kind].reshape(400, 64)
    gold = torch.tensor([0.0, 1.0, -1.0]).double()[kind].reshape(400, 64)
    point, same = proxy_points(torch.stack([proxy, gold]), gold, [1, 2, 4, 8, 16, 64])
    assert point.n == 4 and point.low <= 1.055894 <= point.high and point.value == pytest.approx(1.055894, abs=0.05)
    assert same.n == 64
    with pytest.raises(InputError, match="scores"):
        proxy_points(proxy, gold, [1])
