"""A search tree over a stochastic process, as arrays.

Children of a node are draws from the process, so a node's soft value is the log-mean of theirs
(Jain et al. 2025, equation 6):

    V(s) = beta log mean over children c of exp(log_edge(c) + V(c) / beta)

`log_edge` is `log p - log q` where the draw came from a proposal q, else 0. Children that are equal
count by their multiplicity. Values are in units of the reward.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Tree", "picked"]


Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_FLOATS = ("value", "log_edge", "log_prior", "guess")
_INTS = ("parent", "level", "visits", "multiplicity", "draws", "chunk", "row")


def picked(cdf: Floats, u: float) -> int:
    """The entry that a uniform number falls on."""
    return min(int(np.searchsorted(cdf, u, side="right")), len(cdf) - 1)


class Tree:
    """Node 0 is the root. `size` nodes; arrays are longer and grow by doubling.

    Arrays by node: `value`, `log_edge`, `parent` (-1 for the root), `level`, `visits` (N, from 1), `multiplicity` (how
    often its parent drew it), `draws` (how many children were drawn, equal ones counted apart), `terminal`, and `chunk`
    and `row`, where its state is kept.
    """

    def __init__(self, beta: float, hard: bool = False, trust: float = 0.0) -> None:
        """`hard`: back up the maximum, the limit of beta to 0. `trust`: how many children's worth `guess` counts for
        when children are chosen; 0 leaves it out.
        """
        self.beta, self.hard, self.trust, self.size = beta, hard, trust, 0
        for name in _FLOATS:
            setattr(self, name, np.zeros(64))
        for name in _INTS:
            setattr(self, name, np.zeros(64, dtype=np.int64))
        self.terminal = np.zeros(64, dtype=bool)
        self._children: list[Ints] = []
        self._count: list[int] = []
        self.add(-1, 0)

    value: Floats
    log_edge: Floats
    guess: Floats
    """What a lookahead said of the node."""
    log_prior: Floats
    """`log multiplicity + log_edge`, kept for selection."""
    parent: Ints
    level: Ints
    visits: Ints
    multiplicity: Ints
    draws: Ints
    chunk: Ints
    row: Ints

    def __len__(self) -> int:
        return self.size

    def add(self, parent: int, level: int, log_edge: float = 0.0) -> int:
        """A new child of `parent`, drawn once; its number."""
        node = self.size
        if node == len(self.value):
            for name in (*_FLOATS, *_INTS, "terminal"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        self.size += 1
        self.parent[node], self.level[node] = parent, level
        self.visits[node] = self.multiplicity[node] = 1
        self.log_edge[node] = self.log_prior[node] = log_edge
        self._children.append(np.zeros(0, dtype=np.int64))
        self._count.append(0)
        if parent >= 0:
            mine, count = self._children[parent], self._count[parent]
            if count == len(mine):
                mine = self._children[parent] = np.concatenate([mine, np.zeros(max(4, count), dtype=np.int64)])
            mine[count] = node
            self._count[parent] = count + 1
            self.draws[parent] += 1
        return node

    def draw_again(self, node: int) -> None:
        """The parent drew an equal of `node`."""
        self.multiplicity[node] += 1
        self.draws[self.parent[node]] += 1
        self.log_prior[node] = np.log(self.multiplicity[node]) + self.log_edge[node]

    def children(self, node: int) -> Ints:
        """Numbers of the children of `node`."""
        return self._children[node][: self._count[node]]

    def place(self, node: int) -> tuple[int, int]:
        """Chunk and row where the state of `node` is kept."""
        return int(self.chunk[node]), int(self.row[node])

    def back_up(self, leaf: int) -> None:
        """Recompute the values of all ancestors of `leaf` from all of their children."""
        node = int(self.parent[leaf])
        while node >= 0:
            at = self.children(node)
            if self.hard:
                self.value[node] = self.value[at].max()
            else:
                scores = self.log_prior[at] + self.value[at] / self.beta
                top = scores.max()
                spread = np.log(np.exp(scores - top).sum()) if np.isfinite(top) else 0.0
                self.value[node] = self.beta * (top + spread - np.log(self.draws[node]))
            node = int(self.parent[node])

    def law(self, node: int, explore: float = 0.0) -> tuple[Ints, Floats, Floats]:
        """Children of `node`, their Boltzmann probabilities `~ exp(log_prior + V / beta)` mixed with `explore` parts of
        their frequency, and that frequency.
        """
        at = self.children(node)
        frequency = self.multiplicity[at] / self.draws[node]
        scores = self.log_prior[at] + self._promise(at) / self.beta
        top = scores.max()
        if not np.isfinite(top):  # every child is impossible: any is as good
            return at, frequency, frequency
        mass = np.exp(scores - top)
        boltzmann = mass / mass.sum()
        return at, (1 - explore) * boltzmann + explore * frequency if explore else boltzmann, frequency

    def _promise(self, at: Ints) -> Floats:
        """Values by which to choose among nodes: those of their children, blended with the guess."""
        if not self.trust:
            return self.value[at]
        seen = self.draws[at]
        with np.errstate(divide="ignore"):
            known = np.log(seen) + self.value[at] / self.beta
        mixed = np.logaddexp(np.log(self.trust) + self.guess[at] / self.beta, known) - np.log(self.trust + seen)
        return np.where(self.terminal[at], self.value[at], self.beta * mixed)

    def upper(self, node: int, bonus: float) -> int:
        """The child with the largest `V + bonus * sqrt(log N(node) / N(child))` (UCT)."""
        at = self.children(node)
        return int(at[np.argmax(self._promise(at) + bonus * np.sqrt(np.log(self.visits[node]) / self.visits[at]))])

    def descend(self, uniform: Callable[[], float]) -> int:
        """The leaf that choices by `law` lead to, each by a fresh uniform number."""
        node = 0
        while not self.terminal[node]:
            at, law, _ = self.law(node)
            node = int(at[picked(law.cumsum(), uniform())])
        return node

    def reach(self) -> Floats:
        """Probability of every node that `descend` comes through it."""
        chance = np.zeros(len(self))
        chance[0] = 1.0
        for node in range(len(self)):  # parents come before their children
            if len(self.children(node)) and chance[node] > 0:
                at, law, _ = self.law(node)
                chance[at] = chance[node] * law
        return chance

    def leaves(self) -> Ints:
        """Numbers of the terminal nodes."""
        return np.flatnonzero(self.terminal[: self.size])

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """The tree as named arrays, from which `restore` makes it again."""
        return {name: getattr(self, name)[: self.size].copy() for name in (*_FLOATS, *_INTS, "terminal")}

    @classmethod
    def restore(cls, beta: float, hard: bool, arrays: dict[str, NDArray[np.generic]], trust: float = 0.0) -> Tree:
        """The tree whose `arrays` these are, bit for bit."""
        tree = cls(beta, hard, trust)
        for node in range(1, len(arrays["parent"])):
            tree.add(int(arrays["parent"][node]), int(arrays["level"][node]))
        for name, values in arrays.items():
            getattr(tree, name)[: tree.size] = values
        return tree
