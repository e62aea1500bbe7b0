"""FK steering, SVDD, gradient guidance and RL guidance against enumeration and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from steer.core import Context, Reward, Samples, UnsupportedError
from steer.methods.best_of_n import Ancestral
from steer.methods.fk import FKSteering
from steer.methods.gradient import GradientGuidance
from steer.methods.rlg import RLGuidance
from steer.methods.svdd import SVDD
from steer.rewards import lift
from steer.sampling import weights
from steer.sampling.lookahead import Preview, Rollouts, StateValue
from steer.toy import GaussianProcess, TabularProcess, markov_lm
from steer.toy.tabular import TabularState

LOG_Z = 1.37488079884  # of the toy with r = number of 2s, beta = 1


def twos(x: Tensor) -> Tensor:
    return (x == 2).sum(-1).double()


TWOS = lift(lambda outputs: twos(outputs))
SOFT = markov_lm().soft_values(twos, 1.0)


def plug_in(context: Context) -> Tensor:
    """Twos so far plus a quarter for each token to come."""
    return twos(context.prefix) + 0.25 * (3 - context.step)


def soft(context: Context) -> Tensor:
    """The exact soft value."""
    at = torch.zeros(len(context.prefix), dtype=torch.long)
    for t in range(context.step):
        at = at * 3 + context.prefix[:, t]
    return SOFT[context.step].flatten()[at]


# -------------------------------------------------------------------------------------------- all paths of a sampler


@dataclass(frozen=True)
class Scripted(TabularProcess):
    """The chain with its tokens dictated: `script` `[T, N]`."""

    script: Tensor | None = None

    def propose(self, state: TabularState, generator: torch.Generator) -> TabularState:
        _, base = self.step_laws(state.x)
        assert self.script is not None
        token = self.script[state.step].unsqueeze(1)
        taken = base.gather(1, token).squeeze(1)
        return replace(
            state,
            x=torch.cat([state.x, token], 1),
            step=state.step + 1,
            log_prob=state.log_prob + taken,
            base_log_prob=state.base_log_prob + taken,
            aim_log_prob=state.aim_log_prob + taken,
        )


class Paths:
    """Every path that a run of a sampler with `size` rows can take on the toy, run at once: as many prompts as there
    are paths, each with its tokens and choices dictated, and the probability of each path `[M]`.
    """

    def __init__(self, size: int, choices: list[int], per_choice: int) -> None:
        """`choices` is how many options each draw by weight has; `per_choice` how many rows it draws."""
        tokens = list(product(range(3), repeat=size))
        picks = [list(product(range(c), repeat=per_choice)) for c in choices]
        whole = list(product(*[tokens] * 3, *picks))
        self.count, self.size = len(whole), size
        script = torch.tensor([[list(step) for step in path[:3]] for path in whole])  # [M, T, size]
        self.picks = [torch.tensor([path[3 + i] for path in whole]) for i in range(len(choices))]
        base = markov_lm()
        self.process = Scripted(base.initial, base.transition, 3, script=script.permute(1, 0, 2).reshape(3, -1))
        self.log_prob = torch.zeros(self.count, dtype=torch.float64)
        self.calls = 0

    def resampler(self, w: Tensor, generator: torch.Generator, count: int) -> Tensor:
        picks = self.picks[self.calls].reshape(w.shape[0], count)
        self.calls += 1
        self.log_prob = self.log_prob + w.log().gather(1, picks).sum(1)
        return picks


@pytest.fixture
def enumerated(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[Any, int, list[int], int], tuple[Samples, Tensor]]]:
    def run(sampler: Any, size: int, choices: list[int], per_choice: int) -> tuple[Samples, Tensor]:
        paths = Paths(size, choices, per_choice)
        for name in ("multinomial",):
            monkeypatch.setitem(weights.RESAMPLERS, name, paths.resampler)
        tokens = paths.process.script
        step_law: list[Tensor] = []

        class Watched(Scripted):
            """Adds up the probability of every token that was drawn, by path."""

            def propose(self, state: TabularState, generator: torch.Generator) -> TabularState:
                after = super().propose(state, generator)
                gained = (after.log_prob - state.log_prob).reshape(paths.count, -1).sum(1)
                step_law.append(gained)
                return after

        process = Watched(paths.process.initial, paths.process.transition, 3, script=tokens)
        generator = torch.Generator().manual_seed(0)
        samples = sampler.run(process, [""] * paths.count, generator=generator, reward=TWOS, beta=1.0)
        probability = (sum(step_law) + paths.log_prob).exp()
        assert abs(float(probability.sum()) - 1) < 1e-9  # these are all paths
        return samples, probability

    yield run


FK_TABLE = {  # E[r] of one output at K = 2 by enumeration, for the plug-in and the exact soft value
    "difference": (1.24807601, 1.28000761),
    "max": (1.25384756, 1.27134479),
    "sum": (1.28865212, 1.32802308),
}


@pytest.mark.parametrize("value", ["plug-in", "soft"])
@pytest.mark.parametrize("potential", list(FK_TABLE))
def test_fk_law_at_two_particles_is_the_enumerated_one(enumerated: Any, potential: str, value: str) -> None:
    sampler = FKSteering(
        num_particles=2,
        potential=potential,
        ess_threshold=None,
        resampler="multinomial",
        floor=0.0,
        lookahead=StateValue(plug_in if value == "plug-in" else soft),
    )
    samples, probability = enumerated(sampler, 2, [2, 2], 2)
    mean = float((probability * samples.mean_reward()).sum())
    assert abs(mean - FK_TABLE[potential][value == "soft"]) < 1e-8
    # E[Z-hat] = Z, and the particles weighted by Z-hat have exactly the target's law.
    z = samples.log_z.exp()
    assert abs(float((probability * z).sum()) - math.exp(LOG_Z)) < 1e-9
    within = torch.softmax(samples.log_weight.reshape(-1, 2), 1)
    mass = ((probability * z).unsqueeze(1) * within).flatten()
    index = samples.outputs @ torch.tensor([9, 3, 1])
    law = torch.zeros(27, dtype=torch.float64).index_add(0, index, mass) / math.exp(LOG_Z)
    target, _ = markov_lm().target(twos, 1.0)
    assert float((law - target.exp()).abs().max()) < 1e-11


@pytest.mark.parametrize("potential", list(FK_TABLE))
def test_fk_with_one_particle_is_the_base_with_an_unbiased_z(enumerated: Any, potential: str) -> None:
    sampler = FKSteering(num_particles=1, potential=potential, ess_threshold=None, resampler="multinomial")
    samples, probability = enumerated(sampler, 1, [1, 1], 1)
    assert abs(float((probability * samples.mean_reward()).sum()) - 0.890625) < 1e-12
    assert abs(float((probability * samples.log_z.exp()).sum()) - math.exp(LOG_Z)) < 1e-9


def test_importance_sampling(enumerated: Any) -> None:
    # Weighed at the end alone, K = 2 draws are independent: E of their self-normalised mean, from the law of r.
    samples, probability = enumerated(FKSteering(num_particles=2, start=3), 2, [], 2)
    pmf = {0: 0.421875, 1: 0.328125, 2: 0.1875, 3: 0.0625}
    mean = sum(
        pmf[a] * pmf[b] * (a * math.exp(a) + b * math.exp(b)) / (math.exp(a) + math.exp(b)) for a in pmf for b in pmf
    )
    assert abs(float((probability * samples.mean_reward()).sum()) - mean) < 1e-12
    # With needless resampling of equal weights on the way, pairs have coalesced by then.
    flat = StateValue(lambda context: torch.zeros(len(context.prefix)))
    sampler = FKSteering(num_particles=2, ess_threshold=None, resampler="multinomial", lookahead=flat)
    samples, probability = enumerated(sampler, 2, [2, 2], 2)
    assert abs(float((probability * samples.mean_reward()).sum()) - 1.07313692) < 1e-8


SVDD_TABLE = {("soft", 2): 1.280132, ("soft", 1): 0.890625, ("argmax", 2): 1.628662}


@pytest.mark.parametrize(("choose", "m"), list(SVDD_TABLE))
def test_svdd_law_is_the_enumerated_one(enumerated: Any, choose: str, m: int) -> None:
    sampler = SVDD(num_candidates=m, choose=choose, lookahead=StateValue(soft))
    if choose == "argmax" or m == 1:
        samples, probability = enumerated(sampler, m, [], 1)
    else:
        samples, probability = enumerated(sampler, m, [m] * 3, 1)
    assert abs(float((probability * samples.reward).sum()) - SVDD_TABLE[choose, m]) < 1e-6


# ----------------------------------------------------------------------------------------------------- Monte Carlo


def close(values: Tensor, truth: float) -> bool:
    """Within five standard errors of independent `values`."""
    return abs(float(values.mean()) - truth) < 5 * float(values.std()) / len(values) ** 0.5


def fk_runs(sampler: FKSteering, runs: int, process: Any = None, seed: int = 0, reward: Any = TWOS) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    return sampler.run(process or markov_lm(), [""] * runs, generator=generator, reward=reward)


CONVERGENCE = {
    ("multinomial", 4): 1.5375,
    ("multinomial", 16): 1.7966,
    ("systematic", 4): 1.5595,
    ("systematic", 16): 1.8041,
}


@pytest.mark.parametrize(("resampler", "k"), list(CONVERGENCE))
def test_fk_converges_as_tabulated(resampler: str, k: int) -> None:
    sampler = FKSteering(num_particles=k, ess_threshold=None, resampler=resampler, lookahead=StateValue(plug_in))
    means = fk_runs(sampler, 4000).mean_reward()
    assert abs(float(means.mean()) - CONVERGENCE[resampler, k]) < 5 * float(means.std()) / len(means) ** 0.5 + 5e-5


@pytest.mark.parametrize("ess", [None, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("potential", list(FK_TABLE))
def test_z_is_unbiased_under_adaptive_resampling(potential: str, ess: float | None) -> None:
    sampler = FKSteering(num_particles=4, potential=potential, ess_threshold=ess, lookahead=StateValue(plug_in))
    assert close(fk_runs(sampler, 6000).log_z.exp(), math.exp(LOG_Z))


def test_no_weight_is_lost_when_nothing_is_resampled() -> None:
    sampler = FKSteering(num_particles=8, ess_threshold=1e-9)
    samples = fk_runs(sampler, 3)
    assert torch.allclose(samples.log_weight, samples.reward)


def test_the_running_terminal_has_the_released_codes_limit() -> None:
    for potential, limit in (("max", 1.724743), ("sum", 2.516473)):
        sampler = FKSteering(
            num_particles=4000, potential=potential, terminal="running", floor=0.0, lookahead=StateValue(plug_in)
        )
        means = fk_runs(sampler, 20).mean_reward()
        assert abs(float(means.mean()) - limit) < 5 * float(means.std()) / 20**0.5 + 2e-3


def test_negative_rewards_steer_where_the_released_floor_does_not() -> None:
    less = TWOS - 4
    generator = torch.Generator().manual_seed(0)
    stuck = FKSteering(num_particles=4000, potential="max", terminal="running", floor=0.0)
    samples = stuck.run(markov_lm(), [""], generator=generator, reward=less)
    assert abs(float(samples.mean_reward()[0]) + 3.109375) < 0.1
    right = replace(stuck, terminal="exact", floor=None).run(markov_lm(), [""], generator=generator, reward=less)
    assert abs(float(right.mean_reward()[0]) - (1.878537 - 4)) < 0.1


def test_a_guided_proposal_is_corrected() -> None:
    """VAS-like guidance of any strength inside FK keeps the law of p exp(r)."""

    @dataclass(frozen=True)
    class Pull(RLGuidance.__mro__[1]):  # a TransitionEdit
        by: float = 0.0

        def shift(self, x: Tensor, context: Context) -> Tensor:
            return x + self.by * torch.tensor([0.0, 0.0, 1.0], dtype=x.dtype)

    for by in (-1.0, 0.7, 2.0):
        sampler = FKSteering(num_particles=4, lookahead=StateValue(plug_in))
        samples = fk_runs(sampler, 6000, markov_lm().edited(Pull(by)))
        assert close(samples.log_z.exp(), math.exp(LOG_Z))
    # Off, the edited law is the base.
    process = markov_lm().edited(Pull(1.0))
    sampler = FKSteering(num_particles=4, lookahead=StateValue(plug_in), correct=False)
    _, log_z = process.target(twos, 1.0)
    assert close(fk_runs(sampler, 6000, process).log_z.exp(), math.exp(log_z))


def test_rollouts_are_a_lookahead() -> None:
    for combine in ("soft", "mean"):
        sampler = FKSteering(num_particles=4, lookahead=Rollouts(3, combine))
        samples = fk_runs(sampler, 3000)
        assert close(samples.log_z.exp(), math.exp(LOG_Z))
        assert samples.cost.reward_calls > 3000 * 4


def test_tempering_still_telescopes() -> None:
    sampler = FKSteering(num_particles=4, lookahead=StateValue(plug_in), tempering=0.4)
    assert close(fk_runs(sampler, 6000).log_z.exp(), math.exp(LOG_Z))


def test_one_population_and_populations_for_each_output() -> None:
    whole = FKSteering(num_particles=4, n=6, lookahead=StateValue(plug_in))
    samples = fk_runs(whole, 2)
    assert len(samples) == 12 and len(samples.pool) == 48 and samples.group.tolist() == [0] * 6 + [1] * 6
    assert torch.equal(samples.outputs, samples.pool.outputs[samples.lineage])
    apart = replace(whole, per_output=True)
    separate = fk_runs(apart, 2)
    assert len(separate) == 12 and len(separate.pool) == 48
    assert [int(i) // 4 for i in separate.lineage] == list(range(12))
    # One population of 24 is closer to the target than six of 4.
    far, near = (float(fk_runs(s, 400).reward.mean()) for s in (apart, whole))
    assert abs(near - 1.878537) < abs(far - 1.878537)
    best = fk_runs(replace(whole, select="best"), 2)
    for b in range(2):
        top = best.pool.reward[best.pool.group == b].sort(descending=True).values[:6]
        assert torch.equal(best.reward[best.group == b], top)


# -------------------------------------------------------------------------------------------------------- gaussian

PULL = lift(lambda outputs: -0.5 * (outputs[:, 0] - 2) ** 2)


class Quadratic(Reward):
    """-(x - 2)^2 / 2, differentiable."""

    def score(self, samples: Samples) -> Tensor:
        return -0.5 * (samples.outputs[:, 0] - 2) ** 2


def moments(samples: Samples) -> tuple[Tensor, Tensor]:
    """Weighted mean and variance of each population."""
    w = torch.softmax(samples.log_weight.reshape(len(samples.prompts), -1), 1)
    x = samples.outputs[:, 0].reshape(w.shape)
    mean = (w * x).sum(1)
    return mean, (w * (x - mean.unsqueeze(1)) ** 2).sum(1)


def exact_value(process: GaussianProcess, beta: float = 1.0) -> Callable[[Context], Tensor]:
    table = process.soft_values(1.0, 2.0, beta)

    def value(context: Context) -> Tensor:
        a, b, c = table[context.step]
        x = context.prefix[:, 0]
        return beta * (-0.5 * a * x * x + b * x + c)

    return value


@pytest.mark.parametrize("lookahead", ["tweedie", "exact"])
@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_fk_tilts_the_discretised_chain(potential: str, lookahead: str) -> None:
    """The tilt of N(0, .907695), the chain's own law: mean .951614, variance .475807, log Z -1.37133349."""
    process = GaussianProcess(steps=50)
    look = Preview() if lookahead == "tweedie" else StateValue(exact_value(process))
    every = 1 if potential == "difference" else 10
    sampler = FKSteering(num_particles=1000, potential=potential, lookahead=look, every=every)
    samples = sampler.run(process, [""] * 30, generator=torch.Generator().manual_seed(0), reward=Quadratic())
    mean, variance = moments(samples)
    # O(1 / K) bias: below a fifth of the standard error here for weights this even.
    slack = 0.02 if potential == "sum" else 5e-3
    for found, truth in ((mean, 0.951614), (variance, 0.475807), (samples.log_z, -1.37133349)):
        assert abs(float(found.mean()) - truth) < 5 * float(found.std()) / 30**0.5 + slack


