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
converges to `p exp(r / beta)`. (Derived here; its bias comes only from how many children adaptive nodes have, and
vanishes.) Edits of the process are a proposal whose weight rides on the edges.

The paper's lambda is 1 / beta.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steer.artifacts import replacing
from steer.core import (
    Ability,
    Cost,
    InputError,
    Process,
    Prompt,
    Reward,
    Sampler,
    Samples,
    UnsupportedError,
    check,
)
from steer.lookahead import Lookahead
from steer.tree import Floats, Ints, Tree
from steer.weights import resample

__all__ = ["DTS", "Forest", "SearchDTS"]

_SLACK = 1e-9
"""`2 * 32^0.8` is 32.000000000000004 in floating point."""


@dataclass(frozen=True)
class DTS(Sampler):
    """Sample from `p exp(r / beta)` with a tree for each prompt.

    Attributes:
        n: outputs for each prompt; None returns every leaf with its weight.
        rollouts: budget for each prompt.
        max_nfe: budget of network evaluations for each prompt; never exceeded, except by a first batch.
        seconds: budget of wall time, after which no further batch starts. Whichever budget ends first holds.
        batch: rollouts that run together in each tree. Choices within a batch do not see each other's rewards.
        levels: at how many equal intervals the chain branches; None is every step, at most 5.
        widening, exponent: C and alpha of `C N^alpha` children at a node that was visited N times.
        explore: share of choices made by frequency instead of value, which bounds the weights.
        estimator: "weighted" or "published".
        lookahead: what is thought of a node before it has many children, such as `Preview()`; it guides choices, and no
            estimate rests on it. None is the paper's tree, which knows rollouts alone.
        trust: how many children's worth the lookahead counts for.
        merge: children that are equal (texts) are one node, counted by multiplicity.
        correct: weigh edits as a proposal; see `FKSteering`.
        max_bytes: memory for states that could go on at once; beyond it the oldest are reduced to what cannot be
        computed
            again.
    """

    n: int | None = 1
    rollouts: int | None = 128
    max_nfe: int | None = None
    seconds: float | None = None
    batch: int = 16
    levels: int | None = None
    widening: float = 2.0
    exponent: float = 0.8
    explore: float = 0.0
    estimator: str = "weighted"
    lookahead: Lookahead | None = None
    trust: float = 1.0
    merge: bool = True
    correct: bool = True
    max_bytes: int = 1 << 30
    needs_reward = True

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
        check(0 <= self.explore <= 1, "explore", self.explore, "0 to 1")
        check(self.trust > 0, "trust", self.trust, "a number above 0")
        check(self.estimator in ("weighted", "published"), "estimator", self.estimator, "weighted, published")

    searching = False

    def run(
        self,
        process: Process,
        prompts: Sequence[Prompt],
        *,
        generator: torch.Generator,
        reward: Reward | None = None,
        beta: float = 1.0,
        on_step: Callable[[Any], None] | None = None,
    ) -> Samples:
        forest = self.plant(process, prompts, generator=generator, reward=reward, beta=beta)
        return forest.grow(on_step=on_step).samples(self.n)

    def plant(
        self,
        process: Process,
        prompts: Sequence[Prompt],
        *,
        generator: torch.Generator,
        reward: Reward | None,
        beta: float = 1.0,
    ) -> Forest:
        """Trees without rollouts, to be grown step by step."""
        check(reward is not None, "reward", None, "a reward: a tree search needs values")
        assert reward is not None
        process.require(Ability.BRANCH, "tree sampling")
        process = process.as_proposal() if self.correct else process
        if self.lookahead is not None:
            self.lookahead.check(process)
            process = self.lookahead.prepared(process)
        return Forest(self, process, list(prompts), reward, beta, generator)

    def choose(self, tree: Tree, node: int, u: float) -> tuple[int, float]:
        """The child to descend to, by a uniform number, and the log-weight of that choice."""
        at, chance, frequency = tree.law(node, self.explore)
        cdf = chance.cumsum()
        k = min(int(np.searchsorted(cdf, u * cdf[-1], side="right")), len(at) - 1)
        return int(at[k]), float(np.log(frequency[k]) - np.log(chance[k]))


