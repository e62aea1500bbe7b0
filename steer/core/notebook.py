"""HTML of results, for notebooks: tables of texts whose tokens are tinted by their KL, and grids of images."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["facts_html", "samples_html", "text_html"]

_SHOWN = 24
"""Rows of a table or images of a grid at most."""
_TINTED = 16
"""Rows whose tokens' KL is computed to be looked at; more are tinted where it is there already."""
_FULL = 2.0
"""KL in nats of a token that has the full tint."""
_STYLE = "text-align:left;vertical-align:top;padding:2px 8px;max-width:44em;white-space:pre-wrap"


def samples_html(samples: Any) -> str:
    """A table of texts, or a grid of images, with what is known of each."""
    shown = samples[:_SHOWN]
    more = len(samples) - len(shown)
    note = f"<p>{more} more</p>" if more else ""
    body = _grid(shown) if isinstance(samples.outputs, Tensor) else _table(shown)
    return f"<div><p><b>{html.escape(repr(samples))}</b></p>{body}{note}</div>"


def text_html(text: str) -> str:
    """A plain-text table as it stands."""
    return f"<pre>{html.escape(text)}</pre>"


def facts_html(title: str, facts: Mapping[str, Any]) -> str:
    """A line of title and a table of facts by name."""
    rows = (_row([f"<b>{html.escape(name)}</b>", html.escape(str(value))]) for name, value in facts.items())
    return f"<div><p><b>{html.escape(title)}</b></p><table>{''.join(rows)}</table></div>"


def _table(samples: Any) -> str:
    """A row for each text: prompts once, and only the columns that say something."""
    rows, weighted = list(samples), bool((samples.log_weight != 0).any())
    columns: dict[str, list[str]] = {
        "prompt": [_said(s.prompt) if i == 0 or s.prompt != rows[i - 1].prompt else "" for i, s in enumerate(rows)],
        "text": _texts(samples),
        "reward": [_number(s.reward) for s in rows] if samples.reward is not None else [],
        "weight": [_number(s.weight) for s in rows] if weighted else [],
        "KL": [_number(s.kl) for s in rows] if samples.kl is not None else [],
    }
    columns["prompt"] = [html.escape(prompt) for prompt in columns["prompt"]]
    shown = {name: cells for name, cells in columns.items() if cells}
    head = _row([f"<b>{name}</b>" for name in shown])
    body = "".join(_row(row) for row in zip(*shown.values(), strict=True))
    tinted = f"<p>Tint: the KL of a token's law, from none to {_FULL:g} nats.</p>" if _is_tinted(samples) else ""
    return f"<table>{head}{body}</table>{tinted}"


def _is_tinted(samples: Any) -> bool:
    """Whether the KL of each token is known, or few enough are to be computed."""
    return samples.token_drift is not None and (len(samples) <= _TINTED or not callable(samples.token_drift))


def _texts(samples: Any) -> list[str]:
    """Texts, their tokens tinted by the KL of their laws where that is known."""
    if not _is_tinted(samples):
        return [html.escape(text) for text in samples.texts]
    drift = samples.drift
    return ["".join(map(_tinted, pieces, kl.tolist())) for pieces, kl in zip(drift.texts, drift.kl, strict=True)]


def _tinted(piece: str, kl: float) -> str:
    strength = min(max(kl, 0.0) / _FULL, 1.0)
    if strength < 0.01:
        return html.escape(piece)
    tint = f"background:rgba(230,120,20,{strength:.2f})"
    return f'<span style="{tint}" title="KL {kl:.3f}">{html.escape(piece)}</span>'


def _grid(samples: Any) -> str:
    figures = []
    for sample in samples:
        buffer = io.BytesIO()
        image = sample.image
        scale = max(1, 112 // max(image.size))
        image.resize((image.width * scale, image.height * scale), 0).save(buffer, "png")
        data = base64.b64encode(buffer.getvalue()).decode()
        caption = "" if sample.reward is None else f"<figcaption>{_number(sample.reward)}</figcaption>"
        alt = html.escape(_said(sample.prompt), quote=True)
        figures.append(
            f'<figure style="margin:4px"><img alt="{alt}" src="data:image/png;base64,{data}"/>{caption}</figure>'
        )
    return f'<div style="display:flex;flex-wrap:wrap">{"".join(figures)}</div>'


def _row(cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f'<td style="{_STYLE}">{cell}</td>' for cell in cells) + "</tr>"


def _said(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
