"""Random configurations of the samplers on random chains, against enumeration.

A seed draws a chain (zeros in it, ends at different lengths), a reward (ties, zeros, -infinity), edits of some of the
prompts, a sampler and all its settings. Every figure that is promised to be unbiased is estimated from independent
runs and compared with its exact value, in standard errors of its own. One beyond five is measured again with other
random numbers and ten times as many runs, and has to be within five then: weights have heavy tails, and a thousand
configurations have outliers.
"""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steer.core import Context, Process, Samples, TransitionEdit
from steer.methods.best_of_n import Ancestral, BestOfN, best_of_n_kl, best_of_n_law
from steer.methods.dts import DTS
from steer.methods.fk import FKSteering
from steer.methods.gradient import GradientGuidance
from steer.methods.rlg import RLGuidance
from steer.methods.svdd import SVDD
from steer.rewards import lift
from steer.sampling.lookahead import Lookahead, Preview, Rollouts, StateValue
from steer.sampling.weights import RESAMPLERS
from steer.toy import GaussianProcess, TabularProcess
from steer.toy.tabular import TabularState

RUNS = 300
TREES = 40
BIAS = 0.03
"""Of a tree's Z: adaptive nodes have a random number of children, which vanishes with the rollouts. Not of the rest."""


# ------------------------------------------------------------------------------------------ chains


@dataclass(frozen=True)
class Ending(TabularProcess):
    """A chain whose rows end with their first token 0; what would follow is 0 in the chain as well."""

    def finished(self, state: TabularState) -> Tensor:
        return (state.x[:, -1:] == 0).any(1) | torch.tensor(state.step >= self.length)

    def done(self, state: TabularState) -> bool:
        return bool(self.finished(state).all())

    def whole(self, state: TabularState) -> TabularState:
        rest = torch.zeros(len(state), self.length - state.x.shape[1], dtype=torch.long)
        return replace(state, x=torch.cat([state.x, rest], 1))

    def decode(self, state: TabularState) -> Samples:
        return super().decode(self.whole(state) if self.done(state) else state)

    def pack(self, state: TabularState) -> dict[str, Tensor]:
        return super().pack(self.whole(state))

    def unpack(self, prompts: Any, step: int, packed: dict[str, Tensor]) -> TabularState:
        return super().unpack(prompts, step, {**packed, "x": packed["x"][:, :step]})

    def identify(self, state: TabularState) -> list[Any]:
        return [tuple(row) for row in self.whole(state).x.tolist()]


@dataclass(frozen=True, eq=False)
class Lean(TransitionEdit):
    """Adds to the logits what `by` `[V]` says."""

    by: Tensor

    def shift(self, x: Tensor, context: Context) -> Tensor:
        return x + self.by


def random_chain(rng: random.Random, v: int, length: int, zeros: float, ends: bool) -> TabularProcess:
    """Tokens that can follow always include the same one, so that two chains share a path."""
    g = torch.Generator().manual_seed(rng.randrange(1 << 30))
    rows = torch.rand(v + 1, v, dtype=torch.float64, generator=g) + 0.1
    dead = torch.rand(rows.shape, generator=g) < zeros
    dead[torch.arange(v + 1), torch.arange(v + 1) % v] = False
    rows = rows.masked_fill(dead, 0.0)
    if ends:
        rows[1] = torch.eye(v, dtype=torch.float64)[0]
    rows = rows / rows.sum(1, keepdim=True)
    return (Ending if ends else TabularProcess)(rows[0], rows[1:], length)


def near(rng: random.Random, chain: TabularProcess) -> TabularProcess:
    """A chain whose log-laws are within 0.7 of another's, before they are normalised."""
    g = torch.Generator().manual_seed(rng.randrange(1 << 30))
    initial, transition = (
        p * torch.exp(1.4 * torch.rand(p.shape, dtype=torch.float64, generator=g) - 0.7)
        for p in (chain.initial, chain.transition)
    )
    transition = transition / transition.sum(1, keepdim=True)
    return replace(chain, initial=initial / initial.sum(), transition=transition)


@dataclass
class Case:
    """What a seed drew. Prompts come in turns of `len(aims)` kinds; runs are repetitions of all kinds."""

    process: TabularProcess
    reward: Any
    beta: float
    scores: Tensor
    """Reward of every sequence `[M]`."""
    aims: list[Tensor]
    """Law that weights aim at before the reward, not normalised, of every kind `[M]`."""
    laws: list[Tensor]
    """Log-law that is drawn from, of every kind `[M]`."""
    about: str

    @property
    def kinds(self) -> int:
        return len(self.aims)

    def number(self, x: Tensor) -> Tensor:
        place = torch.zeros(len(x), dtype=torch.long)
        for t in range(x.shape[1]):
            place = place * self.process.vocabulary + x[:, t]
        return place


