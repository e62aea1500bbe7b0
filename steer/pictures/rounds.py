"""Figures of training: what every round of a policy was like, and the curves of any run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steer.pictures.charts import canvas

__all__ = ["draw_history", "draw_rounds"]

_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Reward", ("reward", "reward_best")),
    ("KL to the base, nats", ("kl",)),
    ("Entropy of a token, nats", ("entropy",)),
    ("Length, tokens", ("length",)),
    ("Log-probability of pairs, nats", ("chosen", "rejected")),
    ("Ranking accuracy", ("ranking_base", "ranking_policy", "ranking_ideal")),
)


def draw_rounds(rounds: Sequence[dict[str, float]], path: Path) -> None:
    """Write the figure as PNG to `path` in one step: a panel for each kind of figure, over the rounds."""
    panels = [(title, [n for n in names if any(n in row for row in rounds)]) for title, names in _PANELS]
    panels = [(title, names) for title, names in panels if names]
    if not panels:
        return
    with _panels(path, len(panels), "Training, round by round") as axes:
        for axis, (title, names) in zip(axes, panels, strict=True):
            for name in names:
                seen = [(row["round"] + 1, row[name]) for row in rounds if name in row]
                axis.plot([x for x, _ in seen], [y for _, y in seen], marker="o", markersize=3, label=name)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("round")
            if len(names) > 1:
                axis.legend(fontsize=8)


def draw_history(curves: Mapping[str, Sequence[tuple[float, float]]], path: Path, title: str, unit: str) -> None:
    """Write the figure to `path`, in the format of its suffix: a panel for each curve, points `(step, value)` of a
    training named `title`; `unit` says what a step is.
    """
    with _panels(path, len(curves), title) as axes:
        for axis, (name, points) in zip(axes, curves.items(), strict=True):
            axis.plot([x for x, _ in points], [y for _, y in points], linewidth=1.4, color="#0f62a8")
            axis.set_title(name, fontsize=10)
            axis.set_xlabel(unit)


@contextmanager
def _panels(path: Path, count: int, title: str) -> Iterator[list[Any]]:
    """That many axes, at most three beside each other."""
    columns = min(3, count)
    lines = -(-count // columns)
    with canvas(path, (3.6 * columns + 0.4 * (columns == 1), 2.9 * lines + 0.5), title) as figure:
        axes = figure.subplots(lines, columns, squeeze=False)
        left = 0.16 if columns == 1 else 0.08
        figure.subplots_adjust(
            left=left, right=0.98, top=0.8 if lines == 1 else 0.86, bottom=0.15, hspace=0.5, wspace=0.28
        )
        for axis in axes.flat[count:]:
            axis.set_visible(False)
        for axis in axes.flat[:count]:
            axis.xaxis.get_major_locator().set_params(integer=True)  # rounds, steps and entries are counted
        yield list(axes.flat[:count])
