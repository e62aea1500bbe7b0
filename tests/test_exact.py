"""Every method against enumeration or a closed form. Formulas to 1e-8, Monte Carlo to 5 standard errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from steer.core import Context, InputError, Reward, Samples
from steer.methods.best_of_n import Ancestral, BestOfN, best_of_n_kl, best_of_n_law, reward_curve
from steer.methods.value import ValueGuidance
from steer.sampling.weights import RESAMPLERS, effective_sample_size, log_mean_exp, normalise, resample, temper
from steer.toy import GaussianProcess, TabularProcess, markov_lm


def twos(sequences: Tensor) -> Tensor:
    return (sequences == 2).sum(-1).double()


def same_ends(sequences: Tensor) -> Tensor:
    return (sequences[:, 0] == sequences[:, -1]).double()


REWARDS = {
    "r1": twos,
    "r2": same_ends,
    "r1+r2": lambda s: twos(s) + same_ends(s),
    "r1-2r2": lambda s: twos(s) - 2 * same_ends(s),
}


class OnSequences(Reward):
    def score(self, samples: Samples) -> Tensor:
        return twos(samples.outputs)


class OnLatents(Reward):
    def score(self, samples: Samples) -> Tensor:
        return samples.outputs.squeeze(-1)


def mean_value(process: TabularProcess, reward: object) -> object:
    """The policy-evaluation value of each candidate's prefix, by table: what regression on rollouts converges to."""
    values = process.mean_values(reward)  # type: ignore[arg-type]

    def value(context: Context, candidates: Tensor) -> Tensor:
        return lookup(values, process, context, candidates)

    return value


def soft_value(process: TabularProcess, reward: object, beta: float) -> object:
    values = process.soft_values(reward, beta)  # type: ignore[arg-type]

    def value(context: Context, candidates: Tensor) -> Tensor:
        return lookup(values, process, context, candidates)

    return value


def lookup(values: list[Tensor], process: TabularProcess, context: Context, candidates: Tensor) -> Tensor:
    v = process.vocabulary
    number = torch.zeros(len(candidates), dtype=torch.long)
    for t in range(context.step):
        number = number * v + context.prefix[:, t]
    return values[context.step + 1][number.unsqueeze(1) * v + candidates]


def expected(process: TabularProcess, reward: object) -> float:
    sequences, log_prob = process.law()
    return float((log_prob.exp() * reward(sequences)).sum())  # type: ignore[operator]


def divergence(log_p: Tensor, log_q: Tensor) -> float:
    return float(torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q)).sum())


# ------------------------------------------------------------------------------------------------------- the chain


@pytest.mark.parametrize(
    ("name", "strength", "log_z", "mean", "kl"),
    [
        ("r1", 0.5, 0.56112612, 1.36973486, 0.12374131),
        ("r1", 1, 1.37488080, 1.87853651, 0.50365571),
        ("r1", 2, 3.64539407, 2.57303501, 1.50067595),
        ("r2", 1, 0.49734863, 0.61991192, 0.12256329),
        ("r2", 2, 1.22256765, 0.81595432, 0.40934098),
        ("r1+r2", 1, 1.96432154, 2.79604056, 0.83171902),
        ("r1-2r2", 1, 0.85724661, 1.34207000, 0.48482339),
    ],
)
def test_target_of_the_chain(name: str, strength: float, log_z: float, mean: float, kl: float) -> None:
    chain, reward = markov_lm(), REWARDS[name]
    target, z = chain.target(reward, 1 / strength)
    sequences, base = chain.law()
    assert z == pytest.approx(log_z, abs=1e-8)
    assert float((target.exp() * reward(sequences)).sum()) == pytest.approx(mean, abs=1e-8)
    assert divergence(target, base) == pytest.approx(kl, abs=1e-8)
    # The identity that defines the target: lambda E r - KL = log Z.
    assert strength * float((target.exp() * reward(sequences)).sum()) - divergence(target, base) == pytest.approx(z)


def test_soft_and_mean_values_of_the_chain() -> None:
    chain = markov_lm()
    assert chain.soft_values(twos, 1.0)[1].tolist() == pytest.approx([0.84826735, 0.84826735, 2.17607335], abs=1e-6)
    assert chain.mean_values(twos)[1].tolist() == [0.5625, 0.5625, 1.875]
    assert float(chain.soft_values(twos, 1.0)[0]) == pytest.approx(1.37488080, abs=1e-8)