def test_gradient_guidance_overshoots_and_weights_remove_it() -> None:
    for steps, mean_, variance_ in ((100, 1.19882, 0.43184), (50, 1.15472, 0.43144)):
        process = GaussianProcess(steps=steps).edited(GradientGuidance(Quadratic()))
        samples = Ancestral(20000).run(process, [""], generator=torch.Generator().manual_seed(1))
        x = samples.outputs[:, 0]
        assert abs(float(x.mean()) - mean_) < 5 * float(x.std()) / len(x) ** 0.5
        assert abs(float(x.var()) - variance_) < 5 * variance_ * (2 / len(x)) ** 0.5
        assert bool(torch.isfinite(samples.kl).all())  # the last, deterministic step is not moved
    process = GaussianProcess(steps=50).edited(GradientGuidance(Quadratic(), tempering=0.2))
    for tempering in (None, 0.2):  # TDS, DAS
        samples = FKSteering(num_particles=500, tempering=tempering).run(
            process, [""] * 30, generator=torch.Generator().manual_seed(2), reward=Quadratic()
        )
        mean, variance = moments(samples)
        for found, truth in ((mean, 0.951614), (variance, 0.475807), (samples.log_z, -1.37133349)):
            assert abs(float(found.mean()) - truth) < 5 * float(found.std()) / 30**0.5 + 5e-3


