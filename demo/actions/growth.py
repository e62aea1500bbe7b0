"""What grows while a search runs, as plain data that a page can draw: the lineage of particles, and trees.

    lineage: {"columns": [{"step", "value": [K], "text": [K], "from": [K], "ess"}]}
        one column a weighing; `from` says which particle of the column before each one descends from
    tree: {"parent": [M], "step": [M], "value": [M], "visits": [M], "text": [M]}
        nodes in the order in which they were drawn; the root's parent is -1, a text is what was written up to the node

Letters: `K` particles, `M` nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from steer.core import Samples
from steer.methods.fk import Generation
from steer.sampling.forest import Forest

__all__ = ["Lineage", "Tree"]


class Lineage:
    """Particles of one population, weighing by weighing."""

    def __init__(self) -> None:
        self._columns: list[dict[str, Any]] = []
        self._ancestors: list[int] | None = None

    def add(self, seen: Generation, texts: Sequence[str] | None = None) -> None:
        """One weighing more; the texts are those that it kept, where none are given."""
        texts = list(seen.outputs) if texts is None else texts
        before = self._ancestors if self._ancestors is not None else list(range(len(seen.value)))
        value = [_finite(score) for score in seen.value.tolist()]
        column = {"step": seen.step, "value": value, "text": list(texts), "from": before}
        self._columns.append({**column, "ess": round(float(seen.ess[0]), 2)})
        self._ancestors = seen.ancestors.tolist()

    def shown(self) -> dict[str, Any]:
        """See the module."""
        return {"columns": list(self._columns)}


class Tree:
    """A forest's first tree, whose nodes are texts of `block` tokens a step."""

    def __init__(self, forest: Forest, leaves: Samples, decode: Callable[[list[int]], str], block: int) -> None:
        self._arrays, self._steps = forest.trees[0].arrays(), forest.steps
        self._leaves, self._decode, self._block = leaves, decode, block

    def shown(self) -> dict[str, Any]:
        """See the module."""
        parent: list[int] = self._arrays["parent"].tolist()
        step = np.asarray(self._steps)[self._arrays["level"]].tolist()
        value = [_finite(score) for score in self._arrays["value"].tolist()]
        visits = self._arrays["visits"].tolist()
        return {"parent": parent, "step": step, "value": value, "visits": visits, "text": self._texts(parent, step)}

    def _texts(self, parent: list[int], step: list[int]) -> list[str]:
        """Every node lies on the way to a leaf, whose first tokens are its text."""
        texts = [""] * len(parent)
        assert self._leaves.lineage is not None and self._leaves.tokens is not None
        for node, tokens in zip(self._leaves.lineage.tolist(), self._leaves.tokens, strict=True):
            texts[node] = self._decode(tokens)
            node = parent[node]
            while node > 0 and not texts[node]:
                texts[node] = self._decode(tokens[: step[node] * self._block])
                node = parent[node]
        return texts


def _finite(score: float) -> float | None:
    return round(score, 4) if np.isfinite(score) else None
