"""Action of the tab Images: the same seed and the same budget for several methods, step by step.

An update is `{"say": text}`, or how all methods stand:

    {"columns": C, "count": K, "methods": [{"name", "title", "facts": [[name, text, explanation]],
        "frames": [{"label", "src"}], "rewards": [K], "best": k, "note"}]}

A frame is a sheet of K images in rows of C, a PNG as a data address: what the network foresees of each particle after a
step (x0-hat), the images themselves last; of a tree the leaves that it has after each batch.
"""

from __future__ import annotations

import base64
import io
import shutil
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.adapters.transformers.serving.work import Done
from steer.artifacts import data_hash
from steer.core import InputError, Samples, check
from steer.demo.actions.shared import Shared
from steer.demo.recipes.images import METHODS, POLICY, ImagesRecipe
from steer.embedded import home
from steer.images import to_pil
from steer.measure.distances import unique_share
from steer.methods.rlg import RLGuidance
from steer.methods.samplers import make_sampler
from steer.model import Plan, execute, prepare
from steer.rewards import parse_reward
from steer.rewards.algebra import check_reward

__all__ = ["run"]

_PACE = 0.4
"""Seconds between updates, at least."""
_COLUMNS = 8
_FRAMES = 25
_LARGEST = 128
"""Pixels of an image on a sheet."""


async def run(recipe: ImagesRecipe, shared: Shared) -> AsyncGenerator[dict[str, Any]]:
    """Draw. Raises `SteerError` for what a person can mend."""
    shared.check_model(recipe.model)
    reward = _reward(recipe.reward)
    with shared.line() as turn:
        async for text in turn:
            yield {"say": text}
        async with aclosing(shared.aside(_Drawing(recipe, shared, reward).work)) as steps:
            async for event in steps:
                if not isinstance(event, Done) and event.value is not None:
                    yield event.value


def _reward(text: str) -> Any:
    """A reward for images that loads nothing. Raises `InputError`."""
    try:
        reward = parse_reward(text, trusted=False)
        check_reward(reward, images=True)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError("reward", text[:80], "an expression of rewards for images, such as class:bag") from error
    return reward


