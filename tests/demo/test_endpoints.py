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
    made = {"prompt": "tell me", "raw": False, "dose": {"available": [about], "cards": cards}, "system": ""}
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
        ({"dose": "nothing"}, "edits"),
        ({"dose": {"cards": [1]}}, "edits"),
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
