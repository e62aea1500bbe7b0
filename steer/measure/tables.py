"""Plain-text tables of measurements."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["aligned", "rendered"]


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
