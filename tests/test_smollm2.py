"""The embedded model, where it has been fetched: the main job, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from steer.cli import main
from steer.embedded import find

RECIPES = Path(__file__).parent.parent / "recipes"
pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(
        not find("smollm2-135m").fetched,
        reason="smollm2-135m is not in the cache: run `steer models fetch smollm2-135m`",
    ),
]


@pytest.fixture(scope="module")
def model() -> Any:
    from steer.loading import load

    return load("smollm2-135m")


@pytest.fixture(scope="module")
def vector(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    from steer import artifacts
    from steer.train.vector import train_vector

    pairs = [json.loads(line) for line in (RECIPES / "sentiment_pairs.jsonl").read_text().splitlines()][:40]
    path = tmp_path_factory.mktemp("vector") / "sentiment.safetensors"
    artifacts.save(path, *train_vector(model, pairs))
    return path


def test_the_command_line_steers_and_repeats(vector: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*args: str) -> dict[str, Any]:
        assert main([*args, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    plain = [
        "generate",
        "--model",
        "smollm2-135m",
        "--prompt",
        "My day at the lake",
        "--seed",
        "0",
        "--max-new-tokens",
        "24",
    ]
    steered = [*plain, "--edit", f"{vector}:-0.2", "--reward", "sentiment"]
    first, second, unsteered = command(*steered), command(*steered), command(*plain)
    for result in (first, second):
        result["cost"].pop("seconds")
    assert first == second
    ours, theirs = first["prompts"][0]["samples"][0], unsteered["prompts"][0]["samples"][0]
    assert ours["text"] != theirs["text"] and ours["kl"] > 1 and theirs["kl"] == 0


def test_sentiment_moves_both_ways(vector: Path, model: Any) -> None:
    from steer.edits import load_edit

    prompts = json.loads((RECIPES / "neutral_prompts.json").read_text())[:12]
    settings = {"reward": "sentiment", "temperature": 0.7, "max_new_tokens": 24, "seed": 0}
    mean = {
        s: float(model.generate(prompts, edits=load_edit(vector, s), **settings).reward.mean()) for s in (-0.3, 0.3)
    }
    plain = float(model.generate(prompts, **settings).reward.mean())
    assert mean[-0.3] < plain - 0.3 and mean[0.3] > plain + 0.1


def test_batches_share_prefill_and_equal_single_runs(model: Any) -> None:
    prompts = ["What is the capital of France?", "Name a colour.", "Write one word that rhymes with cat, then stop."]
    together = model.generate(prompts, temperature=0, max_new_tokens=12)
    assert together.tokens == [model.generate(p, temperature=0, max_new_tokens=12).tokens[0] for p in prompts]
    many = model.generate(prompts[0], n=4, max_new_tokens=4, seed=0)
    assert many.cost.prompt_tokens == len(model.encode(prompts[0]))
    again = model.generate(prompts[0], n=4, max_new_tokens=4, seed=0)
    assert many.tokens == again.tokens and torch.equal(many.log_prob, again.log_prob)
