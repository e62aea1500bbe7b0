"""Tree sampling and search against enumeration."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steer.core import Context, InputError, Reward, Samples, TransitionEdit, UnsupportedError
from steer.methods.dts import DTS, SearchDTS
from steer.rewards import lift
from steer.sampling.forest import Forest
from steer.sampling.tree import Tree
from steer.toy import GaussianProcess, TabularProcess, markov_lm

LOG_Z = 1.37488079884


def twos(x: Tensor) -> Tensor:
    return (x == 2).sum(-1).double()


TWOS = lift(lambda outputs: twos(outputs))
PLACE = torch.tensor([9, 3, 1])


def plant(
    sampler: DTS, trees: int, seed: int = 0, process: Any = None, reward: Any = TWOS, beta: float = 1.0
) -> Forest:
    generator = torch.Generator().manual_seed(seed)
    return sampler.plant(process or markov_lm(), [""] * trees, generator=generator, reward=reward, beta=beta)


def laws(forest: Forest) -> Tensor:
    """Law over the 27 sequences that each tree samples from `[B, 27]`."""
    samples = forest.samples(None)
    index = samples.group * 27 + samples.outputs @ PLACE
    return torch.zeros(27 * len(forest.trees), dtype=torch.float64).index_add(0, index, samples.weights).reshape(-1, 27)


def target() -> Tensor:
    return markov_lm().target(twos, 1.0)[0].exp()


def distance(law: Tensor) -> float:
    return 0.5 * float((law - target()).abs().sum())


def mean_of(law: Tensor) -> Tensor:
    return law @ twos(markov_lm().law()[0])


# ------------------------------------------------------------------------------------------------- the tree by itself


def exact_tree(beta: float, hard: bool = False) -> tuple[Tree, list[tuple[int, int]]]:
    """Every node with exactly 4 children in the multiplicities of p (whose probabilities are quarters)."""
    tree, chain, leaves = Tree(beta, hard), markov_lm(), []
    level = [(0, ())]
    for t in range(3):
        deeper = []
        for node, prefix in level:
            p = chain.transition[prefix[-1]] if prefix else chain.initial
            for token in range(3):
                for _ in range(round(4 * float(p[token]))):
                    deeper.append((tree.add(node, t + 1), (*prefix, token)))
        level = deeper
    for node, sequence in level:
        tree.terminal[node], tree.value[node] = True, sequence.count(2)
        leaves.append((node, sequence[0] * 9 + sequence[1] * 3 + sequence[2]))
    for node, _ in leaves:
        tree.back_up(node)
    return tree, leaves


def test_the_exact_tree_has_the_exact_root_value_and_law() -> None:
    for lam, root in ((1, 1.3748807988), (2, 1.8226970329)):
        tree, leaves = exact_tree(1 / lam)
        assert abs(tree.value[0] - root) < 1e-9
        chance = np.zeros(len(tree))
        chance[0] = 1
        for node in range(len(tree)):
            if len(tree.children(node)):
                at, law, _ = tree.law(node)
                chance[at] = chance[node] * law
        found = torch.zeros(27, dtype=torch.float64)
        for node, place in leaves:
            found[place] += chance[node]
        exact = markov_lm().target(twos, 1 / lam)[0].exp()
        assert float((found - exact).abs().max()) < 1e-12
    assert exact_tree(1.0, hard=True)[0].value[0] == 3


def test_backup_of_three_values() -> None:
    for lam, value in ((1, 1.3089936758), (2, 1.5221596699)):
        tree = Tree(1 / lam)
        for reward in (0.0, 1.0, 2.0):
            leaf = tree.add(0, 1)
            tree.value[leaf] = reward
        tree.back_up(leaf)
        assert abs(tree.value[0] - value) < 1e-9
    tree.beta = 1.0
    assert np.abs(tree.law(0)[1] - [0.090031, 0.244728, 0.665241]).max() < 1e-6


def test_widening_reaches_the_tabulated_number_of_children() -> None:
    forest = plant(DTS(batch=1, merge=False), 1)
    counts = {}
    for n in (10, 30, 100, 300):
        forest.grow(rollouts=n)
        counts[n] = int(forest.trees[0].draws[0])
    assert counts == {10: 10, 30: 30, 100: 80, 300: 192}


def test_arrays_grow_and_come_back() -> None:
    tree = plant(DTS(batch=8, rollouts=200, merge=False), 1).grow().trees[0]
    again = Tree.restore(1.0, False, tree.arrays())
    assert len(again) == len(tree) > 64
    for node in range(len(tree)):
        assert np.array_equal(again.children(node), tree.children(node))
    for name, values in tree.arrays().items():
        assert np.array_equal(values, again.arrays()[name])


# ------------------------------------------------------------------------------------------------- tree sampling


def test_the_published_estimator_has_the_tabulated_bias() -> None:
    """Average over trees at N = 10, 30, 100: E[r] 1.711, 1.820, 1.767 and root value 1.310, 1.353, 1.289."""
    forest = plant(DTS(batch=1, merge=False, estimator="published"), 400)
    for n, mean, root in ((10, 1.711, 1.310), (30, 1.820, 1.353), (100, 1.767, 1.289)):
        forest.grow(rollouts=n)
        means, roots = mean_of(laws(forest)), torch.tensor([tree.value[0] for tree in forest.trees])
        for found, truth in ((means, mean), (roots, root)):
            # The table is itself an average over trees: as much noise again.
            assert abs(float(found.mean()) - truth) < 5 * 2**0.5 * float(found.std()) / len(found) ** 0.5


def test_the_weighted_estimator_converges_where_the_published_one_stalls() -> None:
    forest = plant(DTS(batch=4, merge=False), 16)
    errors = {}
    for n in (100, 800, 3000):
        forest.grow(rollouts=n)
        errors[n] = float((laws(forest) - target()).abs().sum(1).mean()) / 2
        z = forest.samples(None).log_z.exp()
    assert distance(laws(forest).mean(0)) < 0.02
    assert errors[3000] < 0.55 * errors[800] < 0.55**2 * errors[100]  # each tree by itself, about as 1 / sqrt(N)
    assert abs(float(z.mean()) - math.exp(LOG_Z)) < 5 * float(z.std()) / 4
    forest.sampler = replace(forest.sampler, estimator="published")
    assert distance(laws(forest).mean(0)) > 0.05
    assert max(tree.value[0] for tree in forest.trees) < LOG_Z - 0.05


def test_merging_equal_children_removes_the_bias_too() -> None:
    forest = plant(DTS(batch=4, estimator="published"), 16)
    forest.grow(rollouts=3000)
    assert distance(laws(forest).mean(0)) < 0.015
    assert max(len(tree) for tree in forest.trees) <= 1 + 3 + 9 + 27


@pytest.mark.parametrize(("merge", "explore"), [(True, 0.0), (False, 0.0), (False, 0.3)])
def test_z_is_unbiased_up_to_its_noise(merge: bool, explore: float) -> None:
    forest = plant(DTS(batch=2, rollouts=24, merge=merge, explore=explore), 3000)
    z = forest.grow().samples(None).log_z.exp()
    # The number of children of an adaptive node leaves a bias of less than one part in a hundred here.
    assert abs(float(z.mean()) - math.exp(LOG_Z)) < 5 * float(z.std()) / 3000**0.5 + 0.01 * math.exp(LOG_Z)


@dataclass(frozen=True)
class Pull(TransitionEdit):
    by: float

    def shift(self, x: Tensor, context: Context) -> Tensor:
        return x + self.by * torch.tensor([0.0, 0.0, 1.0], dtype=x.dtype)


def test_a_guided_proposal_is_corrected_on_the_edges() -> None:
    for merge in (True, False):
        forest = plant(DTS(batch=4, rollouts=800, merge=merge), 16, process=markov_lm().edited(Pull(1.0))).grow()
        assert distance(laws(forest).mean(0)) < 0.03
    free = plant(DTS(batch=4, rollouts=800, correct=False), 16, process=markov_lm().edited(Pull(1.0))).grow()
    exact = markov_lm().edited(Pull(1.0)).target(twos, 1.0)[0].exp()
    assert 0.5 * float((laws(free).mean(0) - exact).abs().sum()) < 0.03


class Quadratic(Reward):
    def score(self, samples: Samples) -> Tensor:
        return -0.5 * (samples.outputs[:, 0] - 2) ** 2


def test_the_tilt_of_the_discretised_chain() -> None:
    """Mean .951614, variance .475807, log Z -1.37133349: the chain's own law, tilted."""
    process = GaussianProcess(steps=50)
    forest = plant(DTS(batch=50, rollouts=1500), 24, process=process, reward=Quadratic()).grow()
    samples = forest.samples(None)
    x, w = samples.outputs[:, 0], samples.weights
    mean = torch.zeros(24, dtype=torch.float64).index_add(0, samples.group, w * x)
    variance = torch.zeros(24, dtype=torch.float64).index_add(0, samples.group, w * (x - mean[samples.group]) ** 2)
    for found, truth in ((mean, 0.951614), (variance, 0.475807), (samples.log_z, -1.37133349)):
        assert abs(float(found.mean()) - truth) < 5 * float(found.std()) / 24**0.5 + 2e-3
    drawn = forest.samples(10)
    assert len(drawn) == 240 and drawn.outputs.shape == (240, 1)
    assert torch.allclose(Quadratic()(drawn), drawn.reward)  # each output came with its own reward


