"""The tab in which texts are searched for by a reward: candidates by score, and what the search cost."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import gradio as gr

from steer.demo.actions import search as action
from steer.demo.recipes import Recipe
from steer.demo.recipes.search import SearchRecipe
from steer.demo.session import Visitor
from steer.demo.tabs import Opening, Page, note, reproduce, reproduced, said, told

__all__ = ["build"]

_HELP = """
A **search** writes several candidates and chooses by a **reward**, a score of the text. **Best-of-N** scores finished
texts; **FK** (Feynman-Kac steering) scores unfinished ones, and copies the good ones while it writes.
"""


def build(page: Page) -> Opening:
    """See `steer.demo.tabs`."""
    gr.Markdown(_HELP, elem_classes=["terms"])
    prompt = gr.Textbox(label="Prompt", value="How was your day?", elem_id="search-prompt")
    with gr.Row():
        reward = gr.Textbox(label="Reward, an expression", value="sentiment", elem_id="search-reward")
        sampler = gr.Radio([("FK", "fk"), ("best-of-N", "best-of-n")], value="fk", label="Sampler")
        candidates = gr.Slider(2, 32, value=8, step=1, label="Candidates")
    with gr.Row():
        go = gr.Button("Search", variant="primary", elem_id="search-go")
        stop = gr.Button("Stop")
    line = note(elem_id="search-note")
    best = gr.Textbox(label="The best", interactive=False, elem_id="search-best")
    table = gr.Dataframe(headers=["Reward", "Candidate"], interactive=False, wrap=True, elem_id="search-table")
    code = reproduce()
    fields = [prompt, reward, sampler, candidates]

    @told(line)
    async def search(*values: Any) -> AsyncGenerator[dict[Any, Any]]:
        names = ("prompt", "reward", "sampler", "candidates")
        given = dict(zip(names, values, strict=True))
        recipe = SearchRecipe.parse({"model": page.shared.text_model, **given})
        yield {**reproduced(code, recipe), line: said("")}
        async with aclosing(action.run(recipe, page.shared)) as updates:
            async for update in updates:
                if "say" in update:
                    yield {line: said(update["say"])}
                else:
                    facts = update["facts"]
                    text = f"{facts['tokens']} tokens written, {facts['reward_calls']} texts scored."
                    yield {line: said(text), best: update["best"], table: update["rows"]}

    async def on_search(a: Any, b: Any, c: Any, d: Any) -> Any:
        async for update in search(a, b, c, d):
            yield update

    searching = go.click(
        on_search,
        fields,
        [line, best, table, *code.all()],
        api_name="search",
        concurrency_id="searches",
        concurrency_limit=8,
        show_progress="hidden",
    )
    stop.click(lambda: said("Stopped."), None, line, cancels=[searching], api_name=False, queue=False)

    def fill(visitor: Visitor, recipe: Recipe | None) -> Sequence[Any]:
        if not isinstance(recipe, SearchRecipe):
            return [gr.skip()] * 4
        return [recipe.prompt, recipe.reward, recipe.sampler, recipe.candidates]

    return Opening(fields, fill)
