"""Laws at their edges: edits of some prompts, rows that cannot be told from impossible ones, zero probabilities, trees
on continuous chains; against enumeration and closed forms, on chains of several sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from steer.core import Context, Samples, TransitionEdit
from steer.methods.best_of_n import BestOfN, best_of_n_kl, best_of_n_law, reward_curve
from steer.methods.dts import DTS, SearchDTS
from steer.methods.fk import FKSteering
from steer.methods.rlg import RLGuidance
from steer.methods.svdd import SVDD
from steer.rewards import lift
from steer.sampling.lookahead import Preview, Rollouts
from steer.toy import GaussianProcess, TabularProcess, markov_lm


def slow(*values: Any) -> Any:
    """Parameters that the slow suite tries."""
    return pytest.param(*values, marks=pytest.mark.slow)


SIZES = [(3, 3, 0), slow(2, 5, 1), slow(4, 3, 2)]
"""Tokens, steps and a seed. The laws are the same on each: a mistake in one shows on the smallest chain, too, at the
same five standard errors; the others guard against what only holds there.
"""


def chain(vocabulary: int, length: int, seed: int, zeros: float = 0.0) -> TabularProcess:
    """A random chain; entries are 0 with probability `zeros`, but for one in each row, the same in every chain."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.rand(vocabulary + 1, vocabulary, dtype=torch.float64, generator=g) + 0.05
    dead = torch.rand(rows.shape, generator=g) < zeros
    dead[torch.arange(vocabulary + 1), torch.arange(vocabulary + 1) % vocabulary] = False
    rows = rows.masked_fill(dead, 0.0)
    rows = rows / rows.sum(1, keepdim=True)
    return TabularProcess(rows[0], rows[1:], length)


def number(x: Tensor, vocabulary: int) -> Tensor:
    """Places of sequences `[N, T]` in the lexicographic order."""
    place = torch.zeros(len(x), dtype=torch.long)
    for t in range(x.shape[1]):
        place = place * vocabulary + x[:, t]
    return place


def tabled(process: TabularProcess, scores: Tensor) -> Any:
    """The reward that the whole sequences have by a table, and prefixes the mean of what they lead to."""
    v, length = process.vocabulary, process.length

    def score(x: Tensor) -> Tensor:
        after = scores.reshape(v ** x.shape[1], -1)
        return after.mean(1)[number(x, v)] if x.shape[1] < length else scores[number(x, v)]

    return lift(lambda outputs: score(outputs))


def random_scores(process: TabularProcess, seed: int, impossible: float = 0.0) -> Tensor:
    g = torch.Generator().manual_seed(100 + seed)
    size = process.vocabulary**process.length
    scores = torch.randint(0, 5, (size,), generator=g).double() / 2
    return scores.masked_fill(torch.rand(size, generator=g) < impossible, -torch.inf)


def within(values: Tensor, truth: float, slack: float = 0.0) -> bool:
    """The mean of independent `values` lies within five of its standard errors of the truth."""
    assert bool(values.isfinite().all())
    return abs(float(values.mean()) - truth) < 5 * float(values.std()) / len(values) ** 0.5 + slack + 1e-12


def run(sampler: Any, process: Any, prompts: int, reward: Any = None, seed: int = 0, beta: float = 1.0) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    return sampler.run(process, [""] * prompts, generator=generator, reward=reward, beta=beta)


NOTHING = lift(lambda outputs: torch.zeros(len(outputs)))


def mixed(base: TabularProcess, tuned: TabularProcess, w: float) -> Tensor:
    """`p^(1 - w) p_tuned^w` of every sequence, not normalised, with `0^0 = 1`."""
    p, q = base.law()[1].exp(), tuned.law()[1].exp()
    return p ** (1 - w) * q**w


# ------------------------------------------------------------------------------------------ edits of some prompts