# ------------------------------------------------------------------------------------------- value-augmented sampling


def test_soft_q_sampling_is_the_target() -> None:
    chain = markov_lm()
    guided = chain.edited(ValueGuidance(soft_value(chain, twos, 1.0), beta=1.0, top_k=0))
    target, _ = chain.target(twos, 1.0)
    assert float((guided.law()[1].exp() - target.exp()).abs().max()) < 1e-14


@pytest.mark.parametrize(
    ("name", "strength", "mean", "kl", "distance"),
    [
        ("r1", 1.0, 1.870322, 0.495487, 0.004162),
        ("r1", 2.0, 2.588135, 1.531321, 0.011687),
        ("r2", 1.0, 0.619111, 0.121782, 0.003133),
    ],
)
def test_value_guidance_on_the_chain(name: str, strength: float, mean: float, kl: float, distance: float) -> None:
    chain, reward = markov_lm(), REWARDS[name]
    guided = chain.edited(ValueGuidance(mean_value(chain, reward), beta=1 / strength, top_k=0))
    _, base = chain.law()
    target, _ = chain.target(reward, 1 / strength)
    law = guided.law()[1]
    assert expected(guided, reward) == pytest.approx(mean, abs=1e-6)
    assert divergence(law, base) == pytest.approx(kl, abs=1e-6)
    assert float((law.exp() - target.exp()).abs().sum() / 2) == pytest.approx(distance, abs=1e-6)


def test_value_guidance_stays_below_the_optimal_frontier() -> None:
    chain = markov_lm()
    _, base = chain.law()
    table = {
        0.5: (0.12143, 1.36508),
        1: (0.49549, 1.87032),
        2: (1.53132, 2.58814),
        4: (2.55844, 2.95938),
        8: (2.76821, 2.99954),
    }
    sequences = chain.law()[0]
    for strength, (kl, mean) in table.items():
        guided = chain.edited(ValueGuidance(mean_value(chain, twos), beta=1 / strength, top_k=0))
        assert divergence(guided.law()[1], base) == pytest.approx(kl, abs=1e-5)
        assert expected(guided, twos) == pytest.approx(mean, abs=1e-5)
        # The optimal law with the same KL, by bisection, has at least this reward.
        low, high = 0.0, 64.0
        for _ in range(60):
            middle = (low + high) / 2
            target, _ = chain.target(twos, 1 / middle)
            low, high = (middle, high) if divergence(target, base) < kl else (low, middle)
        best = float((chain.target(twos, 1 / high)[0].exp() * twos(sequences)).sum())
        assert mean <= best + 1e-5


@pytest.mark.parametrize(
    ("top_k", "tail", "mean", "kl"),
    [
        (2, "mean", 1.018742, 0.051615),
        (2, "mask", 0.0, 0.863046),
        (1, "mean", 0.890625, 0.0),
        (1, "mask", 0, math.log(8)),
    ],
)
def test_tails_on_the_chain(top_k: int, tail: str, mean: float, kl: float) -> None:
    chain = markov_lm()
    guided = chain.edited(ValueGuidance(mean_value(chain, twos), beta=1.0, top_k=top_k, tail=tail))
    assert expected(guided, twos) == pytest.approx(mean, abs=1e-6)
    assert divergence(guided.law()[1], chain.law()[1]) == pytest.approx(kl, abs=1e-6)


def test_mean_values_compose_and_soft_values_do_not() -> None:
    chain = markov_lm()
    both = lambda s: twos(s) + 0.5 * same_ends(s)  # noqa: E731
    apart = chain.edited(ValueGuidance(mean_value(chain, twos), beta=1.0, top_k=0))
    apart = apart.edited(ValueGuidance(mean_value(chain, same_ends), beta=1.0, strength=0.5, top_k=0))
    together = chain.edited(ValueGuidance(mean_value(chain, both), beta=1.0, top_k=0))
    assert torch.allclose(apart.law()[1], together.law()[1], atol=1e-12)
    for second, distance in ((0.5, 0.057502), (1.0, 0.110085)):
        reward = lambda s, w=second: twos(s) + w * same_ends(s)  # noqa: E731
        part = lambda s, w=second: w * same_ends(s)  # noqa: E731
        soft = chain.edited(ValueGuidance(soft_value(chain, twos, 1.0), beta=1.0, top_k=0))
        soft = soft.edited(ValueGuidance(soft_value(chain, part, 1.0), beta=1.0, top_k=0))
        target, _ = chain.target(reward, 1.0)
        assert float((soft.law()[1].exp() - target.exp()).abs().sum() / 2) == pytest.approx(distance, abs=1e-6)


