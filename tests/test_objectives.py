"""Training objectives against closed forms: every number was computed by two independent ways, in float64."""

from __future__ import annotations

import itertools
import math
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from steer.train.objectives import advantages as rules
from steer.train.objectives import losses, measures, rounds, schedules
from steer.train.objectives import surrogates as tokens
from steer.train.objectives.losses import Group, Loss, sequence_loss
from steer.train.objectives.surrogates import Tokens, aggregate, token_loss

EXACT = 2e-6
LOGP, REF, PREV = (-12.0, -9.5, -11.0, -14.0), (-12.5, -9.0, -11.2, -13.0), (-12.2, -9.3, -11.1, -13.5)
REWARD, LENGTH = (1.2, 0.4, -0.3, 0.9), (6, 5, 7, 8)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def four(k: int = 2, *, m: Any = REF, proposal: Any = REF, reward: Any = REWARD, **more: Any) -> Group:
    """Four completions of one prompt, or the first two, the first better."""
    pairs = more.pop("pairs", [[0, 1]] if k == 2 else [[i, j] for i in range(k) for j in range(i + 1, k)])
    return Group(
        t(*LOGP[:k]).requires_grad_(),
        t(*m[:k]),
        t(*REF[:k]),
        t(*proposal[:k]),
        t(*reward[:k]),
        t(*LENGTH[:k]),
        torch.tensor(pairs),
        **more,
    )


def check_loss(group: Group, loss: float, gradient: tuple[float, ...] | None, **settings: Any) -> None:
    found = sequence_loss(group, Loss(**settings))
    assert float(found.detach()) == pytest.approx(loss, abs=EXACT)
    if gradient is not None:
        (slope,) = torch.autograd.grad(found, group.logp)
        assert slope.tolist() == pytest.approx(list(gradient), abs=EXACT)


def mixed(tau: float, eta: float) -> list[float]:
    return rounds.mixed(t(*REF), t(*PREV), tau, eta - tau).tolist()


SQUARE = {"target": "half", "link": "square"}
PAIR: dict[str, tuple[dict[str, Any], dict[str, Any], float, tuple[float, ...] | None]] = {
    "dpo": ({}, {"beta": 0.1}, 0.644397, (-0.047502, 0.047502)),
    "dpo smoothed": ({}, {"beta": 0.1, "smoothing": 0.1}, 0.654397, (-0.037502, 0.037502)),
    "robust": ({}, {"beta": 0.1, "target": "robust", "smoothing": 0.1}, 0.631897, (-0.060002, 0.060002)),
    "hinge": ({}, {"beta": 0.1, "link": "hinge"}, 0.9, (-0.1, 0.1)),
    "ipo": ({}, {"beta": 0.1, **SQUARE}, 16.0, (-8, 8)),
    "ipo by token": ({}, {"beta": 0.1, "score": "mean", **SQUARE}, 23.200278, (-1.605556, 1.926667)),
    "f forward": ({}, {"beta": 0.1, "f": "forward_kl"}, 0.642395, (-0.028748, 0.078144)),
    "f js": ({}, {"beta": 0.1, "f": "js_divergence"}, 0.668460, (-0.018405, 0.030345)),
    "f alpha .3": ({}, {"beta": 0.1, "f": "alpha_divergence", "f_alpha": 0.3}, 0.644218, (-0.040877, 0.055179)),
    "f alpha .5": ({}, {"beta": 0.1, "f": "alpha_divergence", "f_alpha": 0.5}, 0.643900, (-0.036974, 0.060960)),
    "spin": ({"m": PREV}, {"beta": 0.0, "prox": 0.1}, 0.673347, (-0.049, 0.049)),
    "dno": (
        {"m": PREV, "reward": (0.25, 0.0)},
        {"beta": 0.0, "prox": 0.1, "target": "soft"},
        0.690860,
        (-0.005218, 0.005218),
    ),
    "soft": ({}, {"beta": 1.0, "target": "soft"}, 0.623287, None),
    "inpo": ({"m": mixed(0.2, 0.5)}, {"beta": 0.2, "prox": 0.3, **SQUARE}, 0.1296, (-0.72, 0.72)),
    "inpo paper": (
        {"m": mixed(0.0025, 0.0075)},
        {"beta": 0.0025, "prox": 0.005, **SQUARE},
        4364.804444,
        (-132.133333, 132.133333),
    ),
    "rpo": ({}, {"beta": 0.01, "anchor": "chosen", "anchor_weight": -0.005}, 0.688760, (-0.005025, 0.004975)),
    "rpo average": (
        {},
        {"beta": 0.5, "anchor": "chosen_mean", "anchor_weight": -0.4},
        0.874077,
        (-0.222104, 0.188770),
    ),
    "cpl": ({"m": (0, 0)}, {"beta": 0.1}, 0.825939, (-0.056218, 0.056218)),
    "cpl biased": ({"m": (0, 0)}, {"beta": 0.1, "loser": 0.5}, 1.119960, (-0.067371, 0.033685)),
    "cpl referred": ({}, {"beta": 0.2, "loser": 0.75}, 0.609470, (-0.091272, 0.068454)),
    "dpo gamma": ({"m": [0.5 * x for x in REF]}, {"beta": 0.1}, 0.731350, (-0.051874, 0.051874)),
    "refuel": (
        {"m": PREV},
        {"beta": 0.0, "prox": 1.0, "target": "reward", "link": "square"},
        0.16,
        (-0.8, 0.8),
    ),
    "refuel 1000": (
        {"m": PREV},
        {"beta": 0.0, "prox": 1e-3, "target": "reward", "link": "square"},
        639360.16,
        (-1599.2, 1599.2),
    ),
    "step_advantage": (
        {"reward": (0.3, -0.2)},
        {"beta": 0.5, "target": "advantage", "link": "single"},
        0.005,
        (-0.05, -0.05),
    ),
}


