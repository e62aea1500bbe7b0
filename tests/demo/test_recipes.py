"""Reproduce: every form of a recipe, run by itself, gives the text on the page; addresses hold recipes."""

from __future__ import annotations

import json
import random
import shlex
import string
from pathlib import Path
from typing import Any

import pytest
from helpers import PAIRS, last, packed

from steer.core import InputError
from steer.demo.recipes import LIMIT_ADDRESS, decode, encode
from steer.demo.recipes.frontier import FrontierRecipe
from steer.demo.recipes.images import ImagesRecipe
from steer.demo.recipes.search import SearchRecipe
from steer.demo.recipes.steer import SteerRecipe
from steer.demo.recipes.vector import VectorRecipe


def _recipe(model: str, **given: Any) -> Any:
    edits = [{"name": "glad", "strength": 1.5, "scope": "all"}]
    return SteerRecipe.parse(
        {"model": model, "prompt": "tell me of the dog", "edits": edits, "system": "you are happy", "max_tokens": 12}
        | {"reward": "", "seed": 3}
        | given
    )


@pytest.mark.parametrize("raw", [False, True])
def test_all_forms_give_the_texts_on_the_page(
    page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raw: bool
) -> None:
    import yaml
    from fastapi.testclient import TestClient

    from steer.cli import main
    from steer.demo.actions import steer as action
    from steer.serving.app import AppSettings, create_app

    shared = page.page.shared
    recipe = _recipe(shared.text_model, raw=raw)
    shown = [facts["text"] for _, facts in last(action.run(recipe, shared, page.page.visitors.get("forms")))["done"]]
    assert len(set(shown)) == len(shown) == (2 if raw else 3)
    (tmp_path / "glad.safetensors").write_bytes((shared.artifacts / "glad.safetensors").read_bytes())
    monkeypatch.chdir(tmp_path)

    commands = []
    for line in recipe.commands().splitlines():
        capsys.readouterr()
        assert main([*shlex.split(line)[1:], "--json"]) == 0
        commands.append(json.loads(capsys.readouterr().out)["prompts"][0]["samples"][0]["text"])
    assert commands == shown

    capsys.readouterr()
    exec(compile(recipe.python(), "python", "exec"), {})
    printed = capsys.readouterr().out
    assert printed == "".join(text + "\n" for text in shown)

    Path("recipe.yaml").write_text(recipe.yaml(), encoding="utf-8")
    assert [step["command"] for step in yaml.safe_load(recipe.yaml())["steps"]] == ["generate"] * len(shown)
    assert main(["run", "recipe.yaml"]) == 0
    printed = capsys.readouterr().out
    assert all(text.strip() in printed for text in shown)

    body = json.loads(shlex.split(recipe.curl().partition("\n")[2])[-1])
    app = create_app(shared.engine(), AppSettings(artifacts=tmp_path))
    client = TestClient(app, base_url="http://127.0.0.1")  # outside its lifespan, at whose end the engine is closed
    answer = client.post(
        "/v1/completions" if raw else "/v1/chat/completions", json={**body, "model": shared.engine().name}
    )
    choice = answer.json()["choices"][0]
    assert (choice["text"] if raw else choice["message"]["content"]) == shown[1]