def test_an_edit_reaches_only_the_prompts_that_asked() -> None:
    chain = markov_lm()
    guided = chain.edited(ValueGuidance(mean_value(chain, twos), beta=1.0, top_k=0), prompts=[1])
    n = 4000
    samples = Ancestral(n).run(guided, ["a", "b"], generator=torch.Generator().manual_seed(0))
    for b, mean in ((0, 0.890625), (1, 1.870322)):
        scores = twos(samples.outputs[samples.group == b])
        assert abs(float(scores.mean()) - mean) < 5 * float(scores.std()) / n**0.5
    assert float(samples.kl[samples.group == 0].abs().max()) == 0
    # The recorded KL is the exact KL of every step: its mean over samples estimates that of the sequences.
    steps = samples.kl[samples.group == 1]
    assert abs(float(steps.mean()) - 0.495487) < 5 * float(steps.std()) / n**0.5


# --------------------------------------------------------------------------------------------------------- best of N


@pytest.mark.parametrize(
    ("n", "mean", "kl"),
    [(2, 1.38061523, 0.15303356), (4, 1.87944120, 0.57696209), (16, 2.63390227, 1.67899225)],
)
def test_exact_law_of_best_of_n(n: int, mean: float, kl: float) -> None:
    sequences, base = markov_lm().law()
    law = best_of_n_law(base, twos(sequences), n)
    assert float((law * twos(sequences)).sum()) == pytest.approx(mean, abs=1e-8)
    assert divergence(law.log(), base) == pytest.approx(kl, abs=1e-8)
    assert kl < best_of_n_kl(n)


def test_best_of_two_by_enumerating_pairs() -> None:
    sequences, base = markov_lm().law()
    scores, p = twos(sequences), base.exp()
    law = torch.zeros_like(p)
    for i, j in itertools.product(range(len(p)), repeat=2):
        mass = p[i] * p[j]
        if scores[i] == scores[j]:
            law[i] += mass / 2
            law[j] += mass / 2
        else:
            law[i if scores[i] > scores[j] else j] += mass
    assert torch.allclose(best_of_n_law(base, scores, 2), law, atol=1e-14)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_best_of_n_samples_its_law(n: int) -> None:
    trials = 3000
    chain = markov_lm()
    samples = BestOfN(n).run(chain, ["x"] * trials, generator=torch.Generator().manual_seed(n), reward=OnSequences())
    sequences, base = chain.law()
    law = best_of_n_law(base, twos(sequences), n)
    number = (samples.outputs * torch.tensor([9, 3, 1])).sum(-1)
    counts = torch.bincount(number, minlength=27).double() / trials
    error = (law * (1 - law) / trials).sqrt()
    assert bool(((counts - law).abs() <= 5 * error + 1e-12).all())
    assert len(samples) == trials and len(samples.pool) == trials * n


def test_rejection_samples_its_law() -> None:
    """Four candidates, two after the first symbol and one after the second, ties broken uniformly: by enumeration."""
    chain = markov_lm()
    base = chain.law()[1]
    p = base.exp().reshape(3, 3, 3)
    first, pairs = p.sum((1, 2)).tolist(), p.sum(2).tolist()
    masses = [[0.0] * 3 for _ in range(3)]
    orders = list(itertools.permutations(range(4)))
    for drawn in itertools.product(range(3), repeat=4):
        mass = math.prod(first[i] for i in drawn) / len(orders)
        for order in orders:
            one, two = sorted((drawn[i] for i in order), key=lambda x: -(x == 2))[:2]
            for u, v in itertools.product(range(3), repeat=2):
                both = mass * (pairs[one][u] / first[one]) * (pairs[two][v] / first[two])
                counts = [(one == 2) + (u == 2), (two == 2) + (v == 2)]
                share = 0.5 if counts[0] == counts[1] else float(counts[0] > counts[1])
                masses[one][u] += both * share
                masses[two][v] += both * (1 - share)
    law = torch.tensor(masses, dtype=torch.float64)
    whole = (law.unsqueeze(2) * p / p.sum(2, keepdim=True)).flatten()
    trials = 6000
    sampler = BestOfN(4, reject=0.5)
    samples = sampler.run(chain, ["x"] * trials, generator=torch.Generator().manual_seed(0), reward=OnSequences())
    counts = torch.bincount((samples.outputs * torch.tensor([9, 3, 1])).sum(-1), minlength=27).double() / trials
    error = (whole * (1 - whole) / trials).sqrt()
    assert float(whole.sum()) == pytest.approx(1) and bool(((counts - whole).abs() <= 5 * error + 1e-12).all())
    assert len(samples.pool) == trials and samples.cost.reward_calls == trials * (4 + 2 + 1)
    assert samples.kl is not None and torch.allclose(samples.kl, torch.full_like(samples.kl, math.log(4)))
    assert divergence(whole.clamp_min(1e-300).log(), base) < math.log(4)


