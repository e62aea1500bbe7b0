"""Figures: reports against strength, RL guidance against w, races and comparisons against budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.core import check
from steer.files import replacing
from steer.measure.distances import interval
from steer.measure.tables import few
from steer.pictures.style import FAINT, GRID, STYLE, image_format

if TYPE_CHECKING:
    from steer.measure.compare import Comparison
    from steer.measure.frontier import Frontier
    from steer.measure.guide import Sweep
    from steer.measure.race import Race
    from steer.measure.report import Report, ReportRow

__all__ = ["canvas", "draw_curves", "draw_frontier", "draw_guide", "draw_methods", "draw_race", "draw_report"]


_COLOURS = {"steered": "#0f62a8", "random": "#9aa4ae", "system": "#c2571a"}
_LABELS = {"steered": "steered", "random": "random direction, same norm", "system": "system prompt"}
_PANELS: tuple[tuple[str, str, str, tuple[str, str]], ...] = (
    ("Reward", "mean", "reward", ("reward_low", "reward_high")),
    ("Drift", "KL to the unsteered model, nats a token", "kl_per_token", ("kl_low", "kl_high")),
    ("Fluency", "perplexity, times unsteered", "perplexity_ratio", ("ratio_low", "ratio_high")),
    ("Diversity", "distinct-2", "distinct_2", ("distinct_low", "distinct_high")),
)
"""Title, unit, value and the ends of its interval of each panel."""


def draw_report(report: Report, path: Path | str | None = None, *, ax: Any = None) -> None:
    """Reward, drift, fluency and diversity against strength, with 95% intervals where there are enough prompts for any.

    Args:
        path: a file, written in one step in the format of its suffix.
        ax: four axes of matplotlib's to draw on instead.
    """
    if ax is not None:
        for axis, panel in zip(own_axes(ax, len(_PANELS)), _PANELS, strict=True):
            _panel(axis, report, *panel)
            axis.set_xlabel(_unit(report))
        return
    check(path is not None, "path", None, "a file, or axes to draw on (ax)")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 7.4), dpi=160, facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 2, sharex=True, gridspec_kw={"hspace": 0.3, "wspace": 0.22})
        figure.subplots_adjust(left=0.075, right=0.975, top=0.795, bottom=0.115)
        for axis, panel in zip(axes.flat, _PANELS, strict=True):
            _panel(axis, report, *panel)
        for axis in axes[1]:
            axis.set_xlabel(_unit(report))
        _head(figure, report)
        _legend(figure, axes[0][0])
        with replacing(path) as temporary:  # type: ignore[arg-type]
            figure.savefig(temporary, format=image_format(path))  # type: ignore[arg-type]


def _panel(axis: Any, report: Report, title: str, unit: str, name: str, ends: tuple[str, str]) -> None:
    def value(row: ReportRow) -> float | None:
        found: float | None = getattr(row, name)
        return found

    def ranged(row: ReportRow) -> tuple[float, float] | None:
        low, high = (getattr(row, end) for end in ends)
        return None if low is None or high is None or low == high else (low, high)

    banded = any(ranged(row) for row in report.rows)
    axis.set_title(title, pad=8)
    axis.annotate(
        f"{unit}, 95% interval" if banded else unit,
        (1, 1),
        xycoords="axes fraction",
        xytext=(0, 8),
        textcoords="offset points",
        ha="right",
        color=FAINT,
        fontsize=9,
    )
    for kind in ("random", "steered"):
        rows = [row for row in report.of(kind) if value(row) is not None]
        if not rows:
            continue
        x, y = [row.strength for row in rows], [value(row) for row in rows]
        front = (
            {"zorder": 4, "linewidth": 2.2} if kind == "steered" else {"zorder": 3, "linewidth": 1.5, "linestyle": "--"}
        )
        band = [ranged(row) or (value(row), value(row)) for row in rows]
        if banded:
            low, high = zip(*band, strict=True)
            alpha = 0.16 if kind == "steered" else 0.13
            axis.fill_between(x, low, high, color=_COLOURS[kind], alpha=alpha, linewidth=0)
        axis.plot(x, y, color=_COLOURS[kind], marker="o", markersize=5, clip_on=False, label=_LABELS[kind], **front)
    for row in report.of("system"):
        if found := ranged(row):
            axis.axhspan(*found, color=_COLOURS["system"], alpha=0.09, linewidth=0)
        axis.axhline(
            value(row), color=_COLOURS["system"], linewidth=1.6, linestyle=(0, (5, 2)), label=_LABELS["system"]
        )
    if title == "Fluency":
        axis.axhline(1, color=FAINT, linewidth=0.8)
        _zoom(axis, report, value)
    elif title != "Reward":
        # A share that hardly moves is looked at from near by.
        seen = [end for row in report.rows for end in (value(row), *(ranged(row) or ())) if end is not None]
        share = title == "Diversity" and bool(seen)
        axis.set_ylim(bottom=max(0, min(seen) - 0.1) if share else 0, top=1.02 if share else None)
    _shade(axis, report)


def _zoom(axis: Any, report: Report, value: Callable[[ReportRow], float | None]) -> None:
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
    figure.text(0.075, 0.92, f"{facts}\n{report.verdict}", fontsize=10, color=FAINT, va="top", linespacing=1.5)


def _legend(figure: Any, axis: Any) -> None:
    entries = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    order = [label for label in (*reversed(_LABELS.values()), "texts break") if label in entries]
    order.sort(key=lambda label: label != _LABELS["steered"])
    figure.legend(
        [entries[label] for label in order],
        order,
        loc="lower center",
        ncols=len(order),
        handlelength=2.4,
        bbox_to_anchor=(0.525, 0.005),
    )


# ------------------------------------------------------------------------------------------- races, sweeps, comparisons

_LINES = (
    *("#0f62a8", "#c2571a", "#2e7d4f", "#7a4fa3", "#8c6d1f"),
    *("#c2185b", "#00838f", "#5d4037", "#689f38", "#9aa4ae"),
)
_MARKS = "os^DvX<>Pp"


def draw_guide(found: Sweep, path: Path | str | None = None, *, ax: Any = None) -> None:
    """Reward and KL against w, plain and corrected; `ax` are two axes to draw on in place of a file."""
    title = "RL guidance between a base model and its tuned policy"
    with _plate(path, ax, 2, (10, 4.6), title, left=0.075, right=0.975, top=0.82, bottom=0.135) as axes:
        for axis, name, title in zip(axes, ("reward", "kl"), ("Reward", "KL to the base, nats an output"), strict=True):
            for i, kind in enumerate(("plain", "corrected")):
                points = [p for p in found.points if p.kind == kind]
                ys, halves = ([getattr(p, n) for p in points] for n in (name, f"{name}_half"))
                _line(axis, i, [p.w for p in points], ys, halves, kind)
            axis.set_title(title)
            axis.set_xlabel("w: 0 is the base, 1 the policy")
            for w in (0, 1):
                axis.axvline(w, color=GRID, linewidth=1.5, zorder=0)


def draw_race(found: Race, path: Path | str | None = None, *, ax: Any = None) -> None:
    """Best reward against what the network evaluated; `ax` is an axis to draw on in place of a file."""
    title = "Reward of the best output against the budget"
    with _plate(path, ax, 1, (8, 5), title, left=0.09, right=0.97, top=0.86, bottom=0.13) as (axis,):
        for i, method in enumerate(dict.fromkeys(h.method for h in found.heats)):
            mine = sorted((h for h in found.heats if h.method == method), key=lambda h: h.nfe)
            _line(axis, i, [h.nfe for h in mine], [h.mean for h in mine], [h.half for h in mine], method, bars=True)
        _budgets(axis, {h.budget for h in found.heats})
        axis.set_xlabel("network evaluations for each prompt")
        axis.set_ylabel(
            "mean reward of the best output" + ", 95% interval" * any(h.half == h.half for h in found.heats)
        )


def draw_frontier(found: Frontier, path: Path | str | None = None, *, ax: Any = None) -> None:
    """Reward against KL, a line for each method, and a panel for each reward that was measured beside it; methods whose
    KL is not known are named below. `ax` are as many axes to draw on in place of a file.
    """
    panels: list[tuple[str, Callable[[Any], tuple[float, float]]]] = [("mean reward, 95% interval", lambda p: p.reward)]
    for name in found.points[0].also:
        panels.append((f"{name}: nobody aims at it", _beside(name)))
    size, left = (3 + 5.5 * len(panels), 5.4), 0.09 if len(panels) == 1 else 0.06
    title = "Reward against drift from the base model"
    with _plate(path, ax, len(panels), size, title, left=left, right=0.97, top=0.8, bottom=0.17) as axes:
        unknown = [m for m in found.methods if all(p.kl is None for p in found.of(m) if p.method == m)]
        for axis, (label, value) in zip(axes, panels, strict=True):
            for i, method in enumerate(m for m in found.methods if m not in unknown):
                mine = [(p.kl, value(p)) for p in found.of(method) if p.kl is not None]
                xs, ys, halves = [k[0] for k, _ in mine], [r[0] for _, r in mine], [r[1] for _, r in mine]
                _line(axis, i, xs, ys, halves, method, bars=True)
                sides = [0.0 if k[1] != k[1] else k[1] for k, _ in mine]
                lower = [min(side, max(x, 0.0)) for side, x in zip(sides, xs, strict=True)]  # no KL is below 0
                axis.errorbar(
                    xs,
                    ys,
                    xerr=[lower, sides],
                    fmt="none",
                    ecolor=_LINES[i % len(_LINES)],
                    alpha=0.3,
                    elinewidth=1.2,
                )
            axis.set_xlabel("KL to the base model, nats, 95% interval")
            axis.set_ylabel(label)
        notes = [f"KL not known: {', '.join(unknown)}"] if unknown else []
        notes += [note] if (note := few(len(found.points[0].rewards))) else []
        if notes:
            place = {"xycoords": "axes fraction", "xytext": (0, -42), "textcoords": "offset points"}
            axes[0].annotate("; ".join(notes), (0, 0), fontsize=8, color=FAINT, **place)


def _beside(name: str) -> Callable[[Any], tuple[float, float]]:
    """What reads a reward that was measured beside, with half of its interval."""
    return lambda point: interval(point.also[name])


def draw_methods(found: Comparison, path: Path | str) -> None:
    """Distance to the target and reward of every method, a line of panels for each task, with intervals over seeds."""
    tasks = list(dict.fromkeys(x.task for x in found.lines))
    names = list(dict.fromkeys(x.method for x in found.lines if not x.rollouts))
    size = (10.0, 1.3 + len(tasks) * (0.9 + 0.27 * len(names)))
    with canvas(path, size, "Samplers at equal cost, 95% interval over seeds") as figure:
        axes = figure.subplots(len(tasks), 2, squeeze=False, sharey=True, gridspec_kw={"wspace": 0.06, "hspace": 0.35})
        figure.subplots_adjust(left=0.17, right=0.98, top=1 - 0.95 / size[1], bottom=0.55 / size[1])
        for line, task in zip(axes, tasks, strict=True):
            rows = dict(found.rows(task))
            for axis, column, title in zip(line, ("frechet", "reward"), ("Frechet distance", "reward"), strict=True):
                for i, name in enumerate(names):
                    mean, half = rows[name][column]
                    bar = None if half != half else half
                    axis.errorbar(mean, i, xerr=bar, fmt="o", color=_LINES[0], capsize=2.5, elinewidth=1.2)
                axis.set_title(f"{task}: {title}", fontsize=10)
                axis.grid(visible=False, axis="y")
            line[0].set_yticks(range(len(names)), names)
            line[0].invert_yaxis()
            line[0].set_xlim(left=0)
            line[1].axvline(found.targets[task]["reward"], color=FAINT, linewidth=1.2, linestyle="--")
            place = (found.targets[task]["reward"], 1)
            line[1].annotate("target", place, xycoords=("data", "axes fraction"), fontsize=8, color=FAINT)


def draw_curves(found: Comparison, path: Path | str | None = None, *, ax: Any = None) -> None:
    """Frechet distance against budget, one panel a task; `ax` are as many axes to draw on in place of a file."""
    lines = [x for x in found.lines if x.rollouts]
    tasks = list(dict.fromkeys(x.task for x in lines))
    if not tasks:
        return
    size, left = (5.2 * len(tasks) + 1, 4.8), 0.1 if len(tasks) == 1 else 0.06
    title = "Distance to the target against budget"
    with _plate(path, ax, len(tasks), size, title, left=left, right=0.98, top=0.77, bottom=0.13) as axes:
        for axis, task in zip(axes, tasks, strict=True):
            mine = [x for x in lines if x.task == task]
            for i, method in enumerate(dict.fromkeys(x.method for x in mine)):
                sizes = sorted({x.rollouts for x in mine if x.method == method})
                table = [dict(found.rows(task, size))[method]["frechet"] for size in sizes]
                shifted = [size * 1.03 ** (i - 2) for size in sizes]
                _line(axis, i, shifted, [t[0] for t in table], [t[1] for t in table], method, bars=True)
            _budgets(axis, {x.rollouts for x in mine})
            axis.set_ylim(bottom=0)
            axis.set_title(task)
            axis.set_xlabel("rollouts, or particles, in all")
        axes[0].set_ylabel("Frechet distance, 95% interval")


def own_axes(ax: Any, count: int) -> list[Any]:
    """The axes in `ax`: one, a list, or the array that matplotlib's `subplots` gives. Raises `InputError`."""
    found = list(ax.flat) if hasattr(ax, "flat") else list(ax) if isinstance(ax, Sequence) else [ax]
    check(len(found) == count, "ax", f"{len(found)} axes", f"{count} of matplotlib's axes")
    return found


