"""The tab Frontier in a real browser, on a tiny model: it shows what the action gives, and that what steer says."""

from __future__ import annotations

import csv
import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from helpers import last, number, open_tab, run

PROMPTS = ["tell me about the house", "tell me about the dog"]


def _recipe(page: Any, **given: Any) -> Any:
    from steer.demo.recipes.frontier import FrontierRecipe

    made = {"prompts": PROMPTS, "edits": [{"name": "glad", "strength": 0.0}], "strengths": [0.5, 1.5]}
    made |= {"n": 2, "max_tokens": 6, "system": "you are happy"}
    return FrontierRecipe.parse({"model": page.page.shared.text_model, **made, **given})


def _filled(tab: Any) -> None:
    open_tab(tab, "Frontier")
    tab.fill("#frontier-prompts textarea", "\n".join(PROMPTS))
    tab.fill("#frontier-edits input, #frontier-edits textarea", "glad")
    tab.fill("#strengths input, #strengths textarea", "0.5, 1.5")
    tab.fill("#frontier-system textarea", "you are happy")
    tab.click("#frontier-more button")
    number(tab, "Texts of a prompt", 2)
    number(tab, "Tokens at most", 6)


def _run(page: Any, recipe: Any) -> Any:
    from steer.demo.actions import frontier

    return last(frontier.run(recipe, page.page.shared, page.page.visitors.get("test")))


def test_frontier_shows_what_the_action_gives(page: Any, visit: Any) -> None:
    tab = visit()
    _filled(tab)
    tab.click("#frontier-estimate")
    tab.wait_for_function("document.querySelector('#frontier-note').innerText.startsWith('About')")
    assert "8 points" in tab.inner_text("#frontier-note")
    tab.click("#frontier-go")
    tab.wait_for_function("document.querySelector('#frontier-note').innerText.startsWith('Done')")
    points = _run(page, _recipe(page))["points"]
    known = [(i, point) for i, point in enumerate(points) if point["kl"] is not None]
    marks = tab.locator("#frontier circle.node")
    assert marks.count() == len(known) and tab.locator("#frontier .ring").count() == sum(p["front"] for _, p in known)
    for i, point in known:
        told = tab.get_attribute(f"#frontier circle.node[data-id='{i}']", "aria-label")
        assert f"reward {point['reward'][0]:.3f}" in told and f"KL {point['kl'][0]:.3f}" in told
    i, point = known[-1]
    tab.focus(f"#frontier circle.node[data-id='{i}']")
    shown = tab.locator("#frontier .told dd").all_text_contents()
    assert [text.split() for text in shown] == [text.split() for _, text, _ in point["texts"]]
    with tab.expect_download() as kept:
        tab.get_by_role("button", name="Save CSV").click()
    rows = list(csv.DictReader(io.StringIO(Path(kept.value.path()).read_text())))
    assert [float(row["reward"]) for row in rows] == [point["reward"][0] for point in points]
    with tab.expect_download() as kept:
        tab.get_by_role("button", name="Save PNG").click()
    assert Path(kept.value.path()).read_bytes().startswith(b"\x89PNG")
    tab.get_by_label("glad", exact=True).uncheck()
    assert marks.count() == len([point for _, point in known if point["method"] != "glad"])


def test_all_forms_give_the_points_on_the_page(
    page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from steer.cli import main

    recipe = _recipe(page)
    given = [(p["reward"][0], p["kl"] and p["kl"][0]) for p in _run(page, recipe)["points"]]
    assert len(given) == recipe.points and len({reward for reward, _ in given}) > 3
    monkeypatch.chdir(tmp_path)
    Path("glad.safetensors").write_bytes((page.page.shared.artifacts / "glad.safetensors").read_bytes())

    def written() -> Any:
        points = json.loads(Path("frontier/frontier.json").read_text())["points"]
        return [(p["reward"][0], p["kl"] and p["kl"][0]) for p in points]

    rows, _, line = recipe.commands().partition("\nPROMPTS\n")
    Path("frontier_prompts.json").write_text(rows.partition("\n")[2])
    assert main(shlex.split(line)[1:]) == 0
    assert [pytest.approx(pair, abs=2e-5) for pair in given] == written()
    Path("recipe.yaml").write_text(recipe.yaml(), encoding="utf-8")
    assert main(["run", "recipe.yaml", "--overwrite"]) in (0, 2)
    assert [pytest.approx(pair, abs=2e-5) for pair in given] == written()
    capsys.readouterr()
    names: dict[str, Any] = {}
    exec(compile(recipe.python(), "python", "exec"), names)
    assert "glad" in capsys.readouterr().out
    found = [(p.reward[0], p.kl and p.kl[0]) for p in names["found"].points]
    assert [pytest.approx(pair, abs=2e-5) for pair in given] == found
    assert recipe.curl().startswith("# A server has no route")


def test_what_nothing_beats_is_marked() -> None:
    from steer.demo.actions.frontier import marked

    def points(pairs: list[tuple[float | None, float]]) -> list[dict[str, Any]]:
        return [{"kl": None if kl is None else [kl, 0.1], "reward": [reward, 0.1]} for kl, reward in pairs]

    given = points([(0.0, 0.0), (1.0, 0.5), (1.0, 0.4), (2.0, 0.5), (3.0, 0.6), (None, 9.0), (3.0, 0.6)])
    assert [point["front"] for point in marked(given)] == [True, True, False, False, True, False, True]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"prompts": ["one"]}, "prompts"),
        ({"reward": "sentiment -"}, "reward"),
        ({"methods": []}, "methods"),
        ({"strengths": [float("nan")]}, "strengths"),
        ({"edits": [{"name": "nobody", "strength": 0.0}]}, "edits"),
        ({"prompts": ["tell me", "house " * 400]}, "max_new_tokens|prompts"),
    ],
)
def test_bad_fields_are_named(page: Any, given: dict[str, Any], field: str) -> None:
    from steer.core import SteerError

    with pytest.raises(SteerError, match=field):
        _run(page, _recipe(page, **given))


def test_the_estimate_counts_what_is_drawn(page: Any) -> None:
    """Texts for each prompt: of the model, of two strengths and of the prompt two each; of best-of-n its N."""
    from steer.demo.actions import frontier

    recipe = _recipe(page)
    assert recipe.texts == 2 * 4 + 2 + 4 + 8 + 16 and recipe.points == 8
    drawn = sum(point["tokens"] for point in _run(page, recipe)["points"])
    assert 0 < drawn <= recipe.texts * recipe.max_tokens

    async def told() -> list[dict[str, Any]]:
        return [update async for update in frontier.estimate(recipe, page.page.shared)]

    assert run(told())[-1]["seconds"] > 0