def test_selecting_a_mode_of_a_mixture() -> None:
    """r = log P(component 2 | x): the tilted data law is N(3, 1) with Z = .2; the chain's own is read off a large
    pool.
    """
    process = GaussianProcess((0.5, 0.3, 0.2), (-2.0, 0.0, 3.0), (0.25, 0.5, 1.0), steps=50)
    w, m, v = (torch.tensor(t, dtype=torch.float64) for t in (process.weights, process.means, process.variances))

    def classifier(outputs: Tensor) -> Tensor:
        joint = w.log() - 0.5 * v.log() - 0.5 * (outputs - m) ** 2 / v
        return torch.log_softmax(joint, 1)[:, 2]

    generator = torch.Generator().manual_seed(0)
    reward = lift(classifier)
    pool = Ancestral(20000).run(process, [""], generator=generator, reward=reward)
    truth = torch.softmax(pool.reward, 0) @ pool.outputs[:, 0]
    samples = FKSteering(num_particles=1000, every=5, start=10).run(
        process, [""] * 20, generator=generator, reward=reward
    )
    mean, _ = moments(samples)
    assert abs(float(mean.mean() - truth)) < 5 * float(mean.std()) / 20**0.5 + 0.03
    assert close(samples.log_z.exp(), float(pool.reward.exp().mean()))


