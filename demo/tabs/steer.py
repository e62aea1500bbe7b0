"""The Steer tab: one prompt, unsteered and steered and prompted, token by token."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import gradio as gr

from steer.core import InputError
from steer.demo import parts
from steer.demo.actions import steer as action
from steer.demo.actions.shared import PRESETS
from steer.demo.recipes import Recipe
from steer.demo.recipes.steer import MAX_TOKENS, SteerRecipe
from steer.demo.session import Visitor
from steer.demo.tabs import (
    Asked,
    Opening,
    Page,
    note,
    plain,
    quiet,
    reproduce,
    reproduced,
    said,
    shown_facts,
    stopping,
    told,
)

__all__ = ["build", "values_of"]

_TERMS = """
**KL** (Kullback-Leibler divergence, in nats) says how far steering moved the odds of the next token: 0 is nothing, and
the sum over a text is what the change cost. **Surprise** is how unlikely the unsteered model finds a token.
**Perplexity ratio** compares how unlikely it finds the text with its own: 1 is just as fluent, 2 is twice as odd.
**Reward** is the score of the finished text by the expression on the left.
"""
_PROMPT = "Tell me about your new flat."
_RUNS = itertools.count(1)


def build(page: Page) -> Opening:
    """See `steer.demo.tabs`."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=300):
            gr.Markdown("### What steers", elem_classes=["plain"])
            beside = _beside()
        with gr.Column(scale=3, min_width=320):
            prompt = gr.Textbox(label="Prompt", value=_PROMPT, lines=2, max_lines=8, elem_id="prompt")
            with gr.Row():
                go = gr.Button("Steer", variant="primary", elem_id="go")
                stop = gr.Button("Stop", elem_id="stop")
            line = note(elem_id="steer-note")
            tokens = parts.tokens(elem_id="tokens")
            gr.Markdown(_TERMS, elem_classes=["terms"])
            code = reproduce()
    fields = plain(prompt=prompt, **beside)
    inputs, outputs = list(fields.values()), [tokens, line, *code.all()]

    def recipe_of(asked: Asked, script: Sequence[int] = (), branch: int = 1) -> SteerRecipe:
        edits = asked.given["edits"]
        cards = edits.get("cards") if isinstance(edits, dict) else None
        if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
            raise InputError("edits", str(edits)[:80], "cards of edits")
        chosen = [
            {**card, "layers": card.get("layers") or "", "scope": card.get("scope") or ""}
            | {"pairs": page.shared.pairs_behind(card.get("name"), asked.visitor)}
            | {"policy": page.shared.is_policy(card.get("name"), asked.visitor)}
            for card in cards
        ]
        given = {**asked.given, "model": page.shared.text_model, "edits": chosen, "script": script, "branch": branch}
        given |= {name: asked.text(name) for name in ("prompt", "system", "reward")}
        return SteerRecipe.parse(given)

    async def stream(recipe: SteerRecipe, visitor: Visitor) -> AsyncGenerator[dict[Any, Any]]:
        value: dict[str, Any] = {"run": next(_RUNS), "columns": [], "add": [], "done": []}
        yield {**reproduced(code, recipe), line: said("")}
        async with aclosing(action.run(recipe, page.shared, visitor)) as updates:
            async for update in updates:
                if "say" in update:
                    yield {line: said(update["say"])}
                shown: dict[str, Any] = {key: update[key] for key in ("columns", "add", "whole") if key in update}
                if shown:
                    done = [[i, shown_facts(facts)] for i, facts in update.get("done", [])]
                    value = {**value, "add": [], **shown, "done": done}
                    yield {tokens: value, line: said(_ending(update))}

    @told(page, line, fields)
    async def steer(asked: Asked) -> AsyncGenerator[dict[Any, Any]]:
        async with aclosing(stream(recipe_of(asked), asked.visitor)) as updates:
            async for update in updates:
                yield update

    @told(page, line, fields)
    async def fork(asked: Asked) -> AsyncGenerator[dict[Any, Any]]:
        data = asked.data if isinstance(asked.data, dict) else {}
        script, branch = data.get("script"), data.get("column")
        if not isinstance(script, list) or not isinstance(branch, int):
            raise InputError("fork", str(data)[:80], "a column and its tokens")
        async with aclosing(stream(recipe_of(asked, script, branch), asked.visitor)) as updates:
            async for update in updates:
                yield update

    events = {"concurrency_limit": None, **quiet(line)}
    go.click(steer, inputs, outputs, api_name="steer", **events)
    prompt.submit(steer, inputs, outputs, api_name=False, **events)
    tokens.fork(fork, inputs, outputs, api_name=False, **events)
    stopping(page, stop, line)

    def fill(visitor: Visitor, recipe: Recipe | None) -> Sequence[Any]:
        return values_of(page, visitor, recipe if isinstance(recipe, SteerRecipe) else None)

    page.parts.update(dose=fields["edits"], steer=inputs)
    return Opening(inputs, fill)


def _beside() -> dict[str, Any]:
    """What steers and how texts are drawn: all but the prompt."""
    dose = parts.dose({"available": [], "cards": []}, elem_id="dose")
    system = gr.Textbox(label="The same wish as a system prompt (empty: no third column)", lines=2, elem_id="system")
    reward = gr.Textbox(
        label="Reward", info="An expression, such as sentiment - 0.3*profanity", value="sentiment", elem_id="reward"
    )
    with gr.Accordion("How to draw", open=False):
        raw = gr.Checkbox(label="Continue the text as it stands, without the chat template")
        drawn = {
            "temperature": gr.Slider(0, 2, value=0.7, step=0.05, label="Temperature (0: always the likeliest token)"),
            "max_tokens": gr.Slider(1, MAX_TOKENS, value=60, step=1, label="Tokens at most"),
            "seed": gr.Number(value=0, precision=0, label="Seed", info="Same seed, same texts"),
        }
    return {"raw": raw, "edits": dose, "system": system, "reward": reward, **drawn}


def values_of(page: Page, visitor: Visitor, recipe: SteerRecipe | None) -> list[Any]:
    """Values for the tab's inputs, in their order: those of a recipe, or the first ones."""
    known = action.available(page.shared, visitor)
    if recipe is None:
        preset = PRESETS["sentiment"]
        cards = [{"name": preset.name, "strength": 0.15, "layers": "", "scope": ""}]
        return [*[gr.skip()] * 2, {"available": known, "cards": cards}, preset.system_high, *[gr.skip()] * 4]
    return [
        recipe.prompt,
        recipe.raw,
        {"available": known, "cards": [edit.model_dump(exclude={"pairs", "policy"}) for edit in recipe.edits]},
        recipe.system,
        recipe.reward,
        recipe.temperature,
        recipe.max_tokens,
        recipe.seed,
    ]


def _ending(update: dict[str, Any]) -> str:
    cost = update.get("cost")
    if cost is None:
        return "" if "add" in update else "Reading the prompt"
    return (
        f"{cost['tokens']} tokens written or read beside, {cost['prompt_tokens']} of prompts, {cost['seconds']:.1f} s."
    )