@pytest.mark.parametrize("name", PAIR)
def test_losses_of_a_pair(name: str) -> None:
    given, settings, loss, gradient = PAIR[name]
    check_loss(four(**given), loss, gradient, **settings)


def test_losses_of_a_group() -> None:
    ranks = four(4, reward=(0.9, 0.5, 0.1, 0.7))
    pairs = rounds.ranked(ranks.reward.tolist(), [""] * 4, Random(0))
    ranks = four(4, reward=(0.9, 0.5, 0.1, 0.7), pairs=pairs)
    check_loss(ranks, 0.814464, (-0.023213, 0.006832, 0.016251, 0.000130), beta=0.05, weight="rank")
    copg = {"beta": 0.5, "target": "reward", "link": "square", "scale": "linear"}
    check_loss(four(), -0.55 + 0.8**2, (-0.3, 0.3), **copg)
    every = four(4)
    check_loss(every, 2.34, (-0.4, 0, 1.4, -1), weight="others", **copg)
    value = every.reward - 0.5 * every.ratio.detach()
    assert rules.leave_one_out(value, torch.zeros(4, dtype=torch.int64)).tolist() == pytest.approx([0.4, 0, -1.4, 1])
    anchored = four(3, pairs=[[0, 1]], anchor=2)
    selm: dict[str, Any] = {"anchor": "greedy"}
    check_loss(anchored, 0.688162, (-0.004975, 0.004975, 0.000010), beta=0.01, anchor_weight=1e-3, **selm)
    check_loss(
        four(3, pairs=[[0, 1]], anchor=2), 0.654397, (-0.047502, 0.047502, 0.05), beta=0.1, anchor_weight=0.5, **selm
    )
    brain: dict[str, Any] = {"beta": 1.0, "link": "softmax"}
    check_loss(four(4, proposal=PREV), 0.288506, (0.058167, -0.000692, 0.221698, -0.279174), **brain)
    check_loss(four(4), 0.260325, (0.014474, -0.028426, 0.225239, -0.211287), **brain)


def test_squares_of_single_completions() -> None:
    """TRL's sppo_hard is twice the sum over both, A2PO the mean square in units of beta."""
    single: dict[str, Any] = {"target": "advantage", "link": "single"}
    group = four(reward=(0.5, -0.5))
    assert 4 * float(sequence_loss(group, Loss(beta=0.1, **single)).detach()) == pytest.approx(40.5, abs=EXACT)
    value = losses.soft_value(t(*REWARD), 0.5)
    a2po = four(4, reward=(t(*REWARD) - value).tolist())
    loss = 2 * 0.001**2 * sequence_loss(a2po, Loss(beta=0.001, **single))
    assert float(loss.detach()) == pytest.approx(0.385403, abs=EXACT)
    (slope,) = torch.autograd.grad(loss, a2po.logp)
    assert slope.tolist() == pytest.approx([-0.000199, 0.000200, 0.000551, -0.000050], abs=EXACT)


@pytest.mark.parametrize(
    ("divergence", "pseudo", "gradient"),
    [
        ("forward", (-0.875652, -1.069523, -0.263741, -2.907266), (-0.267381, -0.218913, -0.072870, -0.440836)),
        ("reverse", (1.132787, 0.932787, 2.332787, -0.067213), (0.345897, 0.190925, 0.644532, -0.010192)),
        ("js", (0.064191, -0.034171, 0.459071, -0.669691), (0.019601, -0.006994, 0.126838, -0.101547)),
        ("tv", (0.5, -0.5, 0.5, -0.5), (0.152675, -0.102341, 0.138146, -0.075816)),
    ],
)
def test_f_dpg(divergence: str, pseudo: tuple[float, ...], gradient: tuple[float, ...]) -> None:
    group = four(4, proposal=PREV)
    (slope,) = torch.autograd.grad(
        sequence_loss(group, Loss(beta=1.0, link="weighted", divergence=divergence)), group.logp
    )
    assert slope.tolist() == pytest.approx(list(gradient), abs=EXACT)
    wanted = group.ref + group.reward
    z = float((wanted - group.proposal).exp().mean())
    assert z == pytest.approx(2.299719, abs=EXACT)
    primes = losses.F_PRIME[divergence](group.logp.detach() + math.log(z) - wanted)
    assert primes.tolist() == pytest.approx(list(pseudo), abs=EXACT)


# ----------------------------------------------------------------------------------------------------------- identities


def slope_of(group: Group, **settings: Any) -> list[float]:
    return torch.autograd.grad(sequence_loss(group, Loss(**settings)), group.logp)[0].tolist()


def some(seed: int, k: int = 4) -> dict[str, list[float]]:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(5, k, generator=draw, dtype=torch.float64).tolist()
    return dict(zip(("logp", "ref", "prev", "proposal", "reward"), rows, strict=True))


