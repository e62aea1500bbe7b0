"""Action of the tab in which a vector is made: pairs in, a file in the visitor's folder out, and how well it separates.

An update is `{"say": text}` while texts are read, and at the end `{"name", "path", "card", "chart"}`; the chart holds
for every layer the share of held-out texts on the right side of the vector (`accuracy`), the same of random directions
(`random`), the layers that it steers by default (`chosen`), and the layer that separates best (`best`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import torch

from steer.adapters.transformers.serving.work import Done
from steer.artifacts import read_card
from steer.cli.checks import read_pairs
from steer.core import InputError, check
from steer.demo.actions.shared import Shared
from steer.demo.recipes.vector import LIMIT_PAIRS, VectorRecipe
from steer.demo.session import Visitor
from steer.edits import parse_layers
from steer.train.vector import encode_pairs

__all__ = ["make", "pairs_of", "read_sentences", "sentences"]

_RANDOM = 32
"""Random directions at each layer."""


def pairs_of(recipe: VectorRecipe) -> list[dict[str, Any]]:
    """The pairs of a recipe. Raises `InputError`."""
    count, other = len(recipe.positive), len(recipe.negative)
    check(count == other, "sentences", f"{count} and {other}", "as many on the left as on the right, one a line")
    check(2 <= count <= LIMIT_PAIRS, "sentences", f"{count}", f"2 to {LIMIT_PAIRS}")
    return recipe.pairs()


def read_sentences(file: Path) -> tuple[str, str]:
    """A file of pairs as the two text areas hold it, a sentence a line. Raises `InputError`."""
    rows = read_pairs(file)
    check(len(rows) <= LIMIT_PAIRS, "pairs", f"{len(rows)}", f"2 to {LIMIT_PAIRS}")
    for i, row in enumerate(rows):
        asked = "prompt" in row or any("\n" in row[side].strip() for side in ("positive", "negative"))
        check(not asked, f"pairs[{i}]", row, "two texts of one line; steer train vector takes prompts and longer ones")
    positive, negative = ("\n".join(row[side].strip() for row in rows) for side in ("positive", "negative"))
    return positive, negative


async def make(recipe: VectorRecipe, shared: Shared, visitor: Visitor) -> AsyncGenerator[dict[str, Any]]:
    """Fit a vector. Raises `SteerError` for what a person can mend."""
    shared.check_model(recipe.model)
    rows = pairs_of(recipe)
    path = visitor.path(recipe.name)
    visitor.check_room(1 << 22)
    with shared.line(fits=True) as turn:
        async for text in turn:
            yield {"say": text}
        async for text in shared.ready():
            yield {"say": text}
        settings: dict[str, Any] = {"method": recipe.method, "seed": recipe.seed}
        settings |= {"layers": recipe.layers.replace(" ", "")} if recipe.layers else {}
        async with aclosing(shared.fit(rows, path, **settings)) as steps:
            async for done, total in steps:
                yield {"say": f"{done} of {total} texts read"}
        yield {"say": "Comparing with random directions"}
        baseline: list[float] = []
        async with aclosing(shared.engine().run_work(_random(shared, rows, recipe.seed))) as steps:
            async for event in steps:
                if isinstance(event, Done):
                    baseline = event.value
    card = read_card(path)
    yield {
        "name": recipe.name,
        "path": str(path),
        "card": card.describe(),
        "chart": {
            "accuracy": card.metrics["held_out_accuracy"],
            "random": baseline,
            "best": card.metrics["best_layer"],
            "chosen": parse_layers(card.settings["layers"], card.layers),
        },
    }


def _random(
    shared: Shared, rows: Sequence[dict[str, Any]], seed: int
) -> Callable[[Callable[[Any], None]], list[float]]:
    """Work that finds, for every layer, the mean share of texts on the right side of random directions. Each is cut
    at the middle of the two means on these same texts, and turned so that it is right more often than wrong.
    """

    def work(tell: Callable[[Any], None]) -> list[float]:
        model = shared.engine().model
        some = list(rows)[: max(2, min(len(rows), 40))]
        positive, negative = encode_pairs(model, some)
        seen = model.hidden_states([*positive, *negative], pool="mean", on_batch=lambda count: tell(count))
        generator = torch.Generator().manual_seed(seed)
        found = []
        for layer in sorted(seen):
            up, down = seen[layer].double().chunk(2)
            direction = torch.randn(up.shape[1], _RANDOM, generator=generator, dtype=torch.float64)
            middle = ((up + down) / 2).mean(0) @ direction
            right = (up @ direction > middle).double().mean(0) + (down @ direction <= middle).double().mean(0)
            share = right / 2
            found.append(round(float(torch.maximum(share, 1 - share).mean()), 4))
        return found

    return work


def sentences(text: str) -> tuple[str, ...]:
    """The lines of a text area that are not empty."""
    if len(text) > 400_000:
        raise InputError("sentences", f"{len(text)} characters", "at most 400000")
    return tuple(line.strip() for line in text.splitlines() if line.strip())
