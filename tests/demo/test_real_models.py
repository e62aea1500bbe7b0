"""The page on the embedded language model: what is shown is what the action gives, soon enough."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import Visit, column, finished, last, number, open_tab, run, texts_of

pytestmark = [pytest.mark.slow, pytest.mark.smollm2]


def _recipe(**given: Any) -> Any:
    from steer.demo.recipes.steer import SteerRecipe

    edits = [{"name": "sentiment", "strength": 0.15, "pairs": "sentiment_pairs"}]
    return SteerRecipe.parse(
        {"model": "smollm2-135m", "prompt": "Tell me about your new flat.", "edits": edits, "max_tokens": 24} | given
    )


def test_steering_is_seen(smollm2_page: Any, chromium: Any) -> None:
    from steer.demo.actions import steer as action

    page = smollm2_page.page
    given = last(action.run(_recipe(max_tokens=60), page.shared, page.visitors.get("test")))
    visit = Visit(chromium, smollm2_page.url)
    open_tab(visit.tab, "Steer")
    visit.tab.wait_for_selector(".steer-dose .card")
    visit.tab.fill("#system textarea", "")
    visit.tab.set_default_timeout(300_000)
    visit.tab.click("#go")
    finished(visit.tab)
    plain, steered = (facts for _, facts in given["done"])
    assert steered["reward"] > plain["reward"] + 0.3 and steered["kl"] > 1
    for title, index in (("Unsteered", 0), ("Steered", 1)):
        assert texts_of(column(visit.tab, title)) == [token["t"] for token in given["whole"][index]]
    visit.close()


def test_the_first_token_comes_as_soon_as_from_the_plain_api(smollm2_page: Any) -> None:
    """The same three rows through `model.generate(stream=True)`; alternating, the median of seven ratios. The smallest
    and the largest of seven hold the true median with a probability of 1 - 2 * 0.5 ** 7, 98 %.
    """
    from steer.demo.actions import steer as action

    page = smollm2_page.page
    recipe = _recipe(system="You are a very happy assistant.", max_tokens=8)
    last(action.run(recipe, page.shared, page.visitors.get("first")))
    engine = page.shared.engine()
    model = engine.model
    path = str(page.shared.find("sentiment", page.visitors.get("first")))
    chat = [{"role": "user", "content": recipe.prompt}]
    prompts = [chat, chat, [{"role": "system", "content": recipe.system}, *chat]]

    async def of_the_page() -> float:
        began = time.perf_counter()
        async for update in action.run(recipe, page.shared, page.visitors.get("first")):
            if "add" in update:
                return time.perf_counter() - began
        raise AssertionError("no token came")

    def of_the_api() -> float:
        began = time.perf_counter()
        stream = model.generate(
            prompts, edits=[None, [f"{path}:0.15"], None], temperature=0.7, seed=0, max_new_tokens=8, stream=True
        )
        next(iter(stream))
        return time.perf_counter() - began

    ratios = []
    for _ in range(7):
        while engine.load().rows:
            time.sleep(0.02)
        there = of_the_api()
        ratios.append(run(of_the_page()) / there)
    middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
    print(f"first token, page to API: {middle:.2f} ({low:.2f} to {high:.2f}, 98 % interval of the median of 7)")
    assert middle < 1.5


def test_the_preset_reproduces_by_itself(smollm2_page: Any, tmp_path: Path) -> None:
    """The four forms of the tab's first recipe, each run by a shell in an empty folder, give the texts on the page."""
    from steer.demo.actions import steer as action

    page = smollm2_page.page
    recipe = _recipe(max_tokens=8, prompt="Say ${x} and $(date).")
    shown = [facts["text"] for _, facts in last(action.run(recipe, page.shared, page.visitors.get("forms")))["done"]]
    assert shown[0] != shown[1]
    (tmp_path / "page.py").write_text(recipe.python(), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(recipe.yaml(), encoding="utf-8")
    folder = Path(sys.executable).parent
    setting = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "400"}
    for form in (recipe.commands(), "python page.py", "steer run recipe.yaml"):
        done = subprocess.run(
            ["bash", "-ec", form], cwd=tmp_path, env=setting, capture_output=True, text=True, timeout=900, check=True
        )
        printed = " ".join(done.stdout.split())
        assert all(" ".join(text.split()) in printed for text in shown), (form, printed)
        (tmp_path / "sentiment.safetensors").unlink()


