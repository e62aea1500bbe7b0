"""Everybody can use the page: axe-core finds nothing serious, the keyboard is enough, narrow and dark are readable."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from helpers import ask, finished, open_tab

ROOT = Path(__file__).parents[2]
AXE = Path(os.environ.get("STEER_AXE", ROOT / "build/axe/node_modules/axe-core/axe.min.js"))
TABS = ("The first minute", "Steer", "Make a vector", "Search", "Images", "Frontier")


def _found(tab: Any) -> list[str]:
    """What axe-core calls serious or critical, a line each."""
    tab.add_script_tag(content=AXE.read_text(encoding="utf-8"))
    found = tab.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    serious = [rule for rule in found if rule["impact"] in ("serious", "critical")]
    return [f"{rule['id']}: {node['html'][:200]}" for rule in serious for node in rule["nodes"]]


@pytest.mark.skipif(not AXE.is_file(), reason="AXE-CORE DID NOT RUN: npm install --prefix build/axe axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit: Any, scheme: str) -> None:
    tab = visit(color_scheme=scheme)
    ask(tab, "tell me about the house", system="you are happy")
    finished(tab)
    found = []
    for title in TABS:
        open_tab(tab, title)
        tab.wait_for_timeout(300)
        found += [f"{title}: {line}" for line in _found(tab)]
    assert found == []


def test_nothing_is_wider_than_a_narrow_screen(visit: Any) -> None:
    tab = visit(viewport={"width": 390, "height": 844})
    for title in TABS:
        if tab.get_by_role("tab", name=title, exact=True).first.is_visible():
            open_tab(tab, title)
        tab.wait_for_timeout(200)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390, title


def test_the_keyboard_is_enough(visit: Any) -> None:
    tab = visit()
    seen = []
    for _ in range(12):
        tab.keyboard.press("Tab")
        seen.append(
            tab.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.innerText")
        )
        if seen[-1] == "From sad to happy":
            break
    else:
        pytest.fail(f"the slider cannot be reached by Tab: {seen}")
    before = tab.locator("#first-tokens .column .text").nth(1).inner_text()
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function(
        "before => document.querySelectorAll('#first-tokens .column .text')[1]?.innerText !== before", arg=before
    )
    for _ in range(12):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.classList.contains('tok')"):
            break
    tab.keyboard.press("ArrowRight")
    assert "KL" in tab.locator("#first-tokens .detail .head").inner_text()
    for _ in range(40):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.id === 'live' || !!document.activeElement.closest('#live')"):
            break
    tab.keyboard.press("Enter")
    tab.wait_for_function("document.querySelector('[role=tab][aria-selected=true]').innerText === 'Steer'")
    tab.wait_for_function("document.querySelector('#prompt textarea').value === 'Tell me about your new neighbour.'")
