"""A sampler that is added at run time: one class and one line, and it is there wherever samplers are named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from steer import generate
from steer.cli import main
from steer.core import Ability, InputError, Run, Sampler, Samples, UnsupportedError, check_whole
from steer.measure.compare import Setting
from steer.measure.compare import methods_by_name as compared
from steer.measure.race import race
from steer.methods.best_of_n import best_of_n_law
from steer.methods.samplers import SAMPLERS, make_sampler, sampler_name
from steer.rewards import lift
from steer.serving.artifact_store import Store
from steer.serving.limits import Limits
from steer.serving.protocol import ChatRequest
from steer.serving.reward_store import Rewards
from steer.serving.tasks import Tasks
from steer.toy import GaussianProcess, markov_lm


@dataclass(frozen=True)
class WorstOf(Sampler):
    """For each of `n` outputs the worst of `tries`."""

    n: int = 1
    tries: int = 4

    title = "the worst of several"
    needs = frozenset({Ability.BRANCH})
    needs_reward = True
    population = "tries"

    def __post_init__(self) -> None:
        check_whole("tries", self.tries)

    @property
    def rows(self) -> int:
        return self.n * self.tries

    def draw(self, run: Run) -> Samples:
        process, generator = run.process, run.generator
        state = process.init(run.prompts, self.rows, generator)
        while not process.done(state):
            state = process.propose(state, generator)
            run.step(state)
        found = process.decode(state)
        found = replace(found, reward=run.score(found))
        worst = found.reward.reshape(-1, self.tries).argmin(1)
        return replace(found.select(torch.arange(len(worst)) * self.tries + worst), pool=found)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    SAMPLERS["worst-of"] = WorstOf
    yield
    del SAMPLERS["worst-of"]


SCORES = torch.randperm(27, generator=torch.Generator().manual_seed(0)).double()
PLACE = torch.tensor([9, 3, 1])
REWARD = lift(lambda outputs: SCORES[outputs @ PLACE])


def test_python_generates_with_it() -> None:
    samples = generate(markov_lm(), ["a", "b"], sampler="worst-of", reward=REWARD, n=2000, seed=0, max_rows=10**6)
    assert samples.group.tolist() == [0] * 2000 + [1] * 2000 and len(samples.pool) == 16_000
    law = best_of_n_law(markov_lm().law()[1], -SCORES, 4)
    seen = torch.bincount(samples.outputs @ PLACE, minlength=27).double() / 4000
    assert bool(((seen - law).abs() <= 5 * (law * (1 - law) / 4000).sqrt() + 1e-12).all())
    assert samples.cost.reward_calls == 16_000 and samples.cost.seconds > 0
    assert samples.pool.cost == samples.cost
    assert sampler_name(make_sampler("worst-of", 3, tries=2)) == "worst-of"
    with pytest.raises(InputError, match="reward: got None; allowed: a reward: worst-of"):
        generate(markov_lm(), "a", sampler="worst-of")
    with pytest.raises(InputError, match="reward: got None; allowed: a reward: the worst of several"):
        WorstOf().run(markov_lm(), [""], generator=torch.Generator())
    with pytest.raises(UnsupportedError, match="the worst of several needs a process that can branch"):
        WorstOf().run(GaussianProcess(eta=0.0), [""], generator=torch.Generator(), reward=REWARD)


def test_the_command_line_takes_it(capsys: pytest.CaptureFixture[str], tiny_lm_dir: Path) -> None:
    command = ["generate", "--model", str(tiny_lm_dir), "--prompt", "hello", "--sampler", "worst-of", "-n", "3"]
    assert main([*command, "--reward", "length", "--set", "tries=2", "--max-new-tokens", "4", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["prompts"]
    assert len(found["samples"]) == 3
    for wrong, field in ((["--set", "tries=0"], "tries"), (["--set", "trials=2"], "trials"), ([], "reward")):
        assert main([*command, *wrong, *(["--reward", "length"] if wrong else [])]) == 2
        assert field in capsys.readouterr().err
    assert (
        main(["generate", "--model", "fashion-ddpm", "--sampler", "worst-of", "--reward", "brightness", "--eta", "0"])
        == 2
    )
    assert "eta" in capsys.readouterr().err  # it needs copies that part ways
    assert (
        main(
            [
                "generate",
                "--model",
                "fashion-ddpm",
                "--sampler",
                "worst-of",
                "--reward",
                "brightness",
                "--tree",
                "tree.png",
            ]
        )
        == 2
    )
    assert "--sampler dts or dts-star" in capsys.readouterr().err


def test_the_server_takes_it(tmp_path: Path) -> None:
    tasks = Tasks(Store(tmp_path, lambda path: None), Rewards(), Limits())

    def asked(n: int = 1, **steer: object) -> ChatRequest:
        body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "n": n}
        return ChatRequest.model_validate({**body, "steer": {"sampler": "worst-of", "reward": "length", **steer}})

    steering = tasks.chat(asked(n=2, candidates=5)).steering
    assert steering.sampler == WorstOf(n=2, tries=5)
    assert steering.repeats == 1 and steering.candidates == 10
    assert tasks.chat(asked(budget=48)).steering.sampler == WorstOf(n=1, tries=6)
    with pytest.raises(InputError, match=r"steer\.reward"):
        tasks.chat(asked(reward=None))
    with pytest.raises(InputError, match=r"steer\.settings\.tries"):
        tasks.chat(asked(settings={"tries": 3}))


def test_it_can_be_raced_and_compared(tmp_path: Path) -> None:
    found = race(markov_lm(), ["a"], REWARD, [60], tmp_path, methods=["best-of-n", "worst-of"], seeds=3)
    best, worst = ({h.method: h for h in found.heats}[name] for name in ("best-of-n", "worst-of"))
    assert worst.mean < best.mean and worst.nfe == best.nfe == 60
    sampler, apart = compared()["worst-of"](Setting(outputs=10, particles=3, steps=5))
    assert sampler == WorstOf(n=10, tries=3) and not apart
