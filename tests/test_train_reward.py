"""Trained rewards: what the fit is, what bad rows are told, and where a file of one is used."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import steer
from steer.cli import main
from steer.core import InputError, RawText, UnsupportedError
from steer.rewards import parse_reward
from steer.rewards.heads import HeadReward, reply_ids
from steer.train.reward import (
    RewardSettings,
    bradley_terry,
    log_loss,
    prior_correction,
    ridge,
    train_reward,
)
from steer.train.reward.heads import Fit, minimised
from steer.train.reward.measures import auroc, spearman
from steer.train.reward.rows import Rows

GOOD = ("good nice happy", "nice happy sun", "love good day", "happy calm cat", "good calm house", "nice love dog")
BAD = ("bad awful sad", "awful sad rain", "hate bad night", "sad loud cat", "bad loud house", "awful hate dog")
PROMPTS = ("the sun", "tell me", "why", "what is the day", "how", "where is the dog")


def pairs(count: int = 36) -> list[dict[str, Any]]:
    return [
        {"prompt": PROMPTS[i % 6], "chosen": GOOD[(i // 6) % 6], "rejected": BAD[(i * 5 + i // 6) % 6]}
        for i in range(count)
    ]


# ------------------------------------------------------------------------------------------------------------- laws


def test_ridge_by_hand() -> None:
    x = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, -1]], dtype=torch.float64)
    y = torch.tensor([[1.0, 0], [0, 2], [1, math.nan], [3, -1]], dtype=torch.float64)
    expected = torch.tensor([[1.1111111111, -0.2222222222], [0.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(ridge(x, y, 1.0), expected, atol=1e-9)


def test_losses_by_hand() -> None:
    assert float(bradley_terry(torch.tensor([1.2, -0.3]).double())) == pytest.approx(0.558819, abs=1e-6)
    share = 0.03 / (0.03 + 0.1 * 0.97)
    logit = math.log(share / (1 - share)) + prior_correction(0.1)
    assert share == pytest.approx(0.236220, abs=1e-6) and prior_correction(0.1) == pytest.approx(-2.302585, abs=1e-6)
    assert 1 / (1 + math.exp(-logit)) == pytest.approx(0.03, abs=1e-9)
    logits, labels = torch.tensor([2.0, -1.0]).double(), torch.tensor([1.0, 0.0]).double()
    by_hand = (3 * math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 4
    assert float(log_loss(logits, labels, torch.tensor([3.0, 1.0]).double())) == pytest.approx(by_hand, abs=1e-12)


def test_ranks_by_counting() -> None:
    scores, positive = torch.tensor([0.1, 0.4, 0.4, 0.9, 0.2]), torch.tensor([False, True, False, True, False])
    wins = [float(a > b) + 0.5 * float(a == b) for a in scores[positive].tolist() for b in scores[~positive].tolist()]
    assert auroc(scores, positive) == pytest.approx(sum(wins) / len(wins))
    x, y = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    assert spearman(x, y) == pytest.approx(1 - 6 * 2 / (4 * 15)) and spearman(x, -x) == pytest.approx(-1)


@pytest.mark.parametrize("biased", [False, True])
def test_the_minimum_is_where_the_gradient_ends(biased: bool) -> None:
    """One dimension, by bisection of the derivative; the bias is found too."""
    z = torch.tensor([[0.5], [2.0], [-1.0], [1.5]], dtype=torch.float64)
    labels = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)

    def loss(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        scores = z @ w + b
        fit = log_loss(scores, labels, torch.ones(4).double()) if biased else bradley_terry(z @ w)
        return fit + 0.5 * 0.3 * w.square().sum()

    w, b = minimised(loss, 1, biased)
    step = 1e-5
    for dw, db in ((step, 0.0), (-step, 0.0), *(((0.0, step), (0.0, -step)) if biased else ())):
        assert float(loss(w + dw, b + db)) >= float(loss(w, b)) - 1e-14
    w, b = w.requires_grad_(), b.requires_grad_()
    grads = torch.autograd.grad(loss(w, b), [w, b] if biased else [w])
    assert max(float(g.abs().max()) for g in grads) < 1e-7


def test_heads_find_the_direction_that_made_the_preferences() -> None:
    """400 pairs of a linear truth in 8 dimensions: the cosine to it is above .97 (.99 in the limit of the noise)."""
    drawn = torch.Generator().manual_seed(0)
    truth = torch.randn(8, generator=drawn, dtype=torch.float64)
    states = torch.randn(800, 8, generator=drawn, dtype=torch.float64) * torch.linspace(0.5, 3, 8) + 5
    a, b = states.reshape(400, 2, 8).unbind(1)
    swap = torch.rand(400, generator=drawn) > torch.sigmoid((a - b) @ truth)
    states = torch.stack([torch.where(swap[:, None], b, a), torch.where(swap[:, None], a, b)], 1).reshape(800, 8)
    rows = Rows(
        "pairs",
        [("", "")] * 800,
        torch.zeros(400).double(),
        torch.ones(400).double(),
        ("score",),
        ["a"] * 400,
        torch.ones(800),
    )
    fitted = Fit.of(rows, states, range(400))
    head, _ = fitted.head(rows, torch.arange(400), 1e-3, None)
    found = head[0] / fitted.std
    assert float(torch.cosine_similarity(found, truth, 0)) > 0.97


# ------------------------------------------------------------------------------------------------------------ whole


@pytest.fixture(scope="module")
def trained(tiny_lm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "kind.safetensors"
    train_reward(tiny_lm, pairs(), members=3, layer=1, l2=0.1).save(path)
    return path


def scored(reward: Any, model: Any, texts: list[str], prompt: Any = "the sun") -> list[float]:
    drawn = model.generate([prompt] * len(texts), max_new_tokens=1)
    from dataclasses import replace

    return reward.bind(model)(replace(drawn, outputs=texts, tokens=None)).tolist()


def _ranked_right(reward: Any, model: Any) -> float:
    """Share of pairs of a good text and a bad one, after one prompt, in which the good one scores more."""
    good, bad = scored(reward, model, list(GOOD)), scored(reward, model, list(BAD))
    return sum(a > b for a in good for b in bad) / (len(good) * len(bad))


def test_a_reward_prefers_what_was_preferred(tiny_lm: Any, trained: Path) -> None:
    tensors, card = steer.artifacts.load(trained)
    assert card.kind == "reward" and card.metrics["accuracy"] == 1.0 and card.metrics["interval"][0] > 0.5
    assert tensors["heads"].shape == (3, 1, 32) and card.recipe["layer"] == 1
    reward = parse_reward(str(trained))
    assert _ranked_right(reward, tiny_lm) > 0.9


def test_scores_are_the_heads_of_the_state_at_the_end(tiny_lm: Any, trained: Path) -> None:
    """Against one forward pass of the library's own model."""
    ids = reply_ids(tiny_lm, "the sun", GOOD[0])
    assert ids[-1] == tiny_lm.eos_token_ids[0]
    with torch.no_grad():
        states = tiny_lm.network(torch.tensor([ids]), output_hidden_states=True).hidden_states
    # The state after the last block is shown behind the final norm, so an earlier block is compared.
    early = HeadReward(
        torch.randn(2, 1, 32), torch.zeros(2, 1), torch.zeros(32), torch.ones(32), 0, ("score",), torch.ones(1).double()
    )
    expected = states[1][0, -1].double() @ early.heads.mean(0)[0].double()
    object.__setattr__(early, "model", tiny_lm)
    found = early(_samples(tiny_lm, [GOOD[0]]))
    assert float(found[0]) == pytest.approx(float(expected), abs=1e-4)


