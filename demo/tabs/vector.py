"""The tab in which a vector is made from pairs of sentences, judged at once, and used or taken home."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import gradio as gr

from steer.core import check
from steer.core.edit import ranges
from steer.demo import parts
from steer.demo.actions import vector as action
from steer.demo.actions.steer import available
from steer.demo.recipes import Recipe
from steer.demo.recipes.vector import VectorRecipe
from steer.demo.session import Visitor
from steer.demo.tabs import Asked, Opening, Page, note, plain, quiet, reproduce, reproduced, said, stopping, told

__all__ = ["build"]

_POSITIVE = """The committee met twice and then agreed on every point.
We missed the train, but the walk along the river was lovely.
The soup was warm and the bread was fresh.
Our neighbour waved and asked how we were.
The exam was long, yet I knew most of the answers.
Rain fell all day, and we played cards and laughed."""
_NEGATIVE = """The committee met twice and then quarrelled over every point.
We missed the train, and the walk along the river was dreadful.
The soup was cold and the bread was stale.
Our neighbour frowned and looked the other way.
The exam was long, and I knew none of the answers.
Rain fell all day, and we sat inside and sulked."""
_HELP = """
A **steering vector** is a direction inside the model: the difference between what it computes for the sentences on the
left and for those on the right. **Separation** is checked on pairs that the fit did not see: 100 % is every sentence
on its own side, and a random direction stays near the line.
"""


def build(page: Page) -> Opening:
    """See `steer.demo.tabs`."""
    gr.Markdown(_HELP, elem_classes=["terms"])
    with gr.Row():
        more = gr.Textbox(label="More of this, one sentence a line", value=_POSITIVE, lines=7, elem_id="more")
        less = gr.Textbox(label="Less of this, line by line its opposite", value=_NEGATIVE, lines=7, elem_id="less")
    with gr.Row(equal_height=True), gr.Column():
        file = gr.UploadButton(
            "Read pairs from a file (JSONL or CSV with positive and negative)",
            file_types=[".jsonl", ".json", ".csv", ".tsv"],
            elem_id="pairs-file",
        )
        name = gr.Textbox(label="Name", value="mine", elem_id="vector-name")
        method = gr.Radio(
            [("difference of means", "mean"), ("first principal axis", "pca"), ("logistic probe", "probe")],
            value="mean",
            label="Method",
        )
    with gr.Row():
        go = gr.Button("Make the vector", variant="primary", elem_id="make")
        stop = gr.Button("Stop")
    line = note(elem_id="vector-note")
    chart = parts.part("layers", {}, elem_id="layers")
    with gr.Row():
        use = gr.Button("Use in Steer", interactive=False, elem_id="use")
        take = gr.DownloadButton("Download", interactive=False, elem_id="take")
    card = gr.Textbox(label="Card", lines=6, interactive=False, elem_id="card")
    code = reproduce()
    outputs = [line, chart, card, use, take, *code.all()]

    fields = plain(positive=more, negative=less, name=name, method=method)

    @told(page, line, fields)
    async def make(asked: Asked) -> AsyncGenerator[dict[Any, Any]]:
        sides = {side: action.sentences(asked.text(side)) for side in ("positive", "negative")}
        recipe = VectorRecipe.parse({**asked.given, **sides, "model": page.shared.text_model})
        yield {**reproduced(code, recipe), line: said("")}
        async with aclosing(action.make(recipe, page.shared, asked.visitor)) as updates:
            async for update in updates:
                if "say" in update:
                    yield {line: said(update["say"])}
                else:
                    yield {
                        line: said(f"The vector {update['name']} is ready."),
                        chart: update["chart"],
                        card: update["card"],
                        use: gr.Button(interactive=True),
                        take: gr.DownloadButton(value=update["path"], interactive=True),
                    }

    @told(page, line, ("file",))
    def read(asked: Asked) -> dict[Any, Any]:
        up, down = action.read_sentences(Path(asked.text("file")))
        return {more: up, less: down, line: said("The pairs of the file are in the two fields.")}

    @told(page, line, ("name", "layers", "edits"))
    def place(asked: Asked) -> dict[Any, Any]:
        named, layers, cards = (asked.given[key] for key in ("name", "layers", "edits"))
        check(named in asked.visitor.artifacts(), "name", named, "a vector that was made here")
        chosen = [layer for layer in (layers or {}).get("chosen", []) if isinstance(layer, int)]
        check(bool(chosen), "layers", "none", "at least one, chosen on the chart")
        about = next(a for a in available(page.shared, asked.visitor) if a["name"] == named)
        mine = {"name": named, "strength": about["strength"], "layers": ranges(chosen), "scope": ""}
        kept = [c for c in (cards or {}).get("cards", []) if isinstance(c, dict) and c.get("name") != named]
        return {
            page.parts["dose"]: {"available": available(page.shared, asked.visitor), "cards": [mine, *kept][:8]},
            page.parts["tabs"]: gr.Tabs(selected="steer"),
            line: said(f"The vector {named} is in the tab Steer."),
        }

    events, inputs = {"api_name": False, **quiet(line)}, list(fields.values())
    file.upload(read, file, [more, less, line], **events)
    go.click(make, inputs, outputs, api_name="make_vector", concurrency_limit=None, **quiet(line))
    stopping(page, stop, line)
    dose = page.parts["dose"]
    use.click(place, [name, chart, dose], [dose, page.parts["tabs"], line], **events)

    def fill(visitor: Visitor, recipe: Recipe | None) -> Sequence[Any]:
        if not isinstance(recipe, VectorRecipe):
            return [gr.skip()] * len(fields)
        return ["\n".join(recipe.positive), "\n".join(recipe.negative), recipe.name, recipe.method]

    return Opening(inputs, fill)
