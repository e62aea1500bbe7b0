"""The tab in which methods are compared: reward against drift, each at several strengths."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import gradio as gr

from steer.core import InputError
from steer.demo import parts
from steer.demo.actions import frontier as action
from steer.demo.actions.shared import PRESETS
from steer.demo.recipes import Recipe
from steer.demo.recipes.frontier import FrontierRecipe
from steer.demo.tabs import Asked, Opening, Page, note, plain, quiet, reproduce, reproduced, said, stopping, told

__all__ = ["build"]

_HELP = """
Every method can be made stronger, and then reaches more **reward** and drifts further from the model (**KL**, in nats a
text). One point is one method at one strength: its height is the mean reward, its place from left to right the drift,
its size what it took in tokens, and the bars are 95 % intervals over the prompts. A ring marks what nothing beats: no
other point has more reward at no more drift.
"""
_PROMPTS = """How was your day?
Tell me about your new flat.
Describe the weather this morning.
What do you think of the new neighbour?"""


def build(page: Page) -> Opening:
    """See `steer.demo.tabs`."""
    gr.Markdown(_HELP, elem_classes=["terms"])
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=300):
            fields = _fields()
            with gr.Row():
                how_long = gr.Button("How long?", elem_id="frontier-estimate")
                go = gr.Button("Measure", variant="primary", elem_id="frontier-go")
                stop = gr.Button("Stop", elem_id="frontier-stop")
        with gr.Column(scale=3, min_width=320):
            line = note(elem_id="frontier-note")
            shown = parts.part("frontier", {"points": []}, elem_id="frontier")
            code = reproduce()

    @told(page, line, fields)
    async def estimate(asked: Asked) -> AsyncGenerator[dict[Any, Any]]:
        async with aclosing(action.estimate(_recipe(page, asked), page.shared)) as updates:
            async for update in updates:
                yield {line: said(update["say"])}

    @told(page, line, fields)
    async def measure(asked: Asked) -> AsyncGenerator[dict[Any, Any]]:
        recipe = _recipe(page, asked)
        yield {**reproduced(code, recipe), shown: {"points": []}, line: said("")}
        async with aclosing(action.run(recipe, page.shared, asked.visitor)) as updates:
            async for update in updates:
                made: dict[Any, Any] = {line: said(update["say"])} if "say" in update else {}
                yield made | ({shown: {"points": update["points"]}} if "points" in update else {})

    events = {"concurrency_limit": None, **quiet(line)}
    inputs = list(fields.values())
    how_long.click(estimate, inputs, [line], api_name="estimate", **events)
    go.click(measure, inputs, [line, shown, *code.all()], api_name="frontier", **events)
    stopping(page, stop, line)
    return Opening(inputs, lambda visitor, recipe: _values(recipe, fields))


def _fields() -> dict[str, Any]:
    """What is compared, and how much is drawn."""
    prompts = gr.Textbox(label="Prompts, one a line", value=_PROMPTS, lines=5, elem_id="frontier-prompts")
    reward = gr.Textbox(label="Reward", info="An expression", value="sentiment", elem_id="frontier-reward")
    methods = gr.CheckboxGroup(
        [("best-of-N, N from 2 to 16", "best-of-n"), ("FK, 16 particles at three betas", "fk")],
        value=["best-of-n"],
        label="Samplers",
    )
    edits = gr.Textbox(
        label="Vectors and controllers, by name",
        info="As the tab Steer lists them, with commas between: sentiment, formality, your own",
        value="sentiment",
        elem_id="frontier-edits",
    )
    strengths = gr.Textbox(
        label="Their strengths", info="Numbers with commas between", value="0.1, 0.15, 0.2", elem_id="strengths"
    )
    system = gr.Textbox(
        label="A system prompt that asks for the same (empty: none)",
        value=PRESETS["sentiment"].system_high,
        lines=2,
        elem_id="frontier-system",
    )
    with gr.Accordion("How much to draw", open=False, elem_id="frontier-more"):
        drawn = {
            "n": gr.Slider(1, 32, value=4, step=1, label="Texts of a prompt"),
            "max_tokens": gr.Slider(1, 128, value=24, step=1, label="Tokens at most"),
            "temperature": gr.Slider(0.05, 2, value=0.7, step=0.05, label="Temperature"),
            "seed": gr.Number(0, precision=0, label="Seed"),
        }
    return plain(
        prompts=prompts, reward=reward, methods=methods, edits=edits, strengths=strengths, system=system, **drawn
    )


def _recipe(page: Page, asked: Asked) -> FrontierRecipe:
    known = page.shared.named(asked.visitor)
    wanted = [name.strip() for name in asked.text("edits").split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise InputError("edits", name[:80], ", ".join(known))
    made: dict[str, Any] = {
        "model": page.shared.text_model,
        "prompts": [text.strip() for text in asked.text("prompts").splitlines() if text.strip()],
        "edits": [
            {"name": name, "strength": 0.0, "pairs": page.shared.pairs_behind(name, asked.visitor)} for name in wanted
        ],
        "strengths": _numbers(asked.text("strengths")) if wanted else [],
    }
    return FrontierRecipe.parse({**asked.given, **made})


def _values(recipe: Recipe | None, fields: dict[str, Any]) -> Sequence[Any]:
    if not isinstance(recipe, FrontierRecipe):
        return [gr.skip()] * len(fields)
    written = {
        "prompts": "\n".join(recipe.prompts),
        "methods": list(recipe.methods),
        "edits": ", ".join(edit.name for edit in recipe.edits),
        "strengths": ", ".join(f"{x:g}" for x in recipe.strengths),
    }
    return [written[name] if name in written else getattr(recipe, name) for name in fields]


def _numbers(text: str) -> list[float]:
    """Finite numbers with commas between. Raises `InputError`."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise InputError("strengths", text[:80], "numbers with commas between, such as 0.1, 0.2")
    return found
