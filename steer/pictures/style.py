"""Colours and type that all pictures share."""

from __future__ import annotations

from pathlib import Path

from steer.core import check

__all__ = ["FAINT", "FORMATS", "GRID", "INK", "STYLE", "image_format"]


FORMATS = ("png", "svg", "pdf")
INK, FAINT, GRID = "#24292f", "#6e7781", "#e6e8eb"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "steer",
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRID,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "legend.frameon": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
}


def image_format(path: Path | str, field: str = "picture") -> str:
    """The format that a picture's suffix names; PNG where it has none. Raises `InputError`."""
    kind = Path(path).suffix.lower().removeprefix(".") or "png"
    check(kind in FORMATS, field, str(path), f"a file that ends in {', '.join('.' + name for name in FORMATS)}")
    return kind
