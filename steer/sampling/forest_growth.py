"""Trees that grow together, one for each prompt: a batch of rollouts descends, draws children and backs rewards up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from steer.core import Cost, Process, Prompt, Reward, UnsupportedError
from steer.sampling.states import StateStore
from steer.sampling.tree import Tree
from steer.sampling.weights import gained

if TYPE_CHECKING:
    from steer.methods.dts import DTS

__all__ = ["Growth"]


_SLACK = 1e-9
"""`2 * 32^0.8` is 32.000000000000004 in floating point."""


@dataclass
class _Rollout:
    tree: int
    node: int
    """Where it is: at first the node to expand, at last its leaf."""
    log_path: float


@dataclass
class Growth:
    """The trees, their rollouts and what they cost. Rollouts of all trees share the network's batches."""

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
        on_step: Callable[[Any], None] | None = None,
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
