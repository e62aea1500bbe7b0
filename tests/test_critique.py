"""Critics, the critique loop and its laws: enumeration and closed forms, bad input, every engine's way in."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steer import generate
from steer.cli import main
from steer.core import InputError, Prompt, PromptEdit, RawText, RewardError, Samples, UnsupportedError
from steer.critique import (
    FunctionCritic,
    ModelCritic,
    Pairwise,
    Panel,
    StepCritic,
    Verdicts,
    critique_accepted,
    critique_accuracy,
    critique_drafts,
    critique_limit,
    friction_law,
    gate_law,
    majority,
    parse_critic,
    redraw_law,
    rounds_of,
    select_accuracy,
    step_accuracy,
    threshold,
)
from steer.measure.friction import friction_table, plateau
from steer.methods.best_of_n import BestOfN
from steer.methods.critique import Critique
from steer.methods.prompt import DirectionalStimulus
from steer.methods.samplers import make_sampler
from steer.rewards import lift
from steer.toy import GaussianProcess, markov_lm
from steer.toy.prompted import PromptTable, refining

PLACE = torch.tensor([9, 3, 1])


def twos(sequences: Tensor) -> Tensor:
    return (sequences == 2).sum(-1).double()


def good(prompt: Any, output: Tensor) -> bool:
    return bool(twos(output) >= 2)


def noisy(right: Callable[[Any], bool], a: float, f: float, seed: int = 0) -> FunctionCritic:
    """A critic that accepts what is right with probability `a` and all else with `f`."""
    rng = random.Random(seed)
    return FunctionCritic(lambda prompt, output: rng.random() < (a if right(output) else f), "noisy")


def run(process: Any, sampler: Critique, prompts: Any = ("a",), seed: int = 0, **more: Any) -> Samples:
    return generate(process, list(prompts), sampler=sampler, seed=seed, max_rows=10**7, **more)


def near(found: Tensor | float, want: float, error: float) -> None:
    assert abs(float(found) - want) <= 5 * error + 1e-12, (float(found), want, error)


# ------------------------------------------------------------------------------- redraws, on the enumerated chain


def chain_law(a: float, f: float, draws: int) -> tuple[Tensor, Tensor, float, float]:
    sequences, log_prob = markov_lm().law()
    accept = f + (a - f) * (twos(sequences) >= 2).double()
    return twos(sequences), *redraw_law(log_prob, accept, draws)


def test_the_law_of_redraws_with_a_perfect_critic() -> None:
    r1, law, accepted, drafts = chain_law(1.0, 0.0, 3)
    assert accepted == pytest.approx(0.578125, abs=1e-12) and drafts == pytest.approx(2.3125, abs=1e-12)
    assert float((law * r1).sum()) == pytest.approx(1.4853515625, abs=1e-12)
    p = markov_lm().law()[1].exp()
    is_good = r1 >= 2
    assert float(p[is_good].sum()) == pytest.approx(0.25)
    mixture = torch.where(is_good, 0.578125 * p / 0.25, 0.421875 * p / 0.75)
    assert torch.allclose(law, mixture, rtol=0, atol=1e-14)


def test_the_law_of_redraws_with_a_noisy_critic() -> None:
    r1, law, accepted, drafts = chain_law(0.9, 0.2, 3)
    assert accepted == pytest.approx(0.755859375, abs=1e-12) and drafts == pytest.approx(2.015625, abs=1e-12)
    assert float((law * r1).sum()) == pytest.approx(1.277197265625, abs=1e-12)
    assert chain_law(0.9, 0.2, 1)[2] == pytest.approx(0.375)


@pytest.mark.parametrize(("a", "f", "mean"), [(1.0, 0.0, 1.4853515625), (0.9, 0.2, 1.277197265625)])
def test_redraws_follow_their_law(a: float, f: float, mean: float) -> None:
    n = 3000
    critic = noisy(lambda y: good(None, y), a, f)
    samples = run(markov_lm(), Critique(critic, n=n, revise=False))
    _, law, accepted, drafts = chain_law(a, f, 3)
    seen = torch.bincount(samples.outputs @ PLACE, minlength=27).double() / n
    assert bool(((seen - law).abs() <= 5 * (law * (1 - law) / n).sqrt() + 1e-12).all())
    near(twos(samples.outputs).mean(), mean, 1.0 / n**0.5)
    near(samples.trace[-1].accepted / n, accepted, (accepted * (1 - accepted) / n) ** 0.5)
    near(len(samples.pool) / n, drafts, 0.9 / n**0.5)
    assert samples.cost.critic_calls == len(samples.pool) == sum(r.drawn for r in samples.trace)
    # The KL that is told is an upper bound of the exact one.
    base = markov_lm().law()[1]
    exact = float(torch.where(law > 0, law * (law.log() - base), 0.0).sum())
    assert samples.kl_kind == "bound" and exact <= float(samples.kl.mean()) == pytest.approx(math.log(3) - 2 / 3)


@pytest.mark.parametrize("redraw", [False, True])
def test_choosing_among_drafts_is_redrawing(redraw: bool) -> None:
    """Both against the enumeration: drafts are exchangeable."""
    n, critic = 3000, noisy(lambda y: good(None, y), 0.9, 0.2, seed=3)
    how = {"rounds": 2} if redraw else {"drafts": 3, "rounds": 0, "keep": "accepted", "otherwise": "random"}
    samples = run(markov_lm(), Critique(critic, n=n, revise=False, **how))
    _, law, _, _ = chain_law(0.9, 0.2, 3)
    seen = torch.bincount(samples.outputs @ PLACE, minlength=27).double() / n
    assert bool(((seen - law).abs() <= 5 * (law * (1 - law) / n).sqrt() + 1e-12).all())


def test_the_accepted_are_the_tilt_by_acceptance() -> None:
    samples = run(markov_lm(), Critique(good, n=2000, revise=False, keep="accepted"))
    rows = twos(samples.outputs) >= 2
    p = torch.where(chain_law(1, 0, 1)[0] >= 2, markov_lm().law()[1].exp() / 0.25, 0.0)
    count = int(rows.sum())
    seen = torch.bincount(samples.outputs[rows] @ PLACE, minlength=27).double() / count
    assert bool(((seen - p).abs() <= 5 * (p * (1 - p) / count).sqrt() + 1e-12).all())


def test_edits_and_lineage_follow_the_rows() -> None:
    samples = run(markov_lm(), Critique(good, n=2, revise=False), prompts=["a", "b"], reward=lift(twos))
    pool = samples.pool
    assert samples.group.tolist() == [0, 0, 1, 1] and torch.equal(pool.outputs[samples.lineage], samples.outputs)
    for i, parent in enumerate(pool.lineage.tolist()):
        assert parent == -1 or (parent < i and pool.group[parent] == pool.group[i])
    assert torch.equal(samples.reward, twos(samples.outputs).double())
    apart = generate(
        markov_lm(), ["a", "b"], sampler=Critique(good, n=2, revise=False), reward=lift(twos), seed=0, max_rows=2
    )
    assert sorted(set(apart.pool.lineage.tolist()) & {-1}) == [-1] and len(rounds_of(apart.trace)) <= 3
    assert rounds_of(apart.trace)[0].outputs == 4


# ------------------------------------------------------------------------------- revisions, as a chain of two states

ROWS = [
    (
        (0.5, 0.9, 0.2, 0.6, 0.95),
        (0.5, 0.7375, 0.814063, 0.839186, 0.850202),
        (0.85155, 0.84125, 0.982333),
        0.842496,
        1.662031,
    ),
    (
        (0.5, 0.9, 0.2, 0.5, 0.5),
        (0.5, 0.675, 0.75375, 0.789188, 0.81231),
        (0.818182, 0.7975, 0.958994),
        0.818182,
        1.743625,
    ),
    (
        (0.7, 0.6, 0.3, 0.3, 0.5),
        (0.7, 0.623, 0.64267, 0.660554, 0.678546),
        (0.688525, 0.7179, 0.900423),
        0.754701,
        1.939309,
    ),
    ((0.4, 1.0, 0.0, 0.25, 1.0), (0.4, 0.55, 0.6625, 0.746875, 0.857617), (1.0, 0.55, 0.746875), 1.0, 2.3875),
]
"""Rates; accuracies after 0, 1, 2, 3, 5 rounds; limit and P(accepted) after 1 and 3; accuracy given that; drafts."""


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row[0]))
def test_the_chain_of_revisions(row: Any) -> None:
    rates, accuracy, (limit, accepted1, accepted3), given1, drafts3 = row
    found = [critique_accuracy(*rates, rounds) for rounds in (0, 1, 2, 3, 5)]
    assert found == pytest.approx(accuracy, abs=6e-7)
    assert critique_limit(*rates) == pytest.approx(limit, abs=6e-7)
    assert critique_accepted(*rates, 1) == pytest.approx((accepted1, given1), abs=6e-7)
    assert critique_accepted(*rates, 3)[0] == pytest.approx(accepted3, abs=6e-7)
    assert critique_drafts(*rates, 3) == pytest.approx(drafts3, abs=6e-7)
    p0, a, f, r, k = rates
    helps = (1 - p0) * (1 - f) * r > p0 * (1 - a) * (1 - k)
    assert (found[1] > found[0]) == helps


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row[0]))
def test_the_sampler_revises_as_the_chain_does(row: Any) -> None:
    (p0, a, f, r, k), n = row[0], 1500
    critic = noisy(lambda y: y == "right", a, f, seed=1)
    reward = lift(lambda texts: [float(t == "right") for t in texts])
    samples = run(refining(p0, r, k), Critique(critic, n=n, rounds=3), reward=reward)
    accuracies = [entry.accuracy for entry in samples.trace]
    for j, entry in enumerate(samples.trace):
        want = critique_accuracy(p0, a, f, r, k, j)
        near(accuracies[j], want, (want * (1 - want) / n) ** 0.5)
        ever = critique_accepted(p0, a, f, r, k, j)[0]
        near(entry.accepted / n, ever, (ever * (1 - ever) / n) ** 0.5)
        assert sum(entry.moves) == (entry.drawn if j else 0)
    assert float(samples.reward.mean()) == accuracies[-1]
    near(len(samples.pool) / n, critique_drafts(p0, a, f, r, k, 3), 1.2 / n**0.5)
    assert samples.kl is None and samples.log_prob is None and samples.kl_kind.startswith("none: revisions")


def test_selection_and_votes() -> None:
    assert [select_accuracy(0.5, 0.9, 0.2, n) for n in (1, 2, 4, 8)] == pytest.approx(
        [0.5, 0.675, 0.789188, 0.816993], abs=6e-7
    )
    assert select_accuracy(0.5, 0.9, 0.2, 400) == pytest.approx(0.818182, abs=6e-7)
    three, five = [(majority(0.9, v), majority(0.2, v)) for v in (3, 5)]
    assert three == pytest.approx((0.972, 0.104)) and five == pytest.approx((0.99144, 0.05792))
    assert [critique_accuracy(0.5, *v, 0.6, 0.95, 3) for v in (three, five)] == pytest.approx(
        [0.899148, 0.929112], abs=6e-7
    )
    assert [select_accuracy(0.5, *v, 4) for v in (three, five)] == pytest.approx([0.863571, 0.897038], abs=6e-7)


@pytest.mark.parametrize(("votes", "want"), [(1, 0.789188), (3, 0.863571)])
def test_selection_by_votes_is_drawn_so(votes: int, want: float) -> None:
    n, critic = 2000, noisy(lambda y: y == "right", 0.9, 0.2, seed=2)
    how = Critique(critic, n=n, drafts=4, rounds=0, keep="accepted", otherwise="random", votes=votes)
    samples = run(refining(0.5, 0.5, 0.5), how)
    found = sum(text == "right" for text in samples.texts) / n
    near(found, want, (want * (1 - want) / n) ** 0.5)
    assert samples.cost.critic_calls == 4 * n * votes


@pytest.mark.parametrize(
    ("redraws", "want"),
    [(0, (0.57, 0.04, 0.39)), (1, (0.7923, 0.0556, 0.1521)), (3, (0.912809, 0.064057, 0.023134))],
)
def test_a_gate_before_an_action(redraws: int, want: tuple[float, float, float]) -> None:
    assert gate_law(0.6, 0.95, 0.1, redraws) == pytest.approx(want, abs=6e-7)
    n, critic = 2000, noisy(lambda y: y == "right", 0.95, 0.1, seed=4)
    gate = Critique(critic, n=n, rounds=redraws, revise=False, keep="accepted", otherwise="abstain")
    texts = run(refining(0.6, 0, 0), gate).texts
    for word, share in zip(("right", "wrong", ""), want, strict=True):
        near(texts.count(word) / n, share, (share * (1 - share) / n) ** 0.5)
    assert (1 - gate_law(0.6, 0.95, 0.1, 1)[1]) ** 10 == pytest.approx(0.564365, abs=1e-6)
    assert pytest.approx(0.006047, abs=1e-6) == 0.6**10
    instead = run(refining(0.6, 0, 0), Critique(lambda p, y: False, rounds=1, revise=False, otherwise="text:wait"))
    assert instead.texts == ["wait"] and instead.lineage.tolist() == [-1]


def test_friction_of_two_kinds_of_items() -> None:
    want = [0.4, 0.61, 0.715, 0.7675, 0.79375, 0.806875]
    assert friction_law(0.4, 0.3, 0.5, 5) == pytest.approx(want, abs=1e-12)
    assert friction_law(0.4, 0.3, 0.5, 200)[-1] == pytest.approx(0.82, abs=1e-12)

    def law(prompt: Prompt) -> tuple[float, float]:
        said = [m for m in prompt if m["role"] == "assistant"] if not isinstance(prompt, str) else []
        text = prompt if isinstance(prompt, str) else prompt[0]["content"]
        if not said:
            return (0.4, 0.6)
        return (0.0, 1.0) if text == "stuck" else (0.5, 0.5)

    n = 800
    prompts = ["stuck", "free"]
    truth = lift(lambda texts: [float(t == "right") for t in texts])
    how = make_sampler("critique", n, preset="feedback-friction", critic=threshold(truth, 1.0))
    assert (how.rounds, how.history) == (10, "all")
    found = run(PromptTable(law), how, prompts=prompts, reward=truth)
    stuck, free = (
        [float(found.pool.reward[(found.pool.group == b)].max()) for b in range(2)],
        rounds_of(found.trace),
    )
    assert stuck == [1.0, 1.0]
    # Half of the wrong items are never put right: phi goes to 1/2, accuracy to .4 + .6 / 2.
    near(free[-1].friction, 0.5, (0.25 / (0.6 * 2 * n)) ** 0.5)
    for j, entry in enumerate(free):
        accuracy = friction_law(0.4, 0.5, 0.5, j)[j]
        near(entry.accuracy, accuracy, (accuracy * (1 - accuracy) / (2 * n)) ** 0.5)
    assert plateau(free) and not plateau(free[:3])
    table = friction_table(found.trace)
    assert table.splitlines()[0].split() == [
        "round",
        "drafts",
        "accepted",
        "accuracy",
        "friction",
        "repeated",
        "unparsed",
        "score",
    ]
    assert "accuracy rests" in table


# -------------------------------------------------------------------------------------------------------- conversations


def heard(prompts: list[Any]) -> PromptTable:
    """A solver that is always wrong, and what it was asked."""

    def law(prompt: Prompt) -> tuple[float, float]:
        prompts.append(prompt)
        return 0.0, 1.0

    return PromptTable(law)


def test_what_a_revision_is_asked() -> None:
    asked: list[Any] = []
    critic = FunctionCritic(lambda p, y: (False, f"{y} is not it"))
    run(heard(asked), Critique(critic, rounds=2, history="all", feedback="tried", template="No. {critique}"), ["Why?"])
    listed = "No. wrong is not it\nThese were tried before:\n- wrong"
    turn = [{"role": "assistant", "content": "wrong"}, {"role": "user", "content": listed}]
    assert asked == [
        "Why?",
        [{"role": "user", "content": "Why?"}, *turn],
        [{"role": "user", "content": "Why?"}, *turn * 2],
    ]
    for feedback, said in (
        ("none", "No."),
        ("binary", "No. Not accepted, try again."),
        ("text", "No. wrong is not it"),
    ):
        asked.clear()
        run(heard(asked), Critique(critic, rounds=2, feedback=feedback, template="No. {critique}"), ["Why?"])
        assert [len(p) for p in asked[1:]] == [3, 3] and asked[-1][-1]["content"] == said


class Marked(PromptEdit):
    """Adds a mark to the first user message."""

    def rewrite(self, prompt: Prompt) -> Prompt:
        if isinstance(prompt, str):
            return prompt + "!"
        return [{**prompt[0], "content": prompt[0]["content"] + "!"}, *prompt[1:]]


@pytest.mark.parametrize("marked", [0, 1])
@pytest.mark.parametrize("revise", [True, False])
def test_an_edit_stays_with_its_prompt(marked: int, revise: bool) -> None:
    """The edit is on one of two prompts and the other is drawn again, and the other way round."""
    for again in (0, 1):
        asked: list[Any] = []
        critic = FunctionCritic(lambda p, y, again=again: p != f"p{again}")
        process = heard(asked).edited(Marked(), prompts=[marked])
        run(process, Critique(critic, rounds=1, revise=revise), prompts=["p0", "p1"])
        firsts = [p if isinstance(p, str) else p[0]["content"] for p in asked]
        want = [f"p{b}" + "!" * (b == marked) for b in (0, 1, again)]
        assert firsts == want


def test_a_stimulus_fills_the_request_once() -> None:
    asked: list[Any] = []
    hint = DirectionalStimulus({"Why?": "because"})
    run(heard(asked).edited(hint), Critique(lambda p, y: False, rounds=1), ["Why?"])
    assert asked[-1][0]["content"] == asked[0] == "Why?\n\nHint: because"
    assert "Hint" not in asked[-1][-1]["content"]


def test_repeats_are_drawn_again_and_counted() -> None:
    words = PromptTable(lambda prompt: (0.9, 0.1), words=("a", "b"))
    allowed, rejected = (
        run(words, Critique(lambda p, y: False, n=400, rounds=1, revise=False, repeats=how)).trace[1]
        for how in ("allow", "reject")
    )
    # A second draft equals the first with probability .82; three more draws leave .9 .9^4 + .1 .1^4 of them.
    near(allowed.repeated / 400, 0.82, (0.82 * 0.18 / 400) ** 0.5)
    left = 0.9**5 + 0.1**5
    near(rejected.repeated / 400, left, (left * (1 - left) / 400) ** 0.5)


def test_heat_warms_later_rounds() -> None:
    cold = PromptTable(lambda prompt: (0.99, 0.01))
    samples = run(cold, Critique(lambda p, y: False, n=2000, rounds=1, revise=False, heat=0.5))
    second = samples.pool.outputs[2000:]
    warm = 0.01 ** (1 / 1.5) / (0.01 ** (1 / 1.5) + 0.99 ** (1 / 1.5))
    near(second.count("wrong") / 2000, warm, (warm * (1 - warm) / 2000) ** 0.5)
    assert samples.kl is None


def test_keep_best_vote_and_tournament() -> None:
    words = PromptTable(lambda prompt: (0.5, 0.3, 0.2), words=("a", "b", "c"))
    scored = FunctionCritic(lambda p, y: (False, {"a": 0.1, "b": 0.2, "c": 0.3}[y], ""))
    best = run(words, Critique(scored, n=300, drafts=6, rounds=0, keep="best"))
    near(best.texts.count("c") / 300, 1 - 0.8**6, (0.2 / 300) ** 0.5)
    vote = run(words, Critique(lambda p, y: y != "a", n=300, drafts=9, rounds=0, keep="vote"))
    assert vote.texts.count("b") > vote.texts.count("c") and vote.texts.count("a") <= 3
    better = Pairwise(prefer=lambda prompt, x, y: x <= y)
    won = run(words, Critique(better, n=100, drafts=5, rounds=0, keep="tournament"))
    for i, text in enumerate(won.texts):
        mine = won.pool.outputs[5 * i : 5 * i + 5]
        assert text == min(mine) and won.pool.outputs[int(won.lineage[i])] == text
    assert won.cost.critic_calls == 500 + 400


def test_an_inner_sampler_draws_the_drafts() -> None:
    samples = run(
        markov_lm(), Critique(good, n=50, rounds=1, revise=False, inner=BestOfN(4)), reward=lift(twos), seed=1
    )
    assert len(samples) == 50 and float(twos(samples.outputs).mean()) > 1.7 and samples.kl is None


# -------------------------------------------------------------------------------------------------------------- critics


class Replies:
    """A model that says the same of everything, by turns."""

    name = "replies"

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = list(texts), []

    def generate(self, prompts: list[Any], n: int, **settings: Any) -> Samples:
        self.asked += prompts
        count = len(prompts) * n
        texts = [self.texts[i % len(self.texts)] for i in range(count)]
        group = torch.arange(len(prompts)).repeat_interleave(n)
        return Samples(prompts, texts, group, torch.zeros(count, dtype=torch.float64))


def drafts(*texts: str, prompt: Any = "Add 2 and 2.") -> Samples:
    return Samples([prompt], list(texts), torch.zeros(len(texts), dtype=torch.long), torch.zeros(len(texts)))


def test_a_model_as_critic() -> None:
    model = Replies("It says {output}. First correct, then Incorrect.", "fine: correct", "no verdict")
    found = ModelCritic(model)(drafts("4", "5 {prompt}", "6"))
    assert found.accept.tolist() == [False, True, False] and found.unparsed.tolist() == [False, False, True]
    assert "Answer: 5 {prompt}" in model.asked[1][0]["content"] and found.cost.critic_calls == 3
    voted = ModelCritic(Replies("correct, I say", "incorrect", "correct"), votes=3, temperature=1.0)(drafts("4"))
    assert voted.accept.tolist() == [True] and float(voted.score) == pytest.approx(2 / 3)
    assert voted.text == ["correct, I say"]
    tie = ModelCritic(Replies("correct", "incorrect"), votes=2, temperature=1.0)(drafts("4"))
    assert tie.accept.tolist() == [False]
    gui = ModelCritic(Replies("<score>Correct</score>"), verdict=r"<score>(correct|incorrect)</score>")
    assert gui(drafts("click")).accept.tolist() == [True]


def test_the_first_wrong_step() -> None:
    text = "1. two is 2\n2. so 2+2=5\n3. done"
    found = StepCritic(Replies(r"\boxed{1} no, \boxed{2}"))(drafts(text))
    assert not bool(found.accept) and found.text[0].startswith("Step 2 is the first wrong one: so 2+2=5")
    assert bool(StepCritic(Replies(r"\boxed{-1}"))(drafts(text)).accept)
    for unread in (r"\boxed{7}", "all right"):
        said = StepCritic(Replies(unread))(drafts(text))
        assert said.unparsed.tolist() == [True] and said.accept.tolist() == [False]
    votes = StepCritic(Replies(r"\boxed{2}", r"\boxed{3}", r"\boxed{2}"), votes=3, temperature=1.0)(drafts(text))
    assert "Step 2" in votes.text[0]
    assert step_accuracy([2, 3, -1, 1], [2, 2, -1, -1]) == pytest.approx((0.5, 0.5, 0.5))
    assert step_accuracy([1, 2], [2, -1])[2] == 0.0
    with pytest.raises(InputError, match="right ones"):
        step_accuracy([1], [1])


def test_a_panel_and_a_pair() -> None:
    panel = Panel(
        (
            threshold("length", 2),
            FunctionCritic(lambda p, y: (False, "never"), "no"),
            FunctionCritic(lambda p, y: len(y), "len"),
        )
    )
    found = panel(drafts("one two three", "x"))
    assert found.accept.tolist() == [True, False] and found.text == ["no: never", "no: never"]
    assert found.cost.critic_calls == 6 and panel.name == "[length>=2, no, len]"
    a_first = Pairwise(Replies("A"))  # always the first place: a tie, which the first wins
    assert a_first.better([("p", "x", "y")])[0] == [True]
    assert Pairwise(Replies("A", "B")).better([("p", "x", "y")])[0] == [True]
    assert Pairwise(Replies("B", "A")).better([("p", "x", "y")])[0] == [False]


def test_critics_from_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_critic("keywords:lake,boat >= 1").name.endswith(">=1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judges.py").write_text("def short(prompt, output):\n    return len(output) < 4\n")
    assert parse_critic("judges:short")(drafts("abc", "abcd")).accept.tolist() == [True, False]
    assert parse_critic("model:self").name == "model:self"
    for text, word in (
        ("keywords:lake", "critic"),
        ("length>=many", "critic"),
        ("nowhere:at", "nowhere"),
        ("", "critic"),
    ):
        with pytest.raises(InputError, match=word):
            parse_critic(text)
    with pytest.raises(InputError, match="critic_instruction"):
        parse_critic("length>=3", instruction="x")


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"critic": None}, "critic: got None"),
        ({"rounds": -1}, "rounds"),
        ({"drafts": 0}, "drafts"),
        ({"votes": 0}, "votes"),
        ({"rounds": 0}, "rounds: got 0"),
        ({"keep": "lats"}, "last, accepted"),
        ({"template": "again"}, "template"),
        ({"otherwise": "abstian"}, "otherwise"),
        ({"heat": -0.1}, "heat"),
        ({"critic": Pairwise(prefer=lambda p, a, b: True)}, "keep=tournament"),
        ({"keep": "tournament"}, "compares two"),
        ({"critic": lift(lambda t: [0.0])}, "threshold"),
    ],
)
def test_what_the_sampler_refuses(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Critique(**{"critic": good, **given})


def test_what_does_not_fit_the_process(tiny_lm: Any) -> None:
    with pytest.raises(UnsupportedError, match="revise=False"):
        run(markov_lm(), Critique(good))
    with pytest.raises(InputError, match="raw text has no turns"):
        tiny_lm.generate([RawText("the sun")], sampler=Critique("length>=3"), max_new_tokens=4)
    with pytest.raises(UnsupportedError, match="temperature above 0"):
        tiny_lm.generate("the sun", sampler=Critique("length>=3", revise=False), temperature=0, max_new_tokens=4)
    with pytest.raises(UnsupportedError, match="no temperature"):
        run(GaussianProcess(), Critique(lambda p, y: True, revise=False, heat=0.1))
    with pytest.raises(InputError, match="preset"):
        make_sampler("critique", critic="length>=3", preset="refcritc")


@pytest.mark.parametrize(
    ("critic", "said"),
    [
        (lambda p, y: "yes", "critic judge: returned 'yes'"),
        (lambda p, y: float("nan"), "critic judge: returned NaN for draft 0"),
        (lambda p, y: 1 / 0, "critic judge: raised ZeroDivisionError"),
    ],
)
def test_a_critic_that_says_nonsense(critic: Any, said: str) -> None:
    with pytest.raises(RewardError, match=said):
        run(refining(0.5, 0.5, 0.5), Critique(FunctionCritic(critic, "judge")))

    class Short(FunctionCritic):
        def judge(self, samples: Samples) -> Verdicts:
            return Verdicts(torch.ones(1, dtype=torch.bool), torch.ones(1), [""])

    with pytest.raises(RewardError, match=r"critic short: returned \[1\] verdicts; allowed: 2"):
        run(refining(0.5, 0.5, 0.5), Critique(Short(good, "short"), n=2))


# -------------------------------------------------------------------------------------------------- a language model


def test_a_language_model_revises_and_redraws(tiny_lm: Any) -> None:
    critic = threshold("length", 4, say=lambda prompt, output: "longer")
    for how in ({"revise": True}, {"revise": False}, {"revise": True, "history": "all", "heat": 0.2}):
        samples = tiny_lm.generate(
            ["the sun", "a good dog"], sampler="critique", critic=critic, rounds=2, max_new_tokens=6, seed=0, **how
        )
        assert len(samples.texts) == 2 and samples.tokens is not None
        for text, row in zip(samples.texts, samples.lineage.tolist(), strict=True):
            assert samples.pool.texts[row] == text
        assert samples.cost.generated_tokens == sum(len(t) for t in samples.pool.tokens)
    gate = tiny_lm.generate(
        "the sun", sampler="critique", critic="length>=99", preset="gui-critic-r1", max_new_tokens=4
    )
    assert gate.texts == [""] and len(gate.pool) == 2
    own = ModelCritic(None, instruction="{prompt} : {output} ?", max_new_tokens=4)
    own = tiny_lm.generate("the sun", sampler="critique", critic=own, rounds=1, max_new_tokens=6, seed=0)
    assert own.trace[0].unparsed == 1  # the little model says neither word


def test_a_conversation_that_outgrows_the_context_ends(tiny_lm: Any) -> None:
    how = Critique(lambda p, y: (False, "the sun " * 8), rounds=4, history="all")
    samples = tiny_lm.generate("the sun", sampler=how, max_new_tokens=16, seed=0)
    assert [r.skipped for r in samples.trace][-1] == 1 and len(samples) == 1


def test_the_command_line(tiny_lm_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["generate", "--model", str(tiny_lm_dir), "--prompt", "the sun", "--sampler", "critique", "--seed", "0"]
    command += ["--max-new-tokens", "5"]
    assert main([*command, "--critic", "length>=3", "--set", "rounds=2", "--set", "revise=false", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cost"]["critic_calls"] >= 1
    assert main([*command, "--critic", "length>=100", "--set", "preset=gui-critic-r1"]) == 0
    assert "abstained" in capsys.readouterr().out
    for wrong, word in (
        ([], "critic"),
        (["--critic", "lenght>=3"], "lenght"),
        (["--critic", "length>=3", "--set", "preset=x"], "preset"),
        (["--critic", "length>=3", "--critic-instruction", str(tmp_path / "no.txt")], "critic_instruction"),
    ):
        assert main([*command, *wrong]) == 2
        assert word in capsys.readouterr().err
    assert main([*command[:5], "--sampler", "best-of-n", "--reward", "length", "--critic", "length>=3"]) == 2
    assert "critic" in capsys.readouterr().err
