"""Action of the tab Frontier: reward against drift, of methods at several strengths.

An update is `{"say": text}`, or what was measured so far:

    {"points": [{"method", "setting", "reward": [mean, half], "kl": [mean, half] | None, "kind", "tokens", "front",
        "texts": [[prompt, text, reward]]}]}

`half` is half of a 95% interval over prompts, None where there is none; `front` says that no other point has more
reward at no more drift; `tokens` were drawn for each prompt.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from steer.adapters.transformers.serving.work import Done
from steer.core import Samples, check
from steer.demo.actions.shared import Shared
from steer.demo.recipes.frontier import FrontierRecipe
from steer.demo.session import Visitor
from steer.edits import load_edit
from steer.measure.frontier import SWEEPS, Frontier
from steer.measure.frontier import frontier as measure
from steer.model import as_prompts

__all__ = ["estimate", "marked", "run"]

_TRIAL_ROWS, _TRIAL_TOKENS = 8, 6
_SHOWN = 6
"""Texts of a point that can be read."""


async def estimate(recipe: FrontierRecipe, shared: Shared) -> AsyncGenerator[dict[str, Any]]:
    """Say how long it will take, by a short trial. Raises `SteerError`."""
    _check(recipe, shared)
    async for text in shared.ready():
        yield {"say": text}
    yield {"say": "Trying how fast this machine is"}

    def trial(tell: Callable[[Any], None]) -> float:
        model: Any = shared.engine().model
        began = time.perf_counter()
        settings = {"n": _TRIAL_ROWS, "max_new_tokens": _TRIAL_TOKENS, "temperature": 1.0, "seed": 0}
        drawn = model.generate(list(recipe.prompts[:1]), progress=lambda *_: tell(None), **settings)
        return float((time.perf_counter() - began) / max(1, drawn.cost.generated_tokens))

    async with aclosing(shared.engine().run_work(trial)) as steps:
        async for event in steps:
            if isinstance(event, Done):
                yield {"say": _told(recipe, event.value), "seconds": event.value * _tokens(recipe)}


def _tokens(recipe: FrontierRecipe) -> int:
    return recipe.texts * len(recipe.prompts) * recipe.max_tokens


def _told(recipe: FrontierRecipe, each: float) -> str:
    seconds = each * _tokens(recipe)
    shown = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
    texts = recipe.texts * len(recipe.prompts)
    return f"About {shown}: {recipe.points} points, {texts} texts of at most {recipe.max_tokens} tokens."


def _check(recipe: FrontierRecipe, shared: Shared) -> None:
    shared.check_model(recipe.model)
    shared.reward(recipe.reward)
    count = len(recipe.prompts)
    check(count >= 2, "prompts", f"{count}", "at least 2, one a line: intervals are over prompts")
    check(recipe.points > 1, "methods", "none", "a sampler, an edit, or a system prompt")


async def run(recipe: FrontierRecipe, shared: Shared, visitor: Visitor) -> AsyncGenerator[dict[str, Any]]:
    """Measure. Raises `SteerError` for what a person can mend."""
    _check(recipe, shared)
    with shared.line() as turn:
        async for text in turn:
            yield {"say": text}
        for edit in recipe.edits:
            async for text in shared.ready(edit.name if edit.name not in visitor.artifacts() else None):
                yield {"say": text}
        async with aclosing(estimate(recipe, shared)) as told:
            async for update in told:
                yield {"say": update["say"]}
        work = _Measurement(recipe, shared, visitor).work
        async with aclosing(shared.engine().run_work(work)) as steps:
            async for event in steps:
                if not isinstance(event, Done) and event.value is not None:
                    yield event.value


class _Measurement:
    """One measurement, watched."""

    def __init__(self, recipe: FrontierRecipe, shared: Shared, visitor: Visitor) -> None:
        self.recipe, self.shared, self.visitor = recipe, shared, visitor
        self.points: list[dict[str, Any]] = []
        self._told = 0.0

    def work(self, tell: Callable[[Any], None]) -> None:
        """Measure, and tell of every point."""
        recipe, self._tell = self.recipe, tell
        model = self.shared.engine().model
        methods: dict[str, Any] = {name: SWEEPS[name] for name in recipe.methods}
        for choice in recipe.edits:
            path = self.shared.find(choice.name, self.visitor)
            check(
                not path.is_dir(),
                "edits",
                choice.name,
                "vectors, controllers and value heads; steer frontier takes policies",
            )
            edit: Any = load_edit(path, model=model)
            methods[choice.name] = [{"edits": replace(edit, strength=x)} for x in recipe.strengths]
        if recipe.system:
            methods["system"] = [{"system": recipe.system}]
        measure(
            model,
            as_prompts(list(recipe.prompts)),
            self.shared.reward(recipe.reward) or "",
            methods,
            n=recipe.n,
            seed=recipe.seed,
            on_point=self._point,
            on_step=self._step,
            **recipe.drawing(),
        )
        tell({"say": f"Done: {len(self.points)} points.", "points": self.points})

    def _step(self, done: int, total: int) -> None:
        due = time.monotonic() - self._told >= 0.5
        self._told = time.monotonic() if due else self._told
        where = f"Point {len(self.points) + 1} of {self.recipe.points}"
        self._tell({"say": f"{where}: step {done} of {total}"} if due else None)

    def _point(self, found: Frontier, samples: Samples) -> None:
        point = found.points[-1]
        assert samples.reward is not None
        first = [samples.group.tolist().index(b) for b in range(min(_SHOWN, len(samples.prompts)))]
        texts = [
            [self.recipe.prompts[b], samples.texts[i], round(float(samples.reward[i]), 4)] for b, i in enumerate(first)
        ]
        made = {
            "method": point.method,
            "setting": point.setting,
            "reward": _interval(point.reward),
            "kl": None if point.kl is None else _interval(point.kl),
            "kind": point.kl_kind,
            "tokens": round(point.tokens),
            "texts": texts,
            "front": False,
        }
        self.points = marked([*self.points, made])
        self._tell({"points": self.points})


def _interval(value: tuple[float, float]) -> list[float | None]:
    return [round(x, 5) if math.isfinite(x) else None for x in value]


def marked(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points, those marked that no other one dominates: no less reward at no more drift, and one of them better."""

    def at(point: dict[str, Any]) -> tuple[float, float]:
        return point["kl"][0], -point["reward"][0]

    known = [point for point in points if point["kl"] is not None]

    def beaten(point: dict[str, Any]) -> bool:
        mine = at(point)
        return any(a <= mine[0] and b <= mine[1] and (a, b) != mine for a, b in map(at, known))

    return [{**point, "front": point["kl"] is not None and not beaten(point)} for point in points]