def random_case(rng: random.Random, runs: int, product: bool = True) -> Case:
    v, length = rng.choice([(2, 2), (2, 4), (3, 3), (4, 3), (5, 2), (3, 4)])
    zeros, ends = rng.choice([0.0, 0.0, 0.3]), rng.random() < 0.4
    base = random_chain(rng, v, length, zeros, ends)
    kinds = rng.choice([1, 2, 3])
    process: Any = base
    aims = [base.law()[1].exp() for _ in range(kinds)]
    mounted: list[list[TransitionEdit]] = [[] for _ in range(kinds)]
    words = [f"V={v} T={length} zeros={zeros} ends={ends} kinds={kinds}"]
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        kind = rng.choice(["lean", "rlg", "product"] if product else ["lean", "rlg"])
        wanted = None if rng.random() < 0.3 else [k for k in range(kinds) if rng.random() < 0.5]
        w = rng.choice([0.0, 0.5, 1.0, 1.5]) if not zeros else rng.choice([0.0, 0.5])
        if kind == "lean":
            edit: TransitionEdit = Lean(torch.tensor([rng.uniform(-0.5, 0.5) for _ in range(v)], dtype=torch.float64))
        else:
            # Weights towards the base have long tails where the other law is far from it.
            tuned = near(rng, base) if kind == "rlg" else random_chain(rng, v, length, zeros, ends)
            edit = RLGuidance(tuned, w, "product" if kind == "product" else "base")
        asked = range(kinds) if wanted is None else wanted
        process = process.edited(edit, None if wanted is None else [k + kinds * r for k in wanted for r in range(runs)])
        for k in asked:
            mounted[k].append(edit)
            if kind == "product":
                p, q = base.law()[1].exp(), tuned.law()[1].exp()
                aims[k] = aims[k] * torch.where(p > 0, q / p.clamp_min(1e-300), 0.0) ** w
        words.append(f"{kind}(w={w}, wanted={wanted})")
    laws = []
    for edits in mounted:
        alone: Any = base
        for edit in edits:
            alone = alone.edited(edit)
        laws.append(alone.law()[1])
    g = torch.Generator().manual_seed(rng.randrange(1 << 30))
    levels = rng.choice([2, 5, 1000])
    scores = torch.randint(levels, (v**length,), generator=g).double() * (2 / (levels - 1))
    if rng.random() < 0.3:
        scores = torch.zeros_like(scores)
    impossible = rng.choice([0.0, 0.0, 0.3, 0.7])
    scores = scores.masked_fill(torch.rand(len(scores), generator=g) < impossible, -torch.inf)
    beta = rng.choice([0.7, 1.0, 3.0])
    harsh = rng.random() < 0.5
    words.append(f"beta={beta} levels={levels} impossible={impossible} harsh={harsh}")

    def score(x: Tensor) -> Tensor:
        place = torch.zeros(len(x), dtype=torch.long)
        for t in range(x.shape[1]):
            place = place * v + x[:, t]
        after = scores.reshape(v ** x.shape[1], -1)
        # What a reward says of a prefix is anyone's guess: of its first end or of its mean, -infinity included.
        return (after.mean(1) if harsh else after[:, 0])[place]

    return Case(process, lift(lambda outputs: score(outputs)), beta, scores, aims, laws, ", ".join(words))


# ------------------------------------------------------------------------------------------ what is compared


def features(rng: random.Random, size: int) -> Tensor:
    """All sequences, and random halves of them, as rows `[F, M]` of zeros and ones."""
    g = torch.Generator().manual_seed(rng.randrange(1 << 30))
    return torch.cat([torch.ones(1, size), (torch.rand(4, size, generator=g) < 0.5).double()]).double()


def deviations(values: Tensor, truth: Tensor, bias: Any = 0.0, spread: Any = 0.0) -> Tensor:
    """Distances `[F]` of the means of independent runs `[R, F]` from the truth, in standard errors, of the sample or
    of a `spread` that is known; what rounding leaves, and a known bias of that share, are taken off.
    """
    assert bool(values.isfinite().all()) and bool(truth.isfinite().all())
    error = torch.maximum(values.std(0), torch.as_tensor(spread)) / len(values) ** 0.5
    gap = (values.mean(0) - truth).abs() - bias * truth.abs() - 1e-9 * (1 + truth.abs())
    return torch.where(gap <= 0, 0.0, gap / error.clamp_min(1e-12))