@pytest.mark.parametrize("sampler", ["best-of-n", "fk", "dts-star"])
def test_all_forms_of_a_search_give_the_text_on_the_page(
    page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sampler: str
) -> None:
    from fastapi.testclient import TestClient

    from steer.cli import main
    from steer.demo.actions import search
    from steer.serving.app import AppSettings, create_app

    shared = page.page.shared
    given = {
        "model": shared.text_model,
        "prompt": "tell me of the dog",
        "sampler": sampler,
        "seed": 3,
        "max_tokens": 20,
    }
    recipe = SearchRecipe.parse({**given, "budget": 160})
    shown = last(search.run(recipe, shared))["best"]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main([*shlex.split(recipe.commands())[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"][0]["samples"][0]["text"] == shown
    exec(compile(recipe.python(), "python", "exec"), {})
    assert capsys.readouterr().out == shown + "\n"
    Path("recipe.yaml").write_text(recipe.yaml(), encoding="utf-8")
    assert main(["run", "recipe.yaml"]) == 0
    assert shown.strip() in capsys.readouterr().out
    body = json.loads(shlex.split(recipe.curl().partition("\n")[2])[-1])
    client = TestClient(create_app(shared.engine(), AppSettings(artifacts=tmp_path)), base_url="http://127.0.0.1")
    answer = client.post("/v1/chat/completions", json={**body, "model": shared.engine().name})
    assert answer.json()["choices"][0]["message"]["content"] == shown


def test_all_forms_give_the_vector_on_the_page(page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from steer.artifacts import load
    from steer.cli import main
    from steer.demo.actions import vector

    shared, visitor = page.page.shared, page.page.visitors.get("vector-forms")
    sides = {side: [pair[side] for pair in PAIRS] for side in ("positive", "negative")}
    recipe = VectorRecipe.parse({"model": shared.text_model, "name": "cheer", "method": "pca", "seed": 2, **sides})
    last(vector.make(recipe, shared, visitor))
    want, _ = load(visitor.path("cheer"))
    monkeypatch.chdir(tmp_path)

    def made() -> None:
        found, _ = load("cheer.safetensors")
        assert found.keys() == want.keys()
        assert all(torch.allclose(found[name], want[name], atol=1e-5) for name in want)
        Path("cheer.safetensors").unlink()

    rows, _, line = recipe.commands().partition("\nPAIRS\n")
    Path(recipe.source).write_text(rows.partition("\n")[2] + "\n", encoding="utf-8")
    assert main(shlex.split(line)[1:]) == 0
    made()
    exec(compile(recipe.python(), "python", "exec"), {})
    made()
    Path("recipe.yaml").write_text(recipe.yaml(), encoding="utf-8")
    assert main(["run", "recipe.yaml"]) == 0
    made()
    assert recipe.curl().startswith("# A server has no route")


def test_a_text_that_looks_like_a_variable_survives(tmp_path: Path) -> None:
    from steer.cli.recipe import load_recipe

    recipe = _recipe("m", prompt="${recipes} and ${x} and $y", system="${out}")
    (tmp_path / "recipe.yaml").write_text(recipe.yaml(), encoding="utf-8")
    steps = load_recipe(tmp_path / "recipe.yaml").steps
    assert [step.options.prompt for step in steps] == [recipe.prompt] * 3
    words = [shlex.split(line) for line in recipe.commands().splitlines()]
    assert all(f"--prompt={recipe.prompt}" in line for line in words)


def test_presets_name_the_pairs_that_steer_ships(tmp_path: Path) -> None:
    from steer.cli.recipe import load_recipe

    edits = [{"name": "sentiment", "strength": 0.15, "pairs": "sentiment_pairs"}]
    steered = _recipe("m", edits=edits)
    measured = FrontierRecipe.parse({"model": "m", "prompts": ["a", "b"], "edits": edits})
    for recipe in (steered, measured):
        (tmp_path / "recipe.yaml").write_text(recipe.yaml(), encoding="utf-8")
        fit = load_recipe(tmp_path / "recipe.yaml").steps[0].options
        assert Path(str(fit.pairs)).is_file()
        assert '--pairs="$recipes/sentiment_pairs.jsonl"' in recipe.commands()
        assert "importlib.resources.files('steer.recipes') / 'sentiment_pairs.jsonl'" in recipe.python()


def test_an_address_holds_the_recipe() -> None:
    pairs = {"positive": ["a"], "negative": ["b"]}
    for recipe in (
        _recipe("m"),
        VectorRecipe.parse({"model": "m", "name": "x", **pairs}),
        SearchRecipe.parse({"model": "m", "prompt": "x", "sampler": "dts-star", "budget": 99, "temperature": 1.5}),
        ImagesRecipe.parse({"model": "m", "methods": ["rlg"], "w": -0.5}),
        FrontierRecipe.parse({"model": "m", "prompts": ["a", "b"], "strengths": [0.25]}),
    ):
        assert decode(encode(recipe)) == recipe
    with pytest.raises(InputError, match="address"):
        encode(_recipe("m", prompt="".join(random.Random(0).choices(string.printable, k=15_000))))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A",
        "AAAA",
        "%%%",
        "é" * 20,
        "A" * (LIMIT_ADDRESS + 1),
        packed([]),
        packed({"tab": "nope"}),
        packed("x" * 10**6),
    ],
)
def test_what_is_no_recipe_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="address"):
        decode(text)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 100_000}, "prompt"),
        ({"temperature": float("nan")}, "temperature"),
        ({"edits": [{"name": "a", "strength": float("nan")}]}, "edits.0.strength"),
        ({"edits": [{"name": "../a", "strength": 1.0}]}, "edits.0.name"),
        ({"edits": [{"name": "a", "strength": 1.0, "layers": "1; rm"}]}, "edits.0.layers"),
        ({"seed": -1}, "seed"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"other": 1}, "other"),
    ],
)
def test_bad_fields_are_named(given: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as error:
        _recipe("m", **given)
    assert error.value.field == field