def made(x: dict[str, list[float]], m: Any, *, proposal: Any = None, reward: Any = None, pairs: Any = None) -> Group:
    k = len(x["logp"])
    default = [[i, j] for i in range(k) for j in range(i + 1, k)]
    return Group(
        t(*x["logp"]).requires_grad_(),
        torch.as_tensor(m, dtype=torch.float64),
        t(*x["ref"]),
        t(*(x["proposal"] if proposal is None else proposal)),
        t(*(x["reward"] if reward is None else reward)),
        torch.ones(k),
        torch.tensor(default if pairs is None else pairs),
    )


@pytest.mark.parametrize("seed", range(3))
def test_identities_of_losses(seed: int) -> None:
    x, beta, tau, eta = some(seed), 0.7, 0.2, 0.5
    two = some(seed, 2)
    # 1. INPO is IPO with the mixed reference and beta = eta.
    m = (tau / eta) * t(*x["ref"]) + (1 - tau / eta) * t(*x["prev"])
    inpo = made(x, rounds.mixed(t(*x["ref"]), t(*x["prev"]), tau, eta - tau))
    assert slope_of(inpo, beta=tau, prox=eta - tau, **SQUARE) == pytest.approx(
        slope_of(made(x, m), beta=eta, **SQUARE), abs=1e-12
    )
    # 2. The square in units of c.
    h = two["logp"][0] - two["ref"][0] - two["logp"][1] + two["ref"][1]
    assert float(sequence_loss(made(two, two["ref"]), Loss(beta=eta, **SQUARE))) == pytest.approx(
        (h - 1 / (2 * eta)) ** 2
    )
    delta = two["reward"][0] - two["reward"][1]
    refuel = made(two, two["prev"])
    hp = two["logp"][0] - two["prev"][0] - two["logp"][1] + two["prev"][1]
    found = sequence_loss(refuel, Loss(beta=0.0, prox=1 / eta, target="reward", link="square"))
    assert float(found) == pytest.approx((hp - eta * delta) ** 2)
    # 3. CoPG's square has the gradient of its stop-gradient form.
    copg: dict[str, Any] = {"beta": beta, "target": "reward", "link": "square", "scale": "linear"}
    v = [a - b for a, b in zip(two["logp"], two["ref"], strict=True)]
    gain = delta - beta * (v[0] - v[1])
    assert slope_of(made(two, two["ref"]), **copg) == pytest.approx([-gain, gain])
    # 4. Of K completions it is the leave-one-out policy gradient, at scale 1 / (2 beta).
    value = t(*x["reward"]) - beta * (t(*x["logp"]) - t(*x["ref"]))
    loo = rules.leave_one_out(value, torch.zeros(4, dtype=torch.int64))
    assert slope_of(made(x, x["ref"]), weight="others", **copg) == pytest.approx((-loo).tolist())
    # 5. BRAIn of two is the soft-label logistic loss.
    brain = slope_of(made(two, two["ref"], proposal=two["ref"]), beta=1.0, link="softmax")
    assert brain == pytest.approx(slope_of(made(two, two["ref"]), beta=1.0, target="soft"))
    # 6. BRAIn's gradient is f-DPG's for KL(p || pi) plus a self-normalised baseline.
    whole = slope_of(made(x, x["ref"]), beta=1.0, link="softmax")
    part = slope_of(made(x, x["ref"]), beta=1.0, link="weighted", divergence="forward")
    base = (t(*x["logp"]) - t(*x["proposal"])).softmax(0)
    assert whole == pytest.approx((t(*part) + base).tolist())
    # 7. DNO is soft DPO at the last iterate, SPIN hard DPO there, CPL(1) DPO without a reference.
    assert slope_of(made(two, two["prev"]), beta=0.0, prox=beta, target="soft") == pytest.approx(
        [-beta * (torch.tensor(delta).sigmoid() - torch.tensor(beta * hp).sigmoid()).item() * s for s in (1, -1)],
        abs=1e-7,
    )
    shifted = {**two, "ref": two["prev"]}
    assert slope_of(made(two, two["prev"]), beta=0.0, prox=beta) == slope_of(made(shifted, two["prev"]), beta=beta)
    assert slope_of(made(two, [0.0, 0.0]), beta=beta, loser=1.0) == slope_of(made(two, [0.0, 0.0]), beta=beta)


def token_rows(x: dict[str, list[float]], advantage: Tensor) -> tuple[Tokens, Tensor]:
    logp = t(*x["logp"]).unsqueeze(1).requires_grad_()
    old, ref = t(*x["proposal"]).unsqueeze(1), t(*x["ref"]).unsqueeze(1)
    return Tokens(logp, old, ref, advantage.unsqueeze(1), torch.ones_like(logp, dtype=torch.bool)), logp


