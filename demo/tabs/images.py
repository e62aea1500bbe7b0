"""The tab in which images are drawn by several methods from one seed, and looked at step by step."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import gradio as gr

from steer.demo import parts
from steer.demo.actions import images as action
from steer.demo.recipes import Recipe
from steer.demo.recipes.images import METHODS, ImagesRecipe
from steer.demo.session import Visitor
from steer.demo.tabs import Asked, Opening, Page, note, plain, quiet, reproduce, reproduced, said, stopping, told

__all__ = ["build"]

_HELP = """
A diffusion model makes an image out of noise, step by step; at each step it **foresees** the image (x0-hat), which a
**reward** can look at. Every method gets the same seed and as many images. **FK** copies promising particles on the
way, **DTS\\*** grows a tree, **RL guidance** (RLG) goes from the model towards one that was tuned for the reward, and
beyond: w = 0 is the model, 1 the tuned one, and every step takes both networks. **beta** is how much reward one nat of
drift has to bring: smaller is bolder.
"""


def build(page: Page) -> Opening:
    """See `steer.demo.tabs`."""
    gr.Markdown(_HELP, elem_classes=["terms"])
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=300):
            fields = _fields()
            with gr.Row():
                go = gr.Button("Draw", variant="primary", elem_id="images-go")
                stop = gr.Button("Stop", elem_id="images-stop")
        with gr.Column(scale=3, min_width=320):
            line = note(elem_id="images-note")
            shown = parts.part("images", None, elem_id="images")
            code = reproduce()

    @told(page, line, fields)
    async def draw(asked: Asked) -> AsyncGenerator[dict[Any, Any]]:
        recipe = ImagesRecipe.parse({"model": page.shared.image_model, **asked.given})
        yield {**reproduced(code, recipe), shown: None, line: said("")}
        async with aclosing(action.run(recipe, page.shared)) as updates:
            async for update in updates:
                made: dict[Any, Any] = {line: said(update["say"])}
                if "methods" in update:
                    made[shown] = {**{key: update[key] for key in ("columns", "count", "methods")}, "w": recipe.w}
                yield made

    inputs = list(fields.values())
    go.click(draw, inputs, [line, shown, *code.all()], api_name="images", concurrency_limit=None, **quiet(line))
    stopping(page, stop, line)

    def fill(visitor: Visitor, recipe: Recipe | None) -> Sequence[Any]:
        if not isinstance(recipe, ImagesRecipe):
            return [gr.skip()] * len(fields)
        return [list(recipe.methods) if name == "methods" else getattr(recipe, name) for name in fields]

    return Opening(inputs, fill)


def _fields() -> dict[str, Any]:
    """What is drawn, by which methods, for which reward."""
    prompt = gr.Textbox(
        label="Class or prompt", info="Empty: any. fashion-ddpm: boot, bag, dress ...", elem_id="images-prompt"
    )
    reward = gr.Textbox(
        label="Reward",
        info="An expression, such as class:bag, brightness or class:bag,boot - symmetry",
        value="class:bag",
        elem_id="images-reward",
    )
    methods = gr.CheckboxGroup(
        [(title, name) for name, title in METHODS.items()],
        value=["plain", "best-of-n", "fk", "dts-star"],
        label="Methods (RL guidance first tunes a policy for the reward: minutes, once)",
        elem_id="images-methods",
    )
    particles = gr.Slider(2, 32, value=8, step=1, label="Images that the budget pays for")
    steps = gr.Slider(2, 100, value=25, step=1, label="Steps from noise to image")
    beta = gr.Number(1.0, label="beta", elem_id="images-beta")
    w = gr.Slider(-1, 6, value=2, step=0.25, label="w of RL guidance")
    seed = gr.Number(0, precision=0, label="Seed")
    return plain(
        prompt=prompt, reward=reward, methods=methods, particles=particles, steps=steps, beta=beta, w=w, seed=seed
    )
