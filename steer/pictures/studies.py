"""Figures of the studies that tell right from wrong: goals, concepts, reliability and ranking accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.pictures.charts import canvas
from steer.pictures.style import FAINT, INK

if TYPE_CHECKING:
    from steer.measure.concept import ConceptReport
    from steer.measure.goals import Goals
    from steer.measure.rankings import Rankings
    from steer.measure.reliability import Reliability

__all__ = ["draw_concept", "draw_goals", "draw_rankings", "draw_reliability"]

_BLUE, _ORANGE, _GREEN = "#0f62a8", "#c2571a", "#2e7d4f"
_COLOURS = (_BLUE, _ORANGE, _GREEN)


def draw_goals(found: Goals, path: Path) -> None:
    """Median error with its interval, miscalibration and orthogonality of every way to ask."""
    names = [r.method for r in found.rows]
    with canvas(path, (10, 1.8 + 0.42 * len(names)), "How far texts end from their goals") as figure:
        axes = figure.subplots(1, 3, sharey=True, gridspec_kw={"wspace": 0.12})
        figure.subplots_adjust(left=0.17, right=0.98, top=0.72, bottom=0.2)
        error = axes[0]
        spans = _spans([(r.error, r.error_low, r.error_high) for r in found.rows])
        for axis, title, values in (
            (error, "Error, 95% interval", [r.error for r in found.rows]),
            (axes[1], "Miscalibration", [r.miscalibration for r in found.rows]),
            (axes[2], "Orthogonality: side effects", [r.orthogonality for r in found.rows]),
        ):
            axis.barh(names, values, color=_BLUE, alpha=0.85, height=0.6)
            axis.set_title(title, fontsize=10)
        error.errorbar([r.error for r in found.rows], names, xerr=spans, fmt="none", ecolor=INK, capsize=3)
        for axis in axes:
            axis.set_xlim(left=0)
        error.invert_yaxis()


def draw_concept(found: ConceptReport, path: Path) -> None:
    """Score against factor on the half it was chosen on, and the three judgments on the half that is reported."""
    with canvas(path, (11, 4.8), "Concept, instruction and fluency, judged") as figure:
        curve, bars = figure.subplots(1, 2, gridspec_kw={"wspace": 0.3})
        figure.subplots_adjust(left=0.07, right=0.98, top=0.78, bottom=0.15)
        for i, (name, points) in enumerate(found.curves.items()):
            xs = list(points)
            curve.plot(xs, [points[x] for x in xs], marker="o", markersize=4, color=_COLOURS[i % 3], label=name)
        curve.set_title("Score, on the half that chooses the factor", fontsize=10)
        curve.set_xlabel("factor")
        curve.set_ylim(bottom=0)
        _legend(curve, above=True)
        names = [r.method for r in found.rows]
        for i, part in enumerate(("concept", "instruction", "fluency")):
            places = [j + 0.22 * (i - 1) for j in range(len(names))]
            bars.barh(places, [getattr(r, part) for r in found.rows], height=0.2, color=_COLOURS[i], label=part)
        scores = [r.score for r in found.rows]
        spans = _spans([(r.score, r.low, r.high) for r in found.rows])
        bars.errorbar(scores, range(len(names)), xerr=spans, fmt="D", color=INK, capsize=3, label="score, 95% interval")
        bars.set_yticks(range(len(names)), names)
        bars.invert_yaxis()
        bars.set_xlim(-0.05, 2.05)  # marks of 0 and of 2 are seen whole
        bars.set_title("On the half that is reported", fontsize=10)
        _legend(bars, above=True)


def draw_reliability(found: Reliability, path: Path) -> None:
    """Propensity and accuracy against strength, and the slopes of the prompts."""
    with canvas(path, (11, 4.4), "How evenly an edit moves a choice") as figure:
        moves, right, spread = figure.subplots(1, 3, gridspec_kw={"wspace": 0.3})
        figure.subplots_adjust(left=0.065, right=0.98, top=0.8, bottom=0.15)
        xs = [s.strength for s in found.strengths]
        halves = [0.0 if s.propensity_half != s.propensity_half else s.propensity_half for s in found.strengths]
        moves.errorbar(xs, [s.propensity for s in found.strengths], halves, color=_BLUE, marker="o", capsize=3)
        moves.set_title("Propensity, nats, 95% interval", fontsize=10)
        for i, name in enumerate(found.strengths[0].accuracy):
            shares = [s.accuracy[name] for s in found.strengths]
            spans = _spans([(s.accuracy[name], *found.span(s, name)) for s in found.strengths])
            right.errorbar(xs, shares, spans, marker="o", markersize=4, color=_COLOURS[i % 3], capsize=3, label=name)
        right.set_title("Accuracy by set, 95% interval", fontsize=10)
        right.set_ylim(-0.02, 1.02)
        _legend(right)
        for axis in (moves, right):
            axis.set_xlabel("strength")
        spread.hist(found.slopes, bins=min(20, max(5, len(found.slopes) // 2)), color=_BLUE, alpha=0.85)
        spread.axvline(0, color=_ORANGE, linewidth=1.6)
        spread.set_title(f"Slopes: {found.wrong_way:.0%} the wrong way", fontsize=10)
        spread.set_xlabel("nats a unit of strength")


def draw_rankings(found: Rankings, path: Path) -> None:
    """Accuracy of every judge with its interval; chance and the ideal as lines."""
    shown = [r for r in found.rankings if r.by != "idealised"]
    with canvas(path, (9, 1.6 + 0.4 * max(len(shown), 1)), "How often the preferred text is put first") as figure:
        axis = figure.subplots()
        figure.subplots_adjust(left=0.3, right=0.97, top=0.82, bottom=0.24)
        names = [f"{r.judge}, by {r.by}" for r in shown]
        spans = _spans([(r.accuracy, r.low, r.high) for r in shown])
        axis.errorbar([r.accuracy for r in shown], range(len(names)), xerr=spans, fmt="o", color=_BLUE, capsize=3)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.axvline(0.5, color=FAINT, linewidth=1, linestyle="--", label="chance")
        for ideal in (r for r in found.rankings if r.by == "idealised"):
            axis.axvline(ideal.accuracy, color=_GREEN, linewidth=1.6, label="a perfect DPO")
        axis.set_xlim(0, 1.02)
        axis.set_xlabel("ranking accuracy, 95% interval")
        _legend(axis)


def _spans(intervals: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    """How far each value is from the ends of its interval, as bars of errors want it."""
    return [[max(x - low, 0.0) for x, low, _ in intervals], [max(high - x, 0.0) for x, _, high in intervals]]


def _legend(axis: Any, above: bool = False) -> None:
    """Where there is anything to name: in the panel, or above its title, where no line can run through it."""
    handles, _ = axis.get_legend_handles_labels()
    outside: dict[str, Any] = {"ncols": 4, "loc": "lower right", "bbox_to_anchor": (1.0, 1.06), "columnspacing": 1.0}
    if handles:
        axis.legend(fontsize=8, **(outside if above else {}))
