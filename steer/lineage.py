"""Pictures of how samplers for images work: lineages of particles, search trees, previews over time.

Time runs from left to right in all of them. Images are `[..., C, H, W]` in [0, 1], C 1 or 3. Files are PNG whatever
their suffix and appear all at once; `SteerError` where one cannot be written, `InputError` for bad input.

Axis letters: `K` particles, `M` nodes of a tree, `N` samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from steer.artifacts import replacing
from steer.core import check
from steer.images import to_uint8
from steer.picture import _FAINT, _GRID, _INK, _STYLE

__all__ = ["draw_lineage", "draw_previews", "draw_tree"]

_BEST = "#c2571a"
_EXTINCT = "#d0d5da"
_DPI = 160
_HEAD, _FOOT, _SIDE, _BAR = 0.85, 0.42, 0.35, 0.85
"""Margins of a picture in inches: title, step numbers, left, colour bar."""
_THUMBNAILS = 16
"""Largest number of particles that are shown as images."""
_LEAVES = 10
"""Images shown beside a tree."""


# ------------------------------------------------------------------------------------------------------------ lineage


def draw_lineage(
    path: Path | str,
    ancestors: Sequence[Tensor],
    thumbnails: Sequence[Tensor] | None = None,
    rewards: Sequence[Tensor] | None = None,
    steps: Sequence[int] = (),
) -> None:
    """Write who descends from whom: one column of particles for each resampling time and one for the result.

    `ancestors[t]` `[K]` says which particle of column t became particle k of column t + 1. `thumbnails[t]`
    `[K, C, H, W]` and `rewards[t]` `[K]` belong to the particles of column t as they were when they were resampled, and
    `steps[t]` is its time; with one entry more the last belongs to the result. Images are drawn up to 16 particles.

    Rows are ordered so that lines never cross; particles whose line died out are faint.
    """
    parents = [np.asarray(a.cpu(), dtype=np.int64) for a in ancestors]
    count = len(parents[0]) if parents else 0
    check(count > 0, "ancestors", len(parents), "at least one resampling of at least one particle")
    for a in parents:
        right = a.shape == (count,) and a.min() >= 0 and a.max() < count
        check(right, "ancestors", a.tolist(), f"{count} indices from 0 to {count - 1}")
    times = len(parents)
    scores = None if rewards is None else [np.asarray(r.detach().cpu(), dtype=float) for r in rewards]
    for name, given in (("thumbnails", thumbnails), ("rewards", scores), ("steps", steps or None)):
        if given is not None:
            check(len(given) in (times, times + 1), name, len(given), f"{times}, or {times + 1} with the result")
    for name, each in (("thumbnails", thumbnails or []), ("rewards", scores or [])):
        check(all(len(x) == count for x in each), name, [len(x) for x in each], f"{count} in every column")

    places = _uncrossed(parents)
    alive = _surviving(parents)
    tiles = None if thumbnails is None or count > _THUMBNAILS else [_rgb(x) for x in thumbnails]
    tile_width, tile_height = _tile(tiles[0], 0.72 if count <= 8 else 0.54) if tiles else (0.0, 0.0)
    dense = min(0.3, 6.5 / count)
    row = tile_height * 1.22 if tiles else dense
    column = tile_width + min(0.75, max(0.3, 9 / times)) if tiles else min(1.3, max(0.3, 10 / times))
    width, height = column * times + tile_width, row * (count - 1) + tile_height
    width, height = max(width, 4.5), max(height, 1.6)
    column = (width - tile_width) / times
    x = tile_width / 2 + column * np.arange(times + 1)
    y = [height - tile_height / 2 - row * p - (height - tile_height - row * (count - 1)) / 2 for p in places]

    survivors = int(alive[0].sum())
    facts = f"{count} particles, resampled {_times(times)}; the result descends from {survivors} of the first {count}"
    with _page(path, width, height, "Lineage of the particles", facts, bar=scores is not None) as (figure, axis):
        paint = _Paint(np.concatenate(scores)) if scores else None
        for t, parent in enumerate(parents):
            child_scores = scores[t + 1] if scores and t + 1 < len(scores) else None
            colours = paint(child_scores) if paint and child_scores is not None else None
            half = [tile_width / 2 if tiles and c < len(tiles) else 0.0 for c in (t, t + 1)]
            _links(axis, x[t] + half[0], x[t + 1] - half[1], y[t][parent], y[t + 1], alive[t + 1], colours,
                   thick=1.8 if count <= 64 else 0.8)  # fmt: skip
        for t in range(times + 1):
            known = scores[t] if scores and t < len(scores) else None
            colours = paint(known) if paint and known is not None else None
            if tiles and t < len(tiles):
                for k in range(count):
                    edge = colours[k] if colours is not None else _INK
                    _image(axis, tiles[t][k], x[t], y[t][k], tile_width, tile_height, edge, faint=not alive[t][k])
            else:
                area = (min(row, 0.14) * 72 * 0.75) ** 2
                faces = [colours[k] if colours is not None else _INK for k in range(count)]
                shown = [f if a else _EXTINCT for f, a in zip(faces, alive[t], strict=True)]
                axis.scatter(np.full(count, x[t]), y[t], s=area, c=shown, linewidths=0, zorder=4, clip_on=False)
        names = [str(s) for s in steps] if steps else [str(t + 1) for t in range(times)]
        names += ["result"] if len(names) == times else []
        _times_axis(axis, x, names, "step" if steps else "time")
        if paint:
            _bar(figure, axis, paint, "reward")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _uncrossed(parents: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """The row of every particle in every column: children in their ancestors' order."""
    places = [np.arange(len(parents[0]))]
    for parent in parents:
        order = np.argsort(places[-1][parent], kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        places.append(place)
    return places


def _surviving(parents: list[NDArray[np.int64]]) -> list[NDArray[np.bool_]]:
    """Whether each particle of each column has a descendant in the last one."""
    alive = [np.ones(len(parents[-1]), dtype=bool)]
    for parent in reversed(parents):
        has = np.zeros(len(parent), dtype=bool)
        has[parent[alive[0]]] = True
        alive.insert(0, has)
    return alive


def _links(
    axis: Any,
    left: float,
    right: float,
    start: NDArray[Any],
    end: NDArray[Any],
    alive: NDArray[np.bool_],
    colours: NDArray[Any] | None,
    thick: float,
) -> None:
    from matplotlib.collections import LineCollection

    at = np.linspace(0, 1, 24)
    bend = at * at * (3 - 2 * at)
    curves = np.stack(
        [
            np.broadcast_to(left + (right - left) * at, (len(start), len(at))),
            start[:, None] + (end - start)[:, None] * bend,
        ],
        axis=2,
    )
    for kept in (False, True):
        chosen = alive == kept
        colour = _EXTINCT if not kept else _FAINT if colours is None else colours[chosen]
        width = thick if kept else 0.6 * thick
        axis.add_collection(
            LineCollection(curves[chosen], colors=colour, linewidths=width, zorder=2 + kept, clip_on=False)
        )


# --------------------------------------------------------------------------------------------------------------- tree


def draw_tree(
    path: Path | str,
    parent: ArrayLike,
    level: ArrayLike,
    value: ArrayLike,
    visits: ArrayLike,
    thumbnails: Mapping[int, Tensor] | None = None,
    max_nodes: int = 400,
) -> None:
    """Write a search tree in layers: its `M` nodes with their size by visits and their colour by value.

    `parent` `[M]` is -1 for roots; `level` `[M]` is the number of steps taken and grows from parent to child; `value`
    `[M]` may be NaN where nothing is known. Of larger trees the `max_nodes` most visited nodes are drawn. The best path
    leads to the most valuable node of the last level. `thumbnails` `{node: [C, H, W]}`: those of the last level stand
    at the right (the best path's and the most valuable ones), those of the best path below.
    """
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
    check(isinstance(max_nodes, int) and max_nodes > 0, "max_nodes", max_nodes, "an integer > 0")

    best = _best_path(up, depth, worth)
    shown = _most_visited(up, depth, worth, count, best, max_nodes)
    rows = _layered(up, depth, shown)
    images = {i: _rgb(x.unsqueeze(0))[0] for i, x in (thumbnails or {}).items() if i in rows}
    last = max(int(depth[i]) for i in shown)
    leaves = _beside({i for i in images if depth[i] == last}, best, worth, rows)
    below = [i for i in best if i in images and i not in leaves]

    span = max(rows.values()) or 1.0
    tile_width, tile_height = _tile(np.stack(list(images.values()))[:1]) if images else (0.0, 0.0)
    height = max(min(5.6, 0.16 * span + 1.6), len(leaves) * (tile_height + 0.08))
    strip = tile_height + 0.3 if below else 0.0
    first, levels = int(depth[shown].min()), max(last - int(depth[shown].min()), 1)
    plot = min(10.0, max(5.5, 0.55 * levels))
    pitch = plot / levels
    margin = tile_width + 0.75 if leaves else 0.0
    y_of = {i: strip + 0.1 + (height - 0.2) * (1 - rows[i] / span if len(rows) > 1 else 0.5) for i in rows}
    x_of = {i: 0.15 + pitch * (int(depth[i]) - first) for i in shown}

    drawn = (
        f"{size:,} node{'s' * (size > 1)}"
        if len(shown) == size
        else f"the {len(shown):,} most visited of {size:,} nodes"
    )
    ends = worth[best[-1]]
    facts = f"{drawn}, {last} steps deep; the best path ends at {ends:.3g}" if np.isfinite(ends) else drawn
    coloured = bool(np.isfinite(worth[shown]).any())
    with _page(path, plot + 0.3 + margin, height + strip, "Search tree", facts, bar=coloured) as (figure, axis):
        paint = _Paint(worth[shown])
        _branches(axis, up, shown, x_of, y_of, count, best)
        size_of = _area(count[shown])
        order = np.argsort(-count[shown], kind="stable")
        at = np.asarray(shown)[order]
        axis.scatter([x_of[i] for i in at], [y_of[i] for i in at], s=size_of[order], c=paint(worth[at]), zorder=4,
                     clip_on=False, linewidths=[1.4 if i in best else 0.5 for i in at],
                     edgecolors=[_BEST if i in best else "white" for i in at])  # fmt: skip
        heights = _spread([y_of[i] for i in leaves], tile_height + 0.08, strip, strip + height)
        beside = plot + 0.3 + margin - tile_width
        for i, y in zip(leaves, heights, strict=True):
            axis.plot([x_of[i] + 0.12, beside - 0.06], [y_of[i], y], color=_BEST if i in best else _EXTINCT,
                      linewidth=0.9, zorder=1)  # fmt: skip
            edge = _BEST if i in best else paint(worth[[i]])[0]
            _image(axis, images[i], beside + tile_width / 2, y, tile_width, tile_height, edge)
        for i in _apart(below, x_of, tile_width + 0.06):
            _image(axis, images[i], max(x_of[i], tile_width / 2), tile_height / 2, tile_width, tile_height, _BEST)
        if below:
            axis.annotate("best path, as it was foreseen", (0, tile_height + 0.05), color=_BEST, fontsize=8.5)
        ticks = list(range(first, last + 1, max(1, round((last - first) / 10))))
        _times_axis(axis, [0.15 + pitch * (t - first) for t in ticks], [str(t) for t in ticks], "step")
        if coloured:
            _bar(figure, axis, paint, "value")


def _best_path(up: NDArray[np.int64], depth: NDArray[np.int64], worth: NDArray[Any]) -> list[int]:
    """From the root to the most valuable node of the last level."""
    deepest = np.flatnonzero(depth == depth.max())
    node = int(deepest[np.argmax(np.nan_to_num(worth[deepest], nan=-np.inf))])
    found = [node]
    while up[found[-1]] >= 0:
        found.append(int(up[found[-1]]))
    return found[::-1]


def _most_visited(
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


def _layered(up: NDArray[np.int64], depth: NDArray[np.int64], shown: list[int]) -> dict[int, float]:
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


def _branches(
    axis: Any,
    up: NDArray[np.int64],
    shown: list[int],
    x_of: Mapping[int, float],
    y_of: Mapping[int, float],
    count: NDArray[Any],
    best: list[int],
) -> None:
    from matplotlib.collections import LineCollection

    at = np.linspace(0, 1, 20)
    bend = at * at * (3 - 2 * at)
    inner = [i for i in shown if up[i] >= 0]
    most = max((count[i] for i in inner), default=1.0) or 1.0
    for on_path in (False, True):
        chosen = [i for i in inner if (i in best) == on_path]
        curves = []
        for i in chosen:
            a, b = (x_of[int(up[i])], y_of[int(up[i])]), (x_of[i], y_of[i])
            curves.append(np.column_stack([a[0] + (b[0] - a[0]) * at, a[1] + (b[1] - a[1]) * bend]))
        widths = [0.6 + 2.2 * float(np.sqrt(count[i] / most)) for i in chosen]
        if curves:
            colour = _BEST if on_path else "#b4bcc5"
            axis.add_collection(
                LineCollection(curves, colors=colour, linewidths=widths, zorder=2 + on_path, clip_on=False)
            )


def _area(count: NDArray[Any]) -> NDArray[Any]:
    """Areas of nodes in square points: proportional to visits, within what the eye can tell apart."""
    return 9 + 190 * count / max(float(count.max()), 1.0)


def _beside(found: set[int], best: list[int], worth: NDArray[Any], rows: Mapping[int, float]) -> list[int]:
    order = sorted(found, key=lambda i: (i not in best, -np.nan_to_num(worth[i], nan=-np.inf)))
    return sorted(order[:_LEAVES], key=lambda i: rows[i])


def _spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Heights from the top down, `gap` apart, near `wanted` (which falls) and between `low` and `high`."""
    placed: list[float] = []
    for i, y in enumerate(wanted):
        ceiling = placed[-1] - gap if placed else high - gap / 2
        floor = low + gap / 2 + gap * (len(wanted) - 1 - i)
        placed.append(max(min(y, ceiling), floor))
    return placed


def _apart(nodes: list[int], x_of: Mapping[int, float], gap: float) -> list[int]:
    """The nodes whose images, one beside the other, do not overlap: from the last one back."""
    kept: list[int] = []
    for i in reversed(nodes):
        if not kept or x_of[kept[-1]] - max(x_of[i], gap / 2) >= gap:
            kept.append(i)
    return kept[::-1]


# ----------------------------------------------------------------------------------------------------------- previews


def draw_previews(path: Path | str, previews: Sequence[Tensor], steps: Sequence[int]) -> None:
    """Write x0-hat over time: one row for each of `N` samples, one column for each of `steps`.

    `previews[t]` `[N, C, H, W]` is what the model foresaw at `steps[t]`, row i the same sample in every column.
    """
    check(len(previews) == len(steps) > 0, "previews", len(previews), f"{len(steps)}, one for each step, at least one")
    columns = [_rgb(x) for x in previews]
    shapes = [c.shape for c in columns]
    check(len(set(shapes)) == 1 and shapes[0][0] > 0, "previews", shapes, "one shape in every column, at least one row")
    tile_width, tile_height = _tile(columns[0])
    gap, count = 0.05, len(columns[0])
    width = len(steps) * (tile_width + gap) - gap
    height = count * (tile_height + gap) - gap
    title = "What the model foresees" if width > 3 else "x0-hat"
    facts = f"x0-hat of {count} sample{'s' * (count > 1)}, step by step"
    with _page(path, width, height, title, facts, bar=False) as (_, axis):
        x = [tile_width / 2 + t * (tile_width + gap) for t in range(len(steps))]
        for t, column in enumerate(columns):
            for i, tile in enumerate(column):
                _image(axis, tile, x[t], height - tile_height / 2 - i * (tile_height + gap), tile_width, tile_height)
        _times_axis(axis, x, [str(s) for s in steps], "step")


# -------------------------------------------------------------------------------------------------------------- pages


class _Paint:
    """Colours for numbers; a long tail of low ones shares the first colour."""

    def __init__(self, values: NDArray[Any]) -> None:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        tail = float(np.quantile(finite, 0.1)) if len(finite) else low
        self.cut = high - low > 4 * (high - tail) > 0
        low = tail if self.cut else low
        if high <= low:
            low, high = low - 0.5, high + 0.5
        self.map = ScalarMappable(Normalize(low, high, clip=True), colormaps["viridis"])

    def __call__(self, values: NDArray[Any]) -> NDArray[Any]:
        """RGBA `[M, 4]`; grey for NaN."""
        colours = np.array(self.map.to_rgba(np.nan_to_num(values, nan=0.0, posinf=1e300, neginf=-1e300)))
        colours[np.isnan(values)] = (0.82, 0.84, 0.86, 1)
        return colours


@contextmanager
def _page(
    path: Path | str, width: float, height: float, title: str, facts: str, bar: bool
) -> Iterator[tuple[Any, Any]]:
    """A figure with its heading and one axis in inches, `width` x `height`, written when the block ends."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heading = max(0.093 * len(title), 0.064 * len(facts))
    full = max(width + 2 * _SIDE + (_BAR if bar else 0), heading + 2 * _SIDE)
    tall = height + _HEAD + _FOOT + 0.1
    dpi = min(_DPI, 12000 / max(full, tall))
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(full, tall), dpi=dpi, facecolor="white")
        FigureCanvasAgg(figure)
        axis = figure.add_axes((_SIDE / full, (_FOOT + 0.05) / tall, width / full, height / tall))
        axis.set_axis_off()
        axis.set_xlim(0, width)
        axis.set_ylim(0, height)
        figure.text(_SIDE / full, 1 - 0.2 / tall, title, fontsize=14, fontweight="bold", va="top")
        figure.text(_SIDE / full, 1 - 0.5 / tall, facts, fontsize=9.5, color=_FAINT, va="top")
        yield figure, axis
        axis.set_xlim(0, width)
        axis.set_ylim(0, height)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def _times_axis(axis: Any, x: Sequence[float] | NDArray[Any], names: Sequence[str], label: str) -> None:
    """Names under the columns, as many as fit."""
    widest = max(len(name) for name in names) * 0.085 + 0.12
    kept: list[int] = []
    for i in reversed(range(len(names))):
        if not kept or x[kept[-1]] - x[i] >= widest:
            kept.append(i)
    for i in kept:
        prefix = f"{label} " if i == min(kept) and names[i].isdecimal() else ""
        axis.annotate(prefix + names[i], (x[i], 0), xytext=(0, -8), textcoords="offset points", ha="center", va="top",
                      color=_FAINT, fontsize=9, annotation_clip=False)  # fmt: skip


def _bar(figure: Any, axis: Any, paint: _Paint, label: str) -> None:
    full, tall = figure.get_size_inches()
    box = axis.get_position()
    height = min(box.height, 2.6 / tall)
    cax = figure.add_axes((box.x1 + 0.28 / full, box.y1 - height, 0.11 / full, height))
    bar = figure.colorbar(paint.map, cax=cax, extend="min" if paint.cut else "neither")
    bar.outline.set_visible(False)
    bar.ax.set_title(label, fontsize=9, color=_FAINT, fontweight="normal", loc="left", pad=7)
    bar.ax.tick_params(labelsize=8.5, colors=_FAINT)
    bar.ax.set_facecolor(_GRID)


def _rgb(images: Tensor) -> NDArray[np.uint8]:
    """Bytes `[N, H, W, 3]`."""
    rows = to_uint8(images).permute(0, 2, 3, 1).numpy()
    return np.broadcast_to(rows, (*rows.shape[:3], 3))


def _tile(images: NDArray[np.uint8], size: float = 0.72) -> tuple[float, float]:
    """Width and height of a thumbnail in inches, the longer one `size`."""
    rows, columns = images.shape[1:3]
    longer = max(rows, columns)
    return size * columns / longer, size * rows / longer


def _image(
    axis: Any,
    image: NDArray[np.uint8],
    x: float,
    y: float,
    width: float,
    height: float,
    edge: Any = None,
    faint: bool = False,
) -> None:
    from matplotlib.patches import Rectangle

    factor = max(1, 224 // max(image.shape[:2]))
    large = image.repeat(factor, 0).repeat(factor, 1)  # even squares, where scaling to the page would make uneven ones
    left, low = x - width / 2, y - height / 2
    axis.imshow(
        large, extent=(left, left + width, low, low + height), alpha=0.3 if faint else 1.0, zorder=5, aspect="auto"
    )
    if edge is not None:
        colour, thick = (_EXTINCT, 1.0) if faint else (edge, 2.2)
        frame = Rectangle((left, low), width, height, fill=False, edgecolor=colour, linewidth=thick, zorder=6)
        axis.add_patch(frame).set_clip_on(False)