@pytest.mark.parametrize("seed", range(3))
def test_identities_of_policy_gradients(seed: int) -> None:
    zero = torch.zeros(4, dtype=torch.int64)
    reward = t(*some(seed)["reward"])
    # 8. P3O is RLOO of two; the mean-centred rule is (G - 1) / G of leave-one-out.
    assert rules.leave_one_out(reward[:2], zero[:2]).tolist() == pytest.approx(
        [float(reward[0] - reward[1]), float(reward[1] - reward[0])]
    )
    assert (rules.mean_only(reward, zero) * 4 / 3).tolist() == pytest.approx(rules.leave_one_out(reward, zero).tolist())
    # 9. NFT on-policy, weighted by sqrt((1 - r) / r), is GRPO with the population's standard deviation.
    for right in (t(1, 0, 0, 0), t(1, 0, 1, 0), t(1, 1, 0, 1)):
        grpo = rules.group_std(right, zero, ddof=0, epsilon=0.0)
        x, logp = token_rows({**some(seed), "logp": some(seed)["proposal"]}, grpo)
        x = Tokens(x.logp, x.old, x.ref, x.advantage, x.mask, accuracy=right.mean().expand(4, 1))
        (slope,) = torch.autograd.grad(tokens.nft(x).sum(), logp)
        assert slope.flatten().tolist() == pytest.approx((-grpo).tolist(), abs=1e-12)
    # 10. Win rate less beta log(pi / ref) in the reward is the exact gradient of P - beta KL.
    logits = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
    beta, ref, wins = 0.3, t(0.5, 0.3, 0.2), t(0.9, 0.4, 0.2)
    pi = logits.softmax(0)
    (exact,) = torch.autograd.grad((pi * (wins - beta * (pi / ref).log())).sum(), logits)
    worth = wins - 0.5 - beta * (pi.detach() / ref).log()
    (found,) = torch.autograd.grad((pi.detach() * worth * logits.log_softmax(0)).sum(), logits)
    assert found.tolist() == pytest.approx(exact.tolist(), abs=1e-12)
    # 11. The loss of a token with negative advantage is at most the dual clip times as much.
    x, _ = token_rows({**some(seed), "logp": [3.0] * 4, "proposal": [0.0] * 4}, t(-1, -2, 1, -0.5))
    assert tokens.clip(x, dual=10.0).flatten().tolist() == pytest.approx([10, 20, -1.2, 5])
    # 12. Policy filtration by the best alone is RAFT's selection.
    assert rules.sample_weights(reward, "best").tolist() == rules.best(reward, zero).tolist()


def test_on_policy_gradients_by_enumeration() -> None:
    """Expected gradients in logits over all samples of a bandit: exact for some rules, scaled or biased for others."""
    pi, reward = t(0.5, 0.3, 0.2), t(1, 0, 2)

    def expected(rule: Any, k: int) -> list[float]:
        total = torch.zeros(3, dtype=torch.float64)
        for drawn in itertools.product(range(3), repeat=k):
            worth = rule(reward[list(drawn)], torch.zeros(k, dtype=torch.int64))
            score = torch.nn.functional.one_hot(torch.tensor(drawn), 3).double() - pi
            total += math.prod(float(pi[i]) for i in drawn) * (worth.unsqueeze(1) * score).mean(0)
        return total.tolist()

    exact = [0.05, -0.27, 0.22]
    for k, share in ((2, 0.5), (4, 0.75)):
        assert expected(rules.leave_one_out, k) == pytest.approx(exact, abs=1e-12)
        assert expected(rules.mean_only, k) == pytest.approx([share * x for x in exact], abs=1e-12)
    assert expected(rules.group_std, 2) == pytest.approx([0.035350, -0.148474, 0.113124], abs=EXACT)
    assert expected(rules.group_std, 4) == pytest.approx([0.067814, -0.276884, 0.209070], abs=EXACT)


# ------------------------------------------------------------------------------------------------------------- pairings


def test_pairings() -> None:
    draw, roles = Random(0), ["own"] * 4
    assert rounds.best_worst(REWARD, roles, draw) == [(0, 2)]
    assert rounds.best_worst([1.0] * 4, roles, draw) == []
    assert rounds.disagree((0.2, 0.9, 0.4, 0.1), roles, draw, second=(0.8, 0.1, 0.5, 0.2)) == [(1, 0)]
    gold = ["gold", *["own"] * 5]
    found = rounds.margin([6, 5, 3, 2, 6, 4], gold, draw)
    assert sorted(found) == sorted([(0, 2), (0, 3), (0, 5), (1, 2), (1, 3), (1, 5), (4, 1), (4, 2), (4, 3), (4, 5)])
    assert rounds.gold_own([0, 0, 0], ["gold", "own", "own"], draw) == [(0, 1), (0, 2)]
    assert rounds.every((1.0, 1.0, 3.0), roles, draw) == [(0, 1), (2, 0), (2, 1)]
    assert rounds.ranked((1.0, 1.0, 3.0), roles, draw) == [(2, 0), (2, 1)]
    assert len({rounds.random_two(REWARD, roles, draw)[0] for _ in range(50)}) == 12
    assert rounds.gap_split([2, 0.3, 0.9, 0.05]) == ([0, 2], [1, 3])
    assert [len([r for r, _ in rounds.kept([range(100)] * 3, (1, 0.3, 0.15), draw) if r == n]) for n in range(3)] == [
        15,
        30,
        100,
    ]


def test_references_of_the_next_round() -> None:
    """Accelerated preference optimisation moves the exponent of its policy as the closed form says; a soup of two
    linear-softmax policies is their geometric mean.
    """
    r, ref = t(1, 0, 2), t(0.5, 0.3, 0.2)
    now, before, seen = {"x": ref.log()}, {"x": ref.log()}, []
    for _ in range(5):
        hat = {"x": now["x"] + r}
        now, before = rounds.extrapolated(hat, before, 0.3), hat
        seen.append(((hat["x"] - ref.log())[0].item(), (now["x"] - ref.log())[0].item()))
    flat = [x for pair in seen for x in pair]
    assert flat == pytest.approx([1, 1.3, 2.3, 2.69, 3.69, 4.107, 5.107, 5.5321, 6.5321, 6.95963], abs=EXACT)
    one, two = {"x": t(0.7, 0.2, 0.1).log()}, {"x": t(0.2, 0.5, 0.3).log()}
    made = rounds.soup([one, two], [0.5, 0.5])["x"].softmax(0)
    assert made.tolist() == pytest.approx([0.433263, 0.366174, 0.200562], abs=EXACT)
    assert (made.log() + r).softmax(0).tolist() == pytest.approx([0.389221, 0.121015, 0.489764], abs=EXACT)
    assert rounds.trailing({"x": t(1)}, {"x": t(3)}, 0.75)["x"].item() == 1.5


