"""A forest of search trees that grow together, one for each prompt: a batch of rollouts descends, draws children and
backs rewards up; what they have found; and the file that it is kept in.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from steer.core import Cost, InputError, Run, Samples, UnsupportedError, check
from steer.files import replacing
from steer.sampling.lookahead import Lookahead
from steer.sampling.states import StateStore
from steer.sampling.tree import Floats, Ints, Tree
from steer.sampling.weights import gained, resample

__all__ = ["Forest", "Search"]


class Search(Protocol):
    """Settings that a forest reads from the sampler that grows it. See `DTS`."""

    @property
    def hard(self) -> bool:
        """Whether trees back up the maximum in place of soft values."""

    @property
    def searching(self) -> bool:
        """Whether the best leaves are wanted, and not leaves by their weights."""

    @property
    def exploration(self) -> float: ...

    @property
    def estimator(self) -> str: ...

    @property
    def rollouts(self) -> int | None: ...

    @property
    def max_nfe(self) -> int | None: ...

    @property
    def seconds(self) -> float | None: ...

    @property
    def batch(self) -> int: ...

    @property
    def levels(self) -> int | None: ...

    @property
    def widening(self) -> float: ...

    @property
    def exponent(self) -> float: ...

    @property
    def lookahead(self) -> Lookahead | None: ...

    @property
    def trust(self) -> float: ...

    @property
    def merge(self) -> bool: ...

    @property
    def correct(self) -> bool: ...

    @property
    def max_bytes(self) -> int: ...

    def choose(self, tree: Tree, node: int, u: float) -> tuple[int, float]:
        """The child to descend to, by a uniform number, and the log-weight of that choice."""


_SLACK = 1e-9
"""`2 * 32^0.8` is 32.000000000000004 in floating point."""


@dataclass
class _Rollout:
    tree: int
    node: int
    """Where it is: at first the node to expand, at last its leaf."""
    log_path: float


class Forest:
    """One tree for each prompt, growing together: rollouts of all trees share the network's batches.

    `cost` is what they took, `rollouts` how many are finished in each tree.
    """

    def __init__(self, sampler: Search, run: Run) -> None:
        self.sampler, self.process, self.prompts = sampler, run.process, run.prompts
        self.reward, self.beta, self.generator, self._watch = run.reward, run.beta, run.generator, run.step
        self._note = run.note
        self.cost, self.rollouts = Cost(), 0
        trust = 0.0 if self.sampler.lookahead is None else self.sampler.trust
        self.trees = [Tree(self.beta, self.sampler.hard, trust) for _ in self.prompts]
        self.log_path: list[list[float]] = [[] for _ in self.prompts]
        """Log-weight of every rollout's path, by tree."""
        self.leaf: list[list[int]] = [[] for _ in self.prompts]
        """Leaf of every rollout, by tree."""
        self._known: list[dict[tuple[int, Any], int]] = [{} for _ in self.prompts]
        self._store = StateStore(self.process, self.prompts, self.sampler.max_bytes)
        self._roots: Any = None
        steps = self.process.num_steps
        intervals = min(steps, self.sampler.levels or 5)
        ends = [round(steps * (i + 1) / intervals) for i in range(intervals)]
        self.steps = [-1 if self.process.random_start else 0, *([0] if self.process.random_start else []), *ends]
        """Step of the process at every level of the tree; the root of a random start is before it."""

    def grow(
        self,
        rollouts: int | None = None,
        max_nfe: int | None = None,
        seconds: float | None = None,
    ) -> Self:
        """Grow to budgets *in all*, in whole batches; the sampler's own where none is given. A rollout that ends in a
        leaf that was known costs no evaluation, so `max_nfe` also bounds the rollouts. Returns itself.
        """
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
            if max_nfe is not None and self.rollouts and (spent + most > max_nfe or self.rollouts >= max_nfe):
                break
            if seconds is not None and self.rollouts and self.cost.seconds >= seconds:
                break
            self._batch(size)
        return self

    def _batch(self, size: int) -> None:
        draws = torch.rand(
            len(self.trees),
            size,
            len(self.steps),
            dtype=torch.float64,
            generator=self.generator,
            device=self.generator.device,
        ).tolist()
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
        done += self._run(waiting)
        for rollout in done:
            self.trees[rollout.tree].back_up(rollout.node)
            self.log_path[rollout.tree].append(rollout.log_path)
            self.leaf[rollout.tree].append(rollout.node)
        self.rollouts += size
        self._note(self)

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

    def _run(self, waiting: dict[int, list[_Rollout]]) -> list[_Rollout]:
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
                self._watch(state)
            state = self._paid(process.settle(state))
            state, rows, ended = self._arrive(level + 1, state, rows, before)
            done += ended
        return done

    def _paid(self, settled: tuple[Any, Cost]) -> Any:
        """What was got for a cost, which is entered in the account."""
        got, cost = settled
        self.cost = self.cost + cost
        return got

    def _states(self, level: int, rollouts: list[_Rollout]) -> Any:
        """A state of the nodes to expand, all at `level`."""
        process = self.process
        if self.steps[level] < 0:
            return self._noise(rollouts)
        if level == 0:
            if self._roots is None:
                self._roots = self._paid(process.settle(process.read(process.init(self.prompts, 1, self.generator))))
            return process.gather(self._roots, torch.tensor([r.tree for r in rollouts]))
        return self._paid(self._store.rows([self.trees[r.tree].place(r.node) for r in rollouts]))

    def _noise(self, rollouts: list[_Rollout]) -> Any:
        """Children of the root of a random start."""
        seen = [0] * len(self.prompts)
        place = []
        for rollout in rollouts:
            place.append((rollout.tree, seen[rollout.tree]))
            seen[rollout.tree] += 1
        most = max(seen)
        state = self.process.init(self.prompts, most, self.generator)
        return self.process.gather(state, torch.tensor([tree * most + i for tree, i in place]))

    def _ratio(self, state: Any) -> Tensor:
        if not self.sampler.correct or self.steps[0] > state.step:
            return torch.zeros(len(state), dtype=torch.float64)
        if state.base_log_prob is None:
            raise UnsupportedError(
                "a tree cannot weigh edits of prompts or hidden states, whose law against the base is not known while "
                "generating: set correct=False to search under the edited process itself"
            )
        return (state.aim_log_prob - state.log_prob).double().cpu()

    def _arrive(
        self, level: int, state: Any, rows: list[_Rollout], before: Tensor
    ) -> tuple[Any, list[_Rollout], list[_Rollout]]:
        """Rows become nodes at `level`; those that are finished become leaves with their reward and leave."""
        process = self.process
        edges = gained(self._ratio(state), before).tolist() if level > 1 or self.steps[0] == 0 else [0.0] * len(rows)
        names = process.identify(state) if self.sampler.merge else None
        finished = process.finished(state).cpu()
        inner, ends = (~finished).nonzero().squeeze(1), finished.nonzero().squeeze(1)
        kept, guesses, chunk = self._keep(state, inner) if len(inner) else (None, [], -1)
        scores, last_chunk = self._score(state, ends) if len(ends) else ([], -1)
        for i, rollout in enumerate(rows):
            rollout.node = self._child(rollout, level, edges[i], None if names is None else names[i])
            rollout.log_path += edges[i]
        live, done = ([rows[i] for i in at.tolist()] for at in (inner, ends))
        for row, (rollout, guess) in enumerate(zip(live, guesses, strict=True)):
            tree, node = self.trees[rollout.tree], rollout.node
            tree.chunk[node], tree.row[node], tree.guess[node] = chunk, row, guess
        for row, (rollout, score) in enumerate(zip(done, scores, strict=True)):
            tree, node = self.trees[rollout.tree], rollout.node
            if not tree.terminal[node]:
                tree.terminal[node], tree.value[node] = True, score
                tree.chunk[node], tree.row[node] = last_chunk, row
        if kept is not None and process.consumes:
            # The store's copy must survive what the live rows do next.
            kept = process.gather(kept, torch.arange(len(kept)))
        return kept, live, done

    def _keep(self, state: Any, inner: Tensor) -> tuple[Any, list[float], int]:
        """The unfinished rows, read; what the lookahead says of them and the chunk where they are kept."""
        process = self.process
        # Reading now lets every later child of these nodes share this pass of the network.
        rows = state if len(inner) == len(state) else process.gather(state, inner)
        kept = self._paid(process.settle(process.read(rows)))
        return kept, self._guessed(kept), self._store.add(kept)

    def _guessed(self, state: Any) -> list[float]:
        look = self.sampler.lookahead
        if look is None:
            return [0.0] * len(state)
        return self._paid(look(self.process, state, self.reward, self.beta, self.generator)).tolist()

    def _score(self, state: Any, ends: Tensor) -> tuple[list[float], int]:
        """Rewards of the finished rows and the chunk of leaves where they are kept."""
        gone = self.process.gather(state, ends) if len(ends) < len(state) else state
        scores = self.reward(self.process.decode(gone)).tolist()
        self.cost = self.cost + Cost(reward_calls=len(ends))
        return scores, self._store.add_leaves(gone)

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
        """`n` outputs for each prompt, or all leaves with their weights. DTS* gives the best leaves first, and from the
        best again where it found fewer than n.
        """
        check(self.rollouts > 0, "rollouts", 0, "a forest that has been grown")
        chosen: list[tuple[Tree, int]] = []
        log_weights: list[float] = []
        log_z: list[float] = []
        for t, tree in enumerate(self.trees):
            leaf, weight = self.weights(t)
            picked, own = self._picked(tree, n, leaf, weight)
            chosen += [(tree, int(node)) for node in picked]
            log_weights += own.tolist()
            weighted = self.sampler.estimator == "weighted"
            log_z.append(float(np.logaddexp.reduce(weight)) if weighted else tree.value[0] / self.beta)
        found = self.process.decode(self._store.leaves([tree.place(node) for tree, node in chosen]))
        return replace(
            found,
            reward=torch.tensor([float(tree.value[node]) for tree, node in chosen], dtype=torch.float64),
            log_weight=torch.tensor(log_weights, dtype=torch.float64),
            log_z=None if self.sampler.searching else torch.tensor(log_z, dtype=torch.float64),
            lineage=torch.tensor([node for _, node in chosen]),
            kl_estimate=None,
            cost=self.cost,
            trace=[self],
        )

    def _picked(self, tree: Tree, n: int | None, leaf: Ints, weight: Floats) -> tuple[Ints, Floats]:
        """The leaves to return and their log-weights, of all with their weights."""
        if self.sampler.searching:
            order = leaf[np.argsort(-tree.value[leaf], kind="stable")]
            order = np.resize(order, n or len(order))  # from the best again where there are fewer than n
            return order, np.zeros(len(order))
        if self.sampler.estimator == "published":
            return self._published(tree, n, leaf)
        if n is None:
            return leaf, weight
        index = resample(torch.from_numpy(weight), self.generator, "ssp", n).numpy()
        return leaf[index], np.zeros(n)

    def _published(self, tree: Tree, n: int | None, leaf: Ints) -> tuple[Ints, Floats]:
        """Algorithm 2: Boltzmann descents; without n every leaf with the log-probability of being reached."""
        if n is None:
            with np.errstate(divide="ignore"):
                return leaf, np.log(tree.reach()[leaf])
        return np.asarray([tree.descend(self._uniform) for _ in range(n)], dtype=np.int64), np.zeros(n)

    def _uniform(self) -> float:
        return float(torch.rand((), dtype=torch.float64, generator=self.generator, device=self.generator.device))

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
            type(s).__name__,
            s.batch,
            s.widening,
            s.exponent,
            s.exploration,
            s.lookahead,
            s.trust,
            self.steps,
            self.beta,
            len(self.prompts),
        )

    def load(self, path: Path | str) -> Forest:
        """Take up the forest that was saved to `path` by a sampler with the same settings. Returns itself.

        Raises `InputError` where the file is no forest, or one with other settings.
        """
        facts, tensors = _read(path)
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
                chunk, row = tree.place(node)
                names = self._store.names(chunk, bool(tree.terminal[node]))
                if names is not None:
                    self._known[t][int(tree.parent[node]), names[row]] = node


def _read(path: Path | str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The facts and the tensors of a file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError("forest", str(path), f"a forest that was saved ({error})") from error
