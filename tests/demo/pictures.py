"""Pictures of every tab, light, dark and narrow: `python tests/demo/pictures.py FOLDER [TAB...]`. The embedded models
run; a chromium and playwright are needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parent))
from conftest import CHROMIUM
from helpers import Visit, number, open_tab

from steer.demo.actions.shared import Shared
from steer.demo.app import launch

LONG = 600_000
"""Milliseconds for a run."""


def first(tab: Any) -> None:
    tab.wait_for_selector("#first-tokens .tok")


def steer(tab: Any) -> None:
    open_tab(tab, "Steer")
    tab.wait_for_selector(".steer-dose .card")
    tab.click("#go")
    tab.wait_for_selector("#tokens .facts div", timeout=LONG)
    steered = tab.locator("#tokens .column").nth(1).locator(".tok")
    heat = steered.evaluate_all("found => found.map(x => +x.style.getPropertyValue('--heat'))")
    steered.nth(heat.index(max(heat))).click()


def vector(tab: Any) -> None:
    open_tab(tab, "Make a vector")
    tab.click("#make")
    tab.wait_for_selector(".steer-layers .layer", timeout=LONG)


def search(tab: Any) -> None:
    open_tab(tab, "Search")
    tab.click("#search-go")
    tab.wait_for_selector("#search-table dd", timeout=LONG)
    tab.locator("#search-lineage circle.node").last.click()


def images(tab: Any) -> None:
    open_tab(tab, "Images")
    tab.get_by_label("RL guidance", exact=True).check()
    tab.click("#images-go")
    tab.wait_for_function("document.querySelector('#images-note').innerText.startsWith('Done')", timeout=LONG)


def frontier(tab: Any) -> None:
    open_tab(tab, "Frontier")
    tab.click("#frontier-more button")
    number(tab, "Tokens at most", 16)
    tab.click("#frontier-go")
    tab.wait_for_function("document.querySelector('#frontier-note').innerText.startsWith('Done')", timeout=LONG)
    tab.locator("#frontier circle.node[data-id='2']").focus()


TABS: dict[str, Callable[[Any], None]] = {
    "first": first,
    "steer": steer,
    "vector": vector,
    "search": search,
    "images": images,
    "frontier": frontier,
}
"""What brings each tab into the state that is worth a picture."""
WIDE, NARROW = {"width": 1280, "height": 1000}, {"width": 390, "height": 844}


def main(folder: Path, wanted: list[str]) -> int:
    """Write `TAB-light.png`, `TAB-dark.png` and `TAB-narrow.png` for each; a tab runs once for all three."""
    folder.mkdir(parents=True, exist_ok=True)
    page = launch(Shared("smollm2-135m"))
    with sync_playwright() as api:
        browser = api.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name in wanted or TABS:
            visit = Visit(browser, page.url, color_scheme="light")
            TABS[name](visit.tab)
            for way, size, dark in (("light", WIDE, False), ("dark", WIDE, True), ("narrow", NARROW, False)):
                visit.tab.set_viewport_size(size)
                visit.tab.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
                visit.tab.wait_for_timeout(500)
                visit.tab.screenshot(path=folder / f"{name}-{way}.png", full_page=True)
                print(folder / f"{name}-{way}.png", flush=True)
            visit.close()
        browser.close()
    page.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