def test_roll_ins() -> None:
    draw, count = Random(1), 20_000
    for share, after, before in (
        (0.8, (0.2, 0.4, 0.6, 0.8, 1), (0.8, 0.6, 0.4, 0.2, 0)),
        (1.0, (0, 0.25, 0.5, 0.75, 1), (1, 0.75, 0.5, 0.25, 0)),
    ):
        starts = [rounds.rolled_in(5, share, draw) for _ in range(count)]
        for name, wanted in (("ppo++", after), ("aggrevated", before)):
            seen = torch.tensor([rounds.ROLL_INS[name](5, h) for h in starts]).double().mean(0)
            error = 5 * math.sqrt(0.25 / count)
            assert seen.tolist() == pytest.approx(list(wanted), abs=error)


# ----------------------------------------------------------------------------------------------------------- advantages

TWO = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
R2 = t(1, 0, 0, 1, 0, 0, 0, 1)


@pytest.mark.parametrize(
    ("rule", "more", "wanted"),
    [
        ("group_std", {}, (0.865875, -0.865875, -0.865875, 0.865875, -0.4999, -0.4999, -0.4999, 1.4997)),
        ("mean_only", {}, (0.5, -0.5, -0.5, 0.5, -0.25, -0.25, -0.25, 0.75)),
        ("leave_one_out", {}, (2 / 3, -2 / 3, -2 / 3, 2 / 3, -1 / 3, -1 / 3, -1 / 3, 1)),
        ("batch_std", {}, (0.965905, -0.965905, -0.965905, 0.965905, -0.482953, -0.482953, -0.482953, 1.448858)),
        (
            "batch_std",
            {"epsilon": 1e-6},
            (0.966090, -0.966090, -0.966090, 0.966090, -0.483045, -0.483045, -0.483045, 1.449135),
        ),
        ("batch_std", {"epsilon": 0.0, "centred": True}, (1, -1, -1, 1, -0.5, -0.5, -0.5, 1.5)),
    ],
)
def test_advantages(rule: str, more: dict[str, Any], wanted: tuple[float, ...]) -> None:
    assert rules.ADVANTAGES[rule](R2, TWO, **more).tolist() == pytest.approx(list(wanted), abs=EXACT)


def test_groups_of_unequal_size() -> None:
    """Every rule of one group gives what it gives for the groups one by one, and nothing for a constant group."""
    group, reward = torch.tensor([0, 1, 0, 1, 1, 2, 2]), t(1, 3, 2, 0, 1, 4, 4)
    for name in ("group_std", "mean_only", "leave_one_out", "best"):
        whole = rules.ADVANTAGES[name](reward, group)
        assert whole[5:].tolist() == pytest.approx([0, 0], abs=1e-9)
        for b in (0, 1):
            alone = rules.ADVANTAGES[name](reward[group == b], torch.zeros(int((group == b).sum()), dtype=torch.int64))
            assert whole[group == b].tolist() == pytest.approx(alone.tolist())


def test_several_objectives() -> None:
    both, one = torch.stack([t(1, 1, 0, 0), t(10, 0, 10, 0)]), torch.zeros(4, dtype=torch.int64)
    first = rules.weighted(both, one, weights=(1, 0.5))
    assert first.tolist() == pytest.approx([1.019015, -0.679343, 0.679343, -1.019015], abs=EXACT)
    last = rules.weighted(both, one, weights=(1, 0.5), normalize_first=True)
    assert last.tolist() == pytest.approx([1.161815, 0.387191, -0.387191, -1.161815], abs=EXACT)


RISK = t(1, 0, 1, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1)
FIVE = torch.arange(5).repeat_interleave(3)


def test_risk() -> None:
    settings: dict[str, Any] = {"quantiles": (1.5, 3.0), "risk_credit": "sum-mean", "constant": False}
    found = rules.bundle(RISK, FIVE, **settings).view(5, 3)
    assert found[:, 0].tolist() == pytest.approx([0.192450, -0.192450, 0.384900, 0.384900, -0.192450], abs=EXACT)
    assert found[:, 1].tolist() == pytest.approx([-0.866021, *[-0.433011] * 4], abs=EXACT)
    plain = rules.bundle(RISK, FIVE, quantiles=(1.5, 3.0), constant=False).view(5, 3)
    assert torch.allclose(plain, t(0.577349, -2.598063, 0.577349).expand(5, 3), atol=EXACT)
    constant = rules.bundle(RISK, FIVE, quantiles=(1.5, 3.0)).view(5, 3)
    assert torch.allclose(constant, t(0, -3.175413, 0).expand(5, 3), atol=EXACT)
    trap = t(1, 1, 1, 1, 0, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1)
    shares = rules.bundle(trap, FIVE, **settings).view(5, 3)[:, 0]
    assert shares.tolist() == pytest.approx([0, -0.064150, 0.128300, 0.064150, 0.064150], abs=EXACT)
    q, seen = 1.5, []
    for _ in range(3):
        q = rules.tracked(q, 0.2, t(3, 0, 3))
        seen.append(q)
    assert seen == pytest.approx([1.486667, 1.473333, 1.46], abs=EXACT)


