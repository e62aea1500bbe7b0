"""The tab Search in a real browser, on a tiny model: what is shown is what the action gives."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import last, open_tab


@pytest.mark.parametrize("sampler", ["fk", "best-of-n"])
def test_search_shows_what_the_action_gives(page: Any, visit: Any, sampler: str) -> None:
    from steer.demo.actions import search
    from steer.demo.recipes.search import SearchRecipe

    tab = visit()
    open_tab(tab, "Search")
    tab.fill("#search-prompt textarea", "tell me about the house")
    tab.get_by_label({"fk": "FK", "best-of-n": "best-of-N"}[sampler], exact=True).check()
    tab.click("#search-go")
    tab.wait_for_function("document.querySelector('#search-note').innerText.includes('tokens written')")
    shared = page.page.shared
    recipe = SearchRecipe.parse({"model": shared.text_model, "prompt": "tell me about the house", "sampler": sampler})
    given = last(search.run(recipe, shared))
    assert tab.input_value("#search-best textarea").split() == given["best"].split()
    assert f"{given['facts']['tokens']} tokens" in tab.inner_text("#search-note")
    assert given["rows"][0][0] >= given["rows"][-1][0]


def test_a_broken_expression_gives_a_line(visit: Any) -> None:
    tab = visit()
    open_tab(tab, "Search")
    tab.fill("#search-reward textarea", "sentiment +")
    tab.click("#search-go")
    tab.wait_for_selector("#search-note .wrong, #search-note.wrong")
    assert "Traceback" not in tab.inner_text("#search-note")