def common(truth: Tensor, runs: int) -> Tensor:
    """Features that enough runs have to see for errors to be normal; the first is everything."""
    return (truth == 0) | (truth * runs > 10 * truth[0])


def weighed(case: Case, samples: Samples, runs: int, f: Tensor) -> list[Tensor]:
    """For every kind, `exp(log_z)` times the weighted share of each feature, by run: `[R, F]`."""
    assert samples.log_z is not None
    mass = samples.weights * samples.log_z.exp()[samples.group]
    columns = mass.unsqueeze(1) * f[:, case.number(samples.outputs)].T
    total = torch.zeros(runs * case.kinds, len(f), dtype=torch.float64).index_add(0, samples.group, columns)
    return list(total.reshape(runs, case.kinds, len(f)).unbind(1))


def run(case: Case, sampler: Any, runs: int, seed: int) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    prompts = [""] * (runs * case.kinds)
    return sampler.run(case.process, prompts, generator=generator, reward=case.reward, beta=case.beta)


def worst_of_fk(rng: random.Random, seed: int, more: int) -> tuple[float, str]:
    runs = RUNS * more
    case = random_case(rng, runs)
    sampler = random_fk(rng, case)
    f = features(rng, len(case.scores))
    samples = run(case, sampler, runs, seed)
    worst = 0.0
    populations = [samples] if samples.pool is None else [samples, samples.pool]
    for population in populations:
        if population is samples and (sampler.select == "best" or (sampler.per_output and (sampler.n or 1) > 1)):
            continue  # no law is promised of these
        found = weighed(case, population, runs, f)
        for k, values in enumerate(found):
            truth = f @ (case.aims[k] * reachable(case, k) * (case.scores / case.beta).exp())
            worst = max(worst, float(deviations(values, truth)[common(truth, runs)].max()))
    dead = samples.log_z.isneginf()
    assert samples.kl is None or not bool(samples.kl.isnan().any())
    assert samples.kl is None or bool(samples.kl[dead[samples.group]].isposinf().all())
    return worst, f"{case.about}; {sampler}"


def reachable(case: Case, kind: int) -> Tensor:
    """What a proposal never draws, no weight can bring back."""
    return (case.laws[kind] > -torch.inf).double()


def random_lookahead(rng: random.Random, case: Case) -> Lookahead:
    g = torch.Generator().manual_seed(rng.randrange(1 << 30))
    table = torch.rand(4096, dtype=torch.float64, generator=g) * 2 - 0.5
    table = table.masked_fill(torch.rand(4096, generator=g) < rng.choice([0.0, 0.3]), -torch.inf)

    def value(context: Context) -> Tensor:
        return table[(case.number(context.prefix) * 7 + context.step) % len(table)]

    choices = [Preview(), Rollouts(rng.choice([1, 2, 3]), rng.choice(["soft", "mean"])), StateValue(value)]
    return rng.choice(choices)


def random_fk(rng: random.Random, case: Case) -> FKSteering:
    steps = case.process.num_steps
    # Sums of lookaheads that are far off give weights whose tail no number of runs would show at a small beta.
    potentials = ["difference", "difference", "max", *(["sum"] if case.beta == 3.0 else [])]
    n = rng.choice([None, None, 1, 3])
    return FKSteering(
        num_particles=rng.choice([1, 3, 4, 8]),
        n=n,
        per_output=rng.random() < 0.5 and n is not None,
        potential=rng.choice(potentials),
        start=rng.randrange(1, steps + 1),
        stop=rng.choice([None, steps - 1 or 1]),
        every=rng.choice([1, 1, 2]),
        ess_threshold=rng.choice([None, 0.3, 0.5, 0.9]),
        resampler=rng.choice(sorted(RESAMPLERS)),
        tempering=rng.choice([None, None, 0.4]),
        lookahead=random_lookahead(rng, case),
        select=rng.choice([None, "best"]) if n else None,
        floor=rng.choice([None, None, 0.0, 0.5]),
    )


