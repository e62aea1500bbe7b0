"""The reward of a judge: what it is asked, how its replies are read, and a run that is driven by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from steer.core import InputError, Samples, SteerError
from steer.rewards import parse_reward
from steer.rewards.judged import JudgeReward


@dataclass
class Said:
    texts: list[str]


@dataclass
class Speaker:
    """Rates by the number of words in the answer, and says so in words of its own."""

    asked: list[str] = field(default_factory=list)
    form: str = "It has {n} words; I first thought Rating: 1. Rating: {n}"

    def generate(self, prompts: list[Any], **settings: Any) -> Said:
        assert settings["temperature"] == 0
        questions = [p[0]["content"] for p in prompts]
        self.asked += questions
        counts = [len(q.split("Answer: ")[1].split("\n")[0].split()) for q in questions]
        return Said([self.form.format(n=n) for n in counts])


def samples(*texts: str, prompt: Any = "say {output} twice") -> Samples:
    return Samples([prompt], list(texts), torch.zeros(len(texts), dtype=torch.long), torch.zeros(len(texts)))


def test_the_last_rating_counts_and_is_cut_to_the_scale() -> None:
    speaker = Speaker()
    judge = JudgeReward(model=speaker, low=2, high=4)
    assert judge(samples("a b c", "a", "a b c d e f")).tolist() == [3, 2, 4]
    assert "Request: say {output} twice" in speaker.asked[0], "braces of a prompt are text"
    assert "from 2 (worst) to 4 (best)" in speaker.asked[0]


def test_a_question_is_asked_once() -> None:
    speaker = Speaker()
    judge = JudgeReward(model=speaker)
    judge(samples("a b", "a b", "c"))
    judge(samples("a b"))
    assert len(speaker.asked) == 2


def test_rubrics(tmp_path: Path) -> None:
    speaker = Speaker()
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    JudgeReward("Is it polite?", speaker)(samples("yes", prompt=chat))
    question = speaker.asked[0]
    assert question.startswith("Is it polite?\n\nRequest: system: be brief\nuser: hello\n\nAnswer: yes\n\nEnd with")
    (tmp_path / "own.txt").write_text("{prompt}|Answer: {output}\n|{low}|{high}")
    own = parse_reward(f'judge:"{tmp_path / "own.txt"}",low=0,high=5').bind(speaker)
    assert own(samples("x y", prompt="p")).tolist() == [2.0] and speaker.asked[-1] == "p|Answer: x y\n|0|5"


def test_a_model_of_its_own_stays_and_none_takes_the_generating_one() -> None:
    first, second = Speaker(), Speaker()
    assert JudgeReward(model=first).bind(second).model is first
    assert JudgeReward().bind(second).model is second
    with pytest.raises(InputError, match="a model"):
        JudgeReward()(samples("a"))


def test_replies_without_a_rating() -> None:
    silent = JudgeReward(model=Speaker(form="I cannot say ({n})."))
    assert silent(samples("a")).tolist() == [1.0]
    with pytest.raises(SteerError, match='20 of 20 replies have no "Rating: NUMBER"'):
        silent(samples(*(f"text {i}" for i in range(19))))


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("judge:nowhere.txt", "judge rubric: got 'nowhere.txt'"),
        ("judge:low=x", "judge low: got 'x'; allowed: a number"),
        ("judge:low=5,high=2", "judge low: got 5.0; allowed: a number below high"),
        ("judge:modle=x", "judge"),
    ],
)
def test_what_does_not_fit(expression: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_reward(expression)


def test_strangers_may_not_name_a_judge() -> None:
    with pytest.raises(InputError):
        parse_reward("judge", trusted=False)


def test_best_of_n_by_a_judge(tiny_lm: Any) -> None:
    judge = JudgeReward(model=Speaker(), low=0, high=100)
    best = tiny_lm.generate("the sun", reward=judge - 0.0, sampler="best-of-n", n=6, max_new_tokens=8, seed=0)
    drawn = tiny_lm.generate("the sun", n=6, max_new_tokens=8, seed=0)
    assert float(best.reward[0]) == max(len(text.split("\n")[0].split()) for text in drawn.texts)


def test_a_policy_is_trained_by_a_judge_behind_an_endpoint(tiny_lm: Any, tiny_lm_dir: Path, tmp_path: Path) -> None:
    """Over HTTP, as `openai:` endpoints are: a served tiny model never rates: each reply counts as the least, and
    the run is refused once twenty are unread.
    """
    from serving_tools import serving_here

    from steer.adapters.transformers.policy.tuning import train_policy

    with serving_here(tiny_lm_dir, "--name", "tiny", "--max-tokens", 128) as server:
        judge = JudgeReward(model=f"openai:{server.url}/v1#tiny", max_new_tokens=8)
        settings = {"steps": 1, "batch_size": 2, "group_size": 2, "max_new_tokens": 4, "lora_rank": 2}
        out = tmp_path / "policy"
        with pytest.raises(SteerError, match="replies have no"):
            train_policy(tiny_lm, ["a", "b", "c", "d", "e"] * 4, method="dapo", out=out, reward=judge, **settings)
        assert not out.exists()
