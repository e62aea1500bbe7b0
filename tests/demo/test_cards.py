"""Cards of edits in the tab Steer: what stands on them comes from the artifacts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from helpers import last


@pytest.mark.parametrize(
    ("sweep", "zones"),
    [
        ([[0.0, 1.0, False], [0.5, 1.05, False], [1.0, 1.15, False], [2.0, 1.6, True]], [1.0, 2.0]),
        ([[-0.5, 1.0, False], [0.5, 1.3, False], [1.0, 1.4, False]], [0.0, 1.25]),
        ([[0.5, 1.0, False], [1.0, 1.1, False]], [1.0, 1.25]),
        ([["a", None, 0]], [0.2, 0.3]),
        (None, [0.2, 0.3]),
    ],
)
def test_zones_come_from_the_sweep_in_the_card(page: Any, sweep: Any, zones: list[float]) -> None:
    from steer.artifacts import load, save
    from steer.demo.actions.steer import available

    shared, visitor = page.page.shared, page.page.visitors.get("zones")
    tensors, card = load(shared.artifacts / "glad.safetensors")
    metrics = {**card.metrics, **({} if sweep is None else {"sweep": sweep})}
    save(visitor.path("swept"), tensors, replace(card, metrics=metrics))
    about = next(a for a in available(shared, visitor) if a["name"] == "swept")
    assert about["zones"] == zones and about["limit"] >= zones[1]
    page.page.visitors.leave("zones")


def test_a_value_head_is_a_card(page: Any) -> None:
    """A value head changes the odds of the steered column, and the KL of every token says by how much."""
    import steer
    from steer.demo.actions import steer as action
    from steer.demo.recipes.steer import SteerRecipe

    shared, visitor = page.page.shared, page.page.visitors.get("value")
    model = steer.load(shared.text_model, dtype="float32", device="cpu")
    prompts = ["tell me about the dog", "tell me about the house"]
    steer.train_value(model, prompts, "sentiment", max_new_tokens=8, hidden=16, epochs=1).save(visitor.path("head"))
    about = next(a for a in action.available(shared, visitor) if a["name"] == "head")
    assert about["kind"] == "value"
    recipe = SteerRecipe.parse(
        {"model": shared.text_model, "prompt": prompts[0], "max_tokens": 8}
        | {"edits": [{"name": "head", "strength": 2.0}]}
    )
    plain, steered = (facts for _, facts in last(action.run(recipe, shared, visitor))["done"])
    assert plain["kl"] == 0 and steered["kl"] > 0
    page.page.visitors.leave("value")
