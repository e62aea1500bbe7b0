"""The named endpoints, called without a browser."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import last


@pytest.fixture(scope="module")
def client(page: Any) -> Any:
    """A client of the page."""
    from gradio_client import Client

    return Client(page.url, verbose=False)


def _asked(**given: Any) -> list[Any]:
    """Arguments of the endpoint `steer`."""
    about = {"name": "glad", "pairs": ""}
    cards = [{"name": "glad", "strength": given.pop("strength", 1.5)}]
    made = {"prompt": "tell me", "raw": False, "edits": {"available": [about], "cards": cards}, "system": ""}
    made |= {"reward": "sentiment", "temperature": 0, "max_tokens": 8, "seed": 0}
    return list((made | given).values())


def test_steer_gives_what_the_action_gives(page: Any, client: Any) -> None:
    from steer.demo.actions import steer as action
    from steer.demo.recipes.steer import SteerRecipe

    tokens = client.predict(*_asked(), api_name="/steer")[0]
    recipe = SteerRecipe.parse(
        {"model": page.page.shared.text_model, "prompt": "tell me", "temperature": 0, "max_tokens": 8}
        | {"edits": [{"name": "glad", "strength": 1.5}]}
    )
    given = last(action.run(recipe, page.page.shared, page.page.visitors.get("endpoint")))
    assert tokens["whole"] == given["whole"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"strength": "NaN"}, "strength"),
        ({"strength": None}, "strength"),
        ({"edits": "nothing"}, "edits"),
        ({"edits": {"cards": [1]}}, "edits"),
        ({"prompt": None}, "prompt"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_arguments_are_one_line(client: Any, given: dict[str, Any], told: str) -> None:
    line = client.predict(*_asked(**given), api_name="/steer")[1]
    assert line["wrong"] and told in line["text"] and "Something went wrong" not in line["text"]


def test_a_vector_is_made(client: Any) -> None:
    sides = ["\n".join(f"the {one} is {how}" for one in ("dog", "cat", "house")) for how in ("good", "bad")]
    line, chart, card, *_ = client.predict(*sides, "by-wire", "mean", api_name="/make_vector")
    assert "by-wire is ready" in line["text"] and len(chart["accuracy"]) == 2 and card.startswith("vector for")


def test_a_search_is_run(page: Any, client: Any) -> None:
    from steer.demo.actions import search
    from steer.demo.recipes.search import SearchRecipe

    given = {"prompt": "tell me", "reward": "sentiment", "sampler": "fk", "budget": 64, "max_tokens": 16}
    given |= {"beta": 0.1, "temperature": 0.7, "seed": 0}
    line, best, curve, lineage, tree, table, *_ = client.predict(**given, api_name="/search")
    recipe = SearchRecipe.parse({"model": page.page.shared.text_model, **given})
    want = last(search.run(recipe, page.page.shared))
    assert line["text"] == "Done." and best == want["best"] and table["rows"] == want["rows"]
    assert curve["ghost"] == want["ghost"] and lineage == want["lineage"] and tree is None


def test_images_are_drawn(page: Any, client: Any) -> None:
    from steer.demo.actions import images
    from steer.demo.recipes.images import ImagesRecipe

    given = {"prompt": "boot", "reward": "class:boot", "methods": ["plain"], "particles": 2, "steps": 2}
    line, shown, *_ = client.predict(**given, beta=1.0, w=1.0, seed=0, api_name="/images")
    want = last(images.run(ImagesRecipe.parse({"model": page.page.shared.image_model, **given}), page.page.shared))
    assert line["text"].startswith("Done") and shown["methods"][0]["rewards"] == want["methods"][0]["rewards"]


def test_a_frontier_is_measured(client: Any) -> None:
    given = ["tell me\nthe dog", "sentiment", ["best-of-n"], "", "", "", 1, 2, 0.7, 0]
    assert client.predict(*given, api_name="/estimate")["text"].startswith("About")
    line, shown, *_ = client.predict(*given, api_name="/frontier")
    assert line["text"].startswith("Done") and len(shown["points"]) == 5


@pytest.mark.parametrize(
    ("endpoint", "given", "told"),
    [
        ("/search", ["tell me", "sentiment", "fk", 64, 16, "NaN", 0.7, 0], "beta"),
        ("/search", ["x" * 100_000, "sentiment", "fk", 64, 16, 0.1, 0.7, 0], "prompt"),
        ("/search", ["tell me", None, "fk", 64, 16, 0.1, 0.7, 0], "reward"),
        ("/images", ["", "class:bag", ["plain"], 2, 2, "NaN", 1.0, 0], "beta"),
        ("/images", ["", "class:bag", [], 2, 2, 1.0, 1.0, 0], "methods"),
        ("/frontier", ["a\nb", "sentiment", ["fk"], "../etc", "1", "", 1, 2, 0.7, 0], "edits"),
        ("/frontier", ["a\nb", "sentiment", ["fk"], "glad", "1, NaN", "", 1, 2, 0.7, 0], "strengths"),
        ("/frontier", ["", "sentiment", ["fk"], "", "", "", 1, 2, 0.7, 0], "prompts"),
    ],
)
def test_bad_arguments_of_other_tabs_are_one_line(client: Any, endpoint: str, given: list[Any], told: str) -> None:
    line = client.predict(*given, api_name=endpoint)[0]
    assert line["wrong"] and told in line["text"] and "Something went wrong" not in line["text"]
    assert len(line["text"]) < 600


def test_a_page_for_others_wants_a_key(tiny_lm_dir: Any) -> None:
    import httpx

    from steer.cli import main
    from steer.demo.actions.shared import Shared
    from steer.demo.app import launch

    assert main(["demo", "--host", "0.0.0.0", "--no-open"]) == 2
    launched = launch(Shared(str(tiny_lm_dir)), keys=("right",))
    try:
        url = launched.url.rstrip("/")
        assert httpx.get(f"{url}/config").status_code == 401
        assert httpx.post(f"{url}/login", data={"username": "x", "password": "wrong"}).status_code == 400
        assert httpx.post(f"{url}/login", data={"username": "x", "password": "right"}).status_code == 200
    finally:
        launched.close()


def test_without_a_key_only_this_machine_is_answered(page: Any) -> None:
    import httpx

    assert httpx.get(page.url).status_code == 200
    assert httpx.get(page.url, headers={"Host": "evil.example"}).status_code == 400
    for path in ("/etc/passwd", str(page.page.shared.artifacts / "glad.safetensors")):
        assert httpx.get(f"{page.url}gradio_api/file={path}").status_code in (403, 404)


@pytest.mark.parametrize("late", [1, 9])
def test_a_busy_machine_gets_several_turns(tiny_lm_dir: Any, monkeypatch: pytest.MonkeyPatch, late: int) -> None:
    import httpx
    from gradio import networking

    from steer.core import SteerError
    from steer.demo.actions.shared import Shared
    from steer.demo.app import launch

    answers = iter([False] * late + [True] * 4)
    monkeypatch.setattr(networking, "url_ok", lambda url: next(answers))
    if late > 3:
        with pytest.raises(SteerError, match="does not answer"):
            launch(Shared(str(tiny_lm_dir)))
        return
    launched = launch(Shared(str(tiny_lm_dir)))
    try:
        assert httpx.get(launched.url, timeout=60).status_code == 200
    finally:
        launched.close()