def test_stop_stands_still_within_two_seconds(smollm2_page: Any, chromium: Any) -> None:
    engine = smollm2_page.page.shared.engine()
    visit = Visit(chromium, smollm2_page.url)
    open_tab(visit.tab, "Steer")
    visit.tab.wait_for_selector(".steer-dose .card")
    visit.tab.click("#go")
    visit.tab.wait_for_selector("#tokens .tok", timeout=120_000)
    visit.tab.click("#stop")
    began = time.monotonic()
    while engine.load().rows:
        assert time.monotonic() - began < 2
        time.sleep(0.02)
    shown = visit.tab.locator("#tokens .tok").count()
    time.sleep(1)
    assert visit.tab.locator("#tokens .tok").count() <= shown + 6
    visit.close()


def test_a_search_is_seen(smollm2_page: Any, chromium: Any) -> None:
    from steer.demo.actions import search
    from steer.demo.recipes.search import SearchRecipe

    given = {"model": "smollm2-135m", "prompt": "How was your day?", "budget": 96, "max_tokens": 16}
    want = last(search.run(SearchRecipe.parse(given), smollm2_page.page.shared))
    visit = Visit(chromium, smollm2_page.url)
    open_tab(visit.tab, "Search")
    visit.tab.set_default_timeout(300_000)
    visit.tab.fill("#search-budget input", "96")
    number(visit.tab, "Tokens at most, of one text", 16)
    visit.tab.click("#search-go")
    visit.tab.wait_for_function("document.querySelector('#search-note').innerText === 'Done.'")
    visit.tab.wait_for_selector("#search-table dd")
    assert visit.tab.input_value("#search-best textarea") == want["best"]
    scores = visit.tab.locator("#search-table td.score").all_text_contents()
    assert scores == [f"{score:.3f}" for score, _, _ in want["rows"]]
    assert want["rows"][0][0] >= want["ghost"][0][1] - 1
    visit.close()


def test_images_are_seen(smollm2_page: Any, chromium: Any) -> None:
    """FK reaches more reward than plain sampling with as many calls of the network."""
    visit = Visit(chromium, smollm2_page.url)
    open_tab(visit.tab, "Images")
    visit.tab.set_default_timeout(300_000)
    visit.tab.click("#images-go")
    visit.tab.wait_for_function("document.querySelector('#images-note').innerText.startsWith('Done')")

    def fact(title: str, name: str) -> float:
        found = visit.tab.locator(f'#images section[aria-label="{title}"] .facts div', has_text=name)
        return float(found.locator("dd").inner_text().split()[0])

    assert fact("FK", "Mean reward") > fact("Plain", "Mean reward") + 3
    assert fact("FK", "Network calls") == fact("Plain", "Network calls") == 200
    visit.close()


def test_a_frontier_is_seen(smollm2_page: Any, chromium: Any) -> None:
    visit = Visit(chromium, smollm2_page.url)
    open_tab(visit.tab, "Frontier")
    visit.tab.set_default_timeout(600_000)
    visit.tab.fill("#frontier-prompts textarea", "How was your day?\nTell me about your new flat.")
    visit.tab.fill("#strengths input, #strengths textarea", "0.15")
    visit.tab.click("#frontier-more button")
    number(visit.tab, "Tokens at most", 12)
    visit.tab.click("#frontier-go")
    visit.tab.wait_for_function("document.querySelector('#frontier-note').innerText.startsWith('Done')")
    told = visit.tab.locator("#frontier circle.node").evaluate_all("all => all.map(x => x.getAttribute('aria-label'))")
    rewards = {text.split(":")[0]: float(text.split("reward ")[1].split()[0]) for text in told}
    assert rewards["best-of-n, n 16"] > rewards["the model as it is"]
    visit.close()
