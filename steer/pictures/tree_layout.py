"""Layout of a search tree's picture: the nodes it shows, and the order of them and of their images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["apart", "beside", "best_path", "layered", "most_visited", "spread"]


_LEAVES = 10
"""Images shown beside a tree."""


def best_path(up: NDArray[np.int64], depth: NDArray[np.int64], worth: NDArray[Any]) -> list[int]:
    """From the root to the most valuable node of the last level."""
    deepest = np.flatnonzero(depth == depth.max())
    node = int(deepest[np.argmax(np.nan_to_num(worth[deepest], nan=-np.inf))])
    found = [node]
    while up[found[-1]] >= 0:
        found.append(int(up[found[-1]]))
    return found[::-1]


def most_visited(
    up: NDArray[np.int64],
    depth: NDArray[np.int64],
    worth: NDArray[Any],
    count: NDArray[Any],
    best: list[int],
    limit: int,
) -> list[int]:
    """The best path and the most visited other nodes whose parents are kept too, by index. Of those visited equally
    often, the ones that lead to the better ends come first: whole paths, where a cut by level would leave stumps.
    """
    kept = set(best)
    reach = np.where((depth == depth.max()) & np.isfinite(worth), worth, -np.inf)
    for i in np.argsort(-depth, kind="stable").tolist():
        if up[i] >= 0:
            reach[up[i]] = max(reach[up[i]], reach[i])
    for i in np.lexsort((depth, -reach, -count)).tolist():
        if len(kept) >= limit:
            break
        if up[i] < 0 or int(up[i]) in kept:
            kept.add(i)
    return sorted(kept)


def layered(up: NDArray[np.int64], depth: NDArray[np.int64], shown: list[int]) -> dict[int, float]:
    """The row of every node: leaves one below the other in depth-first order, parents amid their children."""
    children: dict[int, list[int]] = {i: [] for i in (-1, *shown)}
    for i in shown:
        children[int(up[i])].append(i)
    rows: dict[int, float] = {}
    stack, free, visited = list(reversed(children[-1])), 0, []
    while stack:
        node = stack.pop()
        visited.append(node)
        if children[node]:
            stack += reversed(children[node])
        else:
            rows[node] = float(free)
            free += 1
    for node in reversed(visited):
        if children[node]:
            rows[node] = float(np.mean([rows[c] for c in children[node]]))
    return rows


def beside(found: set[int], best: list[int], worth: NDArray[Any], rows: Mapping[int, float]) -> list[int]:
    """The nodes whose images stand beside the tree, from the top down: the best path's and the most valuable ones."""
    order = sorted(found, key=lambda i: (i not in best, -np.nan_to_num(worth[i], nan=-np.inf)))
    return sorted(order[:_LEAVES], key=lambda i: rows[i])


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Heights from the top down, `gap` apart, near `wanted` (which falls) and between `low` and `high`."""
    placed: list[float] = []
    for i, y in enumerate(wanted):
        ceiling = placed[-1] - gap if placed else high - gap / 2
        floor = low + gap / 2 + gap * (len(wanted) - 1 - i)
        placed.append(max(min(y, ceiling), floor))
    return placed


def apart(nodes: list[int], x_of: Mapping[int, float], gap: float) -> list[int]:
    """The nodes whose images, one beside the other, do not overlap: from the last one back."""
    kept: list[int] = []
    for i in reversed(nodes):
        if not kept or x_of[kept[-1]] - max(x_of[i], gap / 2) >= gap:
            kept.append(i)
    return kept[::-1]
