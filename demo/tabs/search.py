"""The tab in which texts are searched for by a reward: candidates while they come, and what the search cost."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import gradio as gr

from steer.demo import parts
from steer.demo.actions import search as action
from steer.demo.recipes import Recipe
from steer.demo.recipes.search import MAX_CANDIDATES, SearchRecipe
from steer.demo.session import Visitor
from steer.demo.tabs import Asked, Opening, Page, note, plain, quiet, reproduce, reproduced, said, stopping, told

__all__ = ["WEIGHED", "build", "expression"]

_HELP = f"""
A **search** writes several candidates and chooses by a **reward**, a score of the text. **Best-of-N** scores finished
texts and keeps the best. **FK** (Feynman-Kac steering) scores unfinished ones, and copies the good ones while it
writes. **DTS\\*** (diffusion tree search) grows a tree, and goes on from where texts ended well. The budget is what all
candidates may take together; it pays for at most {MAX_CANDIDATES} of them. **ESS** (effective sample size) is how many
independent texts a weighted population is worth; **KL**, in nats, how far the law of the chosen text is from the model.
"""
_SAMPLERS = [("FK", "fk"), ("DTS* (tree)", "dts-star"), ("best-of-N", "best-of-n")]
WEIGHED = {
    "sentiment": (1.0, "sad to happy, -1 to 1"),
    "0.01*readability": (0.0, "plain words and short sentences"),
    "fluency": (0.0, "how likely the model itself finds the text"),
    "profanity": (0.0, "swear words"),
    "refusal": (0.0, "whether it declines to answer"),
}
"""Rewards with a slider each: where it stands at first, and what the reward looks at."""


def expression(weights: Sequence[float]) -> str:
    """What the sliders say, as a reward's expression; empty where all are 0."""
    made = ""
    for name, weight in zip(WEIGHED, weights, strict=True):
        size = round(abs(weight), 2)
        if size:
            term = name if size == 1 else f"{size:g}*{name}"
            sign = "-" if weight < 0 else "+"
            made += f" {sign} {term}" if made else (f"-{term}" if weight < 0 else term)
    return made


def build(page: Page) -> Opening:
    """See `steer.demo.tabs`."""
    gr.Markdown(_HELP, elem_classes=["terms"])
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=300):
            fields, sliders = _fields()
            with gr.Row():
                go = gr.Button("Search", variant="primary", elem_id="search-go")
                stop = gr.Button("Stop", elem_id="search-stop")
        with gr.Column(scale=3, min_width=320):
            line = note(elem_id="search-note")
            best = gr.Textbox(label="The best so far", interactive=False, lines=2, elem_id="search-best")
            curve = parts.part("curve", None, elem_id="search-curve")
            lineage = parts.part("lineage", None, elem_id="search-lineage")
            tree = parts.part("tree", None, elem_id="search-tree")
            table = parts.part("candidates", {"rows": [], "facts": []}, elem_id="search-table")
            code = reproduce()
    outputs = [line, best, curve, lineage, tree, table, *code.all()]

    def shown(update: dict[str, Any]) -> dict[Any, Any]:
        made: dict[Any, Any] = {line: said(update["say"])} if "say" in update else {}
        if "rows" in update:
            ghost = update.get("ghost", [])
            made |= {
                best: update["best"],
                curve: {"curve": update["curve"], "ghost": ghost, "title": "the best so far"},
                lineage: update.get("lineage"),
                tree: update.get("tree"),
                table: {"rows": update["rows"], "facts": update.get("facts", [])},
            }
        if "facts" in update:
            made |= {line: said("Done.")}
        return made

    @told(page, line, fields)
    async def search(asked: Asked) -> AsyncGenerator[dict[Any, Any]]:
        recipe = SearchRecipe.parse({"model": page.shared.text_model, **asked.given})
        empty: dict[Any, Any] = {best: "", curve: None, lineage: None, tree: None, table: {"rows": [], "facts": []}}
        yield {**reproduced(code, recipe), **empty, line: said("")}
        async with aclosing(action.run(recipe, page.shared)) as updates:
            async for update in updates:
                yield shown(update)

    inputs = list(fields.values())
    go.click(search, inputs, outputs, api_name="search", concurrency_limit=None, **quiet(line))
    stopping(page, stop, line)
    for slider in sliders:
        slider.change(
            lambda *weights: expression(weights), sliders, fields["reward"], api_name=False, queue=False, **quiet(line)
        )

    def fill(visitor: Visitor, recipe: Recipe | None) -> Sequence[Any]:
        if not isinstance(recipe, SearchRecipe):
            return [gr.skip()] * len(fields)
        return [getattr(recipe, name) for name in fields]

    return Opening(inputs, fill)


def _fields() -> tuple[dict[str, Any], list[Any]]:
    """What is searched for and how; and the sliders that write the reward."""
    prompt = gr.Textbox(label="Prompt", value="How was your day?", lines=2, elem_id="search-prompt")
    reward = gr.Textbox(
        label="Reward",
        info="An expression, such as sentiment - 0.3*profanity; the sliders write one",
        value="sentiment",
        elem_id="search-reward",
    )
    with gr.Accordion("Build the reward by sliders", open=False, elem_id="search-sliders"):
        sliders = [
            gr.Slider(-2, 2, value=start, step=0.1, label=name, info=what) for name, (start, what) in WEIGHED.items()
        ]
    sampler = gr.Radio(_SAMPLERS, value="fk", label="How to search")
    budget = gr.Number(320, label="Budget in tokens, of all candidates", precision=0, elem_id="search-budget")
    length = gr.Slider(1, 256, value=32, step=1, label="Tokens at most, of one text")
    with gr.Accordion("How to weigh and draw", open=False):
        drawn = {
            "beta": gr.Number(0.1, label="beta", info="Reward that one nat of drift has to bring; smaller is bolder"),
            "temperature": gr.Slider(0.05, 2, value=0.7, step=0.05, label="Temperature"),
            "seed": gr.Number(0, precision=0, label="Seed", info="Same seed, same search"),
        }
    made = plain(prompt=prompt, reward=reward, sampler=sampler, budget=budget, max_tokens=length, **drawn)
    return made, sliders
