"""Plain-text tables of measurements, and how numbers are written in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["FEW", "aligned", "few", "number", "ranged", "rendered"]

FEW = 20
"""Below so many prompts a difference is more likely chance than not, and tables say so."""


def number(x: float, shape: str = "{:.3f}") -> str:
    """A number as `shape` writes it, without the sign of a zero; a dash for what is not known."""
    if math.isnan(x):
        return "-"
    shown = shape.format(x)
    return shown[1:] if shown.startswith("-") and not shown.strip("-0.x%") else shown


def ranged(mean: float, half: float, shape: str = "{:.3f}") -> str:
    """A mean and the half width of its interval, where there is one."""
    return number(mean, shape) if math.isnan(half) else f"{number(mean, shape)} ±{number(half, shape)}"


def few(prompts: int, what: str = "prompts") -> str:
    """A line of warning where a table stands on little; the empty text elsewhere."""
    counted = f"1 {what.removesuffix('s')} is" if prompts == 1 else f"{prompts} {what} are"
    return "" if prompts >= FEW else f"{counted} few: differences may be chance"


def aligned(rows: Sequence[Sequence[str]], left: bool = False) -> str:
    """Rows of cells as text: the first column to the left, all others to the right (or all to the left), no line wider
    than its cells.
    """
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for i in range(len(rows[0])):
        table.add_column(justify="right" if i and not left else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return rendered(table, 10_000)


def rendered(table: Table, width: int) -> str:
    """A table as plain text of at most `width` columns, in notebooks too, where `rich` would show it instead."""
    plain: dict[str, Any] = {"color_system": None, "highlight": False, "markup": False, "emoji": False}
    console = Console(file=StringIO(), width=width, force_jupyter=False, **plain)
    with console.capture() as shown:
        console.print(table)
    return "\n".join(line.rstrip() for line in shown.get().rstrip("\n").split("\n"))
