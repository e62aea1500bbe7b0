"""The first minute: a finished example that needs no model, with one slider."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import gradio as gr

from steer.core import InputError
from steer.demo import parts
from steer.demo.first_minute import STOPS, frames, recipe
from steer.demo.recipes import Recipe
from steer.demo.session import Visitor
from steer.demo.tabs import Asked, Opening, Page, note, quiet, shown_facts, told
from steer.demo.tabs.steer import values_of

__all__ = ["build"]

_LABELS = ["much sadder", "sadder", "unsteered", "happier", "much happier"]
_START = 3
_RUNS = itertools.count(1)
_WHAT = """
### One prompt, one slider

The model was asked: **{prompt}** Move the slider. A vector that was fitted to 80 pairs of happy and sad sentences is
added inside the model while it writes; nothing was retrained, and the prompt stays the same. Coloured tokens are where
the odds moved. This is one prompt and one seed, picked out of four; the live model shows others.
"""
_COST = """
**KL** is what the change cost: how far the odds of the tokens moved, in nats, summed over the text. **Perplexity
ratio** is how odd the unsteered model finds the text, 1 being as fluent as its own. **Prompted** is the third way: a
system prompt that asks for the same.
"""


def build(page: Page) -> Opening:
    """See `steer.demo.tabs`."""
    gr.Markdown(_WHAT.format(prompt=recipe(_START).prompt), elem_classes=["lead"])
    slider = parts.part("stops", {"labels": _LABELS, "index": _START}, elem_id="stops")
    line = note(elem_id="first-note", visible="hidden")
    tokens = parts.part("tokens", _frame(_START), elem_id="first-tokens")
    gr.Markdown(_COST, elem_classes=["terms"])
    live = gr.Button("Now with the live model", variant="primary", elem_id="live")

    @told(page, line, ("stop",))
    def move(asked: Asked) -> dict[Any, Any]:
        return {tokens: _frame(_index(asked.given["stop"]))}

    @told(page, line, ("stop",))
    def to_live(asked: Asked) -> dict[Any, Any]:
        filled = values_of(page, asked.visitor, recipe(_index(asked.given["stop"])))
        return {**dict(zip(page.parts["steer"], filled, strict=True)), page.parts["tabs"]: gr.Tabs(selected="steer")}

    events = {"api_name": False, **quiet(line)}
    slider.moved(move, slider, [tokens, line], trigger_mode="always_last", **events)
    page.parts["later"].append(
        lambda: live.click(to_live, slider, [*page.parts["steer"], page.parts["tabs"], line], **events).then(
            None, js="() => document.querySelector('#go').click()"
        )
    )

    def fill(visitor: Visitor, recipe: Recipe | None) -> Sequence[Any]:
        return []

    return Opening([], fill)


def _index(value: Any) -> int:
    """The stop that the slider stands at. Raises `InputError`."""
    index = value.get("index") if isinstance(value, dict) else None
    if not isinstance(index, int) or index not in range(len(STOPS)):
        raise InputError("stop", index, f"0 to {len(STOPS) - 1}")
    return index


def _frame(index: int) -> dict[str, Any]:
    """The value of the part `tokens` at one stop."""
    frame = frames()[index]
    done = [[i, shown_facts(facts)] for i, facts in frame["done"]]
    return {
        "run": -next(_RUNS),
        "columns": frame["columns"],
        "add": [],
        "whole": frame["whole"],
        "done": done,
        "fixed": True,
    }
