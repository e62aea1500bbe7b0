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
from helpers import Visit, open_tab

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


TABS: dict[str, Callable[[Any], None]] = {"first": first, "steer": steer, "vector": vector}
"""What brings each tab into the state that is worth a picture."""
WAYS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "narrow": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
}


def main(folder: Path, wanted: list[str]) -> int:
    """Write `TAB-WAY.png` for each."""
    folder.mkdir(parents=True, exist_ok=True)
    page = launch(Shared("smollm2-135m"))
    with sync_playwright() as api:
        browser = api.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for way, settings in WAYS.items():
            for name in wanted or TABS:
                visit = Visit(browser, page.url, **settings)
                TABS[name](visit.tab)
                visit.tab.screenshot(path=folder / f"{name}-{way}.png", full_page=True)
                visit.close()
                print(folder / f"{name}-{way}.png", flush=True)
        browser.close()
    page.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