def test_steps_and_turns() -> None:
    found = rules.entropy_steps([1, -1], [[0.2, 0.8, 0.5], [0.4, 1.2]])
    assert found[0] == pytest.approx([1.131899, 0.492539, 0.731668], abs=EXACT)
    assert found[1] == pytest.approx([-1.493093, -0.863012], abs=EXACT)
    assert rules.entropy_steps([1, -1], [[0.5], [0.5]]) == [[1.0], [-1.0]]
    gained = rules.turns([[0.1, 0.3, 0.25], [0.2, 0.2, 0.6]], 0.1, [1, 0])
    assert gained[0] == pytest.approx([0.325, 0.375, 0.275, 0.5], abs=EXACT)
    assert gained[1] == pytest.approx([-0.325, -0.375, -0.275, -0.5], abs=EXACT)
    discounted = rules.turns([[0.1, 0.3, 0.25], [0.2, 0.2, 0.6]], 0.1, [1, 0], discount=0.5)
    gap = [2 * x for x in discounted[0]]
    assert gap == pytest.approx(
        [a - b for a, b in zip((0.2125, 0.425, 0.45, 1), (0.2, 0.2, 0.4, 0), strict=True)], abs=EXACT
    )


def test_asymmetric_and_filtered() -> None:
    one = torch.zeros(4, dtype=torch.int64)
    found = rules.length_factor(t(1, 1, 0, 0), one, length=t(100, 200, 1150, 50))
    assert found.tolist() == pytest.approx([0.866025, 0.866025, -0.874642, -0.866025], abs=EXACT)
    for right, weight in ((t(1, 0, 0, 0), 0.493165), (t(1, 1, 0, 0), 0.743119), (t(1, 1, 1, 0), 0.869804)):
        found = rules.kl_weight(right, one)
        assert (float(found[0]), float(found[3])) == pytest.approx((weight, 1), abs=EXACT)
    assert rules.kl_weight(t(1, 1, 1, 1), one).tolist() == [1, 1, 1, 1]
    r = t(0.2, 1.5, -0.7, 0.9, 0.1)
    wanted = {"best": 1.5, "br": 0.8125, "bw": 0.4, "pow": 1.047222}
    for rule, mean in wanted.items():
        assert float((rules.sample_weights(r, rule) * r).sum()) == pytest.approx(mean, abs=EXACT)
    assert rules.sample_weights(r, "pow").tolist() == pytest.approx(
        [0.011111, 0.625, 0.136111, 0.225, 0.002778], abs=EXACT
    )


# ----------------------------------------------------------------------------------------------------------- surrogates


def k4(**more: Any) -> tuple[Tokens, Tensor]:
    new = t(-0.8, -0.9, -1.2, -0.1).unsqueeze(0).requires_grad_()
    old = t(-1, -0.5, -2, -0.1).unsqueeze(0)
    ref = torch.zeros_like(old)
    return Tokens(new, old, ref, t(1, -1, 1, -1).unsqueeze(0), torch.ones_like(old, dtype=torch.bool), **more), new


NFT = ((0.25, (-0.2, -0.104264, -0.8, 0), (-1, 0.201317, -1, 0.333333)),
       (0.5, (-0.2, -0.284938, -0.8, 0), (-1, 0.504121, -1, 1)),
       (0.75, (-0.2, -0.687652, -0.8, 0), (-1, 1.011021, -1, 3)))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "more", "loss", "gradient"),
    [
        ("plain", {}, (-1.221403, 0.670320, -2.225541, 1), (-1.221403, 0.670320, -2.225541, 1)),
        ("clip", {}, (-1.2, 0.8, -1.2, 1), (0, 0, 0, 1)),
        ("clip", {"clip_high": 0.28}, (-1.221403, 0.8, -1.28, 1), (-1.221403, 0, 0, 1)),
        ("mirror", {"step": 0.75}, (-1.190899, 0.752389, -1.485685, 1), (-0.895695, 0.312816, 0.148369, 1)),
    ],
)
def test_surrogates(name: str, more: dict[str, Any], loss: Any, gradient: Any) -> None:
    x, logp = k4()
    found = tokens.SURROGATES[name](x, **more)
    assert found.detach().flatten().tolist() == pytest.approx(list(loss), abs=EXACT)
    assert torch.autograd.grad(found.sum(), logp)[0].flatten().tolist() == pytest.approx(list(gradient), abs=EXACT)


@pytest.mark.parametrize(("accuracy", "loss", "gradient"), NFT)
def test_nft(accuracy: float, loss: Any, gradient: Any) -> None:
    x, logp = k4(accuracy=torch.full((1, 4), accuracy, dtype=torch.float64))
    found = tokens.nft(x, prompt_weight="one")
    assert found.detach().flatten().tolist() == pytest.approx(list(loss), abs=EXACT)
    assert torch.autograd.grad(found.sum(), logp)[0].flatten().tolist() == pytest.approx(list(gradient), abs=EXACT)