def test_siblings_share_the_networks_pass() -> None:
    process = GaussianProcess(steps=10)
    forest = plant(DTS(batch=20, rollouts=400), 1, process=process, reward=Quadratic()).grow()
    starts = forest.trees[0].level[1 : len(forest.trees[0])] - 1  # level 1 is the noise
    # Every node below the leaves was read once, and every step between levels once for each row.
    read = int((starts < 5).sum())
    between = int((starts >= 1).sum())
    assert forest.cost.nfe == read + between  # levels of 2 steps: one read at the node, one in between
    assert forest.cost.nfe < 400 * 10


# --------------------------------------------------------------------------------------------------------- search


def deep_chain() -> TabularProcess:
    """Twelve tokens; only the third token counts, and only in a run that reaches the end."""
    initial = torch.tensor([0.6, 0.2, 0.2], dtype=torch.float64)
    stay = torch.full((3, 3), 0.2, dtype=torch.float64) + torch.tensor([[0.4, 0, 0], [0.4, 0, 0], [0.4, 0, 0]]).double()
    return TabularProcess(initial, stay, 12)


def test_search_beats_best_of_n_on_a_deep_chain() -> None:
    sampler = SearchDTS(batch=4, rollouts=128, levels=12, bonus=0.5, n=1)
    best = plant(sampler, 60, process=deep_chain()).grow().samples(1).reward
    from steer.methods.best_of_n import BestOfN

    base = BestOfN(128).run(deep_chain(), [""] * 60, generator=torch.Generator().manual_seed(0), reward=TWOS).reward
    gap = best.mean() - base.mean()
    assert float(gap) > 5 * float((best.var() / 60 + base.var() / 60).sqrt())


