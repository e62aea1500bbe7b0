"""Action of the Steer tab: one prompt in columns that stream together, and what steering cost at every token.

Columns are `unsteered`, `steered` and, where a system prompt asks for the same, `prompted`. Their rows join the batch
that all visitors share. An update is a dictionary:

    {"say": text}                                what is going on before the first token
    {"columns": [{"title", "note"}]}             the columns that follow
    {"add": [[column, place, [token]]]}          new tokens from a place on; token: {"t" text, "i" id, "k" KL in nats,
                                                 "s" surprise to the unsteered model in nats, "a" and "b" the likeliest
                                                 after and before: [[id, text, probability]], "g" the gate}
    {"done": [[column, facts]], "whole": [...]}  the end: facts about each column, all tokens of each
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from steer.adapters.transformers.serving.columns import Columns, Opened, Traced
from steer.artifacts import read_card
from steer.core import Cost, Prompt, RawText, check
from steer.demo.actions.policy import guided
from steer.demo.actions.shared import PRESETS, Shared
from steer.demo.recipes.steer import EditChoice, SteerRecipe
from steer.demo.session import Visitor
from steer.serving.artifact_store import digest
from steer.serving.engine import Ended, Finished, NamedEdit, Sampling, Steering, Task
from steer.serving.wire import EditRequest

__all__ = ["available", "run"]

_FLUENT = 1.2
"""Perplexity ratio up to which a strength is called gentle."""
_PACE = 0.1
"""Seconds between updates, at least: the page compares every update with the last."""


async def run(recipe: SteerRecipe, shared: Shared, visitor: Visitor) -> AsyncGenerator[dict[str, Any]]:
    """Write the columns of a recipe. Raises `SteerError` for what a person can mend, before anything is written."""
    shared.check_model(recipe.model)
    shared.reward(recipe.reward)
    for edit in recipe.edits:
        async for text in shared.ready(edit.name if edit.name not in visitor.artifacts() else None):
            yield {"say": text}
    async for text in shared.ready():
        yield {"say": text}
    policy = _policy_of(recipe, shared, visitor)
    columns, shown = await asyncio.to_thread(_columns, recipe, shared, visitor, policy is not None)
    yield {"columns": shown, "say": "Reading the prompt"}
    begin = shared.engine().run_columns(columns) if policy is None else _beside(columns, policy, recipe, shared)
    async with aclosing(begin) as events:
        async for update in _paced(events, len(shown)):
            yield update


def _policy_of(recipe: SteerRecipe, shared: Shared, visitor: Visitor) -> Path | None:
    """The folder of the policy that steers, where one does. Raises `InputError`."""
    folders = [path for edit in recipe.edits if (path := shared.find(edit.name, visitor)).is_dir()]
    if not folders:
        return None
    check(len(recipe.edits) == 1, "edits", f"{len(recipe.edits)} edits", "a policy alone: its drift is then exact")
    check(recipe.temperature > 0, "temperature", recipe.temperature, "above 0 for a policy")
    alone = not (recipe.script and recipe.branch == 1)
    check(alone, "branch", "a token of the steered column", "another column: a policy's text cannot be gone on from")
    return folders[0]


async def _beside(
    columns: Columns, policy: Path, recipe: SteerRecipe, shared: Shared
) -> AsyncGenerator[Opened | Traced | Ended | Finished]:
    """The events of the other columns, and then those of the one that a policy steers."""
    place = [0, 2]
    spent = Cost()
    async with aclosing(shared.engine().run_columns(columns)) as events:
        async for event in events:
            if isinstance(event, Opened):
                yield Opened((event.weights[0], {}, *event.weights[1:]))
            elif isinstance(event, Traced | Ended):
                yield replace(event, choice=place[event.choice])
            elif isinstance(event, Finished):
                spent = event.cost
    drawing = {"max_new_tokens": recipe.max_tokens, "temperature": recipe.temperature}
    reward, w = shared.reward(recipe.reward), recipe.edits[0].strength
    work = guided(shared, policy, w, _prompt(recipe), reward, recipe.seed, **drawing)
    async with aclosing(shared.engine().run_work(work)) as steps:
        async for step in steps:
            if isinstance(step.value, Finished):
                yield replace(step.value, cost=step.value.cost + spent)
            elif step.value is not None:
                yield step.value


def _prompt(recipe: SteerRecipe) -> Prompt:
    return RawText(recipe.prompt) if recipe.raw else [{"role": "user", "content": recipe.prompt}]


def _columns(
    recipe: SteerRecipe, shared: Shared, visitor: Visitor, apart: bool
) -> tuple[Columns, list[dict[str, str]]]:
    """The requests behind the columns, without the steered one where it is written `apart`; and all columns' titles."""
    engine, reward = shared.engine(), shared.reward(recipe.reward)
    sampling = Sampling(max_tokens=recipe.max_tokens, temperature=recipe.temperature, seed=recipe.seed)
    plain = _prompt(recipe)
    edits = () if apart else tuple(_named(edit, shared, visitor) for edit in recipe.edits)
    asked: list[tuple[Any, tuple[NamedEdit, ...]]] = [(plain, ()), *([] if apart else [(plain, edits)])]
    shown = [
        {"title": "Unsteered", "note": "The model as it is"},
        {"title": "Steered", "note": ", ".join(edit.shown() for edit in recipe.edits)},
    ]
    if recipe.system and not recipe.raw:
        asked.append(([{"role": "system", "content": recipe.system}, *plain], ()))
        shown.append({"title": "Prompted", "note": recipe.system})
    made = tuple(
        engine.prepare(Task((prompt,), sampling=sampling, steering=Steering(edits=mine, reward=reward)))
        for prompt, mine in asked
    )
    scripts = [recipe.script if i == recipe.branch else () for i in range(len(shown))]
    scripts = [script for i, script in enumerate(scripts) if not (apart and i == 1)]
    return Columns(made, tuple(scripts)), shown


