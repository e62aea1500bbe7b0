"""Training on several processes: torchrun with two gloo ranks gives what one process with twice the batch does."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_job import train, value_head
from ranks_tools import torchrun
from safetensors.torch import load_file

from steer.adapters.transformers.model import LanguageModel
from steer.cli import jobs
from steer.cli.recipe import load_recipe
from steer.cli.session import Session
from steer.core import InputError, Reward, Samples, SteerError
from steer.ranks import ALONE, Ranks, ranks
from steer.train import loop
from steer.train.value import ValueSettings, train_value

JOB = Path(__file__).with_name("ranks_job.py")


def test_two_ranks_are_one_process_with_twice_the_batch(
    tiny_lm_dir: Path, tiny_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Controller, value head, reward and diffusion policies; last batches of one row; a rank is killed on the way."""
    two = tmp_path / "two"
    two.mkdir()
    killed = torchrun([str(JOB), str(tiny_lm_dir), str(two), "2"], KILL="1")
    assert killed.returncode != 0 and (two / "value.work" / "state.safetensors").is_file()
    assert not (two / "result.safetensors").exists()
    again = torchrun([str(JOB), str(tiny_lm_dir), str(two), "2"])
    assert again.returncode == 0, again.stderr[-2000:]
    steps = [json.loads((two / f"rank-{i}.json").read_text())["steps"] for i in range(2)]
    # Of three epochs of three steps the first was over; the controller takes five steps an epoch.
    assert steps == [6 + 3 * 4] * 2

    one = tmp_path / "one"
    one.mkdir()
    train(tiny_lm_dir, one, 1)
    found, wanted = load_file(two / "result.safetensors"), load_file(one / "result.safetensors")
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        # Adam divides by gradients, so that rounding counts for more where they are next to nothing.
        scale = float(x.double().abs().max())
        assert torch.allclose(found[name].double(), x.double(), rtol=1e-4, atol=1e-4 * scale + 1e-9), name
    # One process reads what two have left, where nothing is left to do.
    steps = 0

    def counted(*given: Any) -> float:
        nonlocal steps
        steps += 1
        return plain(*given)

    plain = loop.descend
    monkeypatch.setattr(loop, "descend", counted)
    read = value_head(tiny_lm, two / "value.work", 1)
    assert steps == 0 and all(torch.equal(x, found[f"value.{name}"]) for name, x in read.items())


def test_a_command_that_ranks_do_not_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "ranks", lambda: Ranks(1, 2))
    assert jobs.check_ranks("train value").index == 1
    with pytest.raises(InputError, match="WORLD_SIZE: got 2; allowed: 1 for generate; more share batch, train"):
        jobs.check_ranks("generate")
    recipe = load_recipe("quickstart", [])
    shared = [step.command for step in recipe.steps if step.command in jobs.SHARED]
    assert len(shared) < len(recipe.steps)
    with pytest.raises(SteerError, match=r"recipe quickstart, step .*WORLD_SIZE: got 2"):
        jobs.run_recipe(recipe, Session(io.StringIO(), progress=False))


def test_one_process_is_alone() -> None:
    assert ranks() is ALONE and ALONE.first
    assert ALONE.mine([1, 2, 3]) == [1, 2, 3] and ALONE.total(1, 2.5) == [1, 2.5]
    assert Ranks(1, 2).mine([1, 2, 3, 4]) == [2, 4] and Ranks(0, 2).mine([1, 2, 3]) == [1, 3]
    settings = ValueSettings(batch_size=8)
    assert ALONE.whole(settings) is settings
    both = Ranks(0, 2).whole(settings)
    assert both.batch_size == 16 and both.epochs == settings.epochs and settings.batch_size == 8


# --------------------------------------------------------------------------------------------------------- rollouts


def words(texts: list[str]) -> list[float]:
    return [float(len(set(text.split()))) for text in texts]


class Told:
    """A model that draws the texts that it is told to."""

    def __init__(self, model: LanguageModel, texts: list[list[str]], prompts: list[str]) -> None:
        self.model, self.texts, self.prompts = model, texts, prompts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(self, prompts: list[str], *, n: int, reward: Any, **settings: Any) -> Samples:
        texts = [text for prompt in prompts for text in self.texts[self.prompts.index(prompt)]]
        ids = [[self.model.tokenizer.get_vocab()[word] for word in text.split()] + [3] for text in texts]
        group = torch.arange(len(prompts)).repeat_interleave(n)
        return Samples(list(prompts), texts, group, torch.zeros(len(group)), reward=reward(texts), tokens=ids)


def test_a_head_from_recorded_rollouts_is_that_of_the_rollouts(tiny_lm: LanguageModel) -> None:
    """The same texts, drawn by the model or read from records, train the same head."""
    prompts = [f"tell me how the {x} is" for x in ("sun", "rain", "day", "dog", "cat")]
    texts = [
        [f"{a} {b}" for b in ("good bad", "sad", "happy happy", "nice day")] for a in ("it", "we", "the", "I", "a")
    ]
    settings: dict[str, Any] = {"max_new_tokens": 6, "hidden": 8, "epochs": 2, "max_rows": 64}

    class Scores(Reward):
        def score(self, samples: Samples) -> torch.Tensor:
            return torch.tensor(words(samples.outputs))

        def __call__(self, given: Any) -> torch.Tensor:
            return torch.tensor(words(getattr(given, "outputs", given)), dtype=torch.float64)

    told: Any = Told(tiny_lm, texts, prompts)
    direct = train_value(told, prompts, Scores(), samples=4, **settings)
    records = [
        {
            "id": str(b),
            "prompt": prompt,
            "samples": [
                {"text": x, "finish_reason": "stop", "reward": y} for x, y in zip(row, words(row), strict=True)
            ],
        }
        for b, (prompt, row) in enumerate(zip(prompts, texts, strict=True))
    ]
    failed = {"id": "x", "samples": [], "error": {"message": "no", "param": None}}
    for reward in (None, Scores()):
        read = train_value(tiny_lm, [], reward, rollouts=[*records, failed], **settings)
        assert all(torch.equal(read.tensors[name], x) for name, x in direct.tensors.items())
    with pytest.raises(InputError, match=r"rollouts\[1\].samples: got 3; allowed: 4, as before"):
        train_value(tiny_lm, [], None, rollouts=[records[0], {**records[1], "samples": records[1]["samples"][:3]}])
    bare = [{**row, "samples": [{"text": s["text"]} for s in row["samples"]]} for row in records]
    with pytest.raises(InputError, match=r"rollouts\[0\].reward: got None"):
        train_value(tiny_lm, [], None, rollouts=bare, **settings)
    with pytest.raises(InputError, match=r"allowed: 1 to 2 \(max_new_tokens\)"):
        train_value(tiny_lm, [], words, rollouts=records, **{**settings, "max_new_tokens": 2})
    with pytest.raises(InputError, match="rollouts, which have their own"):
        train_value(tiny_lm, prompts, words, rollouts=records, **settings)
    with pytest.raises(InputError, match=r"rollouts\[0\].*records of steer batch"):
        train_value(tiny_lm, [], words, rollouts=[{"text": "x"}] * 3, **settings)