@contextmanager
def _plate(
    path: Path | str | None, ax: Any, count: int, size: tuple[float, float], title: str, **adjust: float
) -> Iterator[list[Any]]:
    """That many axes beside each other, with a key: those in `ax`, or of a figure that is written to `path`."""
    if ax is not None:
        axes = own_axes(ax, count)
        yield axes
        axes[0].legend(fontsize=8, frameon=False)
        return
    check(path is not None, "path", None, "a file, or axes to draw on (ax)")
    assert path is not None
    with canvas(path, size, title) as figure:
        axes = list(figure.subplots(1, count, squeeze=False, gridspec_kw={"wspace": 0.22})[0])
        figure.subplots_adjust(**adjust)
        yield axes
        _key(figure, axes[0])


def _line(
    axis: Any, i: int, xs: Sequence[float], ys: Sequence[float], halves: Sequence[float], label: str, bars: bool = False
) -> None:
    """A line with its intervals: a band, or bars where many lines would cover each other."""
    colour = _LINES[i % len(_LINES)]
    axis.plot(xs, ys, color=colour, marker=_MARKS[i % len(_MARKS)], markersize=5, linewidth=1.8, label=label)
    known = [0.0 if h != h else h for h in halves]
    if bars:
        axis.errorbar(xs, ys, known, fmt="none", ecolor=colour, alpha=0.55, elinewidth=1.2, capsize=2.5)
        return
    low, high = ([y + sign * h for y, h in zip(ys, known, strict=True)] for sign in (-1, 1))
    axis.fill_between(xs, low, high, color=colour, alpha=0.13, linewidth=0)


def _budgets(axis: Any, values: set[int]) -> None:
    """A logarithmic axis that is marked where something was measured."""
    axis.set_xscale("log")
    axis.set_xticks(sorted(values), [f"{value:,}" for value in sorted(values)])
    axis.set_xticks([], minor=True)


def _key(figure: Any, axis: Any) -> None:
    """What the lines are, in rows between the title and the panels."""
    handles, labels = axis.get_legend_handles_labels()
    room = figure.get_figwidth() * (1 - figure.subplotpars.left) / 1.4
    figure.legend(
        handles,
        labels,
        loc="upper left",
        ncols=max(1, int(room)),
        fontsize=9,
        handlelength=1.8,
        columnspacing=1.4,
        borderpad=0,
        bbox_to_anchor=(figure.subplotpars.left, 0.93),
    )


@contextmanager
def canvas(path: Path | str, size: tuple[float, float], title: str) -> Iterator[Any]:
    """A figure with the house's style; written in the format of its suffix, in one step when the block ends."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=160, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        left = figure.subplotpars.left
        figure.text(left, 0.985, title, fontsize=13, fontweight="bold", va="top")
        with replacing(path) as temporary:
            figure.savefig(temporary, format=image_format(path))
