"""The page of a measurement: its table, pictures and texts in one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from steer.files import write_text
from steer.pictures.style import FAINT, GRID, INK

__all__ = ["Page", "as_csv"]

_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
_CSS = f"""
body {{ color: {INK}; font: 15px/1.5 system-ui, sans-serif; margin: 2.2em auto; max-width: 66em; padding: 0 1.2em }}
h1 {{ font-size: 1.5em; margin: 0 0 .2em }} h2 {{ font-size: 1.1em; margin: 1.8em 0 .5em }}
p {{ margin: .3em 0 }} .faint {{ color: {FAINT} }} img {{ max-width: 100%; border: 1px solid {GRID} }}
.wide {{ overflow-x: auto }} table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87em }}
th, td {{ padding: .22em .7em; text-align: right; white-space: nowrap; border-bottom: 1px solid {GRID} }}
th:first-child, td:first-child {{ text-align: left }} th {{ color: {FAINT}; font-weight: 600; vertical-align: bottom }}
th.words, td.words {{ text-align: left }} td.long {{ white-space: normal; min-width: 16em }}
pre {{ background: #f6f8fa; padding: .8em 1em; overflow-x: auto; font-size: .83em; line-height: 1.4 }}
"""


@dataclass(frozen=True)
class Page:
    """What a measurement has to show."""

    title: str
    about: str
    """What was measured, in a sentence."""
    summary: str
    """The table as people read it, and what follows from it: plain text."""
    records: Sequence[Mapping[str, Any]]
    """A flat row for each thing that was measured."""
    pictures: Sequence[Path] = ()
    texts: Sequence[Mapping[str, Any]] = ()
    """Rows of texts to be read, such as examples."""
    recipe: str = ""
    """YAML that measures the same again."""
    files: Sequence[str] = field(default_factory=list)
    """Names of files beside the page."""

    def html(self) -> str:
        """The page."""
        shown = "".join(map(_picture, self.pictures))
        links = ", ".join(f'<a href="{escape(name, quote=True)}">{escape(name)}</a>' for name in self.files)
        parts = [
            f"<h1>{escape(self.title)}</h1><p class=faint>{escape(self.about)}</p>",
            shown,
            f"<h2>What was found</h2><pre>{escape(self.summary)}</pre>",
            f"<h2>Every number</h2>{_table(self.records)}<p class=faint>Files: {links}</p>" if self.records else "",
            f"<h2>Texts</h2>{_table(self.texts)}" if self.texts else "",
            f"<h2>Again</h2><p><code>steer run recipe.yaml</code></p><pre>{escape(self.recipe)}</pre>",
        ]
        head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(self.title)}</title>"
        return f"{head}<style>{_CSS}</style><body>{''.join(parts)}</body></html>\n"

    def write(self, folder: Path, slug: str) -> list[Path]:
        """Write page.html, SLUG.csv and recipe.yaml into `folder`, each in one step; the files."""
        made = {"page.html": self.html(), f"{slug}.csv": as_csv(self.records), "recipe.yaml": self.recipe}
        for name, text in made.items():
            write_text(folder / name, text)
        return [folder / name for name in made]


def as_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Flat rows as CSV with the columns of all of them; what is unknown is empty."""
    columns = _columns(records)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in records:
        writer.writerow(["" if _unknown(row.get(name)) else row[name] for name in columns])
    return out.getvalue()


def _columns(records: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in records for name in row))


def _unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _table(records: Sequence[Mapping[str, Any]]) -> str:
    """Numbers stand to the right of their columns, words to the left."""
    columns = _columns(records)
    words = {name for name in columns if any(isinstance(row.get(name), str) for row in records)}
    head = "".join(f"<th{' class=words' if n in words else ''}>{escape(n.replace('_', ' '))}</th>" for n in columns)
    rows = "".join(f"<tr>{''.join(_cell(row.get(name)) for name in columns)}</tr>" for row in records)
    return f"<div class=wide><table><tr>{head}</tr>{rows}</table></div>"


def _cell(value: Any) -> str:
    if _unknown(value):
        return "<td></td>"
    if isinstance(value, float):
        return f"<td>{value:.4g}</td>"
    text = str(value)
    kind = ("words long" if len(text) > 40 else "words") if isinstance(value, str) else ""
    marked = f' class="{kind}"' if kind else ""
    return f"<td{marked}>{escape(text)}</td>"


def _picture(path: Path) -> str:
    kind = _TYPES.get(path.suffix.lower())
    if kind is None:  # a PDF is a file beside the page
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{escape(path.stem, quote=True)}" src="data:{kind};base64,{data}"></p>'