# ------------------------------------------------------------------------------------------------------------- RLG

RLG_TABLE = [  # tuned mean and std, w, mean and std of 20 Euler steps on the flow path
    (1.0, 1.0, 0.5, 0.5, 0.937699), (1.0, 1.0, 1.6, 1.6, 0.937699), (1.0, 1.0, 3.0, 3.0, 0.937699),
    (1.0, 0.5, 0.5, 0.609986, 0.662782), (1.0, 0.5, 1.0, 1.0, 0.464248), (1.0, 0.5, 2.0, 1.380220, 0.221179),
    (0.0, 2.0, 2.0, 0.0, 3.559978), (1.0, 2.0, 1.2, 1.323309, 2.120395),
]  # fmt: skip


def flow(mean: float, std: float, steps: int, eta: float = 0.0) -> GaussianProcess:
    return GaussianProcess(means=(mean,), variances=(std**2,), steps=steps, eta=eta, path="flow")


def affine(process: GaussianProcess) -> tuple[float, float]:
    """Mean and std of a deterministic chain's output from N(0, 1), from two points."""
    ends = []
    for x in (0.0, 1.0):
        state = process.init([""], 1, torch.Generator())
        state = replace(state, x=torch.full_like(state.x, x))
        while not process.done(state):
            state = process.propose(state, torch.Generator())
        ends.append(float(state.x))
    return ends[0], ends[1] - ends[0]


