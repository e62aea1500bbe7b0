"""Cards of edits in the tab Steer: what stands on them comes from the artifacts."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import last
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize(
    ("sweep", "zones"),
    [
        ([[0.0, 1.0, False], [0.5, 1.05, False], [1.0, 1.15, False], [2.0, 1.6, True]], [1.0, 2.0]),
        ([[-0.5, 1.0, False], [0.5, 1.3, False], [1.0, 1.4, False]], [0.0, 1.25]),
        ([[0.5, 1.0, False], [1.0, 1.1, False]], [1.0, 1.25]),
        ([["a", None, 0]], [0.2, 0.3]),
        (None, [0.2, 0.3]),
    ],
)
def test_zones_come_from_the_sweep_in_the_card(page: Any, sweep: Any, zones: list[float]) -> None:
    from steer.artifacts import load, save
    from steer.demo.actions.steer import available

    shared, visitor = page.page.shared, page.page.visitors.get("zones")
    tensors, card = load(shared.artifacts / "glad.safetensors")
    metrics = {**card.metrics, **({} if sweep is None else {"sweep": sweep})}
    save(visitor.path("swept"), tensors, replace(card, metrics=metrics))
    about = next(a for a in available(shared, visitor) if a["name"] == "swept")
    assert about["zones"] == zones and about["limit"] >= zones[1]
    page.page.visitors.leave("zones")


def test_a_value_head_is_a_card(page: Any) -> None:
    """A value head changes the odds of the steered column, and the KL of every token says by how much."""
    import steer
    from steer.demo.actions import steer as action
    from steer.demo.recipes.steer import SteerRecipe

    shared, visitor = page.page.shared, page.page.visitors.get("value")
    model = steer.load(shared.text_model, dtype="float32", device="cpu")
    prompts = ["tell me about the dog", "tell me about the house"]
    steer.train_value(model, prompts, "sentiment", max_new_tokens=8, hidden=16, epochs=1).save(visitor.path("head"))
    about = next(a for a in action.available(shared, visitor) if a["name"] == "head")
    assert about["kind"] == "value"
    recipe = SteerRecipe.parse(
        {"model": shared.text_model, "prompt": prompts[0], "max_tokens": 8}
        | {"edits": [{"name": "head", "strength": 2.0}]}
    )
    plain, steered = (facts for _, facts in last(action.run(recipe, shared, visitor))["done"])
    assert plain["kl"] == 0 and steered["kl"] > 0
    page.page.visitors.leave("value")


@pytest.fixture
def policy(page: Any) -> Any:
    """The folder of a policy: the page's model with other weights."""
    import torch

    import steer

    shared = page.page.shared
    model = steer.load(shared.text_model, dtype="float32", device="cpu")
    folder = shared.artifacts / "tuned"
    shutil.copytree(shared.text_model, folder)
    network = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in network.lm_head.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    network.save_pretrained(folder)
    card = {"kind": "policy", "model": {"name": "tiny", "fingerprint": model.info.fingerprint}, "format": 1}
    (folder / "steer.json").write_text(json.dumps(card))
    yield folder
    shutil.rmtree(folder)


def test_a_policy_is_a_card(
    page: Any, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """RL guidance: w = 0 is the model; at w = 1 every law is the policy's; the forms give the text on the page."""
    import torch

    from steer.cli import main
    from steer.demo.actions import steer as action
    from steer.demo.recipes.steer import SteerRecipe

    shared, visitor = page.page.shared, page.page.visitors.get("policy")
    about = next(a for a in action.available(shared, visitor) if a["name"] == "tuned")
    assert about["kind"] == "policy"

    def recipe(w: float) -> Any:
        return SteerRecipe.parse(
            {"model": shared.text_model, "prompt": "tell me about the dog", "max_tokens": 10, "system": "you are happy"}
            | {"edits": [{"name": "tuned", "strength": w, "policy": True}], "seed": 4, "temperature": 1.0}
        )

    still = last(action.run(recipe(0.0), shared, visitor))
    assert still["whole"][1] and all(token["k"] == 0 for token in still["whole"][1])
    given = last(action.run(recipe(1.0), shared, visitor))
    assert [facts["kl"] > 0 for _, facts in given["done"]] == [False, True, True]
    start = shared.engine().model.encode([{"role": "user", "content": "tell me about the dog"}])
    ids = torch.tensor([[*start, *(token["i"] for token in given["whole"][1])]])
    for folder, side in ((policy, "a"), (shared.text_model, "b")):
        network = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            odds = torch.softmax(network(ids).logits[0, len(start) - 1 : -1].double(), -1)
        for t, token in enumerate(given["whole"][1]):
            assert [p for _, _, p in token[side]] == pytest.approx(odds[t].topk(5).values.tolist(), abs=1e-4)

    monkeypatch.chdir(tmp_path)
    shutil.copytree(policy, "tuned")
    shown = [facts["text"] for _, facts in last(action.run(recipe(1.5), shared, visitor))["done"]]
    texts = []
    for line in recipe(1.5).commands().splitlines():
        capsys.readouterr()
        assert main([*shlex.split(line)[1:], "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out)["prompts"][0]["samples"][0]["text"])
    assert texts == shown
    exec(compile(recipe(1.5).python(), "python", "exec"), {})
    assert capsys.readouterr().out == "".join(text + "\n" for text in shown)
    page.page.visitors.leave("policy")


def test_a_policy_goes_alone(page: Any, policy: Path) -> None:
    from steer.core import InputError
    from steer.demo.actions import steer as action
    from steer.demo.recipes.steer import SteerRecipe

    edits = [{"name": "tuned", "strength": 1.0, "policy": True}, {"name": "glad", "strength": 1.0}]
    recipe = {"model": page.page.shared.text_model, "prompt": "tell me", "max_tokens": 4}
    for given in ({"edits": edits}, {"edits": edits[:1], "temperature": 0}, {"edits": edits[:1], "script": [5]}):
        with pytest.raises(InputError):
            last(action.run(SteerRecipe.parse(recipe | given), page.page.shared, page.page.visitors.get("policy")))