def test_search_on_the_toy_matches_its_table() -> None:
    """E[best] for 8 and 32 rollouts: 2.281 and 2.862 (best-of-N: 2.3022, 2.8731); nothing to gain on so shallow a
    tree.
    """
    forest = plant(SearchDTS(batch=1, widening=2.0, exponent=0.8, bonus=1.0, merge=False), 1500)
    for n, truth in ((8, 2.281), (32, 2.862)):
        best = forest.grow(rollouts=n).samples(1).reward
        assert abs(float(best.mean()) - truth) < 5 * 2**0.5 * float(best.std()) / 1500**0.5
    several = forest.samples(3)
    assert len(several) == 4500 and bool((several.reward[0::3] >= several.reward[1::3]).all())


# ------------------------------------------------------------------------------------------- budgets, stop, resume


@pytest.mark.parametrize("kind", ["tabular", "gaussian"])
def test_stop_and_resume_give_the_uninterrupted_forest(kind: str, tmp_path: Path) -> None:
    process: Any = markov_lm() if kind == "tabular" else GaussianProcess(steps=10)
    reward: Any = TWOS if kind == "tabular" else Quadratic()
    whole = plant(DTS(batch=8), 2, process=process, reward=reward).grow(rollouts=96)
    stopped = plant(DTS(batch=8), 2, process=process, reward=reward).grow(rollouts=32).grow(rollouts=64)
    stopped.save(tmp_path / "forest.safetensors")
    resumed = plant(DTS(batch=8), 2, seed=5, process=process, reward=reward).load(tmp_path / "forest.safetensors")
    assert resumed.rollouts == 64 and resumed.cost.nfe == stopped.cost.nfe
    for forest in (stopped, resumed):
        forest.grow(rollouts=96)
        for a, b in zip(whole.trees, forest.trees, strict=True):
            assert all(np.array_equal(x, b.arrays()[k]) for k, x in a.arrays().items() if k not in ("chunk", "row"))
        assert torch.equal(whole.samples(7).outputs, forest.samples(7).outputs)
        whole = plant(DTS(batch=8), 2, process=process, reward=reward).grow(rollouts=96)
    with pytest.raises(InputError, match="forest"):
        plant(DTS(batch=4), 2, process=process, reward=reward).load(tmp_path / "forest.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"no forest")
    with pytest.raises(InputError, match="forest"):
        plant(DTS(batch=8), 2, process=process, reward=reward).load(tmp_path / "other.safetensors")


def test_budgets_hold() -> None:
    process = GaussianProcess(steps=10)
    forest = plant(DTS(batch=8), 2, process=process, reward=Quadratic()).grow(max_nfe=1000)
    assert 900 <= forest.cost.nfe / 2 <= 1000
    began = forest.rollouts
    forest.grow(seconds=forest.cost.seconds + 0.05)
    assert forest.rollouts > began
    done = forest.rollouts
    assert forest.grow(rollouts=done).rollouts == done


def test_memory_is_bounded() -> None:
    process = GaussianProcess(steps=10)
    small = DTS(batch=50, max_bytes=2000)
    free = plant(DTS(batch=50), 1, process=process, reward=Quadratic()).grow(rollouts=2500)
    bound = plant(small, 1, process=process, reward=Quadratic()).grow(rollouts=2500)
    assert len(bound.trees[0]) > 10_000
    assert bound._store.held <= 2000 + 50 * 16 and free._store.held > 50_000
    # What was reduced is computed again: more evaluations, the same tree.
    assert bound.cost.nfe > free.cost.nfe
    assert torch.equal(bound.samples(20).outputs, free.samples(20).outputs)


def test_bad_input_is_refused() -> None:
    for field, value in (
        ("n", 0),
        ("rollouts", 0),
        ("max_nfe", -1),
        ("batch", 0),
        ("levels", 0),
        ("seconds", 0.0),
        ("widening", 0.0),
        ("exponent", 1.5),
        ("explore", 2.0),
        ("estimator", "x"),
        ("rollouts", True),
    ):
        with pytest.raises(InputError, match=field):
            DTS(**{field: value})
    with pytest.raises(InputError, match="rollouts"):
        DTS(rollouts=None)
    for field, value in (("bonus", -1.0), ("backup", "x")):
        with pytest.raises(InputError, match=field):
            SearchDTS(**{field: value})
    with pytest.raises(InputError, match="reward"):
        DTS().run(markov_lm(), [""], generator=torch.Generator())
    with pytest.raises(UnsupportedError, match="eta"):
        DTS().run(GaussianProcess(eta=0.0), [""], generator=torch.Generator(), reward=Quadratic())
    with pytest.raises(InputError, match="rollouts"):
        plant(DTS(), 1).samples(1)