def worst_of_draws(rng: random.Random, seed: int, more: int) -> tuple[float, str]:
    """Plain draws and best-of-n: their laws, log-probabilities, KL and the mean of their weights."""
    runs = RUNS * more
    case = random_case(rng, runs)
    n = rng.choice([1, 2, 3, 7])
    sampler: Any = rng.choice([Ancestral(n), BestOfN(n)])
    samples = run(case, sampler, runs, seed)
    f, worst = features(rng, len(case.scores)), 0.0
    place, base = case.number(samples.outputs), TabularProcess.law(case.process.unedited())[1]
    for k in range(case.kinds):
        mine = samples.group % case.kinds == k
        log_q, at = case.laws[k], place[mine]
        assert torch.allclose(samples.log_prob[mine], log_q[at], atol=1e-9)
        assert torch.allclose(samples.base_log_prob[mine], base[at], atol=1e-9)
        kept = 1 if isinstance(sampler, BestOfN) else n
        law = best_of_n_law(log_q, case.scores, n) if isinstance(sampler, BestOfN) else log_q.exp()
        seen = f[:, at].T.reshape(runs, kept, -1).mean(1)
        p = f @ law
        worst = max(worst, float(deviations(seen, p, spread=(p * (1 - p) / kept).clamp_min(0).sqrt()).max()))
        ratio = torch.where(law > 0, law * (log_q - base), 0.0).sum()
        if bool(ratio.isfinite()):
            bound = best_of_n_kl(n) if isinstance(sampler, BestOfN) else 0.0
            kl = samples.kl[mine].reshape(runs, kept).mean(1, keepdim=True)
            worst = max(worst, float(deviations(kl, (ratio + bound).reshape(1)).max()))
        if isinstance(sampler, Ancestral):
            aim = (base[at] + samples.tilt[mine] - log_q[at]).exp()
            aim = torch.where(base[at].isneginf() & samples.tilt[mine].isfinite(), 0.0, aim)
            if not bool(aim.isnan().any()):
                total = (case.aims[k] * (log_q > -torch.inf)).sum().reshape(1)
                worst = max(worst, float(deviations(aim.reshape(runs, n).mean(1, keepdim=True), total).max()))
    return worst, f"{case.about}; {sampler}"


def worst_of_trees(rng: random.Random, seed: int, more: int) -> tuple[float, str]:
    runs = TREES * more
    case = random_case(rng, runs)
    sampler = DTS(
        n=None,
        rollouts=rng.choice([64, 128]),
        batch=rng.choice([4, 16]),
        widening=rng.choice([1.0, 2.0]),
        exponent=rng.choice([0.6, 0.8]),
        explore=rng.choice([None, 0.3]),
        lookahead=rng.choice([None, random_lookahead(rng, case)]),
        merge=rng.random() < 0.7,
    )
    samples = run(case, sampler, runs, seed)
    f, worst = features(rng, len(case.scores)), 0.0
    for k, values in enumerate(weighed(case, samples, runs, f)):
        truth = f @ (case.aims[k] * reachable(case, k) * (case.scores / case.beta).exp())
        whole = BIAS * truth[0] / truth.clamp_min(1e-12)
        worst = max(worst, float(deviations(values, truth, whole)[common(truth, runs)].max()))
    return worst, f"{case.about}; {sampler}"