@dataclass(frozen=True)
class SearchDTS(DTS):
    """DTS*: look for high rewards with upper confidence bounds; returns the best leaves, not a sample of any law.

    Attributes:
        bonus: c of `c sqrt(log N(parent) / N(child))`, in units of the reward. The paper does not give it.
        backup: "soft" values at `beta`, or "max".
    """

    widening: float = 1.0
    exponent: float = 0.4
    bonus: float = 0.1
    backup: str = "soft"

    searching = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.bonus >= 0, "bonus", self.bonus, "a number of 0 or more")
        check(self.backup in ("soft", "max"), "backup", self.backup, "soft, max")

    def choose(self, tree: Tree, node: int, u: float) -> tuple[int, float]:
        return tree.upper(node, self.bonus), 0.0


@dataclass
class _Rollout:
    tree: int
    node: int
    """Where it is: at first the node to expand, at last its leaf."""
    log_path: float


@dataclass
class Forest:
    """One tree for each prompt, growing together: rollouts of all trees share the network's batches."""

    sampler: DTS
    process: Process
    prompts: list[Prompt]
    reward: Reward
    beta: float
    generator: torch.Generator
    cost: Cost = field(default_factory=Cost)
    rollouts: int = 0
    """Finished in each tree."""

    def __post_init__(self) -> None:
        hard = isinstance(self.sampler, SearchDTS) and self.sampler.backup == "max"
        trust = 0.0 if self.sampler.lookahead is None else self.sampler.trust
        self.trees = [Tree(self.beta, hard, trust) for _ in self.prompts]
        self.log_path: list[list[float]] = [[] for _ in self.prompts]
        """Log-weight of every rollout's path, by tree."""
        self.leaf: list[list[int]] = [[] for _ in self.prompts]
        """Leaf of every rollout, by tree."""
        self._known: list[dict[tuple[int, Any], int]] = [{} for _ in self.prompts]
        self._store = _Store(self.process, self.prompts, self.sampler.max_bytes)
        self._roots: Any = None
        steps = self.process.num_steps
        intervals = min(steps, self.sampler.levels or 5)
        ends = [round(steps * (i + 1) / intervals) for i in range(intervals)]
        self.steps = [-1 if self.process.random_start else 0, *([0] if self.process.random_start else []), *ends]
        """Step of the process at every level of the tree; the root of a random start is before it."""

    # ---- growing

    def grow(
        self,
        rollouts: int | None = None,
        max_nfe: int | None = None,
        seconds: float | None = None,
        on_step: Callable[[Any], None] | None = None,
    ) -> Forest:
        """Grow to budgets *in all*, in whole batches; the sampler's own where none is given. Returns itself."""
        if rollouts is None and max_nfe is None and seconds is None:
            rollouts, max_nfe, seconds = self.sampler.rollouts, self.sampler.max_nfe, self.sampler.seconds
        began = time.perf_counter()
        before, steps = self.cost.seconds, self.process.num_steps
        size = self.sampler.batch
        if self.rollouts == 0:
            size = max(1, min(size, rollouts or size, (max_nfe or size * steps) // steps))
        most = size * steps
        while True:
            spent = self.cost.nfe / len(self.prompts)
            self.cost = replace(self.cost, seconds=before + time.perf_counter() - began)
            if rollouts is not None and self.rollouts >= rollouts:
                break
            if max_nfe is not None and self.rollouts and spent + most > max_nfe:
                break
            if seconds is not None and self.rollouts and self.cost.seconds >= seconds:
                break
            self._batch(size, on_step)
        return self

    def _batch(self, size: int, on_step: Callable[[Any], None] | None) -> None:
        draws = torch.rand(
            len(self.trees), size, len(self.steps), dtype=torch.float64, generator=self.generator,
            device=self.generator.device,
        ).tolist()  # fmt: skip
        waiting: dict[int, list[_Rollout]] = {}
        done: list[_Rollout] = []
        for t, tree in enumerate(self.trees):
            pending: dict[int, int] = {}
            for u in draws[t]:
                rollout = self._select(t, tree, pending, u)
                if tree.terminal[rollout.node]:
                    done.append(rollout)
                else:
                    waiting.setdefault(int(tree.level[rollout.node]), []).append(rollout)
        done += self._run(waiting, on_step)
        for rollout in done:
            self.trees[rollout.tree].back_up(rollout.node)
            self.log_path[rollout.tree].append(rollout.log_path)
            self.leaf[rollout.tree].append(rollout.node)
        self.rollouts += size

    def _select(self, t: int, tree: Tree, pending: dict[int, int], u: Sequence[float]) -> _Rollout:
        """Descend to the node to expand, or to a leaf; visits are counted at once, so that a batch spreads out."""
        node, log_path = 0, 0.0
        tree.visits[0] += 1
        while not tree.terminal[node]:
            wanted = self.sampler.widening * (tree.visits[node] - 1) ** self.sampler.exponent - _SLACK
            if not len(tree.children(node)) or tree.draws[node] + pending.get(node, 0) < wanted:
                pending[node] = pending.get(node, 0) + 1
                break
            node, step = self.sampler.choose(tree, node, u[int(tree.level[node])])
            log_path += step + float(tree.log_edge[node])
            tree.visits[node] += 1
        return _Rollout(t, node, log_path)

    def _run(self, waiting: dict[int, list[_Rollout]], on_step: Callable[[Any], None] | None) -> list[_Rollout]:
        """Draw a child of every waiting node and go on to the end; rows that start deeper join the others there."""
        if not waiting:
            return []
        process, state = self.process, None
        rows: list[_Rollout] = []
        done: list[_Rollout] = []
        for level in range(min(waiting), len(self.steps) - 1):
            joining = waiting.get(level, [])
            if joining:
                fresh = self._states(level, joining)
                if state is not None:
                    fresh = process.stack([state, fresh])
                state, rows = fresh, [*rows, *joining]
            if state is None:
                continue
            before = self._ratio(state)
            while state.step < self.steps[level + 1] and not process.done(state):
                state = process.propose(state, self.generator)
                if on_step is not None:
                    on_step(state)
            state, cost = process.settle(state)
            self.cost = self.cost + cost
            state, rows, ended = self._arrive(level + 1, state, rows, before)
            done += ended
        return done

    def _states(self, level: int, rollouts: list[_Rollout]) -> Any:
        process = self.process
        if self.steps[level] < 0:  # children of the root are fresh noise
            seen = [0] * len(self.prompts)
            place = []
            for rollout in rollouts:
                place.append((rollout.tree, seen[rollout.tree]))
                seen[rollout.tree] += 1
            most = max(seen)
            state = process.init(self.prompts, most, self.generator)
            return process.gather(state, torch.tensor([tree * most + i for tree, i in place]))
        if level == 0:
            if self._roots is None:
                self._roots, cost = process.settle(process.read(process.init(self.prompts, 1, self.generator)))
                self.cost = self.cost + cost
            return process.gather(self._roots, torch.tensor([r.tree for r in rollouts]))
        trees = [(self.trees[r.tree], r.node) for r in rollouts]
        state, cost = self._store.rows([(int(tree.chunk[n]), int(tree.row[n])) for tree, n in trees])
        self.cost = self.cost + cost
        return state

    def _ratio(self, state: Any) -> Tensor:
        if not self.sampler.correct or self.steps[0] > state.step:
            return torch.zeros(len(state), dtype=torch.float64)
        if state.base_log_prob is None:
            raise UnsupportedError(
                "a tree cannot weigh edits of prompts or hidden states, whose law against the base is not known while "
                "generating: set correct=False to search under the edited process itself"
            )
        return (state.base_log_prob + state.tilt - state.log_prob).double().cpu()

    def _arrive(
        self, level: int, state: Any, rows: list[_Rollout], before: Tensor
    ) -> tuple[Any, list[_Rollout], list[_Rollout]]:
        """Rows become nodes at `level`; those that are finished become leaves with their reward and leave."""
        process = self.process
        edges = (self._ratio(state) - before).tolist() if level > 1 or self.steps[0] == 0 else [0.0] * len(rows)
        names = process.identify(state) if self.sampler.merge else None
        finished = process.finished(state).cpu()
        inner = (~finished).nonzero().squeeze(1)
        # Reading now lets every later child of these nodes share this pass of the network.
        kept, chunk = None, -1
        guesses: list[float] = []
        if len(inner):
            if len(inner) < len(rows):
                kept = process.read(process.gather(state, inner))
            else:
                kept = state = process.read(state)
            kept, cost = process.settle(kept)
            self.cost = self.cost + cost
            guesses = self._guessed(kept)
            chunk = self._store.add(kept)
        place = {int(i): k for k, i in enumerate(inner.tolist())}
        ends = finished.nonzero().squeeze(1)
        scores: list[float] = []
        leaf_chunk = -1
        if len(ends):
            gone = process.gather(state, ends) if len(ends) < len(rows) else state
            scores = self.reward(process.decode(gone)).tolist()
            self.cost = self.cost + Cost(reward_calls=len(ends))
            leaf_chunk = self._store.add_leaves(gone)
        done: list[_Rollout] = []
        for i, rollout in enumerate(rows):
            tree = self.trees[rollout.tree]
            node = self._child(rollout, level, edges[i], None if names is None else names[i])
            if i in place:
                tree.chunk[node], tree.row[node] = chunk, place[i]
                tree.guess[node] = guesses[place[i]]
            else:
                k = len(done)
                if not tree.terminal[node]:
                    tree.terminal[node], tree.value[node] = True, scores[k]
                    tree.chunk[node], tree.row[node] = leaf_chunk, k
                done.append(rollout)
            rollout.node = node
            rollout.log_path += edges[i]
        live = None
        if kept is not None:
            # The store's copy must survive what the live rows do next.
            live = process.gather(kept, torch.arange(len(kept))) if process.consumes else kept
        return live, [r for i, r in enumerate(rows) if i in place], done

    def _guessed(self, state: Any) -> list[float]:
        if self.sampler.lookahead is None:
            return [0.0] * len(state)
        values, cost = self.sampler.lookahead(self.process, state, self.reward, self.beta, self.generator)
        self.cost = self.cost + cost
        return values.tolist()

    def _child(self, rollout: _Rollout, level: int, log_edge: float, name: Any) -> int:
        tree, known = self.trees[rollout.tree], self._known[rollout.tree]
        if name is not None and (rollout.node, name) in known:
            node = known[rollout.node, name]
            tree.draw_again(node)
            tree.visits[node] += 1
            return node
        node = tree.add(rollout.node, level, log_edge)
        tree.visits[node] += 1
        if name is not None:
            known[rollout.node, name] = node
        return node

    # ---- results

    def weights(self, t: int) -> tuple[Ints, Floats]:
        """Leaves of tree `t` and their log-weights: of their rollouts together, over the number of rollouts, times
        `exp(r / beta)`; their log-sum is log Z.
        """
        tree = self.trees[t]
        leaf, inverse = np.unique(np.asarray(self.leaf[t], dtype=np.int64), return_inverse=True)
        paths = np.asarray(self.log_path[t])
        mass = np.full(len(leaf), -np.inf)
        np.logaddexp.at(mass, inverse, paths)
        return leaf, mass - np.log(max(1, len(paths))) + tree.value[leaf] / self.beta

    def samples(self, n: int | None = None) -> Samples:
        """`n` outputs for each prompt, or all leaves with their weights. DTS* gives the best leaves first."""
        check(self.rollouts > 0, "rollouts", 0, "a forest that has been grown")
        chosen: list[tuple[int, int]] = []
        log_weights: list[float] = []
        log_z: list[float] = []
        for t, tree in enumerate(self.trees):
            leaf, weight = self.weights(t)
            if self.sampler.searching:
                order = leaf[np.argsort(-tree.value[leaf], kind="stable")][: n or len(leaf)]
                picked, own = order, np.zeros(len(order))
            elif self.sampler.estimator == "published":
                picked, own = self._published(tree, n, leaf)
            elif n is None:
                picked, own = leaf, weight
            else:
                index = resample(torch.from_numpy(weight), self.generator, "ssp", n).numpy()
                picked, own = leaf[index], np.zeros(n)
            chosen += [(t, int(node)) for node in picked]
            log_weights += own.tolist()
            log_z.append(
                float(np.logaddexp.reduce(weight))
                if self.sampler.estimator == "weighted"
                else tree.value[0] / self.beta
            )
        trees = [self.trees[t] for t, _ in chosen]
        state = self._store.leaves(
            [(int(tree.chunk[i]), int(tree.row[i])) for tree, (_, i) in zip(trees, chosen, strict=True)]
        )
        found = self.process.decode(state)
        searching = self.sampler.searching
        return replace(
            found,
            reward=torch.tensor([float(tree.value[i]) for tree, (_, i) in zip(trees, chosen, strict=True)]).double(),
            log_weight=torch.tensor(log_weights, dtype=torch.float64),
            log_z=None if searching else torch.tensor(log_z, dtype=torch.float64),
            lineage=torch.tensor([i for _, i in chosen]),
            kl_estimate=None,
            cost=self.cost,
            trace=[self],
        )

    def _published(self, tree: Tree, n: int | None, leaf: Ints) -> tuple[Ints, Floats]:
        """Algorithm 2: Boltzmann descents; without n every leaf with the log-probability of being reached."""
        if n is None:
            chance = np.zeros(len(tree))
            chance[0] = 1.0
            for node in range(len(tree)):  # parents come before their children
                if len(tree.children(node)) and chance[node] > 0:
                    at, law, _ = tree.law(node)
                    chance[at] = chance[node] * law
            with np.errstate(divide="ignore"):
                return leaf, np.log(chance[leaf])
        picked = []
        for _ in range(n):
            node = 0
            while not tree.terminal[node]:
                at, law, _ = tree.law(node)
                u = float(torch.rand((), dtype=torch.float64, generator=self.generator, device=self.generator.device))
                node = int(at[min(int(np.searchsorted(law.cumsum(), u, side="right")), len(at) - 1)])
            picked.append(node)
        return np.asarray(picked, dtype=np.int64), np.zeros(n)

    # ---- keeping

    def save(self, path: Path | str) -> None:
        """Write the forest to one safetensors file, in one step; `load` grows it on as if it had never stopped."""
        from safetensors.torch import save as to_bytes

        tensors = self._store.packed()
        for t, tree in enumerate(self.trees):
            tensors |= {f"tree.{t}.{k}": torch.from_numpy(np.asarray(v)) for k, v in tree.arrays().items()}
            tensors[f"tree.{t}.log_path"] = torch.tensor(self.log_path[t], dtype=torch.float64)
            tensors[f"tree.{t}.leaf"] = torch.tensor(self.leaf[t], dtype=torch.int64)
        tensors["generator"] = self.generator.get_state()
        facts = {
            "forest": repr(self._facts()),
            "rollouts": str(self.rollouts),
            "cost": json.dumps(asdict(self.cost)),
        }
        with replacing(path) as temporary:
            temporary.write_bytes(to_bytes({k: v.clone().contiguous() for k, v in tensors.items()}, facts))

    def _facts(self) -> tuple[Any, ...]:
        s = self.sampler
        return (
            type(s).__name__, s.batch, s.widening, s.exponent, s.explore, s.lookahead, s.trust, self.steps, self.beta,
            len(self.prompts),
        )  # fmt: skip

    def load(self, path: Path | str) -> Forest:
        """Take up the forest that was saved to `path` by a sampler with the same settings. Returns itself.

        Raises `InputError` where the file is no forest, or one with other settings.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError("forest", str(path), f"a forest that was saved ({error})") from error
        same = facts.get("forest") == repr(self._facts())
        check(same, "forest", facts.get("forest", "no forest"), repr(self._facts()))
        names = [name.removeprefix("tree.0.") for name in tensors if name.startswith("tree.0.")]
        for t in range(len(self.prompts)):
            mine = {name: tensors[f"tree.{t}.{name}"].numpy() for name in names}
            self.log_path[t], self.leaf[t] = mine.pop("log_path").tolist(), mine.pop("leaf").tolist()
            self.trees[t] = Tree.restore(self.beta, self.trees[t].hard, mine, self.trees[t].trust)
        self._store.unpacked(tensors)
        self._relearn()
        self.generator.set_state(tensors["generator"])
        self.rollouts = int(facts["rollouts"])
        self.cost = Cost(**json.loads(facts["cost"]))
        return self

    def _relearn(self) -> None:
        """Names of equal children, from the states."""
        if not self.sampler.merge:
            return
        for t, tree in enumerate(self.trees):
            for node in range(1, len(tree)):
                where = (int(tree.chunk[node]), int(tree.row[node]))
                names = self._store.names(where[0], bool(tree.terminal[node]))
                if names is not None:
                    self._known[t][int(tree.parent[node]), names[where[1]]] = node


class _Store:
    """States of nodes, in chunks of rows that arrived together. Inner nodes may keep what lets them go on at once
    (caches, predictions) up to a bound; leaves are packed.
    """

    def __init__(self, process: Process, prompts: list[Prompt], max_bytes: int) -> None:
        self.process, self.prompts, self.max_bytes = process, prompts, max_bytes
        self.live: dict[int, tuple[Any, int]] = {}
        """Chunks that can go on at once, oldest use first, and their size in bytes."""
        self.cold: dict[int, tuple[int, dict[str, Tensor]]] = {}
        """Step and packed rows of chunks that were reduced."""
        self.ended: list[dict[str, Tensor]] = []
        self.held = self.count = 0

    def add(self, state: Any) -> int:
        size = self.process.nbytes(state)
        self.live[self.count] = (state, size)
        self.held += size
        self.count += 1
        while self.held > self.max_bytes and len(self.live) > 1:
            oldest = next(iter(self.live))
            old, size = self.live.pop(oldest)
            self.cold[oldest] = (old.step, self.process.pack(old))
            self.held -= size
        return self.count - 1

    def add_leaves(self, state: Any) -> int:
        self.ended.append(self.process.pack(state))
        return len(self.ended) - 1

    def rows(self, wanted: list[tuple[int, int]]) -> tuple[Any, Cost]:
        """A state of these rows `(chunk, row)`, in order, and what it cost to make those that were reduced go on."""
        process, parts, order, spent = self.process, [], [], Cost()
        by_chunk: dict[int, list[int]] = {}
        for i, (chunk, _) in enumerate(wanted):
            by_chunk.setdefault(chunk, []).append(i)
        cold: list[dict[str, Tensor]] = []
        cold_order: list[int] = []
        step = 0
        for chunk, mine in by_chunk.items():
            at = torch.tensor([wanted[i][1] for i in mine])
            if chunk in self.live:
                self.live[chunk] = self.live.pop(chunk)  # now the most recently used
                parts.append(process.gather(self.live[chunk][0], at))
                order += mine
            else:
                step, packed = self.cold[chunk]
                cold.append({k: v[at] for k, v in packed.items()})
                cold_order += mine
        if cold:
            whole = {k: torch.cat([c[k] for c in cold]) for k in cold[0]}
            state, spent = process.settle(process.read(process.unpack(self.prompts, step, whole)))
            parts.append(state)
            order += cold_order
        state = parts[0] if len(parts) == 1 else process.stack(parts)
        if order != sorted(order):
            state = process.gather(state, torch.tensor(order).argsort())
        return state, spent

    def leaves(self, wanted: list[tuple[int, int]]) -> Any:
        """A finished state of these leaves, in order."""
        chunks = sorted({chunk for chunk, _ in wanted})
        offset, total = {}, 0
        for chunk in chunks:
            offset[chunk] = total
            total += len(self.ended[chunk]["group"])
        at = torch.tensor([offset[chunk] + row for chunk, row in wanted])
        whole = {k: torch.cat([self.ended[c][k] for c in chunks])[at] for k in self.ended[chunks[0]]}
        return self.process.unpack(self.prompts, self.process.num_steps, whole)

    def packed(self) -> dict[str, Tensor]:
        """Everything, as named tensors."""
        out: dict[str, Tensor] = {}
        for chunk in range(self.count):
            if chunk in self.live:
                state = self.live[chunk][0]
                step, rows = state.step, self.process.pack(state)
            else:
                step, rows = self.cold[chunk]
            out |= {f"chunk.{chunk}.{k}": v for k, v in rows.items()}
            out[f"chunk.{chunk}.step"] = torch.tensor(step)
        for chunk, rows in enumerate(self.ended):
            out |= {f"leaf.{chunk}.{k}": v for k, v in rows.items()}
        return out

    def unpacked(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `packed` gave; nothing can go on at once until it is read again."""
        chunks: dict[int, dict[str, Tensor]] = {}
        leaves: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind in ("chunk", "leaf"):
                number, _, field_ = rest.partition(".")
                (chunks if kind == "chunk" else leaves).setdefault(int(number), {})[field_] = value
        self.cold = {i: (int(rows.pop("step")), rows) for i, rows in chunks.items()}
        self.live, self.held, self.count = {}, 0, len(chunks)
        self.ended = [leaves[i] for i in range(len(leaves))]
        self._names: dict[tuple[int, bool], list[Any] | None] = {}

    def names(self, chunk: int, leaf: bool) -> list[Any] | None:
        """Identities of a chunk's rows."""
        if (chunk, leaf) not in self._names:
            step, rows = (self.process.num_steps, self.ended[chunk]) if leaf else self.cold[chunk]
            self._names[chunk, leaf] = self.process.identify(self.process.unpack(self.prompts, step, rows))
        return self._names[chunk, leaf]