class _Drawing:
    """All methods of a recipe, one after the other."""

    def __init__(self, recipe: ImagesRecipe, shared: Shared, reward: Any) -> None:
        self.recipe, self.shared, self.reward = recipe, shared, reward
        self.methods: list[dict[str, Any]] = []
        self._told = self._said = 0.0

    def work(self, tell: Callable[[Any], None]) -> None:
        """Draw, and tell of it after every step."""
        self._tell = tell
        tell({"say": "Loading the image model"})
        model = self.shared.images()
        known = model.classes
        if known and self.recipe.prompt:
            check(self.recipe.prompt in known, "prompt", self.recipe.prompt, f"one of {', '.join(known)}, or nothing")
        for name in self.recipe.methods:
            self._method(model, name)
        self._show(f"Done: {len(self.methods)} methods, each with the seed {self.recipe.seed}.", always=True)

    def _method(self, model: Any, name: str) -> None:
        recipe = self.recipe
        process = model.process(steps=recipe.steps)
        edits = [RLGuidance(self._policy(model).process(steps=recipe.steps), recipe.w)] if name == "rlg" else []
        own = recipe.own(name)
        sampler = make_sampler(recipe.sampler(name), own.pop("n", None), **own)
        plan = prepare(
            process,
            [recipe.prompt],
            edits=edits,
            sampler=sampler,
            reward=self.reward,
            beta=recipe.beta,
            seed=recipe.seed,
            model=model,
        )
        self.methods.append({"name": name, "title": METHODS[name], "note": "", "facts": [], "frames": []})
        samples = execute(plan, lambda first, state: self._step(plan, name, state), self._trace)
        self._finished(name, samples)

    # ---- on the way

    def _step(self, plan: Plan, name: str, state: Any) -> None:
        process: Any = plan.process
        due = time.monotonic() - self._said >= _PACE
        self._said = time.monotonic() if due else self._said
        self._tell({"say": f"{METHODS[name]}: step {state.step} of {self.recipe.steps}"} if due else None)
        if name == "dts-star" or process.done(state):
            return
        every = -(-self.recipe.steps // _FRAMES)
        if state.step % every == 0 and state.parent is not None:
            # What was foreseen before the step costs no further call of the network.
            seen = replace(process, shown="previous").preview(state)
            self._frame(f"step {state.step} of {self.recipe.steps}", seen.outputs)

    def _trace(self, first: int, entry: Any) -> None:
        if self.methods[-1]["name"] == "dts-star":
            leaves = entry.samples(None)
            self._frame(f"{entry.rollouts} rollouts", leaves.outputs)

    def _frame(self, label: str, outputs: Tensor) -> None:
        self.methods[-1]["frames"].append({"label": label, "src": _sheet(outputs[: self.recipe.particles])})
        self._show(f"{self.methods[-1]['title']}: {label}")

    def _show(self, text: str, always: bool = False) -> None:
        if always or time.monotonic() - self._told >= _PACE:
            self._told = time.monotonic()
            methods = [{**method, "frames": list(method["frames"])} for method in self.methods]
            self._tell({"say": text, "columns": _COLUMNS, "count": self.recipe.particles, "methods": methods})

    # ---- at the end

    def _finished(self, name: str, samples: Samples) -> None:
        seen = samples if samples.pool is None else samples.pool
        if name == "dts-star":
            assert samples.trace is not None
            seen = samples.trace[0].samples(None)
        assert seen.reward is not None
        method = self.methods[-1]
        rewards = [round(score, 4) for score in seen.reward.tolist()]
        method |= {"rewards": rewards, "best": int(seen.reward.argmax())}
        label = f"{len(rewards)} leaves" if name == "dts-star" else "the images"
        method["frames"].append({"label": label, "src": _sheet(seen.outputs)})
        method["note"] = _NOTES[name].format(w=self.recipe.w)
        method["facts"] = self._facts(name, samples, seen)
        self._show(f"{method['title']} is done", always=True)

    def _facts(self, name: str, samples: Samples, seen: Samples) -> list[list[str]]:
        assert seen.reward is not None
        weighted = name == "fk"
        mean = float(seen.mean_reward()[0]) if weighted else float(seen.reward.mean())
        facts = [
            ["Best reward", f"{float(seen.reward.max()):.3f}", "Of the image with a frame"],
            ["Mean reward", f"{mean:.3f}", "Of all of them" + (", by their weights" if weighted else "")],
            ["Unique images", f"{100 * unique_share(seen.outputs):.0f} %", "Share of images that are no copies"],
            ["Network calls", str(samples.cost.nfe), "One for each particle at each step"],
        ]
        if weighted:
            facts.append(
                ["ESS", f"{float(seen.ess[0]):.1f} of {len(seen)}", "Independent images the particles are worth"]
            )
        facts.append(["Seconds", f"{samples.cost.seconds:.1f}", "On this machine, now"])
        return facts

    # ---- the policy

    def _policy(self, model: Any) -> Any:
        """The model tuned towards the recipe's reward; tuned once and kept."""
        from steer.adapters.diffusers.policy.network import fingerprint, network_of
        from steer.adapters.diffusers.policy.tuning import load_diffusion_policy, train_diffusion_policy

        recipe = self.recipe
        prompts = recipe.tuning_prompts()
        key = data_hash([prompts, recipe.reward, POLICY, fingerprint(network_of(model))])[:16]
        folder = home() / "demo" / f"policy-{key}"
        if not (folder / "steer.json").is_file():
            what = f"Tuning a policy towards {recipe.reward}, which RL guidance needs. This happens once"
            work = Path(f"{folder}.work")
            self._tell({"say": f"{what}: drawing pairs of images"})

            def watch(done: int, total: int) -> None:
                self._tell({"say": f"{what}: {done} of {total}"})

            folder.parent.mkdir(parents=True, exist_ok=True)
            train_diffusion_policy(
                model,
                prompts,
                out=folder,
                reward=self.reward,
                work=work,
                progress=watch,  # type: ignore[arg-type]
                **POLICY,
            )
            shutil.rmtree(work, ignore_errors=True)
        return load_diffusion_policy(model, folder)


_NOTES = {
    "plain": "The model as it is",
    "best-of-n": "The same images, of which the best is kept",
    "fk": "Promising particles are copied on the way",
    "dts-star": "A tree that goes on from where images ended well",
    "rlg": "From the model towards a tuned one, w = {w:g}",
}


def _sheet(outputs: Tensor) -> str:
    """Images `[K, C, H, W]` in rows of eight, as the data address of a PNG."""
    from PIL import Image

    tiles = to_pil(torch.as_tensor(outputs))
    width, height = tiles[0].size
    scale = min(1.0, _LARGEST / max(width, height))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    columns = min(_COLUMNS, len(tiles))
    sheet = Image.new(tiles[0].mode, (columns * size[0], -(-len(tiles) // columns) * size[1]), "white")
    for i, tile in enumerate(tiles):
        shown = tile if tile.size == size else tile.resize(size)
        sheet.paste(shown, (i % columns * size[0], i // columns * size[1]))
    held = io.BytesIO()
    sheet.save(held, format="PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()
