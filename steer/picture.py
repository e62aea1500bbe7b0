"""The figure of a report: four panels against strength."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steer.report import Report, Row

__all__ = ["draw"]

_INK, _FAINT, _GRID = "#24292f", "#6e7781", "#e6e8eb"
_COLOURS = {"steered": "#0f62a8", "random": "#9aa4ae", "system": "#c2571a"}
_LABELS = {"steered": "steered", "random": "random direction, same norm", "system": "system prompt"}
_PANELS: tuple[tuple[str, str, Callable[[Row], float | None]], ...] = (
    ("Reward", "mean, 95% interval", lambda row: row.reward),
    ("Drift", "KL to the unsteered model, nats a token", lambda row: row.kl_per_token),
    ("Fluency", "perplexity, times unsteered", lambda row: row.perplexity_ratio),
    ("Diversity", "distinct-2", lambda row: row.distinct_2),
)
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GRID,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "legend.frameon": False,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
}


def draw(report: Report, path: Path) -> None:
    """Write the figure as PNG to `path`, whatever its suffix."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 7.4), dpi=160, facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 2, sharex=True, gridspec_kw={"hspace": 0.3, "wspace": 0.22})
        figure.subplots_adjust(left=0.075, right=0.975, top=0.795, bottom=0.115)
        for axis, (title, unit, value) in zip(axes.flat, _PANELS, strict=True):
            _panel(axis, report, title, unit, value)
        for axis in axes[1]:
            axis.set_xlabel(_unit(report))
        _head(figure, report)
        _legend(figure, axes[0][0])
        figure.savefig(path, format="png")


def _panel(axis: Any, report: Report, title: str, unit: str, value: Callable[[Row], float | None]) -> None:
    axis.set_title(title, pad=8)
    axis.annotate(unit, (1, 1), xycoords="axes fraction", xytext=(0, 8), textcoords="offset points", ha="right",
                  color=_FAINT, fontsize=9)  # fmt: skip
    for kind in ("random", "steered"):
        rows = [row for row in report.of(kind) if value(row) is not None]
        x, y = [row.strength for row in rows], [value(row) for row in rows]
        front = (
            {"zorder": 4, "linewidth": 2.2} if kind == "steered" else {"zorder": 3, "linewidth": 1.5, "linestyle": "--"}
        )
        if title == "Reward" and rows:
            low, high = [row.reward_low for row in rows], [row.reward_high for row in rows]
            axis.fill_between(
                x, low, high, color=_COLOURS[kind], alpha=0.16 if kind == "steered" else 0.13, linewidth=0
            )
        axis.plot(x, y, color=_COLOURS[kind], marker="o", markersize=5, clip_on=False, label=_LABELS[kind], **front)
    for row in report.of("system"):
        axis.axhline(
            value(row), color=_COLOURS["system"], linewidth=1.6, linestyle=(0, (5, 2)), label=_LABELS["system"]
        )
    if title == "Fluency":
        axis.axhline(1, color=_FAINT, linewidth=0.8)
        _zoom(axis, report, value)
    elif title != "Reward":
        axis.set_ylim(bottom=0, top=1.05 if title == "Diversity" else None)
    _shade(axis, report)


def _zoom(axis: Any, report: Report, value: Callable[[Row], float | None]) -> None:
    """A broken text can be a thousand times as surprising: then the scale is logarithmic."""
    values = [v for row in report.rows if (v := value(row))]
    if max(values) / min(values) > 8:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=8))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
        axis.yaxis.set_minor_locator(NullLocator())


def _shade(axis: Any, report: Report) -> None:
    """Grey out the strengths from the first broken one outwards."""
    strengths = [row.strength for row in report.of("steered") if row.strength is not None]
    if not strengths:
        return
    margin = 0.04 * (max(strengths) - min(strengths) or 1.0)
    low, high = min(strengths) - margin, max(strengths) + margin
    axis.set_xlim(low, high)
    for b in report.breaks:
        start, stop = (b.strength, high) if b.strength > 0 else (low, b.strength)
        axis.axvspan(start, stop, color="#d1242f", alpha=0.08, linewidth=0, zorder=0, label="texts break")


def _unit(report: Report) -> str:
    return f"strength ({report.settings['unit']})" if report.settings.get("unit") else "strength"


def _head(figure: Any, report: Report) -> None:
    figure.text(0.075, 0.965, f"{report.artifact}  on  {report.model}", fontsize=15, fontweight="bold", va="top")
    facts = f"{report.settings.get('prompts', '?')} prompts, reward {report.reward}"
    facts = facts if len(facts) <= 110 else f"{facts[:107]}..."
    figure.text(0.075, 0.92, f"{facts}\n{report.verdict}", fontsize=10, color=_FAINT, va="top", linespacing=1.5)


def _legend(figure: Any, axis: Any) -> None:
    entries = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    order = [label for label in (*reversed(_LABELS.values()), "texts break") if label in entries]
    order.sort(key=lambda label: label != _LABELS["steered"])
    figure.legend([entries[label] for label in order], order, loc="lower center", ncols=len(order), handlelength=2.4,
                  bbox_to_anchor=(0.525, 0.005))  # fmt: skip
