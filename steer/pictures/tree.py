"""The picture of a search tree: nodes in layers, the best path, and images of where it leads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from steer.core import check
from steer.pictures.page import EXTINCT, Paint, draw_bar, draw_bends, draw_image, name_columns, page, tile_size, to_rgb
from steer.pictures.tree_layout import apart, beside, best_path, layered, most_visited, spread

__all__ = ["draw_tree"]


_BEST = "#c2571a"


def draw_tree(
    path: Path | str,
    parent: ArrayLike,
    level: ArrayLike,
    value: ArrayLike,
    visits: ArrayLike,
    thumbnails: Mapping[int, Tensor] | None = None,
    max_nodes: int = 150,
) -> None:
    """Write a search tree in layers: its `M` nodes with their size by visits and their colour by value.

    `parent` `[M]` is -1 for roots; `level` `[M]` is the number of steps taken, below 0 for a root from which starts
    are drawn, and grows from parent to child; `value`
    `[M]` may be NaN where nothing is known. Of larger trees the `max_nodes` most visited nodes are drawn. The best path
    leads to the most valuable node of the last level. `thumbnails` `{node: [C, H, W]}`: those of the last level stand
    at the right (the best path's and the most valuable ones), those of the best path below.
    """
    up, depth, worth, count = _checked(parent, level, value, visits)
    check(isinstance(max_nodes, int) and max_nodes > 0, "max_nodes", max_nodes, "an integer > 0")

    best = best_path(up, depth, worth)
    shown = most_visited(up, depth, worth, count, best, max_nodes)
    rows = layered(up, depth, shown)
    images = {i: to_rgb(x.unsqueeze(0))[0] for i, x in (thumbnails or {}).items() if i in rows}
    last = max(int(depth[i]) for i in shown)
    leaves = beside({i for i in images if depth[i] == last}, best, worth, rows)
    below = [i for i in best if i in images and i not in leaves]
    plan = _planned(depth, shown, rows, images, len(leaves), bool(below))

    facts = _facts(len(up), len(shown), last, worth[best[-1]])
    coloured = bool(np.isfinite(worth[shown]).any())
    with page(path, plan.width, plan.height, "Search tree", facts, bar=coloured) as (figure, axis):
        paint = Paint(worth[shown])
        _draw_branches(axis, up, shown, plan, count, best)
        _draw_nodes(axis, shown, plan, count, paint(worth), best)
        _draw_leaves(axis, leaves, plan, images, paint(worth), best)
        _draw_path(axis, below, plan, images)
        ticks = list(range(plan.first, last + 1, max(1, round((last - plan.first) / 10))))
        name_columns(axis, [plan.x_at(t) for t in ticks], [str(t) if t >= 0 else "root" for t in ticks], "step")
        if coloured:
            draw_bar(figure, axis, paint, "value")


def _checked(
    parent: ArrayLike, level: ArrayLike, value: ArrayLike, visits: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any], NDArray[Any]]:
    up, depth = np.asarray(parent, dtype=np.int64), np.asarray(level, dtype=np.int64)
    worth, count = np.asarray(value, dtype=float), np.asarray(visits, dtype=float)
    size = len(up)
    check(up.ndim == 1 and size > 0, "parent", up.shape, "one number for each node, at least one node")
    for name, x in (("level", depth), ("value", worth), ("visits", count)):
        check(x.shape == (size,), name, x.shape, f"{size} numbers, one for each node")
    inner = up >= 0
    known = bool((up < size).all()) and bool((depth[inner] > depth[up[inner]]).all())
    check(
        known, "parent", "a parent that does not exist or is no earlier level", "nodes of earlier levels, -1 for roots"
    )
    return up, depth, worth, count


@dataclass
class _Plan:
    """Where everything stands, in inches from the lower left corner."""

    first: int
    """Step of the first layer."""
    pitch: float
    """From one step to the next."""
    width: float
    height: float
    strip: float
    """Height of the images below."""
    tile: tuple[float, float]
    """Width and height of an image."""
    x_of: dict[int, float]
    y_of: dict[int, float]

    def x_at(self, step: int) -> float:
        return 0.15 + self.pitch * (step - self.first)


def _planned(
    depth: NDArray[np.int64],
    shown: list[int],
    rows: Mapping[int, float],
    images: Mapping[int, NDArray[np.uint8]],
    leaves: int,
    below: bool,
) -> _Plan:
    """A plan with so many leaves beside the tree and, perhaps, images below."""
    span = max(rows.values()) or 1.0
    tile = tile_size(np.stack(list(images.values()))[:1]) if images else (0.0, 0.0)
    height = max(min(5.6, 0.16 * span + 1.6), leaves * (tile[1] + 0.08))
    strip = tile[1] + 0.3 if below else 0.0
    first, levels = int(depth[shown].min()), max(int(depth[shown].max()) - int(depth[shown].min()), 1)
    plot = min(10.0, max(5.5, 0.55 * levels))
    margin = tile[0] + 0.75 if leaves else 0.0
    y_of = {i: strip + 0.1 + (height - 0.2) * (1 - rows[i] / span if len(rows) > 1 else 0.5) for i in rows}
    plan = _Plan(first, plot / levels, plot + 0.3 + margin, height + strip, strip, tile, {}, y_of)
    plan.x_of = {i: plan.x_at(int(depth[i])) for i in shown}
    return plan


def _facts(size: int, shown: int, last: int, end: float) -> str:
    drawn = f"{size:,} node{'s' * (size > 1)}" if shown == size else f"the {shown:,} most visited of {size:,} nodes"
    ends = f", ends at {round(end, 3) + 0.0:g}" if np.isfinite(end) else ""
    return f"{drawn}, {last} steps deep; orange: the best path{ends}; larger: visited more often"


def _draw_branches(
    axis: Any, up: NDArray[np.int64], shown: list[int], plan: _Plan, count: NDArray[Any], best: list[int]
) -> None:
    inner = [i for i in shown if up[i] >= 0]
    most = max((count[i] for i in inner), default=1.0) or 1.0
    for on_path in (False, True):
        chosen = [i for i in inner if (i in best) == on_path]
        start, end = ([(plan.x_of[i], plan.y_of[i]) for i in at] for at in (up[chosen].tolist(), chosen))
        widths = [0.6 + 2.2 * float(np.sqrt(count[i] / most)) for i in chosen]
        draw_bends(axis, np.array(start), np.array(end), 20, _BEST if on_path else "#b4bcc5", widths, 2 + on_path)


def _draw_nodes(
    axis: Any, shown: list[int], plan: _Plan, count: NDArray[Any], colours: NDArray[Any], best: list[int]
) -> None:
    """The most visited first, so that small nodes lie on large ones."""
    sizes = _area(count[shown])
    order = np.argsort(-count[shown], kind="stable")
    at = np.asarray(shown)[order]
    axis.scatter(
        [plan.x_of[i] for i in at],
        [plan.y_of[i] for i in at],
        s=sizes[order],
        c=colours[at],
        zorder=4,
        clip_on=False,
        linewidths=[1.4 if i in best else 0.5 for i in at],
        edgecolors=[_BEST if i in best else "white" for i in at],
    )


def _area(count: NDArray[Any]) -> NDArray[Any]:
    """Areas of nodes in square points: proportional to visits, within what the eye can tell apart."""
    return 9 + 190 * count / max(float(count.max()), 1.0)


def _draw_leaves(
    axis: Any,
    leaves: list[int],
    plan: _Plan,
    images: Mapping[int, NDArray[np.uint8]],
    colours: NDArray[Any],
    best: list[int],
) -> None:
    """Images at the right, each with a line to its node."""
    width, height = plan.tile
    heights = spread([plan.y_of[i] for i in leaves], height + 0.08, plan.strip, plan.height)
    left = plan.width - width
    for i, y in zip(leaves, heights, strict=True):
        axis.plot(
            [plan.x_of[i] + 0.12, left - 0.06],
            [plan.y_of[i], y],
            color=_BEST if i in best else EXTINCT,
            linewidth=0.9,
            zorder=1,
        )
        edge = _BEST if i in best else colours[i]
        draw_image(axis, images[i], left + width / 2, y, width, height, edge)


def _draw_path(axis: Any, below: list[int], plan: _Plan, images: Mapping[int, NDArray[np.uint8]]) -> None:
    """Images below, where the best path was at their step."""
    width, height = plan.tile
    for i in apart(below, plan.x_of, width + 0.06):
        draw_image(axis, images[i], max(plan.x_of[i], width / 2), height / 2, width, height, _BEST)
    if below:
        axis.annotate("best path, as it was foreseen", (0, height + 0.05), color=_BEST, fontsize=8.5)