@pytest.mark.parametrize(("v", "length", "seed"), SIZES)
@pytest.mark.parametrize("tree", [False, True])
def test_a_product_for_some_prompts_leaves_the_others_alone(v: int, length: int, seed: int, tree: bool) -> None:
    base, tuned = chain(v, length, seed), chain(v, length, seed + 50)
    scores = random_scores(base, seed)
    runs = 60 if tree else 1500
    wanted = range(0, 2 * runs, 2)
    process = base.edited(RLGuidance(tuned, 0.5, "product"), prompts=wanted)
    sampler: Any = DTS(None, rollouts=96, batch=8) if tree else FKSteering(8)
    samples = run(sampler, process, 2 * runs, tabled(base, scores))
    asked, others = samples.log_z.exp().reshape(runs, 2).T
    # The number of children of an adaptive node leaves a bias of less than one part in fifty here.
    slack = 0.02 * tree
    truth = float((mixed(base, tuned, 0.5) * scores.exp()).sum())
    assert within(asked, truth, slack * truth)
    truth = float((base.law()[1].exp() * scores.exp()).sum())
    assert within(others, truth, slack * truth)
    tilts = samples.tilt.reshape(-1) if samples.tilt is not None else torch.zeros(0)
    assert float(tilts[samples.group % 2 == 1].abs().max()) == 0 < float(tilts[samples.group % 2 == 0].abs().max())


# ------------------------------------------------------------------------------------------ rows that may yet end well


@pytest.mark.parametrize(("v", "length", "seed"), SIZES)
@pytest.mark.parametrize("look", [Rollouts(1), Rollouts(4), Rollouts(4, "mean"), Preview()])
@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_a_lookahead_of_minus_infinity_kills_nobody(v: int, length: int, seed: int, look: Any, potential: str) -> None:
    base = chain(v, length, seed)
    scores = random_scores(base, seed, impossible=0.6)
    truth = float((base.law()[1].exp() * scores.exp()).sum())
    samples = run(FKSteering(8, potential=potential, lookahead=look), base, 1500, tabled(base, scores), seed)
    assert within(samples.log_z.exp(), truth)
    # The ends that are possible have the target's law, those that are not have no weight.
    mass = (samples.log_z.exp() / 1500)[samples.group] * samples.weights
    law = torch.zeros(v**length, dtype=torch.float64).index_add(0, number(samples.outputs, v), mass)
    assert float(law[scores.isneginf()].sum()) == 0 and float(law.sum()) > 0.5 * truth


@pytest.mark.parametrize("potential", ["max", "sum"])
def test_the_running_terminal_keeps_its_own_zeros(potential: str) -> None:
    """Its target has a lookahead's -infinity in it: `p exp(sum rho)` is 0 there, `p exp(max rho)` is not."""
    base = markov_lm()

    def score(x: Tensor) -> Tensor:
        return torch.where(x[:, -1] == 0, -torch.inf, x[:, -1].double()) / 2

    sampler = FKSteering(8, potential=potential, terminal="running")
    samples = run(sampler, base, 4000, lift(lambda outputs: score(outputs)))
    x, log_prob = base.law()
    rho = torch.stack([score(x[:, : t + 1]) for t in range(3)])
    running = rho.sum(0) if potential == "sum" else rho.amax(0)
    assert within(samples.log_z.exp(), float((log_prob + running).exp().sum()))


@pytest.mark.parametrize(("v", "length", "seed"), SIZES)
def test_where_every_reward_is_minus_infinity_nothing_is_nan(v: int, length: int, seed: int) -> None:
    base = chain(v, length, seed)
    nothing = lift(lambda outputs: torch.full((len(outputs),), -torch.inf))
    for sampler in (FKSteering(4), FKSteering(4, n=2, potential="max"), FKSteering(4, ess_threshold=None)):
        samples = run(sampler, base, 3, nothing)
        assert bool(samples.log_z.isneginf().all()) and bool(samples.kl.isposinf().all())
        assert not bool((samples.pool or samples).log_weight.isnan().any())
    for tree in (DTS(None, rollouts=32, batch=8), DTS(4, rollouts=32, batch=8, merge=False)):
        samples = run(tree, base, 3, nothing)
        assert bool(samples.log_z.isneginf().all()) and not bool(samples.log_weight.isnan().any())
    assert len(run(SVDD(2, 3), base, 3, nothing)) == 6 and len(run(BestOfN(3), base, 3, nothing)) == 3


