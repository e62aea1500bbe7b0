"""The page in a real browser, on a tiny model: what is shown is what the actions give."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import PAIRS, ask, column, finished, last, open_tab, packed, texts_of

_UNFINISHED = {"tab": "steer", "prompt": "Hello"}
HOUSE = "tell me about the house"


def _recipe(page: Any, **given: Any) -> Any:
    from steer.demo.recipes.steer import SteerRecipe

    edits = [{"name": "glad", "strength": 1.5}]
    return SteerRecipe.parse({"model": page.page.shared.text_model, "prompt": HOUSE, "edits": edits, **given})


def _run(page: Any, recipe: Any, visitor: str = "test") -> dict[str, Any]:
    from steer.demo.actions import steer as action

    return last(action.run(recipe, page.page.shared, page.page.visitors.get(visitor)))


def test_steer_shows_what_the_action_gives(page: Any, visit: Any) -> None:
    tab = visit()
    ask(tab, HOUSE, system="you are happy")
    tab.wait_for_selector("#tokens .facts div")
    given = _run(page, _recipe(page, system="you are happy"))
    plain, steered, prompted = (facts for _, facts in given["done"])
    assert plain["kl"] == 0 and steered["kl"] > 0.01 and prompted["kl"] > 0
    assert [t["i"] for t in given["whole"][0]] != [t["i"] for t in given["whole"][1]]
    for title, index in (("Unsteered", 0), ("Steered", 1), ("Prompted", 2)):
        shown = column(tab, title)
        assert texts_of(shown) == [token["t"] for token in given["whole"][index]]
        facts = given["done"][index][1]
        assert f"{facts['kl']:.2f} nats" in shown.locator(".facts").inner_text()
        assert f"{facts['reward']:.3f}" in shown.locator(".facts").inner_text()


def test_keys_walk_over_tokens_and_a_click_goes_on_from_there(page: Any, visit: Any) -> None:
    tab = visit()
    ask(tab, HOUSE)
    finished(tab)
    whole = _run(page, _recipe(page))["whole"][1]
    column(tab, "Steered").locator(".tok").first.focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    assert f"KL {whole[2]['k']:.3f} nats" in tab.locator("#tokens .detail .head").inner_text()
    tab.keyboard.press("Enter")
    odds = tab.locator("#tokens .odds").nth(1)
    name = odds.locator(".go").first
    other = next(i for i, _, _ in whole[2]["a"] if i != whole[2]["i"])
    before = finished(tab)
    name.click()
    finished(tab, before)
    forked = _run(page, _recipe(page, script=[whole[0]["i"], whole[1]["i"], other], branch=1))
    assert [t["i"] for t in forked["whole"][1][:3]] == [whole[0]["i"], whole[1]["i"], other]
    assert texts_of(column(tab, "Steered")) == [t["t"] for t in forked["whole"][1]]


def test_the_first_minute_needs_no_model(page: Any, visit: Any) -> None:
    from steer.demo.first_minute import frames

    tab = visit()
    for index in (0, 4, 2):
        tab.locator(".steer-stops .name").nth(index).click()
        first = frames()[index]["done"][0][1]["text"][:20]
        steered = frames()[index]["done"][1][1]
        tab.wait_for_function(
            "want => document.querySelectorAll('#first-tokens .column')[1]?.innerText.includes(want)",
            arg=f"{steered['kl']:.2f} nats",
        )
        assert first in tab.locator("#first-tokens .column .text").first.inner_text()


def test_a_vector_is_made_judged_and_used(page: Any, visit: Any) -> None:
    from steer.demo.actions import vector as action
    from steer.demo.recipes.vector import VectorRecipe

    tab = visit()
    open_tab(tab, "Make a vector")
    sides = {side: [pair[side] for pair in PAIRS] for side in ("positive", "negative")}
    tab.fill("#more textarea", "\n".join(sides["positive"]))
    tab.fill("#less textarea", "\n".join(sides["negative"]))
    tab.fill("#vector-name input, #vector-name textarea", "cheer")
    tab.click("#make")
    tab.wait_for_selector(".steer-layers .layer")
    recipe = VectorRecipe.parse({"model": page.page.shared.text_model, "name": "cheer", **sides})
    made = last(action.make(recipe, page.page.shared, page.page.visitors.get("test")))
    assert tab.locator(".steer-layers .layer").count() == len(made["chart"]["accuracy"])
    told = tab.locator(".steer-layers .layer").first.get_attribute("aria-label")
    assert f"{100 * made['chart']['accuracy'][0]:.0f} %" in told
    assert tab.locator("#card textarea").input_value() == made["card"]
    tab.click("#use")
    tab.wait_for_selector(".steer-dose .card[aria-label='Edit cheer']")


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("?r=%00%ff", "address"),
        ("?r=" + "A" * 7000, "address"),
        ("?r=" + packed(_UNFINISHED), "model"),
        ("?r=" + packed([1]), "address"),
    ],
)
def test_a_recipe_in_the_address_that_is_none(visit: Any, query: str, told: str) -> None:
    tab = visit(query)
    tab.wait_for_selector("#page-note .wrong")
    assert told in tab.locator("#page-note").inner_text()
    tab.locator(".steer-stops .name").nth(0).click()  # and the page goes on


_BAD = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": "house " * 17_000}, "prompt"),
    ({"prompt": "house " * 400}, "messages"),
    ({"reward": "sentiment - "}, "reward"),
    ({"reward": "__import__('os')"}, "reward"),
    ({"strength": ""}, "strength"),
    ({"strength": "1e30"}, "strength"),
]


def test_bad_input_is_one_line_and_the_page_goes_on(visit: Any) -> None:
    tab = visit()
    open_tab(tab, "Steer")
    for given, told in _BAD:
        tab.fill("#reward input, #reward textarea", given.get("reward", "sentiment"))
        ask(tab, given.get("prompt", HOUSE), strength=given.get("strength", "1"))
        tab.wait_for_function(
            "told => document.querySelector('#steer-note .wrong')?.textContent.includes(told)", arg=told
        )
        text = tab.locator("#steer-note").inner_text()
        assert "Traceback" not in text and "went wrong" not in text and len(text) < 600
    tab.fill("#reward input, #reward textarea", "sentiment")
    ask(tab, HOUSE)
    finished(tab)
