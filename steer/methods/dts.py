"""Diffusion tree sampling and search (Jain et al. 2025), over any process that can be forked.

A tree is grown from rollouts. Each descends from the root while a node has its share of children, `C N^alpha`,
choosing by value (DTS: with probability proportional to `exp(V / beta)`; DTS*: by the highest upper bound), draws one
new child from the process, runs on to the end, and backs the reward up through soft values. The tree can be stopped,
kept and grown further at any time.

**Two estimators.** The published one descends again by the same rule to a leaf. On finite trees it is pessimistic: a
child with an unlucky first rollout is rarely visited again, and this bias hardly falls with the number of rollouts. The
default here weighs every rollout by how much likelier the descent made its path than the process did,

    log w = sum over chosen children of log(frequency among draws) - log(probability of the choice)

so that `mean of w exp(r / beta)` estimates Z, and the leaves, weighted by `w exp(r / beta)`, are a population that
converges to `p exp(r / beta)`. (Derived here.) That needs every child to be chosen now and then: by value alone, a
child whose first rollout ended badly has a chance of almost 0 and a weight that no run ever sees, and on continuous
chains Z comes out a fifth too small at any number of rollouts. So a share `explore` of the choices goes by frequency.
What bias is left comes from how many children adaptive nodes have, and vanishes with the number of rollouts; no promise
is made for a small tree. Edits of the process are a proposal whose weight rides on the edges.

**How deep a tree chooses.** A node draws a new child until it has `C N^alpha` of them: with the paper's C = 2 and alpha
= 0.8 at each of its first 36 visits, so that a tree of some thousand rollouts chooses among its roots, hardly below
them, and does little more than importance sampling. A smaller `exponent` goes down sooner, at fewer evaluations a
rollout and from fewer roots (`recipes/README.md`, "Where trees stand").

The paper's lambda is 1 / beta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from steer.core import Ability, Process, Prompt, Run, Sampler, Samples, check
from steer.sampling.forest import Forest
from steer.sampling.lookahead import Lookahead
from steer.sampling.tree import Tree, picked

__all__ = ["DTS", "SearchDTS"]


@dataclass(frozen=True)
class DTS(Sampler):
    """Sample from `p exp(r / beta)` with a tree for each prompt.

    Attributes:
        n: outputs for each prompt; None returns every leaf with its weight.
        rollouts: budget for each prompt.
        max_nfe: budget of network evaluations for each prompt; never exceeded, except by a first batch. It bounds the
            rollouts as well.
        seconds: budget of wall time, after which no further batch starts. Whichever budget ends first holds.
        batch: rollouts that run together in each tree. Choices within a batch do not see each other's rewards.
        levels: at how many equal intervals the chain branches; None is every step, at most 5.
        widening, exponent: C and alpha of `C N^alpha` children at a node that was visited N times.
        explore: share of choices made by frequency instead of value, which bounds the weight of each by `1 / explore`;
            None is 0.1 for "weighted" and 0, the paper's rule, for "published".
        estimator: "weighted" or "published".
        lookahead: an estimate of a node's value before it has many children, such as `Preview()`; it guides choices,
            and no estimate rests on it. None is the paper's tree, which uses rollouts alone.
        trust: how many children's worth the lookahead counts for.
        merge: children that are equal (texts) are one node, counted by multiplicity.
        correct: weigh edits as a proposal; see `FKSteering`.
        max_bytes: memory for states that could go on at once; beyond it the oldest are reduced to what cannot be
            computed again.
    """

    n: int | None = 1
    rollouts: int | None = 128
    max_nfe: int | None = None
    seconds: float | None = None
    batch: int = 16
    levels: int | None = None
    widening: float = 2.0
    exponent: float = 0.8
    explore: float | None = None
    estimator: str = "weighted"
    lookahead: Lookahead | None = None
    trust: float = 1.0
    merge: bool = True
    correct: bool = True
    max_bytes: int = 1 << 30

    title = "tree sampling"
    needs = frozenset({Ability.BRANCH})
    needs_reward = True
    tilts = True
    population = "rollouts"
    shares = True
    chooses_whole = False
    shows = frozenset({"tree"})
    own_settings = frozenset({"max_bytes", "max_nfe"})
    kl_kind = "none: the law of a tree's leaves is not known"

    @property
    def rows(self) -> int:
        return self.batch

    def updates(self, process: Process) -> int:
        budgets = [self.rollouts, None if self.max_nfe is None else self.max_nfe // process.num_steps]
        known = [b for b in budgets if b is not None]
        return -(-min(known) // self.batch) * process.num_steps if known else process.num_steps

    def __post_init__(self) -> None:
        for name in ("n", "rollouts", "max_nfe", "batch", "levels", "max_bytes"):
            value = getattr(self, name)
            optional = value is None and name not in ("batch", "max_bytes")
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            check(optional or whole, name, value, "an integer of 1 or more")
        check(self.seconds is None or self.seconds > 0, "seconds", self.seconds, "a number above 0")
        budgets = (self.rollouts, self.max_nfe, self.seconds)
        check(any(b is not None for b in budgets), "rollouts", None, "a budget: rollouts, max_nfe or seconds")
        check(self.widening > 0, "widening", self.widening, "a number above 0")
        check(0 < self.exponent <= 1, "exponent", self.exponent, "0 < alpha <= 1")
        check(self.explore is None or 0 <= self.explore <= 1, "explore", self.explore, "0 to 1, or None")
        check(self.trust > 0, "trust", self.trust, "a number above 0")
        check(self.estimator in ("weighted", "published"), "estimator", self.estimator, "weighted, published")

    searching = False

    @classmethod
    def sized(cls, candidates: int, n: int = 1, **settings: Any) -> Self:
        return super().sized(candidates, n, **{**settings, "batch": min(settings.get("batch", 8), candidates)})

    @property
    def exploration(self) -> float:
        """`explore`, or what stands for None: 0.1 where rollouts are weighed, 0 in the published estimator."""
        if self.explore is not None:
            return self.explore
        return 0.1 if self.estimator == "weighted" else 0.0

    @property
    def hard(self) -> bool:
        """Whether trees back up the maximum in place of soft values."""
        return False

    def check_process(self, process: Process) -> None:
        super().check_process(process)
        if self.lookahead is not None:
            self.lookahead.check(process)

    def prepared(self, process: Process) -> Process:
        process = process.as_proposal() if self.correct else process
        return process if self.lookahead is None else self.lookahead.prepared(process)

    def draw(self, run: Run) -> Samples:
        return Forest(self, run).grow().samples(self.n)

    def plant(self, process: Process, prompts: Sequence[Prompt], **request: Any) -> Forest:
        """Trees without rollouts, to be grown step by step; `request` is as for `run`."""
        return Forest(self, self.begin(process, prompts, **request))

    def choose(self, tree: Tree, node: int, u: float) -> tuple[int, float]:
        """The child to descend to, by a uniform number, and the log-weight of that choice."""
        at, chance, frequency = tree.law(node, self.exploration)
        cdf = chance.cumsum()
        k = picked(cdf, u * cdf[-1])
        return int(at[k]), float(np.log(frequency[k]) - np.log(chance[k]))


@dataclass(frozen=True)
class SearchDTS(DTS):
    """DTS*: look for high rewards with upper confidence bounds; returns the best leaves, not a sample of any law. Equal
    leaves are one; where fewer than `n` were found, the best are repeated. It pays on deep chains: where a few hundred
    rollouts see most outputs anyway, plain best-of-n finds as much or more.

    Attributes:
        bonus: c of `c sqrt(log N(parent) / N(child))`, in units of the reward. The paper does not give it.
        backup: "soft" values at `beta`, or "max".
    """

    widening: float = 1.0
    exponent: float = 0.4
    bonus: float = 0.1
    backup: str = "soft"

    searching = True
    title = "tree search"
    tilts = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.bonus >= 0, "bonus", self.bonus, "a number of 0 or more")
        check(self.backup in ("soft", "max"), "backup", self.backup, "soft, max")

    @property
    def hard(self) -> bool:
        return self.backup == "max"

    def choose(self, tree: Tree, node: int, u: float) -> tuple[int, float]:
        return tree.upper(node, self.bonus), 0.0