@pytest.mark.parametrize(("mean", "std", "w", "mean_", "std_"), RLG_TABLE)
def test_plain_rlg_table(mean: float, std: float, w: float, mean_: float, std_: float) -> None:
    found = affine(flow(0, 1, 20).edited(RLGuidance(flow(mean, std, 20), w)))
    assert abs(found[0] - mean_) < 1e-6 and abs(found[1] - std_) < 1e-6


def test_plain_rlg_overshoots_and_corrected_rlg_does_not() -> None:
    """Tuned = N(1, .5), the exact optimum of r = -(x - 2)^2 / 2; w = 4 should give N(1.6, .2)."""
    for w, mean, variance in ((0.5, 0.557435, 0.707107), (2.0, 1.623225, 0.25), (4.0, 2.217419, 0.0625)):
        found = affine(flow(0, 1, 1000).edited(RLGuidance(flow(1, 0.5**0.5, 1000), w)))
        assert abs(found[0] - mean) < 4e-3 and abs(found[1] ** 2 - variance) < 4e-3
    # Corrected on a stochastic chain of 100 steps, whose own law is close to N(0, 1): the tilt of that law by 4 r.
    base, tuned = flow(0, 1, 100, eta=1.0), flow(1, 0.5**0.5, 100, eta=1.0)
    _, spread = base.chain_moments()
    precision = 1 / spread + 4
    for w in (1.0, 4.0):
        process = base.edited(RLGuidance(tuned, w))
        samples = FKSteering(num_particles=400).run(
            process, [""] * 12, generator=torch.Generator().manual_seed(3), reward=Quadratic(), beta=0.25
        )
        mean, variance = moments(samples)
        assert abs(float(mean.mean()) - 8 / precision) < 5 * float(mean.std()) / 12**0.5 + 5e-3
        assert abs(float(variance.mean()) - 1 / precision) < 5 * float(variance.std()) / 12**0.5 + 5e-3
    assert abs(8 / precision - 1.6) < 0.02 and abs(1 / precision - 0.2) < 0.02