def test_sequence_ratios_of_p3o() -> None:
    logp = t(-12, -9.5).unsqueeze(1).requires_grad_()
    old = t(-12.2, -9.3).unsqueeze(1)
    worth = rules.leave_one_out(t(1.2, 0.4), torch.zeros(2, dtype=torch.int64)).unsqueeze(1)
    x = Tokens(logp, old, old, worth, torch.ones_like(old, dtype=torch.bool))
    found = token_loss(x, surrogate="clip", aggregation="sum", level="sequence")
    assert float(found.detach()) == pytest.approx(-0.152508, abs=EXACT)
    assert torch.autograd.grad(found, logp)[0].flatten().tolist() == pytest.approx([0, 0.327492], abs=EXACT)


def test_refinements_and_rollouts_of_critique() -> None:
    pi = t(0.05, 0.2, 0.5, 0.9)
    logp = pi.log().unsqueeze(0).requires_grad_()
    refined = torch.ones(1, 4, dtype=torch.bool)
    x = Tokens(logp, logp.detach(), logp.detach(), -torch.ones(1, 4, dtype=torch.float64), refined, refined=refined)
    found = tokens.critique(x)
    assert found.detach().flatten().tolist() == pytest.approx([0.333333, 0.666667, 0.833333, 0.9], abs=EXACT)
    slope = torch.autograd.grad(found.sum(), logp)[0]
    assert slope.flatten().tolist() == pytest.approx([0.222222, 0.222222, 0.138889, 0.09], abs=EXACT)
    mean = rules.mean_only(t(0, 0, 1, 0, 0, 0, 0, 1), torch.zeros(8, dtype=torch.int64))
    assert mean.tolist() == [-0.25, -0.25, 0.75, -0.25, -0.25, -0.25, -0.25, 0.75]


def covariant() -> tuple[Tokens, Tensor]:
    logp = t(-0.1, -2, -0.5, -3, -0.2, -1).unsqueeze(0).requires_grad_()
    old = t(-0.2, -1.8, -0.5, -3.3, -0.1, -1).unsqueeze(0)
    return Tokens(logp, old, old, t(1, 1, -1, -1, 1, -1).unsqueeze(0), torch.ones_like(old, dtype=torch.bool)), logp


def test_covariance_surrogates() -> None:
    x, logp = covariant()
    wanted = [1.033333, -0.866667, -0.633333, 1.866667, 0.933333, -0.133333]
    assert tokens._covariance(x).flatten().tolist() == pytest.approx(wanted, abs=EXACT)
    found = tokens.kl_cov(x, cov_share=0.34)
    assert found.detach().flatten().tolist() == pytest.approx(
        [-1.005171, -0.818731, 1, 1.649859, -0.904837, 1], abs=EXACT
    )
    loss = aggregate(found, x.mask, "token")
    assert float(loss.detach()) == pytest.approx(0.153520, abs=EXACT)
    slope = torch.autograd.grad(loss, logp)[0].flatten().tolist()
    assert slope == pytest.approx([-0.017528, -0.136455, 0.166667, 0.391643, -0.150806, 0.166667], abs=EXACT)
    x, logp = covariant()
    loss = aggregate(tokens.clip_cov(x, cov_share=0.5, cov_low=0.5), x.mask, "token")
    assert float(loss.detach()) == pytest.approx(0.196878, abs=EXACT)
    slope = torch.autograd.grad(loss, logp)[0].flatten().tolist()
    assert slope == pytest.approx([0, -0.136455, 0.166667, 0, 0, 0.166667], abs=EXACT)


def test_entropy_change() -> None:
    pi, mask = t(0.9, 0.5, 0.1, 0.02), torch.ones(1, 4, dtype=torch.bool)
    x = Tokens(
        pi.log().unsqueeze(0),
        t(0.85, 0.55, 0.12, 0.02).log().unsqueeze(0),
        torch.zeros(1, 4),
        t(1, -0.5, 1, -1).unsqueeze(0),
        mask,
        entropy=t(0.4, 0.9, 1.5, 0.3).unsqueeze(0),
    )
    size = tokens.change_of_entropy(x).flatten()
    assert size.tolist() == pytest.approx([0.031197, 0.047012, 0.601939, 3.539783], abs=EXACT)
    clipped = tokens.clip(x, clip_high=0.28, dual=10.0)
    for more, wanted in (
        ({"form": "exponential", "weight_low": 0.7}, [0.996861, 0.995274, 0.941150, 0.7]),
        ({}, [1.2, 1.198197, 1.134932, 0.8]),
    ):
        weight = tokens.entropy_change(x, **more) / clipped  # type: ignore[arg-type]
        assert weight.flatten().tolist() == pytest.approx(wanted, abs=EXACT)


def test_entropy_smooth() -> None:
    h = t(0.2, 0.5, 1, 2.5)
    assert tokens.smooth_penalty(h, 1.0, released=True).tolist() == [0.1, 0.1, 0, 0.1]
    assert tokens.smooth_penalty(h, 1.0).tolist() == pytest.approx([0.3, 0, 0, 1], abs=EXACT)
    zero = torch.zeros(1, 4, dtype=torch.float64)
    x = Tokens(zero, zero, zero, zero, zero == 0, entropy=h.unsqueeze(0))
    for released, wanted in ((True, -0.000975), (False, -0.000725)):
        found = token_loss(x, surrogate="entropy_smooth", entropy_mean=1.0, released=released)
        assert float(found) == pytest.approx(wanted, abs=EXACT)
    epochs = {0: 1, 30: 0.889866, 75: 0.827067, 76: 0.768632, 110: 0.197278, 150: 0.039830}
    for epoch, weight in epochs.items():
        assert tokens.phase_weight(epoch, 150) == pytest.approx(weight, abs=EXACT)