def _samples(model: Any, texts: list[str]) -> Any:
    from dataclasses import replace

    return replace(model.generate(["the sun"] * len(texts), max_new_tokens=1), outputs=texts, tokens=None)


def test_members_are_reduced_as_an_ensemble_is(tiny_lm: Any, trained: Path) -> None:
    samples = _samples(tiny_lm, [*GOOD, *BAD])
    rewards = {how: parse_reward(f"{trained}:how={how}").bind(tiny_lm) for how in ("mean", "worst", "uncertainty")}
    members = rewards["mean"]._members(samples)[:, :, 0]  # type: ignore[attr-defined]
    assert torch.allclose(rewards["mean"](samples), members.mean(1))
    assert torch.allclose(rewards["worst"](samples), members.amin(1))
    expected = members.mean(1) - 0.5 * members.var(1, correction=0)
    assert torch.allclose(rewards["uncertainty"](samples), expected)
    mixed = parse_reward(f'sentiment - 0.5*"{trained}":how=worst').bind(tiny_lm)
    alone = parse_reward("sentiment")
    assert torch.allclose(mixed(samples), alone(samples) - 0.5 * members.amin(1))


def test_ratings_and_labels(tiny_lm: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": PROMPTS[i % 6], "completion": text, "ratings": {"kind": score, "long": float(i) if i % 3 else None}}
        for score, texts in ((1.0, GOOD), (0.0, BAD))
        for i, text in enumerate(texts * 4)
    ]
    path = tmp_path / "two.safetensors"
    made = train_reward(tiny_lm, rows, layer=1)
    made.save(path)
    assert made.card.settings["names"] == ["kind", "long"] and made.card.metrics["kind"]["spearman"] > 0.8
    kind = parse_reward(f"{path}:attribute=kind")
    assert _ranked_right(kind, tiny_lm) > 0.8
    samples = _samples(tiny_lm, list(GOOD))
    both = parse_reward(str(path)).bind(tiny_lm)
    at_angle = parse_reward(f"{path}:angle=30").bind(tiny_lm)
    attributes = both.attributes(samples)  # type: ignore[attr-defined]
    expected = attributes @ torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]).double()
    assert torch.allclose(at_angle(samples), expected, atol=1e-6)
    assert torch.allclose(
        parse_reward(f'"{path}":kind=2,long="-1"').bind(tiny_lm)(samples),
        attributes @ torch.tensor([2.0, -1.0]).double(),
    )

    labelled = [{"prompt": r["prompt"], "completion": r["completion"], "label": r["ratings"]["kind"] > 0} for r in rows]
    plain = train_reward(tiny_lm, labelled, layer=1, l2=0.1)
    rare = train_reward(tiny_lm, labelled, layer=1, l2=0.1, keep_negatives=0.1)
    assert plain.card.metrics["auroc"] > 0.95
    assert torch.allclose(rare.tensors["bias"], plain.tensors["bias"] + math.log(0.1), atol=1e-5)
    plain.save(tmp_path / "love.safetensors")
    chance = scored(parse_reward(f"{tmp_path}/love.safetensors:as=probability"), tiny_lm, [GOOD[0], BAD[0]])
    assert 0 < chance[1] < 0.5 < chance[0] < 1