def test_rlg_is_bit_equal_to_base_and_tuned_at_0_and_1() -> None:
    base, tuned = GaussianProcess(steps=9), GaussianProcess(means=(1.0,), variances=(0.3,), steps=9)

    def draw(process: Any) -> Tensor:
        return Ancestral(50).run(process, [""], generator=torch.Generator().manual_seed(7)).outputs

    assert torch.equal(draw(base.edited(RLGuidance(tuned, 0.0))), draw(base))
    assert torch.equal(draw(base.edited(RLGuidance(tuned, 1))), draw(tuned))
    p, q = markov_lm(), replace(markov_lm(), transition=markov_lm().transition.roll(1, 0))
    assert torch.equal(draw(p.edited(RLGuidance(q, 0.0))), draw(p))
    assert torch.equal(draw(p.edited(RLGuidance(q, 1.0))), draw(q))


@dataclass(frozen=True)
class Optimal(TabularProcess):
    """The chain of p exp(r), from its soft values: a policy that was tuned to the optimum."""

    def view(self, prefix: Tensor, prompts: Any = None) -> Any:
        context = super().view(prefix)
        t = prefix.shape[1]
        at = (prefix * torch.tensor([3 ** (t - 1 - i) for i in range(t)], dtype=torch.long)).sum(1)
        values = SOFT[t + 1].reshape(-1, 3)[at]
        return replace(context, base=torch.log_softmax(context.base + values, -1))