def test_divergence_estimates_and_aggregations() -> None:
    u = t(0.3, -0.2, 0)
    assert tokens.kl_terms(u, "k1").tolist() == u.tolist()
    assert tokens.kl_terms(u, "k2").tolist() == pytest.approx([0.045, 0.02, 0], abs=EXACT)
    assert tokens.kl_terms(u).tolist() == pytest.approx([0.040818, 0.021403, 0], abs=EXACT)
    loss = torch.tensor([[1, 2, 9, 9], [0.5, 0.5, 1, 2]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    found = [float(aggregate(loss, mask, how, 4)) for how in ("sequence", "token", "constant")]
    assert found == pytest.approx([1.25, 1.166667, 0.875], abs=EXACT)


# ------------------------------------------------------------------------------------------------- schedules, measures


def test_knapsack() -> None:
    values = {
        0.25: (0.052734, 0.095581, 0.126544, 0.139216),
        0.5: (0.0625, 0.109375, 0.124023, 0.124996),
        0.75: (0.017578, 0.031860, 0.042181, 0.046405),
    }
    for p, row in values.items():
        assert [schedules.knapsack_value(p, n) for n in (2, 4, 8, 16)] == pytest.approx(list(row), abs=EXACT)
    p = [0.1, 0.25, 0.5, 0.75]
    found = schedules.knapsack(p, 16, most=10)
    assert found == [2, 6, 5, 3]
    value = sum(schedules.knapsack_value(x, n) for x, n in zip(p, found, strict=True))
    assert value == pytest.approx(0.273697, abs=EXACT)
    every = (n for n in itertools.product(range(2, 11), repeat=4) if sum(n) == 16)
    best = max(sum(schedules.knapsack_value(x, n) for x, n in zip(p, row, strict=True)) for row in every)
    assert value == pytest.approx(best, abs=1e-12)
    assert schedules.knapsack([0.0, 1.0, 0.5], 16, most=6) == [6, 2, 6]
    wanted = {0.1: 21.854345, 0.25: 8.003923, 0.5: 3.321928}
    for rate, count in wanted.items():
        assert schedules.samples_needed(rate) == pytest.approx(count, abs=EXACT)


def test_informative_groups() -> None:
    assert schedules.informative([[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]]) == [1, 3]
    assert schedules.expected_draws(0.25, 8) == pytest.approx(1.111269, abs=EXACT)


def test_gain() -> None:
    hidden = torch.tensor([[1, 0], [0, 1], [1, 1], [1, -1], [2, 1]], dtype=torch.float64)
    question = torch.tensor([False, False, True, True, True])
    assert schedules.angle_signal(hidden, question) == pytest.approx(4.096109, abs=EXACT)
    assert schedules.angle_signal(hidden, question, 0.0) == pytest.approx(0.421637, abs=EXACT)
    for accuracy, angle, step in ((0.6, 0.3, 367.212444), (1, 1, 862.810868), (0.1, 0.2, 0)):
        assert schedules.moved(0, accuracy, angle) == pytest.approx(step, abs=EXACT)
    weights = schedules.near(6, 1, 2)
    assert weights == pytest.approx([0.230326, 0.260994, 0.230326, 0.158301, 0.084732, 0.035322], abs=EXACT)
    draw, count = Random(0), 20_000
    seen = [0] * 6
    for _ in range(count):
        for i in schedules.without_replacement(weights, 2, draw):
            seen[i] += 1
    wanted = [0.453669, 0.500003, 0.453669, 0.329402, 0.184408, 0.078849]
    for share, expected in zip(seen, wanted, strict=True):
        assert share / count == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / count))


def test_hints_and_canvas() -> None:
    assert [schedules.hint("abcdefghij", share) for share in (0.25, 0.5, 0.75)] == ["ab", "abcde", "abcdefg"]
    entropy = t(0.1, 2, 0.5, 1.2, 0.3, 0.9, 0.2, 0.4, 0.05, 1.5)
    assert schedules.top_entropy(entropy, 0.2).nonzero().flatten().tolist() == [1, 9]
    assert [schedules.restored(x) for x in (0.25, 0.5)] == [0.1875, 0.25]
    draw = Random(0)
    for _ in range(100):
        fixed = schedules.fixed_chunks(23, 4, draw)
        chunks = {position // 4 for position in fixed}
        assert fixed == [i for i in range(23) if i // 4 in chunks] and 1 <= len(chunks) <= 4


def test_ranking_accuracy() -> None:
    w, n_w = t(-12, -9, -20, -15), t(6, 5, 12, 8)
    lost, n_l = t(-9, -12, -18, -15.5), t(4, 8, 10, 8)
    assert measures.ranking_accuracy(w, lost) == 0.5
    assert measures.ranking_accuracy(w, lost, (n_w, n_l)) == 0.75
    threshold = measures.dpo_threshold(w, lost, 0.1)
    assert threshold.tolist() == pytest.approx([0.554355, 0.854355, 0.598139, 0.718460], abs=EXACT)
    for beta, odds in ((0.1, 8.472979), (0.5, 1.694596), (1, 0.847298)):
        for gap, right in ((odds - 1e-4, 1.0), (odds + 1e-4, 0.0)):
            assert measures.ideal_ranking(t(0), t(gap), beta, 0.7) == right
