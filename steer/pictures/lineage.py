"""Pictures of how samplers for images work: lineages of particles, search trees, previews over time.

Time runs from left to right in all of them. Images are `[..., C, H, W]` in [0, 1], C 1 or 3. Files are PNG whatever
their suffix and appear all at once; `SteerError` where one cannot be written, `InputError` for bad input.

Axis letters: `K` particles, `M` nodes of a tree, `N` samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from steer.core import check
from steer.pictures.page import EXTINCT, Paint, draw_bar, draw_bends, draw_image, name_columns, page, tile_size, to_rgb
from steer.pictures.style import FAINT, INK

__all__ = ["draw_lineage", "draw_previews"]


_THUMBNAILS = 16
"""Largest number of particles that are shown as images."""


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
    parents = _checked(ancestors)
    count, times = len(parents[0]), len(parents)
    scores = None if rewards is None else [np.asarray(r.detach().cpu(), dtype=float) for r in rewards]
    for name, given in (("thumbnails", thumbnails), ("rewards", scores), ("steps", steps or None)):
        if given is not None:
            check(len(given) in (times, times + 1), name, len(given), f"{times}, or {times + 1} with the result")
    for name, each in (("thumbnails", thumbnails or []), ("rewards", scores or [])):
        check(all(len(x) == count for x in each), name, [len(x) for x in each], f"{count} in every column")

    alive = _surviving(parents)
    tiles = [] if thumbnails is None or count > _THUMBNAILS else [to_rgb(x) for x in thumbnails]
    grid = _grid(_uncrossed(parents), tiles)
    survivors = int(alive[0].sum())
    facts = f"{count} particles, resampled {_times(times)}; the result descends from {survivors} of the first {count}"
    with page(path, grid.width, grid.height, "Lineage of the particles", facts, bar=scores is not None) as made:
        figure, axis = made
        paint = Paint(np.concatenate(scores)) if scores else None
        colours = [paint(s) for s in scores] if paint and scores else []
        for t, parent in enumerate(parents):
            _draw_links(axis, grid, t, parent, alive[t + 1], colours[t + 1] if t + 1 < len(colours) else None)
        for t in range(times + 1):
            colour = list(colours[t]) if t < len(colours) else [INK] * count
            if t < len(tiles):
                _draw_images(axis, grid, t, tiles[t], colour, alive[t])
            else:
                _draw_dots(axis, grid, t, colour, alive[t])
        names = [str(s) for s in steps] if steps else [str(t + 1) for t in range(times)]
        names += ["result"] if len(names) == times else []
        name_columns(axis, grid.x, names, "step" if steps else "time")
        if paint:
            draw_bar(figure, axis, paint, "reward")


def _checked(ancestors: Sequence[Tensor]) -> list[NDArray[np.int64]]:
    parents = [np.asarray(a.cpu(), dtype=np.int64) for a in ancestors]
    count = len(parents[0]) if parents else 0
    check(count > 0, "ancestors", len(parents), "at least one resampling of at least one particle")
    for a in parents:
        right = a.shape == (count,) and a.min() >= 0 and a.max() < count
        check(right, "ancestors", a.tolist(), f"{count} indices from 0 to {count - 1}")
    return parents


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


@dataclass
class _Grid:
    """Where the particles of every column stand, in inches from the lower left corner."""

    x: NDArray[Any]
    """Of every column."""
    y: list[NDArray[Any]]
    """Of every particle, by column."""
    tile: tuple[float, float]
    """Width and height of an image; 0 where there are none."""
    tiled: int
    """Columns that have images."""
    row: float
    """From one particle to the next."""
    width: float
    height: float


def _grid(places: list[NDArray[np.int64]], tiles: list[NDArray[np.uint8]]) -> _Grid:
    count, times = len(places[0]), len(places) - 1
    tile_width, tile_height = tile_size(tiles[0], 0.72 if count <= 8 else 0.54) if tiles else (0.0, 0.0)
    row = tile_height * 1.22 if tiles else min(0.3, 6.5 / count)
    column = tile_width + min(0.75, max(0.3, 9 / times)) if tiles else min(1.3, max(0.3, 10 / times))
    width, height = column * times + tile_width, row * (count - 1) + tile_height
    width, height = max(width, 4.5), max(height, 1.6)
    x = tile_width / 2 + (width - tile_width) / times * np.arange(times + 1)
    y = [height - tile_height / 2 - row * p - (height - tile_height - row * (count - 1)) / 2 for p in places]
    return _Grid(x, y, (tile_width, tile_height), len(tiles), row, width, height)


def _draw_links(
    axis: Any,
    grid: _Grid,
    t: int,
    parent: NDArray[np.int64],
    alive: NDArray[np.bool_],
    colours: NDArray[Any] | None,
) -> None:
    """Lines from column t to the particles of column t + 1, beginning and ending at the edges of their images."""
    count, half = len(parent), [grid.tile[0] / 2 if c < grid.tiled else 0.0 for c in (t, t + 1)]
    start = np.column_stack([np.full(count, grid.x[t] + half[0]), grid.y[t][parent]])
    end = np.column_stack([np.full(count, grid.x[t + 1] - half[1]), grid.y[t + 1]])
    thick = 1.8 if count <= 64 else 0.8
    for kept in (False, True):
        chosen = alive == kept
        colour = EXTINCT if not kept else FAINT if colours is None else colours[chosen]
        draw_bends(axis, start[chosen], end[chosen], 24, colour, thick if kept else 0.6 * thick, 2 + kept)


def _draw_images(
    axis: Any, grid: _Grid, t: int, tiles: NDArray[np.uint8], colours: list[Any], alive: NDArray[np.bool_]
) -> None:
    for k, tile in enumerate(tiles):
        draw_image(axis, tile, grid.x[t], grid.y[t][k], *grid.tile, colours[k], faint=not alive[k])


def _draw_dots(axis: Any, grid: _Grid, t: int, colours: list[Any], alive: NDArray[np.bool_]) -> None:
    area = (min(grid.row, 0.14) * 72 * 0.75) ** 2
    shown = [c if a else EXTINCT for c, a in zip(colours, alive, strict=True)]
    axis.scatter(np.full(len(shown), grid.x[t]), grid.y[t], s=area, c=shown, linewidths=0, zorder=4, clip_on=False)


def draw_previews(path: Path | str, previews: Sequence[Tensor], steps: Sequence[int]) -> None:
    """Write x0-hat over time: one row for each of `N` samples, one column for each of `steps`.

    `previews[t]` `[N, C, H, W]` is what the model foresaw at `steps[t]`, row i the same sample in every column.
    """
    check(len(previews) == len(steps) > 0, "previews", len(previews), f"{len(steps)}, one for each step, at least one")
    columns = [to_rgb(x) for x in previews]
    shapes = [c.shape for c in columns]
    check(len(set(shapes)) == 1 and shapes[0][0] > 0, "previews", shapes, "one shape in every column, at least one row")
    tile_width, tile_height = tile_size(columns[0])
    gap, count = 0.05, len(columns[0])
    width = len(steps) * (tile_width + gap) - gap
    height = count * (tile_height + gap) - gap
    title = "What the model foresees" if width > 3 else "x0-hat"
    facts = f"x0-hat of {count} sample{'s' * (count > 1)}, step by step"
    with page(path, width, height, title, facts, bar=False) as (_, axis):
        x = [tile_width / 2 + t * (tile_width + gap) for t in range(len(steps))]
        for t, column in enumerate(columns):
            for i, tile in enumerate(column):
                draw_image(
                    axis, tile, x[t], height - tile_height / 2 - i * (tile_height + gap), tile_width, tile_height
                )
        name_columns(axis, x, [str(s) for s in steps], "step")
