"""Training objectives at their population optimum: expected losses of table policies, minimised without sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from steer.train.objectives import rounds
from steer.train.objectives import surrogates as tokens
from steer.train.objectives.losses import LINKS, Group, Loss, sequence_loss, soft_value
from steer.train.objectives.surrogates import Tokens


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


REF, REWARD = t(0.5, 0.3, 0.2), t(1, 0, 2)
CYCLE = torch.tensor([[0.5, 0.7, 0.2], [0.3, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=torch.float64)
BEHAVED = t(0.2, 0.5, 0.3)
CLOSE = 2e-6


def exact_step(m: Tensor, g: Tensor, c: float) -> Tensor:
    """The proximal step of every objective here: `m exp(g / c)`, normalised."""
    return (m.log() + g / c).softmax(0)


def least(loss: Callable[[Tensor], Tensor], start: Tensor = REF) -> Tensor:
    """The law whose logits minimise a loss of log-probabilities `[3]`."""
    logits = start.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], lr=1.0, max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(logits.log_softmax(0))
        value.backward()
        return value

    for _ in range(4):
        optimizer.step(closure)
    return logits.detach().softmax(0)


def of_pairs(
    weights: Tensor, m: Tensor, *, reward: Tensor = REWARD, preference: Tensor | None = None, **settings: Any
) -> Any:
    """Expected loss over pairs, whose weights are `[3, 3]`."""
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j and weights[i, j] > 0]

    def loss(logp: Tensor) -> Tensor:
        total = logp.new_zeros(())
        for i, j in pairs:
            two = torch.tensor([i, j])
            judged = None if preference is None else preference[i, j].unsqueeze(0)
            group = Group(
                logp[two], m.log()[two], REF.log()[two], m.log()[two], reward[two], torch.ones(2), preference=judged
            )
            total = total + weights[i, j] * sequence_loss(group, Loss(**settings))
        return total

    return loss


def near(found: Tensor, wanted: tuple[float, ...] | Tensor, by: float = CLOSE) -> bool:
    return torch.allclose(found, torch.as_tensor(wanted, dtype=torch.float64), atol=by, rtol=0)


UNIFORM = torch.ones(3, 3, dtype=torch.float64)
SOFTMAX = {1.0: (0.433268, 0.095634, 0.471098), 0.5: (0.247720, 0.020115, 0.732165)}


@pytest.mark.parametrize("beta", SOFTMAX)
def test_optima_of_a_reward(beta: float) -> None:
    """DPO on Bradley-Terry labels, CoPG from any behaviour, BRAIn and f-DPG lead to `ref exp(r / beta)`."""
    off = BEHAVED.unsqueeze(1) * BEHAVED
    assert near(exact_step(REF, REWARD, beta), SOFTMAX[beta])
    assert near(least(of_pairs(UNIFORM, REF, beta=beta, target="soft")), SOFTMAX[beta])
    copg: dict[str, Any] = {"beta": beta, "target": "reward", "link": "square", "scale": "linear"}
    assert near(least(of_pairs(off, REF, **copg)), SOFTMAX[beta])

    def brain(logp: Tensor) -> Tensor:
        group = Group(logp, REF.log(), REF.log(), BEHAVED.log(), REWARD, torch.ones(3))
        return sequence_loss(group, Loss(beta=beta, link="softmax"))

    assert near(least(brain), SOFTMAX[beta])
    for divergence in ("forward", "reverse", "js", "chi2"):
        # At the optimum every f-divergence has no gradient in logits, whatever the proposal.
        logits = t(*SOFTMAX[beta]).log().requires_grad_()
        total = logits.new_zeros(())
        logp, log_z = logits.log_softmax(0), float((REF.log() + REWARD / beta).logsumexp(0))
        for i in range(3):
            one = torch.tensor([i])
            group = Group(logp[one], REF.log()[one], REF.log()[one], BEHAVED.log()[one], REWARD[one], torch.ones(1))
            part = LINKS["weighted"](group, group.reward, beta, beta, divergence=divergence, log_z=log_z)
            total = total + BEHAVED[i] * part
        (slope,) = torch.autograd.grad(total, logits)
        assert slope.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("f", "alpha", "wanted"),
    [
        ("reverse_kl", 0.5, (0.433268, 0.095634, 0.471098)),
        ("forward_kl", 0.5, (0.360021, 0.125586, 0.514393)),
        ("js_divergence", 0.5, (0.205349, 0.035984, 0.758666)),
        ("alpha_divergence", 0.3, (0.405285, 0.106327, 0.488387)),
        ("alpha_divergence", 0.5, (0.389176, 0.112434, 0.498391)),
    ],
)
def test_optima_of_divergences(f: str, alpha: float, wanted: tuple[float, ...]) -> None:
    assert near(least(of_pairs(UNIFORM, REF, beta=1.0, target="soft", f=f, f_alpha=alpha)), wanted)


def test_optima_of_other_losses() -> None:
    labels = (REWARD.unsqueeze(1) - REWARD).sigmoid()
    ipo: dict[str, Any] = {"target": "half", "link": "square"}
    for beta, wanted in ((0.5, (0.499877, 0.199464, 0.300659)), (1.0, (0.505102, 0.247147, 0.247751))):
        assert near(least(of_pairs(UNIFORM, REF, beta=beta, preference=labels, **ipo)), wanted)
    prev = t(0.4, 0.35, 0.25)
    for eta, wanted in ((1.0, (0.331036, 0.106559, 0.562405)), (0.5, (0.390447, 0.207216, 0.402337))):
        refuel: dict[str, Any] = {"beta": 0.0, "prox": 1 / eta, "target": "reward", "link": "square"}
        assert near(least(of_pairs(BEHAVED.unsqueeze(1) * BEHAVED, prev, **refuel)), wanted)
        assert near(exact_step(prev, REWARD, 1 / eta), wanted)
    one = torch.ones(3, dtype=torch.float64)
    for beta, loser, wanted in (
        (1.0, 1.0, (0.244728, 0.090031, 0.665241)),
        (0.5, 1.0, (0.117310, 0.015876, 0.866813)),
        (1.0, 0.5, (0.313013, 0.068866, 0.618121)),
    ):
        weights = labels  # of every pair the winner first, as often as it wins
        assert near(least(of_pairs(weights, one, beta=beta, loser=loser)), wanted)


def test_the_optimum_of_step_advantages() -> None:
    """With the soft value it is the softmax; the mean value leaves a target that is no law."""
    for beta, biased in ((1.0, (0.468882, 0.114110, 0.417008)), (0.5, (0.418014, 0.046242, 0.535745))):
        for value, wanted in (
            (soft_value(REWARD, beta, REF.log()), SOFTMAX[beta]),
            (float((REF * REWARD).sum()), biased),
        ):

            def loss(logp: Tensor, value: Any = value, beta: float = beta) -> Tensor:
                parts = []
                for i in range(3):
                    one = torch.tensor([i])
                    worth = REWARD[one] - value
                    group = Group(logp[one], REF.log()[one], REF.log()[one], REF.log()[one], worth, torch.ones(1))
                    parts.append(REF[i] * sequence_loss(group, Loss(beta=beta, target="advantage", link="single")))
                return torch.stack(parts).sum()

            assert near(least(loss), wanted)


def two(ref: float) -> Tensor:
    return t(ref, 1 - ref)


def of_two(ref: Tensor, p: float, **settings: Any) -> Tensor:
    """The optimum of two actions, the first preferred with probability p."""

    def loss(logp: Tensor) -> Tensor:
        total = logp.new_zeros(())
        for share, order in ((p, (0, 1)), (1 - p, (1, 0))):
            anchor = order.index(0) if settings.get("anchor") == "greedy" else 0
            pick = torch.tensor(order)
            group = Group(
                logp[pick], ref.log()[pick], ref.log()[pick], ref.log()[pick], t(0, 0), torch.ones(2), anchor=anchor
            )
            total = total + share * sequence_loss(group, Loss(beta=1.0, **settings))
        return total

    return least(loss, ref)


def test_optima_of_anchors() -> None:
    for eta, wanted in ((0.0, 0.368421), (0.005, 0.370253), (0.2, 0.433030), (1.0, 0.562687), (100.0, 0.697976)):
        found = of_two(two(0.2), 0.7, anchor="chosen", anchor_weight=-eta)
        assert float(found[0]) == pytest.approx(wanted, abs=CLOSE)
    for alpha, wanted in ((0.1, 0.666667), (0.2, 0.625), (0.3, 0.571429)):
        found = of_two(two(0.5), 0.7, anchor="greedy", anchor_weight=alpha)
        assert float(found[0]) == pytest.approx(wanted, abs=CLOSE)


# ---------------------------------------------------------------------------------------------------------------- games


def beats(pi: Tensor) -> Tensor:
    """P(y > pi) of each action."""
    return CYCLE @ pi


def nash(tau: float) -> Tensor:
    """The regularised Nash policy, by damped iteration."""
    pi = REF.clone()
    for _ in range(5000):
        pi = 0.8 * pi + 0.2 * exact_step(REF, beats(pi), tau)
    return pi


def test_the_regularised_nash_policy() -> None:
    wanted = {
        1.0: (0.497328, 0.289690, 0.212982),
        0.5: (0.489837, 0.283246, 0.226918),
        0.2: (0.454442, 0.284732, 0.260826),
    }
    for tau, law in wanted.items():
        assert near(nash(tau), law)


@pytest.mark.parametrize(
    ("eta", "iterates"),
    [
        (1.0, [(0.499698, 0.288063, 0.212239), (0.496897, 0.283539, 0.219564), (0.494223, 0.282226, 0.223551)]),
        (0.5, [(0.498786, 0.276262, 0.224952), (0.489025, 0.281888, 0.229087), (0.489113, 0.283811, 0.227076)]),
    ],
)
def test_inpo_goes_to_nash(eta: float, iterates: list[tuple[float, ...]]) -> None:
    pi, tau = REF, 0.5
    for wanted in iterates:
        m = rounds.mixed(REF.log(), pi.log(), tau, eta - tau).softmax(0)
        loss = of_pairs(
            pi.unsqueeze(1) * pi, m, preference=CYCLE, target="half", link="square", beta=tau, prox=eta - tau
        )
        pi = least(loss, pi)
        assert near(pi, wanted)
    for _ in range(60):
        pi = exact_step(rounds.mixed(REF.log(), pi.log(), tau, eta - tau).softmax(0), beats(pi), eta)
    assert near(pi, nash(tau))


def test_dno_takes_the_step_of_its_mirror() -> None:
    loss = of_pairs(REF.unsqueeze(1) * REF, REF, reward=beats(REF), target="soft", beta=0.0, prox=1.0)
    assert near(least(loss), (0.499698, 0.288063, 0.212239))


def test_nash_mirror_prox_goes_to_nash() -> None:
    """Two regressions a step, both from the last policy: the opponents of the second are those of the first."""
    pi, tau, prox = REF, 0.5, 0.5
    iterates = [(0.497276, 0.289487, 0.213237), (0.494517, 0.285293, 0.220190), (0.492563, 0.283738, 0.223699)]
    for wanted in iterates:
        m = rounds.mixed(REF.log(), pi.log(), tau, prox).softmax(0)
        faced = pi
        for _ in range(2):
            loss = of_pairs(
                pi.unsqueeze(1) * pi, m, reward=beats(faced), target="reward", link="square", beta=tau, prox=prox
            )
            faced = least(loss, pi)
        pi = faced
        assert near(pi, wanted)


@pytest.mark.parametrize(
    ("eta", "limit"), [(1.0, (0.494072, 0.279395, 0.226532)), (0.5, (0.491869, 0.281259, 0.226872))]
)
def test_nash_md_stays_beside_nash(eta: float, limit: tuple[float, ...]) -> None:
    """Its gradient, the leave-one-out one with KL in the reward, vanishes at a biased point; not at Nash."""

    def slope(pi: Tensor, opponents: Tensor) -> Tensor:
        logits = pi.log().requires_grad_()
        worth = beats(opponents) - 0.5 - 0.5 * (pi / REF).log()
        x = Tokens(*(y.unsqueeze(1) for y in (logits.log_softmax(0), pi.log(), REF.log(), worth)), torch.ones(3, 1) > 0)
        return torch.autograd.grad((pi * tokens.plain(x).squeeze(1)).sum(), logits)[0]

    def mixture(pi: Tensor) -> Tensor:
        return ((1 - eta * 0.5) * pi.log() + eta * 0.5 * REF.log()).softmax(0)

    # The estimator's own point: opponents from the mixture, KL to the base.
    pi = t(*limit)
    assert slope(pi, mixture(pi)).abs().max() < 1e-5
    assert slope(nash(0.5), mixture(nash(0.5))).abs().max() > 1e-4


# -------------------------------------------------------------------------------------------------------------- bandits


@pytest.mark.parametrize(
    ("beta", "iterates"),
    [
        (2.0, [(0.398165, 0.344821, 0.257014), (0.503516, 0.331332, 0.165152)]),
        (1.0, [(0.6, 0.3, 0.1)]),
        (0.75, [(0.707083, 0.245132, 0.047785), (0.558630, 0.315579, 0.125791)]),
        (0.5, [(0.849057, 0.141509, 0.009434), (0.2, 0.3, 0.5)]),
        (0.4, [(0.909840, 0.087549, 0.002610), (0.012388, 0.073367, 0.914245)]),
    ],
)
def test_spin_multiplies_its_error(beta: float, iterates: list[tuple[float, ...]]) -> None:
    data, pi = t(0.6, 0.3, 0.1), t(0.2, 0.3, 0.5)
    for wanted in iterates:
        found = least(of_pairs(data.unsqueeze(1) * pi, pi, beta=0.0, prox=beta), pi)
        # Pairs of equal actions are constant, and left out.
        assert near(found, wanted, 2e-5)
        pi = exact_step(pi, (data / pi).log(), beta)
        assert near(pi, wanted)


def test_momentum_runs_ahead() -> None:
    """Accelerated preference optimisation against the plain iteration, on Bradley-Terry labels."""
    before = {"x": REF.log()}
    now, laws = {"x": REF.log()}, []
    for _ in range(4):
        start = now["x"].softmax(0)
        labels = (REWARD.unsqueeze(1) - REWARD).sigmoid()
        hat = least(of_pairs(UNIFORM, start, target="soft", preference=labels, beta=0.0, prox=1.0), start)
        moved = {"x": hat.log()}
        now, before = rounds.extrapolated(moved, before, 0.3), moved
        laws.append(now["x"].softmax(0))
    wanted = {0: (0.380049, 0.062145, 0.557805), 1: (0.144229, 0.005874, 0.849896), 3: (0.009797, 0.000023, 0.990180)}
    for number, law in wanted.items():
        assert near(laws[number], law, 1e-4)


def test_mirror_descent_takes_exact_steps() -> None:
    wanted = [(0.433268, 0.095634, 0.471098), (0.293590, 0.030611, 0.675799), (0.205832, 0.013017, 0.781151)]
    pi = REF
    for k, law in enumerate(wanted):
        step, start = 1 - k / 4, pi

        def loss(logp: Tensor, start: Tensor = start, step: float = step) -> Tensor:
            x = Tokens(*(y.unsqueeze(1) for y in (logp, start.log(), start.log(), REWARD)), torch.ones(3, 1) > 0)
            return (start * tokens.mirror(x, step=step).squeeze(1)).sum()

        pi = least(loss, pi)
        assert near(pi, law, 1e-5)


def test_negative_awareness_and_labelled_controls() -> None:
    right = t(1, 0, 1)
    good = REF * right / (REF * right).sum()
    logits = good.clamp_min(1e-9).log().requires_grad_()

    def slope(law: Tensor) -> Tensor:
        logits = law.log().requires_grad_()
        x = Tokens(
            *(y.unsqueeze(1) for y in (logits.log_softmax(0), REF.log(), REF.log(), right - 0.7)),
            torch.ones(3, 1) > 0,
            accuracy=torch.full((3, 1), 0.7, dtype=torch.float64),
        )
        return torch.autograd.grad((REF * tokens.nft(x, prompt_weight="one").squeeze(1)).sum(), logits)[0]

    assert logits is not None and near(good, (0.714286, 0, 0.285714))
    assert slope(good.clamp_min(1e-9)).abs().max() < 1e-6 < slope(REF).abs().max()
    for sign, wanted in ((1, (0.528459, 0.216861, 0.254680)), (-1, (0.436152, 0.486521, 0.077326))):
        weights = (sign * REWARD).sigmoid()

        def loss(logp: Tensor, weights: Tensor = weights) -> Tensor:
            x = Tokens(*(y.unsqueeze(1) for y in (logp, REF.log(), REF.log(), weights)), torch.ones(3, 1) > 0)
            return (REF * tokens.nll(x).squeeze(1)).sum()

        assert near(least(loss), wanted)


def test_divergences_cover_or_seek() -> None:
    """Likelihood of on-policy and off-policy data: forward KL covers both modes, reverse KL takes one."""
    target = t(0.45, 0.04, 0.02, 0.04, 0.45)
    places = torch.arange(5, dtype=torch.float64)
    grid = torch.linspace(-1, 5, 60_001, dtype=torch.float64)
    log_q = (-((places - grid.unsqueeze(1)) ** 2) / 0.98).log_softmax(1)
    forward = (target * (target.log() - log_q)).sum(1)
    reverse = (log_q.exp() * (log_q - target.log())).sum(1)
    assert float(grid[forward.argmin()]) == pytest.approx(2.0, abs=2e-4)
    assert float(forward.min()) == pytest.approx(3.262967, abs=1e-5)
    assert min(abs(float(grid[reverse.argmin()]) - x) for x in (4.6388, -0.6388)) < 2e-4
    assert float(reverse.min()) == pytest.approx(0.708503, abs=1e-5)
    assert math.isfinite(float(reverse.max()))