# ------------------------------------------------------------------------------------------ zero probabilities


@pytest.mark.parametrize(("v", "length", "seed"), [(3, 3, 0), slow(2, 5, 6), slow(4, 3, 2)])
@pytest.mark.parametrize("w", [0, 0.5, 1])
@pytest.mark.parametrize("aim", ["base", "product"])
@pytest.mark.parametrize("whose", ["tuned", "base", "both"])
def test_tokens_that_a_model_excludes(v: int, length: int, seed: int, w: float, aim: str, whose: str) -> None:
    """Towards the base the weight of what cannot be drawn from it is 0; towards the product `0^0` is 1."""
    base = chain(v, length, seed, 0.4 if whose in ("base", "both") else 0)
    tuned = chain(v, length, seed + 50, 0.4 if whose in ("tuned", "both") else 0)
    process = base.edited(RLGuidance(tuned, w, aim))
    p = base.law()[1].exp()
    reached = process.law()[1].exp() > 0  # a proposal cannot correct for what it never draws
    truth = float((mixed(base, tuned, w) if aim == "product" else torch.where(reached, p, 0.0)).sum())
    samples = run(FKSteering(4), process, 1200, NOTHING)
    assert within(samples.log_z.exp(), truth)
    tree = run(DTS(None, rollouts=64, batch=8), process, 40, NOTHING)
    assert within(tree.log_z.exp(), truth, 0.02 * truth)
    assert not bool(tree.log_weight.isnan().any())


# ------------------------------------------------------------------------------------------ trees


@pytest.mark.parametrize(
    ("steps", "sharp", "centre", "trees", "rollouts"),
    [(10, 4.0, 2.2, 24, 200), (6, 2.0, 1.8, 32, 200), slow(10, 4.0, 2.2, 16, 800), slow(15, 8.0, 1.5, 24, 200)],
)
def test_a_tree_is_not_pessimistic_on_a_continuous_chain(
    steps: int, sharp: float, centre: float, trees: int, rollouts: int
) -> None:
    process = GaussianProcess(steps=steps)
    mean, variance = process.chain_moments()
    a = 2 * sharp  # E exp(-a / 2 (x - b)^2) of a Gaussian
    truth = math.exp(-0.5 * math.log(1 + a * variance) - 0.5 * a * (mean - centre) ** 2 / (1 + a * variance))
    reward = lift(lambda outputs: -sharp * (outputs[:, 0] - centre) ** 2)
    samples = run(DTS(None, rollouts=rollouts), process, trees, reward, seed=3)
    assert within(samples.log_z.exp() / truth, 1.0)
    assert DTS().exploration == 0.1 and DTS(estimator="published").exploration == 0.0
    assert DTS(explore=0.3).exploration == DTS(explore=0.3, estimator="published").exploration == 0.3


@pytest.mark.parametrize(("v", "length", "seed"), SIZES)
def test_a_tree_without_merging_finds_what_is_rarely_possible(v: int, length: int, seed: int) -> None:
    base = chain(v, length, seed)
    scores = random_scores(base, seed, impossible=0.6)
    truth = float((base.law()[1].exp() * scores.exp()).sum())
    samples = run(DTS(None, rollouts=800, merge=False), base, 12, tabled(base, scores))
    assert within(samples.log_z.exp(), truth, 0.02 * truth)


@pytest.mark.parametrize("value", [1634783.0429, 1.6347830429, -1e-9 + 3])
def test_a_trees_rewards_keep_their_precision(value: float) -> None:
    reward = lift(lambda outputs: torch.full((len(outputs),), value, dtype=torch.float64))
    for sampler in (DTS(2, rollouts=8), SearchDTS(n=2, rollouts=8)):
        assert run(sampler, markov_lm(), 1, reward).reward.tolist() == [value] * 2