def optimal() -> TabularProcess:
    return Optimal(markov_lm().initial, markov_lm().transition, 3)


def test_token_rlg_on_the_toy() -> None:
    base, tuned = markov_lm(), optimal()
    table = ((0.5, 1.369404, 0.00041), (1.0, 1.87853651, 0.0), (2.0, 2.595737, 0.017254), (3.0, 2.873329, 0.023633))
    for w, mean, distance in table:
        sequences, log_prob = base.edited(RLGuidance(tuned, w)).law()
        law = log_prob.exp()
        assert abs(float((law * twos(sequences)).sum()) - mean) < 1e-5
        exact = torch.softmax(base.law()[1] + w * twos(sequences), 0)
        assert abs(0.5 * float((law - exact).abs().sum()) - distance) < 1e-5


NOTHING = lift(lambda outputs: torch.zeros(len(outputs)))


@pytest.mark.parametrize("w", [0.5, 2.0, 3.0, -1.0])
def test_rlg_corrected_towards_the_product_needs_no_reward(w: float) -> None:
    """The policy is p exp(r) / Z, so p^(1 - w) p_tuned^w is p exp(w r) / Z^w."""
    process = markov_lm().edited(RLGuidance(optimal(), w, aim="product"))
    samples = fk_runs(FKSteering(num_particles=50), 400, process, reward=NOTHING)
    sequences, log_prob = markov_lm().law()
    exact = torch.softmax(log_prob + w * twos(sequences), 0)
    means = torch.zeros(400, dtype=torch.float64).index_add(0, samples.group, samples.weights * twos(samples.outputs))
    assert abs(float(means.mean()) - float(exact @ twos(sequences))) < 5 * float(means.std()) / 20 + 2e-3
    z = torch.logsumexp(log_prob + w * twos(sequences), 0) - w * LOG_Z
    assert close(samples.log_z.exp(), float(z.exp()))


def product_moments(base: GaussianProcess, tuned: GaussianProcess, w: float) -> tuple[float, float]:
    """Mean and variance of the output under `p^(1 - w) p_tuned^w` over paths, by a backward recursion of quadratics."""
    steps = [(a, b) for a, b in zip(base._affine(), tuned._affine(), strict=True)]
    value = [(0.0, 0.0)]  # log of what is to come: -A / 2 x^2 + B x
    laws = []
    for (g, c, q), (h, d, _) in reversed(steps):
        if q < 1e-12:  # held to the base
            slope, shift, (big, lin) = g, c, value[0]
            value.insert(0, (big * slope**2, (lin - big * shift) * slope))
            laws.insert(0, (slope, shift, 0.0))
            continue
        slope, shift = g + w * (h - g), c + w * (d - c)
        big, lin = value[0]
        den = 1 + big * q
        # x' given x is Gaussian with this mean and variance once what is to come is weighed in.
        laws.insert(0, (slope / den, (shift + q * lin) / den, q / den))
        extra = w * (w - 1) / q  # log of the step's normaliser: extra / 2 ((h - g) x + d - c)^2
        value.insert(
            0,
            (
                big * slope**2 / den - extra * (h - g) ** 2,
                (slope * lin - big * slope * shift) / den + extra * (h - g) * (d - c),
            ),
        )
    big, lin = value[0]
    variance = 1 / (1 + big)
    mean = variance * lin
    for slope, shift, spread in laws:
        mean, variance = slope * mean + shift, slope**2 * variance + spread
    return mean, variance


