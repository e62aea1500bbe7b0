"""Visitors: what one has is not another's, Stop stops, and who leaves is forgotten."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import PAIRS, Visit, ask, column, finished, last, open_tab, run, texts_of


def _engine(page: Any) -> Any:
    return page.page.shared.engine()


def _idle(page: Any, seconds: float = 5.0) -> None:
    """Wait until nothing decodes."""
    until = time.monotonic() + seconds
    while _engine(page).load().rows and time.monotonic() < until:
        time.sleep(0.02)
    assert _engine(page).load().rows == 0


def _slow(page: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps of the batch take a quarter of a second each; returns the list that counts them."""
    from steer.adapters.transformers.serving.batch import Batch

    steps: list[int] = []
    step = Batch.step

    def slow(batch: Any) -> None:
        steps.append(len(batch.rows))
        time.sleep(0.25)  # the whole would take a quarter of a minute
        step(batch)

    monkeypatch.setattr(Batch, "step", slow)
    return steps


def test_stop_stands_still(page: Any, visit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = _slow(page, monkeypatch)
    tab = visit()
    ask(tab, "tell me about the house")
    tab.wait_for_selector("#tokens .tok")
    tab.dispatch_event("#stop", "click")
    _idle(page, 2.0)
    counted = len(steps)
    time.sleep(0.3)
    assert len(steps) == counted
    assert 0 < counted < 60


def test_a_closed_tab_stands_still_and_is_forgotten(page: Any, visit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _slow(page, monkeypatch)
    before = page.page.visitors.sessions()
    tab = visit()
    ask(tab, "tell me about the house")
    tab.wait_for_selector("#tokens .tok")
    mine = page.page.visitors.sessions() - before
    assert len(mine) == 1
    tab.close()
    _idle(page, 2.0)
    until = time.monotonic() + 10
    while mine & page.page.visitors.sessions() and time.monotonic() < until:
        time.sleep(0.05)
    assert not mine & page.page.visitors.sessions()


def test_two_visitors_have_vectors_of_their_own(page: Any) -> None:
    from steer.artifacts import load, save
    from steer.core import InputError
    from steer.demo.actions import steer as action
    from steer.demo.actions.steer import available
    from steer.demo.recipes.steer import SteerRecipe

    shared, visitors = page.page.shared, page.page.visitors
    tensors, card = load(shared.artifacts / "glad.safetensors")
    for name, factor in (("one", 1.0), ("two", -1.0)):
        save(visitors.get(name).path("mine"), {key: tensor * factor for key, tensor in tensors.items()}, card)
    save(visitors.get("one").path("secret"), tensors, card)

    def recipe(edit: str, strength: float) -> Any:
        edits = [{"name": edit, "strength": strength}]
        return SteerRecipe.parse(
            {"model": shared.text_model, "prompt": "tell me", "edits": edits, "temperature": 0, "max_tokens": 20}
        )

    async def written(visitor: str, edit: str, strength: float = 1.5) -> list[int]:
        found: list[int] = []
        async for update in action.run(recipe(edit, strength), shared, visitors.get(visitor)):
            found = [token["i"] for token in update["whole"][1]] if "whole" in update else found
        return found

    async def together() -> list[list[int]]:
        return list(
            await asyncio.gather(
                written("one", "mine"), written("two", "mine"), written("one", "glad"), written("two", "glad", -1.5)
            )
        )

    mine, theirs, as_mine, as_theirs = run(together())
    assert mine == as_mine and theirs == as_theirs and mine != theirs
    assert "secret" in {about["name"] for about in available(shared, visitors.get("one"))}
    assert "secret" not in {about["name"] for about in available(shared, visitors.get("two"))}
    with pytest.raises(InputError, match="edits"):
        run(written("two", "secret"))
    for name in ("one", "two"):
        folder = visitors.get(name).folder
        visitors.leave(name)
        assert not folder.exists()


def test_ten_visitors_decode_together(page: Any) -> None:
    from steer.demo.actions import steer as action
    from steer.demo.recipes.steer import SteerRecipe

    shared, visitors = page.page.shared, page.page.visitors

    def recipe(seed: int) -> Any:
        edits = [{"name": "glad", "strength": 0.2 * seed}]
        return SteerRecipe.parse(
            {"model": shared.text_model, "prompt": "tell me", "edits": edits, "seed": seed, "max_tokens": 30}
        )

    async def written(seed: int) -> list[list[int]]:
        found: list[list[int]] = []
        async for update in action.run(recipe(seed), shared, visitors.get(f"ten-{seed}")):
            found = [[token["i"] for token in column] for column in update.get("whole", [])] or found
        return found

    async def together() -> list[Any]:
        return list(await asyncio.gather(*(written(seed) for seed in range(10))))

    assert run(together()) == [run(written(seed)) for seed in range(10)]


@pytest.mark.slow
def test_ten_open_visitors_survive(page: Any, chromium: Any) -> None:
    """Ten browsers at once, each with a strength of its own: each gets its own text, and an eleventh is answered."""
    from steer.demo.actions import steer as action
    from steer.demo.recipes.steer import SteerRecipe

    strengths = [round(-3 + 0.6 * i, 1) for i in range(10)]
    visits = [Visit(chromium, page.url) for _ in strengths]
    for visit, strength in zip(visits, strengths, strict=True):
        ask(visit.tab, "tell me about the house", strength=str(strength))
    texts = []
    for visit in visits:
        finished(visit.tab)
        texts.append(texts_of(column(visit.tab, "Steered")))
    for visit in visits:
        visit.close()
    shared = page.page.shared
    given = {"model": shared.text_model, "prompt": "tell me about the house"}
    for strength, shown in zip(strengths, texts, strict=True):
        recipe = SteerRecipe.parse({**given, "edits": [{"name": "glad", "strength": strength}]})
        whole = last(action.run(recipe, shared, page.page.visitors.get("test")))["whole"]
        assert shown == [token["t"] for token in whole[1]]
    assert len({tuple(text) for text in texts}) > 2
    eleventh = Visit(chromium, page.url)
    eleventh.close()


@pytest.mark.slow
def test_vectors_of_one_name_stay_with_their_makers(page: Any, chromium: Any) -> None:
    """Two browsers make a vector of the same name from opposite pairs, and steer with it at the same time."""
    from steer.demo.actions import steer as action
    from steer.demo.recipes.steer import SteerRecipe

    visits, sessions = [], []
    for turn in (1, -1):
        before = page.page.visitors.sessions()
        visits.append(Visit(chromium, page.url))
        tab = visits[-1].tab
        open_tab(tab, "Make a vector")
        sides = [[pair[side] for pair in PAIRS] for side in ("positive", "negative")][::turn]
        tab.fill("#more textarea", "\n".join(sides[0]))
        tab.fill("#less textarea", "\n".join(sides[1]))
        tab.click("#make")
        tab.wait_for_selector(".steer-layers .layer")
        tab.click("#use")
        tab.wait_for_selector(".steer-dose .card[aria-label='Edit mine']")
        tab.locator(".steer-dose .card:not([aria-label='Edit mine']) .drop").click()
        sessions += page.page.visitors.sessions() - before
    assert len(sessions) == 2
    for visit in visits:
        ask(visit.tab, "tell me about the house", edit="mine")
    texts = []
    for visit in visits:
        finished(visit.tab)
        texts.append(texts_of(column(visit.tab, "Steered")))
    given = {"model": page.page.shared.text_model, "prompt": "tell me about the house"}
    recipe = SteerRecipe.parse({**given, "edits": [{"name": "mine", "strength": 1.5}]})
    for session, shown in zip(sessions, texts, strict=True):
        whole = last(action.run(recipe, page.page.shared, page.page.visitors.get(session)))["whole"]
        assert shown == [token["t"] for token in whole[1]]
    assert texts[0] != texts[1]
    for visit in visits:
        visit.close()


def test_who_is_away_for_too_long_is_forgotten() -> None:
    from steer.demo.session import LIMIT_SECONDS, Visitors

    visitors = Visitors()
    folder = visitors.get("one").folder
    visitors.sweep(time.monotonic() + LIMIT_SECONDS - 5)
    assert folder.exists()
    visitors.sweep(time.monotonic() + LIMIT_SECONDS + 5)
    assert not folder.exists() and len(visitors) == 0
    visitors.close()


@pytest.fixture
def tab_page(tmp_path: Any) -> Any:
    """What a tab gets, with one visitor; no model is loaded."""
    pytest.importorskip("gradio", reason="THE DEMO IS NOT TESTED: pip install steer-engine[demo]")
    from steer.demo.session import Visitors
    from steer.demo.tabs import Page

    page = Page(None, Visitors())  # type: ignore[arg-type]
    yield page
    page.visitors.close()


async def _gathered(handler: Any) -> list[Any]:
    return [update async for update in handler(SimpleNamespace(session_hash="one"), None)]


def _endless(page: Any, closed: list[bool], pause: float) -> Any:
    from steer.demo.tabs import told

    @told(page, "line")
    async def endless(asked: Any) -> Any:
        try:
            while True:
                yield {"line": "on it"}
                await asyncio.sleep(pause)
        finally:
            closed.append(True)

    return endless


@pytest.mark.parametrize("pause", [0.02, 60.0])
def test_a_run_that_lasts_too_long_ends_with_a_line(
    tab_page: Any, monkeypatch: pytest.MonkeyPatch, pause: float
) -> None:
    """Even within a step that gives no sign of life."""
    from steer.demo import tabs

    monkeypatch.setattr(tabs, "LIMIT_RUN", 0.2)
    closed: list[bool] = []
    found = run(_gathered(_endless(tab_page, closed, pause)))
    assert (2 < len(found) < 15 if pause < 1 else len(found) == 2) and closed == [True]
    assert found[-1]["line"]["wrong"] and "Stopped after" in found[-1]["line"]["text"]


@pytest.mark.parametrize("pause", [0.02, 60.0])
def test_what_is_stopped_says_so_last(tab_page: Any, pause: float) -> None:
    """Nothing comes after that line, and only who started it stops it."""
    closed: list[bool] = []
    visitor, other = tab_page.visitors.get("one"), tab_page.visitors.get("two")

    async def stopped() -> list[Any]:
        whole = asyncio.ensure_future(_gathered(_endless(tab_page, closed, pause)))
        await asyncio.sleep(0.1)
        assert not other.stop("line") and not visitor.stop("another line")
        assert visitor.stop("line")
        return await asyncio.wait_for(whole, 5)

    found = run(stopped())
    assert [update["line"] for update in found[:-1]] == ["on it"] * (len(found) - 1) and len(found) > 1
    assert "Stopped" in found[-1]["line"]["text"] and closed == [True]
    assert not visitor.stop("line")
