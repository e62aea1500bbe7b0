"""What tests of the page share."""

from __future__ import annotations

import asyncio
import base64
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

PAIRS = [
    {"positive": f"the {one} is good and happy", "negative": f"the {one} is bad and sad"}
    for one in ("dog", "cat", "house", "tree", "day", "night")
]
"""What the tiny model knows to say well or badly."""
PATIENCE = 180_000
"""Milliseconds that the page may take for anything; a busy machine needs them."""


class Visit:
    """One visitor: a browser context of their own, with what it asked for and what it complained about."""

    def __init__(self, browser: Any, url: str, **settings: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 1000}, **settings})
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(PATIENCE)
        self.foreign: list[str] = []
        self.complaints: list[str] = []
        self.tab.on("request", lambda request: self._asked(request.url))
        self.tab.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.goto(url)
        self.tab.wait_for_selector(".steer-stops .name")

    def _asked(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.hostname not in ("127.0.0.1", "localhost"):
            self.foreign.append(url)

    def close(self) -> None:
        self.context.close()
        assert self.foreign == []
        assert self.complaints == []


def open_tab(tab: Any, title: str) -> None:
    """Choose a tab of the page."""
    tab.get_by_role("tab", name=title, exact=True).first.click()


def number(tab: Any, label: str, value: float) -> None:
    """Type a number beside the slider of this label in the open tab."""
    field = tab.get_by_label(f"number input for {label}").locator("visible=true").first
    field.fill(str(value))
    field.press("Tab")


def ask(tab: Any, prompt: str, *, system: str = "", edit: str = "glad", strength: str = "1.5") -> None:
    """Fill the tab Steer, and start."""
    open_tab(tab, "Steer")
    tab.wait_for_selector(".steer-dose .drop")
    tab.fill("#prompt textarea", prompt)
    tab.fill("#system textarea", system)
    tab.click(".steer-dose .drop")
    tab.select_option(".steer-dose .choice", edit)
    tab.click(".steer-dose .plus")
    tab.fill(".steer-dose .number", strength)
    tab.click("#go")


def column(tab: Any, title: str) -> Any:
    """The column of this title in the tab Steer."""
    return tab.locator(f'#tokens .column[aria-label="{title}"]')


def texts_of(shown: Any) -> list[str]:
    """The tokens of a column, as they were sent: the marks for tokens without text are none."""
    found = shown.locator(".tok").all_text_contents()
    return ["" if text in ("·", "■") else text for text in found]


def run(work: Any) -> Any:
    """What a coroutine returns; in a thread of its own, since the browser's loop runs in this one."""
    with ThreadPoolExecutor(1) as other:
        return other.submit(lambda: asyncio.run(work)).result()


def last(updates: Any) -> dict[str, Any]:
    """The last update of an action."""

    async def gathered() -> list[dict[str, Any]]:
        return [update async for update in updates]

    found: list[dict[str, Any]] = run(gathered())
    return found[-1]


def packed(entries: Any) -> str:
    """Data as an address holds it."""
    return base64.urlsafe_b64encode(zlib.compress(json.dumps(entries).encode())).decode()


def finished(tab: Any, before: str = "") -> str:
    """Wait until a run has ended, another than `before`; its number."""
    told = "before => { const run = document.querySelector('#tokens .steer-tokens')?.dataset.run;"
    tab.wait_for_function(told + " return run && run !== before; }", arg=before)
    return str(tab.locator("#tokens .steer-tokens").get_attribute("data-run"))