@pytest.mark.parametrize("w", [0.5, 2.0])
def test_rlg_corrected_towards_the_product_of_gaussian_chains(w: float) -> None:
    base, tuned = GaussianProcess(steps=20), GaussianProcess(means=(1.0,), variances=(0.5,), steps=20)
    samples = FKSteering(num_particles=500).run(
        base.edited(RLGuidance(tuned, w, aim="product")),
        [""] * 24,
        generator=torch.Generator().manual_seed(4),
        reward=lift(lambda outputs: torch.zeros(len(outputs))),
    )
    for found, truth in zip(moments(samples), product_moments(base, tuned, w), strict=True):
        assert abs(float(found.mean()) - truth) < 5 * float(found.std()) / 24**0.5 + 3e-3


# ---------------------------------------------------------------------------------------------------------- refusals


def test_bad_input_is_refused_before_any_work() -> None:
    from steer.core import InputError

    for field, value in (
        ("num_particles", 0),
        ("num_particles", 2.5),
        ("n", 0),
        ("potential", "best"),
        ("terminal", "x"),
        ("every", 0),
        ("ess_threshold", 0.0),
        ("ess_threshold", 1.5),
        ("resampler", "magic"),
        ("tempering", -1.0),
        ("select", "x"),
    ):
        with pytest.raises(InputError, match=field):
            FKSteering(**{field: value})
    for w in (float("nan"), "1", None, float("inf"), True):
        with pytest.raises(InputError, match="w:"):
            RLGuidance(markov_lm(), w)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="aim"):
        RLGuidance(markov_lm(), 2.0, aim="x")
    with pytest.raises(InputError, match="edits"):
        still_ = GaussianProcess(steps=5)
        still_.edited(RLGuidance(still_, 2.0)).edited(RLGuidance(still_, 2.0, aim="product"))
    with pytest.raises(InputError, match="num_candidates"):
        SVDD(num_candidates=0)
    with pytest.raises(InputError, match="choose"):
        SVDD(choose="x")
    still = GaussianProcess(steps=5, eta=0.0)
    for sampler in (FKSteering(), SVDD()):
        with pytest.raises(UnsupportedError, match="eta"):
            sampler.run(still, [""], generator=torch.Generator(), reward=Quadratic())
        with pytest.raises(InputError, match="reward"):
            sampler.run(GaussianProcess(steps=5), [""], generator=torch.Generator())
    with pytest.raises(InputError, match="companion"):
        GaussianProcess(steps=5).edited(RLGuidance(GaussianProcess(steps=6), 2.0))
    flat = lift(lambda outputs: outputs.detach()[:, 0])
    with pytest.raises(UnsupportedError, match="differentiable"):
        Ancestral(2).run(GaussianProcess(steps=5).edited(GradientGuidance(flat)), [""], generator=torch.Generator())


def test_a_trace_is_told_as_it_comes() -> None:
    """FK's weighted steps and a tree's batches arrive one by one, and are those that the samples hold at the end."""
    from steer.methods.dts import SearchDTS

    drawn: dict[str, Any] = {"reward": TWOS, "beta": 1.0}
    order: list[Any] = []
    samples = FKSteering(num_particles=4).run(
        markov_lm(),
        ["a"],
        generator=torch.Generator().manual_seed(0),
        on_step=lambda state: order.append(state.step),
        on_trace=order.append,
        **drawn,
    )
    assert samples.trace is not None and len(samples.trace) == 3
    assert [x if isinstance(x, int) else x.step for x in order] == [1, 1, 2, 2, 3, 3]
    assert all(told is kept for told, kept in zip(order[::2], samples.trace, strict=True))

    grown: list[tuple[int, int]] = []
    forest = SearchDTS(rollouts=12, batch=4).run(
        markov_lm(),
        ["a"],
        generator=torch.Generator().manual_seed(0),
        on_trace=lambda found: grown.append((found.rollouts, len(found.trees[0]))),
        **drawn,
    )
    assert forest.trace is not None
    assert [rollouts for rollouts, _ in grown] == [4, 8, 12]
    assert grown[-1] == (12, len(forest.trace[0].trees[0])) and grown == sorted(grown)