def test_pairs_of_a_vector_are_preferences(tiny_lm: Any) -> None:
    renamed = [{"prompt": r["prompt"], "positive": r["chosen"], "negative": r["rejected"]} for r in pairs()]
    made, same = train_reward(tiny_lm, renamed, layer=1, l2=0.1), train_reward(tiny_lm, pairs(), layer=1, l2=0.1)
    assert torch.equal(made.tensors["heads"], same.tensors["heads"])


def test_states_are_read_once(tiny_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train_reward(tiny_lm, pairs(), work=tmp_path)
    monkeypatch.setattr(type(tiny_lm), "hidden_states", lambda *given, **more: pytest.fail("read again"))
    again = train_reward(tiny_lm, pairs(), work=tmp_path)
    other = train_reward(tiny_lm, pairs(), work=tmp_path, l2=10.0)
    assert torch.equal(first.tensors["heads"], again.tensors["heads"])
    assert not torch.equal(first.tensors["heads"], other.tensors["heads"])


def test_members_that_rank_alike_are_named(tiny_lm: Any) -> None:
    made = train_reward(tiny_lm, pairs(), members=2, diversity="bootstrap", layer=1, l2=10.0, held_out=0.4)
    assert ("warning" in made.card.metrics) == (made.card.metrics["members_alike"] > 0.98)


@pytest.mark.parametrize(
    ("rows", "field"),
    [
        (pairs(4), "at least 10"),
        ([*pairs(12), {"prompt": "a", "chosen": "sun", "rejected": "sun"}], r"data\[12\]"),
        ([*pairs(12), {"prompt": "a", "chosen": "", "rejected": "sun"}], r"data\[12\]\.chosen"),
        ([*pairs(12), {"prompt": "a", "chosen": "cat", "rejected": "sun", "margin": math.inf}], r"data\[12\]\.margin"),
        ([{"completion": f"sun {i}", "label": True} for i in range(12)], "both labels"),
        ([{"completion": f"sun {i}", "label": "maybe"} for i in range(12)], r"data\[0\]\.label"),
        (
            [{"completion": f"sun {i}", "ratings": {"a": 1 if i < 5 else None}} for i in range(12)],
            r"ratings\.a: got '5",
        ),
        ([{"completion": f"sun {i}", "ratings": {"a": "high"}} for i in range(12)], r"data\[0\]\.ratings\.a"),
        ([{"text": "sun"}] * 12, "chosen and rejected"),
    ],
)
def test_bad_rows_are_named(tiny_lm: Any, rows: list[Any], field: str) -> None:
    with pytest.raises(InputError, match=field):
        train_reward(tiny_lm, rows)


def test_bad_settings_and_expressions(tiny_lm: Any, trained: Path, tmp_path: Path) -> None:
    for wrong in ({"layer": 7}, {"members": 0}, {"objective": "magic"}, {"l2": -1}, {"keep_negatives": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            train_reward(tiny_lm, pairs(), **wrong)
    with pytest.raises(UnsupportedError, match="hidden states"):
        train_reward(type("Endpoint", (), {"name": "far"})(), pairs())
    for text, why in (
        (f"{trained}:how=best", "worst"),
        (f"{trained}:attribute=kind", "attribute: score"),
        (f"{trained}:angle=3", "two attributes"),
        (f"{trained}:wrong=1", "wrong"),
        (f"{tmp_path}/no.safetensors", "no such file"),
    ):
        with pytest.raises(InputError, match=why):
            parse_reward(text)
    with pytest.raises(InputError, match="reward"):
        parse_reward(str(trained), trusted=False)
    assert RewardSettings().recipe()["l2"] == "auto"


def test_another_model_generates(tiny_lm: Any, trained: Path) -> None:
    """A model with other weights does not lend its states; without a way to load the right one that is said."""
    reward = parse_reward(str(trained))
    other = type("Other", (), {"info": type("Info", (), {"entry": lambda self: {"fingerprint": "x"}})()})()
    assert reward.bind(other) is reward
    lost = HeadReward(
        torch.zeros(1, 1, 2), torch.zeros(1, 1), torch.zeros(2), torch.ones(2), 0, ("score",), torch.ones(1).double()
    )
    with pytest.raises(InputError, match="trained on"):
        lost(_samples(tiny_lm, ["sun"]))
    assert reply_ids(tiny_lm, RawText("the sun"), "sings")[:-1] == tiny_lm.encode(RawText("the sunsings"))


def test_the_command_trains_and_the_reward_chooses(
    tmp_path: Path, tiny_lm_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs()))
    train = ["train", "reward", "--model", str(tiny_lm_dir), "--data", "pairs.jsonl", "--out", "kind.safetensors"]
    assert main([*train, "--members", "2", "--set", "layer=1"]) == 0
    assert f"reward for {tiny_lm_dir}" in capsys.readouterr().out and not Path("kind.safetensors.work").exists()
    draw = [
        "generate",
        "--model",
        str(tiny_lm_dir),
        "--prompt",
        "the sun",
        "--max-new-tokens",
        "4",
        "--seed",
        "0",
        "--json",
    ]
    for sampler in (["best-of-n", "-n", "8"], ["fk", "-n", "4"]):
        assert main([*draw, "--sampler", *sampler, "--reward", "kind.safetensors:how=worst"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["prompts"][0]["samples"][0]["reward"] is not None
    assert main([*train, "--overwrite", "--objective", "magic"]) == 2
    assert (
        main(
            [
                "eval",
                "--model",
                str(tiny_lm_dir),
                "--edit",
                "kind.safetensors",
                "--prompts",
                "pairs.jsonl",
                "--out",
                "r",
            ]
        )
        == 2
    )