def _named(edit: EditChoice, shared: Shared, visitor: Visitor) -> NamedEdit:
    path = shared.find(edit.name, visitor)
    request = EditRequest(name=edit.name, strength=edit.strength, **edit.options())
    return NamedEdit(path, digest(path), request)


async def _paced(events: AsyncIterator[Any], count: int) -> AsyncGenerator[dict[str, Any]]:
    """Updates from events, several tokens in one where they come fast."""
    fresh: dict[int, list[dict[str, Any]]] = {}
    whole: list[list[dict[str, Any]]] = [[] for _ in range(count)]
    ends: dict[int, Ended] = {}
    sent = 0.0
    gates: tuple[dict[int, float], ...] = ({},) * count
    async for event in events:
        if isinstance(event, Opened):
            gates = event.weights
        elif isinstance(event, Traced):
            token = _token(event, gates[event.choice])
            fresh.setdefault(event.choice, []).append(token)
            whole[event.choice].append(token)
            if time.monotonic() - sent >= _PACE and whole[0]:
                sent = time.monotonic()
                yield {"add": _fresh(fresh, whole)}
                fresh = {}
        elif isinstance(event, Ended):
            ends[event.choice] = event
        elif isinstance(event, Finished):
            facts = [[i, _facts(whole, i, ends[i])] for i in range(count)]
            told = {"tokens": event.cost.generated_tokens, "prompt_tokens": event.cost.prompt_tokens}
            seconds = round(event.cost.seconds, 2)
            yield {
                "add": _fresh(fresh, whole),
                "done": facts,
                "whole": whole,
                "cost": {**told, "seconds": seconds},
            }


def _fresh(fresh: dict[int, list[dict[str, Any]]], whole: list[list[dict[str, Any]]]) -> list[list[Any]]:
    """New tokens of each column, with the place of the first."""
    return [[i, len(whole[i]) - len(tokens), tokens] for i, tokens in sorted(fresh.items())]


def _token(event: Traced, gate: dict[int, float]) -> dict[str, Any]:
    trace = event.trace

    def odds(found: Sequence[tuple[int, str, float]]) -> list[list[Any]]:
        return [[i, text, round(math.exp(value), 5)] for i, text, value in found]

    made: dict[str, Any] = {
        "t": event.text,
        "i": trace.token,
        "k": round(max(trace.kl, 0.0), 5),
        "s": round(-trace.base_log_prob, 4),
        "a": odds(trace.after),
        "b": odds(trace.before),
    }
    if gate:
        largest: float = max(gate.values(), key=lambda weight: abs(weight))
        made["g"] = round(largest, 4)
    return made


def _facts(whole: list[list[dict[str, Any]]], column: int, end: Ended) -> dict[str, Any]:
    """Reward; KL in nats of the text and of a token; perplexity under the unsteered model as a ratio to that of the
    unsteered text; tokens.
    """
    mine, base = whole[column], whole[0]
    count = max(1, len(mine))
    surprise = sum(token["s"] for token in mine) / count - sum(token["s"] for token in base) / max(1, len(base))
    kl = end.kl or 0.0
    return {
        "reward": end.reward,
        "kl": kl,
        "kl_token": kl / count,
        "perplexity_ratio": math.exp(min(surprise, 50.0)),
        "tokens": end.tokens,
        "ended": end.reason == "stop",
        "text": "".join(token["t"] for token in mine),
    }


def available(shared: Shared, visitor: Visitor) -> list[dict[str, Any]]:
    """What the edits of a visitor can be, as the cards show it."""
    return [_about(name, path) for name, path in shared.named(visitor).items()]


def _about(name: str, path: Any) -> dict[str, Any]:
    preset = PRESETS.get(name) if path is None else None
    made: dict[str, Any] = {"name": name, "kind": "vector", "label": name, "low": "", "high": "", "layers": ""}
    made |= {"zones": [0.2, 0.3], "limit": 0.4, "step": 0.01, "strength": 0.15, "pairs": ""}
    if preset is not None:
        return made | {"label": preset.label, "low": preset.low, "high": preset.high, "pairs": preset.pairs}
    if path.is_dir():
        return made | {"kind": "policy", "zones": [1.0, 2.0], "limit": 4.0, "step": 0.05, "strength": 1.0}
    card = read_card(path)
    made |= {"kind": card.kind, "layers": str(card.settings.get("layers", ""))}
    strength = card.settings.get("strength")
    if card.kind != "vector" or card.settings.get("unit") == "raw":
        made |= {"zones": [1.0, 2.0], "limit": 3.0, "step": 0.05, "strength": 1.0}
    elif isinstance(strength, float):
        made |= {"strength": strength}
    return made | _zones(card.metrics.get("sweep"))


def _zones(sweep: Any) -> dict[str, Any]:
    """Zones of a slider from the sweep in a card, as `Report.keep` writes it: green where texts are hardly less fluent
    than the model's own, red from where they broke. Empty without a sweep.
    """
    try:
        rows = sorted((abs(float(x)), float(ratio), bool(broken)) for x, ratio, broken in sweep or [] if x)
    except (TypeError, ValueError):
        return {}
    if not rows:
        return {}
    largest = rows[-1][0]
    red = next((x for x, _, broken in rows if broken), 1.25 * largest)
    tired = next((x for x, ratio, broken in rows if broken or ratio > _FLUENT), red)
    green = max((x for x, _, _ in rows if x < tired), default=0.0)
    return {"zones": [green, red], "limit": max(1.25 * red, largest), "measured": True}