@pytest.mark.parametrize(("n", "length"), [(8, 1), (5, 2), (40, 3)])
def test_a_search_returns_as_many_as_were_asked_for(n: int, length: int) -> None:
    base = chain(2, length, 0)
    scores = torch.arange(2.0**length).double()
    samples = run(SearchDTS(n=n, rollouts=60), base, 2, tabled(base, scores))
    assert samples.group.tolist() == [0] * n + [1] * n
    for b in (0, 1):
        found = samples.reward[samples.group == b].tolist()
        whole = sorted(set(found), reverse=True)
        assert found[: len(whole)] == whole and found == [whole[i % len(whole)] for i in range(n)]


@pytest.mark.parametrize("exponent", [1e-6, 0.01, 0.4])
def test_a_tree_whose_leaves_are_all_known_comes_to_an_end(exponent: float) -> None:
    for sampler in (DTS, SearchDTS):
        tree = sampler(n=1, rollouts=None, max_nfe=300, exponent=exponent, widening=0.5, batch=4)
        samples = run(tree, markov_lm(), 2, NOTHING)
        assert samples.cost.nfe / 2 <= 300 and samples.trace[0].rollouts <= 304


# ------------------------------------------------------------------------------------------ best of n


@dataclass(frozen=True)
class Lean(TransitionEdit):
    """Adds `by` to the last token's logit."""

    by: float

    def shift(self, x: Tensor, context: Context) -> Tensor:
        bias = torch.zeros(x.shape[1], dtype=x.dtype)
        bias[-1] = self.by
        return x + bias


@pytest.mark.parametrize(("v", "length", "seed", "n"), [(3, 3, 0, 5), (2, 5, 1, 2), slow(4, 3, 2, 16)])
def test_the_kl_of_best_of_n_over_edits_is_a_bound(v: int, length: int, seed: int, n: int) -> None:
    base = chain(v, length, seed)
    process = base.edited(RLGuidance(chain(v, length, seed + 50), 0.7)).edited(Lean(-1.0))
    scores = torch.randn(v**length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, p = process.law()[1], base.law()[1]
    law = best_of_n_law(q, scores, n)
    exact = float((law * (law.log() - p)).sum())
    estimate = float((law * (q - p)).sum()) + best_of_n_kl(n)
    samples = run(BestOfN(n), process, 4000, tabled(base, scores))
    assert exact < estimate and within(samples.kl, estimate)
    plain = run(BestOfN(n), base, 50, tabled(base, scores))
    assert torch.allclose(plain.kl, torch.full((50,), best_of_n_kl(n), dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("v", "length", "seed"), SIZES)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_best_of_n_over_outputs_of_no_mass(v: int, length: int, seed: int, n: int) -> None:
    base = chain(v, length, seed, zeros=0.4)
    scores = torch.arange(v**length).double().flip(0)  # every output its own level
    law, p = best_of_n_law(base.law()[1], scores, n), base.law()[1].exp()
    assert bool((law[p == 0] == 0).all()) and float(law.sum()) == pytest.approx(1, abs=1e-12)
    alone = best_of_n_law(base.law()[1][p > 0], scores[p > 0], n)
    assert torch.equal(law[p > 0], alone)


@pytest.mark.parametrize(
    ("scores", "sizes", "want"),
    [
        ((-math.inf, 1, 2), (2, 3), (5 / 3, 2)),
        ((1, -math.inf, 3, -math.inf), (1, 2, 3, 4), (-math.inf, -math.inf, 2.5, 3)),
        ((-math.inf, -math.inf), (1, 2), (-math.inf, -math.inf)),
        ((0, math.inf), (1, 2), (math.inf, math.inf)),
    ],
)
def test_the_reward_curve_of_infinite_scores(scores: tuple, sizes: tuple, want: tuple) -> None:
    assert reward_curve(torch.tensor(scores, dtype=torch.float64), sizes).tolist() == pytest.approx(want)
