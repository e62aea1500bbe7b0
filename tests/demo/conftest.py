"""A page on a tiny model, and a real browser on it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import steer

CHROMIUM = os.environ.get("STEER_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


def _skip(what: str) -> None:
    text = f"THE DEMO IS NOT TESTED: {what}"
    print(f"\n*** {text} ***", file=sys.stderr)
    pytest.skip(text)


@pytest.fixture(scope="session")
def page(tiny_lm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page on the tiny model, launched."""
    pytest.importorskip("gradio", reason="THE DEMO IS NOT TESTED: pip install steer-engine[demo]")
    from helpers import PAIRS

    from steer.demo.actions.shared import Shared
    from steer.demo.app import launch

    folder = tmp_path_factory.mktemp("artifacts")
    shared = Shared(str(tiny_lm_dir), folder, {"dtype": "float32", "device": "cpu"})
    steer.train_vector(steer.load(tiny_lm_dir, dtype="float32"), PAIRS).save(folder / "glad.safetensors")
    launched = launch(shared)
    yield launched
    launched.close()


@pytest.fixture(scope="session")
def smollm2_page() -> Iterator[Any]:
    """The page on the embedded models, launched."""
    pytest.importorskip("gradio", reason="THE DEMO IS NOT TESTED: pip install steer-engine[demo]")
    from steer.demo.actions.shared import Shared
    from steer.demo.app import launch

    launched = launch(Shared("smollm2-135m"))
    yield launched
    launched.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser. While it is there its event loop runs in this thread, which other tests want for theirs."""
    if CHROMIUM is None:
        _skip("no chromium on this machine: apt-get install chromium, or set STEER_CHROMIUM")
    playwright = pytest.importorskip("playwright.sync_api", reason="THE DEMO IS NOT TESTED: pip install playwright")
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(page: Any, chromium: Any) -> Iterator[Any]:
    """Opens a fresh visit; at the end nothing has left the machine, and the console has no error."""
    from helpers import Visit

    opened: list[Visit] = []

    def visit(query: str = "", **settings: Any) -> Any:
        opened.append(Visit(chromium, page.url + query, **settings))
        return opened[-1].tab

    yield visit
    for each in opened:
        each.close()
