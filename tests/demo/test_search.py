"""The tab Search in a real browser, on a tiny model: what is shown is what the action gives."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import pytest
from helpers import last, number, open_tab

LABELS = {"fk": "FK", "best-of-n": "best-of-N", "dts-star": "DTS* (tree)"}
HOUSE = "tell me about the house"


def _recipe(page: Any, **given: Any) -> Any:
    from steer.demo.recipes.search import SearchRecipe

    return SearchRecipe.parse({"model": page.page.shared.text_model, "prompt": HOUSE, **given})


def _started(tab: Any, sampler: str) -> None:
    open_tab(tab, "Search")
    tab.fill("#search-prompt textarea", HOUSE)
    tab.get_by_label(LABELS[sampler], exact=True).check()
    tab.click("#search-go")


def _finished(tab: Any) -> None:
    tab.wait_for_function("document.querySelector('#search-note').innerText === 'Done.'")
    tab.wait_for_selector("#search-table dd")


def test_search_shows_what_the_action_gives(page: Any, visit: Any) -> None:
    from steer.demo.actions import search

    tab = visit()
    for sampler in LABELS:
        _started(tab, sampler)
        _finished(tab)
        given = last(search.run(_recipe(page, sampler=sampler), page.page.shared))
        assert tab.input_value("#search-best textarea").split() == given["best"].split()
        scores = tab.locator("#search-table td.score").all_text_contents()
        assert scores == [f"{score:.3f}" for score, _, _ in given["rows"]]
        shown = tab.locator("#search-table dd").all_text_contents()
        assert shown[:-1] == [text for _, text, _ in given["facts"]][:-1]  # the last are the seconds
        assert tab.locator("#search-curve .dot").count() == len(given["curve"])
        assert tab.locator("#search-curve path.ghost").count() == 1
        if sampler == "fk":
            columns = given["lineage"]["columns"]
            nodes = tab.locator("#search-lineage circle.node")
            assert nodes.count() == len(columns) * len(columns[0]["value"])
            nodes.nth(1).click()
            assert tab.locator("#search-lineage .told .text").inner_text().split() == columns[0]["text"][1].split()
        if sampler == "dts-star":
            nodes = tab.locator("#search-tree circle.node")
            assert nodes.count() == len(given["tree"]["parent"])
            nodes.first.focus()
            tab.keyboard.press("ArrowRight")
            node = int(tab.evaluate("document.activeElement.dataset.id"))
            assert given["tree"]["parent"][node] == 0
            assert tab.locator("#search-tree .told .text").inner_text().split() == given["tree"]["text"][node].split()


def test_what_grows_is_what_the_samplers_did(page: Any) -> None:
    """Particles descend from copies of their texts, nodes of a tree from the beginnings of theirs."""
    from steer.demo.actions import search

    given = last(search.run(_recipe(page, sampler="fk"), page.page.shared))
    columns = given["lineage"]["columns"]
    assert len(columns) == 4 and columns[0]["from"] == list(range(10))
    for before, after in pairwise(columns):
        assert all(text.startswith(before["text"][k]) for text, k in zip(after["text"], after["from"], strict=True))
    assert given["best"] in columns[-1]["text"]

    given = last(search.run(_recipe(page, sampler="dts-star", budget=1000), page.page.shared))
    tree = given["tree"]
    for node, up in enumerate(tree["parent"][1:], 1):
        assert tree["text"][node].startswith(tree["text"][up])
    assert given["best"] == tree["text"][max(range(1, len(tree["value"])), key=lambda i: tree["value"][i])]
    assert [row[0] for row in given["rows"]] == sorted((row[0] for row in given["rows"]), reverse=True)


def test_stop_keeps_the_best_so_far(page: Any, visit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from steer.adapters.transformers.serving.preparing import ServedProcess

    tokens: list[int] = []
    plain = ServedProcess._token

    def slow(process: Any, state: Any, generator: Any) -> Any:
        tokens.append(1)
        time.sleep(0.05)
        return plain(process, state, generator)

    monkeypatch.setattr(ServedProcess, "_token", slow)
    tab = visit()
    open_tab(tab, "Search")
    number(tab, "Tokens at most, of one text", 100)
    tab.fill("#search-budget input", "800")
    _started(tab, "fk")
    tab.wait_for_function("document.querySelector('#search-table td')")
    tab.dispatch_event("#search-stop", "click")
    began, counted = time.monotonic(), -1
    while counted != len(tokens):
        assert time.monotonic() - began < 2
        counted = len(tokens)
        time.sleep(0.3)
    assert 8 <= counted < 100
    assert tab.input_value("#search-best textarea")
    tab.wait_for_function("document.querySelector('#search-note').innerText.includes('kept')")
    assert page.page.shared.waiting == 0


def test_searches_wait_in_a_line_that_is_shown(page: Any, visit: Any) -> None:
    tab = visit()
    with page.page.shared.line():
        _started(tab, "fk")
        tab.wait_for_function("document.querySelector('#search-note').innerText === 'In line: 1 before this one'")
    _finished(tab)


def test_sliders_write_the_expression(visit: Any) -> None:
    from steer.demo.tabs.search import WEIGHED, expression

    assert expression([1, 0, 0, 0, 0]) == "sentiment"
    assert expression([1, 0.5, 0, -0.3, 0]) == "sentiment + 0.5*0.01*readability - 0.3*profanity"
    assert expression([0, 0, -1, 0, 2]) == "-fluency + 2*refusal"
    assert expression([0] * len(WEIGHED)) == ""
    tab = visit()
    open_tab(tab, "Search")
    tab.click("#search-sliders button")
    slider = tab.locator("#search-sliders input[type=range]").nth(3)
    slider.focus()
    slider.press("ArrowLeft")
    tab.wait_for_function(
        "document.querySelector('#search-reward textarea, #search-reward input').value === 'sentiment - 0.1*profanity'"
    )


@pytest.mark.parametrize(
    ("field", "given", "told"),
    [
        ("#search-reward textarea, #search-reward input", "sentiment +", "reward"),
        ("#search-prompt textarea", "", "prompt"),
        ("#search-budget input", "-3", "budget"),
    ],
)
def test_bad_input_gives_a_line(visit: Any, field: str, given: str, told: str) -> None:
    tab = visit()
    open_tab(tab, "Search")
    tab.fill(field, given)
    tab.click("#search-go")
    tab.wait_for_selector("#search-note .wrong")
    text = tab.inner_text("#search-note")
    assert told in text and "Traceback" not in text and "went wrong" not in text