def worst_of_gaussian(rng: random.Random, seed: int, more: int) -> tuple[float, str]:
    """FK on a chain of real numbers, with a proposal: log Z and mean from the closed form of a tilted Gaussian."""
    runs = RUNS * more
    steps, path = rng.choice([6, 10]), rng.choice(["vp", "flow"])
    base = GaussianProcess(
        means=(rng.uniform(-1, 1),),
        variances=(rng.uniform(0.3, 1),),
        steps=steps,
        path=path,
        eta=rng.choice([0.6, 1.0]),
    )
    sharp, centre, beta = rng.uniform(0.2, 1), rng.uniform(-1, 1), rng.choice([0.7, 1.0, 2.0])
    reward = lift(lambda outputs: -sharp / 2 * (outputs[:, 0] - centre) ** 2)
    process: Process = base
    # Late steps have so little noise that no weight makes up for a mean that was moved far, or at all with eta below 1.
    edit: Any = rng.choice([None, "rlg", "gradient"]) if base.eta == 1 else None
    if edit == "rlg":
        tuned = replace(base, means=(base.means[0] + rng.uniform(-0.1, 0.1),))
        process = process.edited(RLGuidance(tuned, rng.choice([0.5, 1.0])), prompts=range(0, 2 * runs, 2))
    elif edit == "gradient":
        process = process.edited(GradientGuidance(reward, beta=4 * beta), prompts=range(0, 2 * runs, 2))
    sampler = FKSteering(
        num_particles=rng.choice([4, 8]),
        potential=rng.choice(["difference", "max"]),
        every=rng.choice([1, 3]),
        ess_threshold=rng.choice([0.3, 0.5, None]),
        resampler=rng.choice(sorted(RESAMPLERS)),
        tempering=rng.choice([None, 0.4]),
        lookahead=rng.choice([Preview(), Rollouts(2)]),
    )
    mean, variance = base.chain_moments()
    a = sharp / beta
    z = (1 + a * variance) ** -0.5 * torch.tensor(-0.5 * a * (mean - centre) ** 2 / (1 + a * variance)).exp()
    tilted = (mean + a * variance * centre) / (1 + a * variance)
    truth = torch.tensor([float(z), float(z) * tilted], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    samples = sampler.run(process, [""] * (2 * runs), generator=generator, reward=reward, beta=beta)
    assert samples.log_z is not None
    means = torch.zeros(2 * runs, dtype=torch.float64)
    means = means.index_add(0, samples.group, samples.weights * samples.outputs[:, 0].double())
    values = torch.stack([samples.log_z.exp(), samples.log_z.exp() * means], 1).reshape(runs, 2, 2)
    worst = max(float(deviations(values[:, k], truth).max()) for k in (0, 1))
    return worst, f"{base}; r={sharp:.2f},{centre:.2f} beta={beta} {edit}; {sampler}"


def worst_of_choices(rng: random.Random, seed: int, more: int) -> tuple[float, str]:
    """SVDD of chains of one step, where its law is that of a draw by weight among M, enumerated."""
    runs = RUNS * more
    case = random_case(rng, runs, product=False)
    m = rng.choice([1, 2, 3])
    one = replace(case.process, length=1)
    v = one.vocabulary
    scores = case.scores.reshape(v, -1).amax(1)
    choose = rng.choice(["soft", "argmax"])
    reward = lift(lambda outputs: scores[outputs[:, 0]])
    generator = torch.Generator().manual_seed(seed)
    sampler = SVDD(1, m, choose)
    samples = sampler.run(one, [""] * (runs * case.kinds), generator=generator, reward=reward, beta=case.beta)
    worst = 0.0
    for k in range(case.kinds):
        prefix, group = torch.zeros(1, 0, dtype=torch.long), torch.tensor([k])
        p = one.step_laws(prefix, group)[0].exp()[0]
        law = torch.zeros(v, dtype=torch.float64)
        for drawn in torch.cartesian_prod(*[torch.arange(v)] * m).reshape(-1, m):
            s = scores[drawn] / case.beta
            share = torch.softmax(torch.zeros_like(s) if bool(s.isneginf().all()) else s, 0)
            if choose == "argmax":
                share = torch.nn.functional.one_hot(s.argmax(), m).double()
            law = law.index_add(0, drawn, p[drawn].prod() * share)
        mine = samples.outputs[samples.group % case.kinds == k, 0]
        seen = torch.nn.functional.one_hot(mine, v).double()
        worst = max(worst, float(deviations(seen, law, spread=(law * (1 - law)).clamp_min(0).sqrt()).max()))
    return worst, f"{case.about}; {sampler}"


SUBJECTS = {
    "fk": worst_of_fk,
    "draws": worst_of_draws,
    "trees": worst_of_trees,
    "gaussian": worst_of_gaussian,
    "svdd": worst_of_choices,
}


def check_all(subject: str, first: int, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Measure configurations `first` to `first + count`; say how many there were and how far the worst was."""
    worst, again = (0.0, ""), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(first, first + count):
            far, about = SUBJECTS[subject](random.Random(number), number, 1)
            if far > 5:
                again += 1
                far, about = SUBJECTS[subject](random.Random(number), number + 1_000_000, 10)
                assert far <= 5, f"{subject} {number}: {far:.1f} standard errors; {about}"
            worst = max(worst, (far, about))
    with capsys.disabled():
        print(f"\n{subject}: {count} configurations, worst {worst[0]:.2f} standard errors, {again} measured again")


@pytest.mark.parametrize(
    ("subject", "count"), [("fk", 120), ("draws", 100), ("trees", 6), ("gaussian", 30), ("svdd", 60)]
)
def test_a_sample_of_configurations(subject: str, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    check_all(subject, 0, count, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("subject", "count"), [("fk", 1000), ("draws", 1500), ("trees", 30), ("gaussian", 200), ("svdd", 500)]
)
def test_many_configurations(subject: str, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    check_all(subject, 10_000, count, capsys)
