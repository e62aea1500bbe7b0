"""Policy optimisation of a masked diffusion language model: inpainting where every sample fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from steer.core import InputError

pytest.importorskip("trl")

from steer.adapters.transformers.policy import rows as by_rows
from steer.adapters.transformers.policy.masked import MaskedActor, train_masked_policy
from steer.adapters.transformers.policy.tuning import train_policy
from steer.train.objectives.collecting import Ask, Collector, Row
from steer.train.objectives.judging import Judge
from steer.train.objectives.settings import policy_settings

SOLUTION = "good good good good good good"
DATA = [{"prompt": "the", "solution": SOLUTION}, {"prompt": "a", "solution": SOLUTION}]


def right(texts: list[str]) -> list[float]:
    """Whether a text has five good words of six."""
    return [float(text.split().count("good") >= 5) for text in texts]


@pytest.fixture(scope="module")
def masked(tiny_bert_dir: Path) -> Any:
    from steer.adapters.transformers.masked import load

    return load(tiny_bert_dir, dtype="float32", device="cpu")


def settings(**more: Any) -> Any:
    given = {"max_new_tokens": 6, "group_size": 8, "batch_size": 2, "steps": 4, "learning_rate": 3e-3, **more}
    return policy_settings(method="inpaint", lora_rank=0, **given)


class Rewarded:
    """Rewards of tokens, in place of a model's."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, prompts: Any, tokens: Any) -> list[float]:
        return right([self.model.decode_text(row) for row in tokens])

    def objectives(self, prompts: Any, tokens: Any) -> list[list[float]]:
        raise NotImplementedError


def test_given_tokens_stand_and_log_probs_are_those_of_the_mean_field(masked: Any) -> None:
    actor = MaskedActor(masked, settings(), steps=4)
    ids = masked.encode(["the"], 6)[0]
    good = masked.tokenizer.convert_tokens_to_ids("good")
    (drawn,) = actor.draw([Ask(ids, 3, canvas=((1, good), (4, good)))], 0)
    assert len(drawn) == 3 and all(row[1] == row[4] == good and masked.mask_id not in row for row in drawn)
    assert actor.draw([Ask(ids, 3, canvas=((1, good), (4, good)))], 0) == [drawn]
    canvas = torch.full((1, 6), masked.mask_id)
    law = masked.predict(canvas, torch.zeros(1, dtype=torch.long), [ids])[0].log_softmax(-1)
    for who in ("policy", "base"):
        (found,) = actor.read([(ids, drawn[0])], who)
        assert found == pytest.approx([float(law[k, token]) for k, token in enumerate(drawn[0])], abs=1e-5)
    (entropy,) = actor.entropies([(ids, drawn[0])])
    assert entropy == pytest.approx([float(-(row.exp() * row).nan_to_num(0).sum()) for row in law], abs=1e-4)


def test_failed_groups_get_completions_around_parts_of_a_solution(masked: Any) -> None:
    tuning = settings(group_size=16)
    actor = MaskedActor(masked, tuning, steps=4)
    rows = [Row(ids, [], SOLUTION) for ids in masked.encode(["the", "a"], 6)]
    collector = Collector(actor, rows, tuning, Rewarded(masked))
    plain = collector._drawn([0, 1], 0, 0)
    assert not any(c.reward for cluster in plain for c in cluster.completions)
    clusters = collector.collect(0, True, None)
    filled = [c for cluster in clusters for c in cluster.completions if c.mask is not None]
    assert all(len(cluster.completions) == 16 for cluster in clusters)
    # Which of them come out right is chance; of those that do most given tokens are not learnt from.
    for c in filled:
        assert c.reward == 1 and not all(c.mask)
    judged = Judge(actor, rows, tuning, {})(clusters, 0, False)
    for cluster in judged:
        worth = [c.advantage[0] for c in cluster.completions]
        assert sum(worth) == pytest.approx(0, abs=1e-9)


def test_inpainting_learns_what_samples_never_find(masked: Any, tmp_path: Path) -> None:
    more: dict[str, Any] = {"method": "inpaint", "max_new_tokens": 6, "group_size": 16, "batch_size": 2, "steps": 60}
    out = train_masked_policy(
        masked, DATA, out=tmp_path / "p", reward=right, learning_rate=1e-2, steps_of_chain=6, **more
    )
    rewards = [row["reward"] for row in json.loads((out / "report.json").read_text())["rounds"]]
    assert rewards[-1] > rewards[0] + 0.3
    from steer.adapters.transformers.masked import load

    tuned = load(out)
    texts = tuned.generate(["the"], n=32, length=6, steps=6, seed=0).texts
    before = masked.generate(["the"], n=32, length=6, steps=6, seed=0).texts
    assert sum(right(texts)) > sum(right(before)) + 8


class Stopped(Exception):
    pass


def test_a_run_that_stopped_goes_on_to_the_same_weights(
    masked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {"method": "inpaint", "max_new_tokens": 6, "group_size": 4, "steps": 5, "steps_of_chain": 3}
    straight = train_masked_policy(masked, DATA, out=tmp_path / "a", reward=right, **more)

    @contextmanager
    def stopping(shown: bool, what: str, total: int) -> Iterator[Any]:
        done = 0

        def tick(count: int, seen: str = "", **figures: float) -> None:
            nonlocal done
            done += count
            if done >= 3:
                raise Stopped

        yield tick

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(by_rows, "ticking", stopping)
        train_masked_policy(masked, DATA, out=tmp_path / "b", reward=right, work=tmp_path / "work", **more)
    resumed = train_masked_policy(masked, DATA, out=tmp_path / "b", reward=right, work=tmp_path / "work", **more)
    a, b = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_does_not_fit_is_refused(masked: Any, tiny_lm: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^schedule: got 'inpaint'; allowed: another for a causal"):
        train_policy(tiny_lm, DATA, method="inpaint", out=tmp_path / "x", reward=right)
    for more, said in (
        ({"method": "hints"}, r"^schedule: got 'hints'; allowed: one of uniform"),
        ({"method": "dpo"}, r"^method: got 'dpo'; allowed: a policy gradient"),
        ({"method": "inpaint", "lora_rank": 4}, r"^lora_rank: got 4; allowed: 0"),
        ({"method": "inpaint", "data": ["the"]}, r"^data\[0\].solution: got None"),
    ):
        given: dict[str, Any] = {"data": DATA, **more}
        with pytest.raises(InputError, match=said):
            train_masked_policy(masked, given.pop("data"), out=tmp_path / "x", reward=right, **given)
    assert not any(tmp_path.iterdir())
