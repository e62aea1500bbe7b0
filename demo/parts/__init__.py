"""Parts of the page that are drawn in the browser: one `gr.HTML` each, its `.js` and `.css` beside this file.

A part's value is plain data. Its JavaScript draws it with `textContent`, never as HTML, and is told of changes by
`watch`; a stream sends what is new since the last update, and the whole once it has ended. What is chosen in a part
goes back as its value (`dose`) or as an event of its own (`tokens`: `fork`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

__all__ = ["dose", "part", "tokens"]

_FOLDER = Path(__file__).parent
_GRAPHS = ("curve", "frontier", "lineage", "tree")
"""Parts that draw with what is in `graph.js`."""


def part(name: str, value: Any, **settings: Any) -> gr.HTML:
    """The part of this name; `settings` are those of `gr.HTML`."""
    names = ("graph", name) if name in _GRAPHS else (name,)
    return gr.HTML(
        value=value,
        html_template=f'<div class="steer-{name}"></div>',
        css_template=_joined(names, "css"),
        js_on_load=_joined(names, "js"),
        elem_classes=[f"part-{name}"],
        apply_default_css=False,
        **settings,
    )


def _joined(names: tuple[str, ...], kind: str) -> str:
    return "\n".join((_FOLDER / f"{name}.{kind}").read_text(encoding="utf-8") for name in names)


def tokens(**settings: Any) -> gr.HTML:
    """Columns of text, token by token. Its event `fork` carries `column`, and `script`, the tokens to begin with."""
    return part("tokens", {"run": 0, "columns": [], "add": [], "done": []}, **settings)


def dose(value: Any, **settings: Any) -> gr.HTML:
    """Cards of edits with a slider each; its value holds what was chosen."""
    return part("dose", value, **settings)
