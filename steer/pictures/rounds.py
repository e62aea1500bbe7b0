"""The figure of a policy's training: what every round was like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from steer.pictures.charts import canvas

__all__ = ["draw_rounds"]

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
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    with canvas(path, (3.6 * columns, 2.9 * lines + 0.5), "Training, round by round") as figure:
        axes = figure.subplots(lines, columns, squeeze=False).flat
        figure.subplots_adjust(left=0.08, right=0.98, top=0.86, bottom=0.13, hspace=0.45, wspace=0.28)
        for axis, (title, names) in zip(axes, panels, strict=False):
            for name in names:
                seen = [(row["round"] + 1, row[name]) for row in rounds if name in row]
                axis.plot([x for x, _ in seen], [y for _, y in seen], marker="o", markersize=3, label=name)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("round")
            if len(names) > 1:
                axis.legend(fontsize=8)
        for axis in list(axes)[len(panels) :]:
            axis.set_visible(False)
