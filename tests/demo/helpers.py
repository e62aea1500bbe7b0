"""What tests of the page share."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit


class Visit:
    """One visitor: a browser context of their own, with what it asked for and what it complained about."""

    def __init__(self, browser: Any, url: str, **settings: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 1000}, **settings})
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(60_000)
        self.foreign: list[str] = []
        self.complaints: list[str] = []
        self.tab.on("request", lambda request: self._asked(request.url))
        self.tab.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.goto(url)
        self.tab.wait_for_selector(".steer-dose :is(.card, .none)")

    def _asked(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.hostname not in ("127.0.0.1", "localhost"):
            self.foreign.append(url)

    def close(self) -> None:
        self.context.close()
        assert self.foreign == []
        assert self.complaints == []


def column(tab: Any, title: str) -> Any:
    """The column of this title."""
    return tab.locator(f'.column[aria-label="{title}"]')


def texts_of(shown: Any) -> list[str]:
    """The tokens of a column, as they were sent: the marks for tokens without text are none."""
    found = shown.locator(".tok").all_text_contents()
    return ["" if text in ("·", "■") else text for text in found]