def test_rejection_needs_steps() -> None:
    with pytest.raises(InputError, match="reject"):
        BestOfN(4, reject=1.0)


def test_best_of_n_runs_unchanged_on_the_gaussian_chain() -> None:
    trials, n = 2000, 4
    process = GaussianProcess(steps=10)
    samples = BestOfN(n).run(process, ["x"] * trials, generator=torch.Generator().manual_seed(0), reward=OnLatents())
    mean, variance = process.chain_moments()
    # E max of four standard normals is 1.0293753730.
    scores = samples.reward
    want = mean + 1.0293753730 * variance**0.5
    assert abs(float(scores.mean()) - want) < 5 * float(scores.std()) / trials**0.5


@pytest.mark.parametrize(
    ("n", "value"),
    [(2, 0.193147), (4, 0.636294), (8, 1.204442), (16, 1.835089), (32, 2.496986), (1000, 5.908755), (12500, 8.433564)],
)
def test_kl_bound_of_best_of_n(n: int, value: float) -> None:
    assert best_of_n_kl(n) == pytest.approx(value, abs=1e-6)


def test_reward_curve() -> None:
    curve = reward_curve(torch.tensor([3.0, 1, 4, 2]), [1, 2, 3, 4])
    assert curve.tolist() == pytest.approx([2.5, 10 / 3, 3.75, 4.0])
    proxy, gold = torch.tensor([0.1, 0.9, 0.4, 0.7]), torch.tensor([3.0, 0, 2, 1])
    assert reward_curve(proxy, [1, 2, 3, 4], gold).tolist() == pytest.approx([1.5, 2 / 3, 0.25, 0.0])
    ties = reward_curve(torch.tensor([1.0, 1, 1]), [2], torch.tensor([0.0, 3, 6]))
    assert ties.tolist() == pytest.approx([3.0])
    with pytest.raises(InputError, match="n: got 4"):
        reward_curve(torch.tensor([1.0, 2, 3]), [4])


def test_reward_curve_is_unbiased_with_ties() -> None:
    sequences, base = markov_lm().law()
    p = torch.stack([base.exp()[twos(sequences) == level].sum() for level in range(4)])
    total = 0.0
    for triple in itertools.product(range(4), repeat=3):
        mass = float(p[list(triple)].prod())
        total += mass * float(reward_curve(torch.tensor(triple).double(), [2])[0])
    assert total == pytest.approx(1.380615234375, abs=1e-12)


# ------------------------------------------------------------------------------------------------------ the gaussian


