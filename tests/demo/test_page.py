"""The page in a real browser, on a tiny model: what is shown is what the actions give."""

from __future__ import annotations

import asyncio
from typing import Any

from helpers import column, texts_of


def test_steer_shows_what_the_action_gives(page: Any, visit: Any) -> None:
    from steer.demo.actions import steer as action
    from steer.demo.recipes.steer import SteerRecipe

    tab = visit()
    tab.fill("#prompt textarea", "tell me about the house")
    tab.fill("#system textarea", "you are happy")
    tab.fill(".steer-dose .number", "1.5")
    tab.click("#go")
    tab.wait_for_selector(".facts div")
    recipe = SteerRecipe.parse(
        {
            "model": page.page.shared.text_model,
            "prompt": "tell me about the house",
            "edits": [{"name": "sentiment", "strength": 1.5}],
            "system": "you are happy",
        }
    )

    async def updates() -> list[dict[str, Any]]:
        return [update async for update in action.run(recipe, page.page.shared, page.page.visitors.get("test"))]

    last = asyncio.run(updates())[-1]
    plain, steered, prompted = (facts for _, facts in last["done"])
    assert plain["kl"] == 0 and steered["kl"] > 0.01 and prompted["kl"] > 0
    assert [t["i"] for t in last["whole"][0]] != [t["i"] for t in last["whole"][1]]
    for title, index in (("Unsteered", 0), ("Steered", 1), ("Prompted", 2)):
        shown = column(tab, title)
        assert texts_of(shown) == [token["t"] for token in last["whole"][index]]
        assert f"{last['done'][index][1]['kl']:.2f} nats" in shown.locator(".facts").inner_text()
