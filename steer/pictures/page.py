"""The page that pictures of particles and trees are drawn on: one axis in inches, its heading, images and colours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from steer.files import replacing
from steer.images import to_uint8
from steer.pictures.style import FAINT, GRID, STYLE, image_format

__all__ = ["EXTINCT", "Paint", "draw_bar", "draw_bends", "draw_image", "name_columns", "page", "tile_size", "to_rgb"]


EXTINCT = "#d0d5da"
"""Colour of what led nowhere."""
_DPI = 160
_HEAD, _FOOT, _SIDE, _BAR = 0.85, 0.42, 0.35, 0.85
"""Margins of a picture in inches: title, step numbers, left, colour bar."""


class Paint:
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
def page(path: Path | str, width: float, height: float, title: str, facts: str, bar: bool) -> Iterator[tuple[Any, Any]]:
    """A figure with its heading and one axis in inches, `width` x `height`, written when the block ends."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heading = max(0.093 * len(title), 0.064 * len(facts))
    full = max(width + 2 * _SIDE + (_BAR if bar else 0), heading + 2 * _SIDE)
    tall = height + _HEAD + _FOOT + 0.1
    dpi = min(_DPI, 12000 / max(full, tall))
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(full, tall), dpi=dpi, facecolor="white")
        FigureCanvasAgg(figure)
        axis = figure.add_axes((_SIDE / full, (_FOOT + 0.05) / tall, width / full, height / tall))
        axis.set_axis_off()
        axis.set_xlim(0, width)
        axis.set_ylim(0, height)
        figure.text(_SIDE / full, 1 - 0.2 / tall, title, fontsize=14, fontweight="bold", va="top")
        figure.text(_SIDE / full, 1 - 0.5 / tall, facts, fontsize=9.5, color=FAINT, va="top")
        yield figure, axis
        axis.set_xlim(0, width)
        axis.set_ylim(0, height)
        with replacing(path) as temporary:
            figure.savefig(temporary, format=image_format(path))


def name_columns(axis: Any, x: Sequence[float] | NDArray[Any], names: Sequence[str], label: str) -> None:
    """Names under the columns, as many as fit."""
    widest = max(len(name) for name in names) * 0.085 + 0.12
    kept: list[int] = []
    for i in reversed(range(len(names))):
        if not kept or x[kept[-1]] - x[i] >= widest:
            kept.append(i)
    for i in kept:
        prefix = f"{label} " if i == min(kept) and names[i].isdecimal() else ""
        axis.annotate(
            prefix + names[i],
            (x[i], 0),
            xytext=(0, -8),
            textcoords="offset points",
            ha="center",
            va="top",
            color=FAINT,
            fontsize=9,
            annotation_clip=False,
        )


def draw_bar(figure: Any, axis: Any, paint: Paint, label: str) -> None:
    full, tall = figure.get_size_inches()
    box = axis.get_position()
    height = min(box.height, 2.6 / tall)
    cax = figure.add_axes((box.x1 + 0.28 / full, box.y1 - height, 0.11 / full, height))
    bar = figure.colorbar(paint.map, cax=cax, extend="min" if paint.cut else "neither")
    bar.outline.set_visible(False)
    bar.ax.set_title(label, fontsize=9, color=FAINT, fontweight="normal", loc="left", pad=7)
    bar.ax.tick_params(labelsize=8.5, colors=FAINT)
    bar.ax.set_facecolor(GRID)


def to_rgb(images: Tensor) -> NDArray[np.uint8]:
    """Bytes `[N, H, W, 3]`."""
    rows = to_uint8(images).permute(0, 2, 3, 1).numpy()
    return np.broadcast_to(rows, (*rows.shape[:3], 3))


def tile_size(images: NDArray[np.uint8], size: float = 0.72) -> tuple[float, float]:
    """Width and height of a thumbnail in inches, the longer one `size`."""
    rows, columns = images.shape[1:3]
    longer = max(rows, columns)
    return size * columns / longer, size * rows / longer


def draw_image(
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
        colour, thick = (EXTINCT, 1.0) if faint else (edge, 2.2)
        frame = Rectangle((left, low), width, height, fill=False, edgecolor=colour, linewidth=thick, zorder=6)
        axis.add_patch(frame).set_clip_on(False)


def draw_bends(
    axis: Any, start: NDArray[Any], end: NDArray[Any], points: int, colour: Any, width: Any, zorder: int
) -> None:
    """Lines of so many points from `start` `[M, 2]` to `end` `[M, 2]` that leave and arrive level."""
    from matplotlib.collections import LineCollection

    if not len(start):
        return
    at = np.linspace(0, 1, points)
    bend = at * at * (3 - 2 * at)
    (left, low), (right, high) = start.T[:, :, None], end.T[:, :, None]
    curves = np.stack([left + (right - left) * at, low + (high - low) * bend], axis=2)
    axis.add_collection(LineCollection(list(curves), colors=colour, linewidths=width, zorder=zorder, clip_on=False))