@pytest.mark.parametrize(
    ("data", "steps", "stochastic", "deterministic"),
    [
        ((0.0, 1.0), 100, (0, 0.951005), (0, 0.978484)),
        ((0.0, 1.0), 50, (0, 0.907695), (0, 0.957765)),
        ((0.0, 1.0), 20, (0, 0.795967), (0, 0.895950)),
        ((0.0, 1.0), 10, (0, 0.652090), (0, 0.794360)),
        ((1.0, 0.25), 50, (0.993280, 0.214719), (0.920738, 0.238426)),
        ((1.0, 0.25), 10, (0.993280, 0.137395), (0.931333, 0.178948)),
    ],
)
def test_moments_of_the_gaussian_chain(
    data: tuple[float, float], steps: int, stochastic: tuple[float, float], deterministic: tuple[float, float]
) -> None:
    for eta, want in ((1.0, stochastic), (0.0, deterministic)):
        process = GaussianProcess(means=(data[0],), variances=(data[1],), steps=steps, eta=eta)
        assert process.chain_moments() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    ("steps", "top"), [(10, (0.016208, 0.199694, -1.473190)), (50, (0.014006, 0.172563, -1.379063))]
)
def test_soft_values_of_the_gaussian_chain(steps: int, top: tuple[float, float, float]) -> None:
    process = GaussianProcess(steps=steps)
    a, b, c = process.soft_values(1.0, 2.0, 1.0)[0]
    assert (a, b, c) == pytest.approx(top, abs=1e-6)
    # log Z of the tilt of the chain's own law, from the closed form.
    _, v = process.chain_moments()
    log_z = -0.5 * math.log(1 + v) - 0.5 * 4 / (1 + v)
    over_start = -0.5 * math.log(1 + a) + c + 0.5 * b * b / (1 + a)
    assert over_start == pytest.approx(log_z, abs=1e-8)


def test_mixture_denoiser() -> None:
    process = GaussianProcess(weights=(0.5, 0.3, 0.2), means=(-2.0, 0.0, 3.0), variances=(0.25, 0.5, 1.0), steps=100)
    for abar, x, want in ((0.5, 0.7, 0.596173), (0.1, -0.3, -0.847154), (0.9, 1.2, 1.164371)):
        fixed = _at_noise(process, abar)
        assert float(fixed.x0_hat(torch.tensor([[x]], dtype=torch.float64), 0)) == pytest.approx(want, abs=1e-6)


def _at_noise(process: GaussianProcess, abar: float) -> GaussianProcess:
    class Fixed(GaussianProcess):
        @property
        def alphas_bar(self) -> Tensor:
            return torch.tensor([abar, 1.0], dtype=torch.float64)

    return Fixed(process.weights, process.means, process.variances, 1)


# ----------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("weights", "size"), [((0.5, 0.5, 0, 0), 2.0), ((0.7, 0.1, 0.1, 0.1), 1.923077), ((0.4, 0.3, 0.2, 0.1), 10 / 3)]
)
def test_effective_sample_size(weights: tuple[float, ...], size: float) -> None:
    log_weights = torch.tensor(weights, dtype=torch.float64).log()
    assert float(effective_sample_size(log_weights)) == pytest.approx(size, abs=1e-6)


@pytest.mark.parametrize("how", list(RESAMPLERS))
def test_resamplers_are_unbiased(how: str) -> None:
    log_weights = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64).log()
    generator, trials = torch.Generator().manual_seed(0), 4000
    drawn = [torch.bincount(resample(log_weights, generator, how), minlength=5) for _ in range(trials)]
    counts = torch.stack(drawn).double()
    want = 5 * normalise(log_weights)
    error = counts.std(0) / trials**0.5
    assert bool(((counts.mean(0) - want).abs() <= 5 * error + 1e-9).all())
    assert bool((counts.sum(1) == 5).all())
    if how in ("systematic", "ssp"):
        assert bool(((counts >= want.floor()) & (counts <= want.ceil())).all())


@pytest.mark.parametrize("how", list(RESAMPLERS))
def test_resamplers_keep_populations_apart(how: str) -> None:
    log_weights = torch.tensor([[0.0, -50, -50], [-50, -50, 0.0]])
    ancestors = resample(log_weights, torch.Generator().manual_seed(1), how)
    assert ancestors.tolist() == [[0, 0, 0], [2, 2, 2]]
    dead = torch.full((1, 4), -torch.inf)
    assert sorted(set(resample(dead, torch.Generator().manual_seed(1), "systematic")[0].tolist())) == [0, 1, 2, 3]


def test_tempering_and_log_mean_exp() -> None:
    log_weights = torch.tensor([[0.0, -5, -9, -1], [0.0, 0, 0, 0]]).double()
    power = temper(log_weights, 2.5)
    assert float(power[1]) == 1.0
    assert float(effective_sample_size(power[0] * log_weights[0])) == pytest.approx(2.5, abs=1e-3)
    assert float(log_mean_exp(torch.tensor([0.0, math.log(3.0)]))) == pytest.approx(math.log(2.0))
    with pytest.raises(InputError, match="resampler: got 'best'"):
        resample(log_weights, torch.Generator(), "best")
