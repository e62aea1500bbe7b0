"""Rewards beyond one head: wrong labels, attributes freed of length, gates, directions, hindsight, and mismatch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from steer.core import InputError, Samples
from steer.measure.agreement import kendall, mismatch
from steer.methods.prompt import direction_prompt
from steer.rewards import Hindsight, parse_reward
from steer.rewards.heads import HeadReward
from steer.train.reward import train_reward
from steer.train.reward.gating import PENALTY_GRID, Gating, debiased, fit_gate, gated, penalties
from steer.train.reward.measures import spearman
from steer.train.reward.robust import collaborative, corrected, plain, preferred

# ---------------------------------------------------------------------------------------------------- lengths and gates


def test_a_gated_score_by_hand() -> None:
    """Penalties (.25, 0, 1) of scores (3, 1, 2), the last the verbosity, under gate logits (10, 0, -10)."""
    r = torch.tensor([3.0, 1.0, 2.0]).double()
    turned = r @ debiased(torch.tensor([0.25, 0.0, 1.0]).double(), 2).T
    assert turned.tolist() == [2.5, 1.0, 0.0]
    weights = gated(torch.tensor([[10.0, 0.0, -10.0]]).double())[0]
    assert torch.allclose(weights, torch.tensor([0.665241, 0.244728, 0.090031]).double(), atol=1e-6)
    assert float(weights @ turned) == pytest.approx(1.907831, abs=1e-6)
    # Over the two equal prompts of a pair, as released, every weight is 1/2 whatever the logits.
    assert not torch.allclose(weights, torch.full((3,), 0.5).double(), atol=0.1)


def test_penalties_are_the_first_that_is_enough() -> None:
    drawn = torch.Generator().manual_seed(0)
    long = torch.randn(400, generator=drawn).double()
    free = torch.randn(400, generator=drawn).double()
    ratings = torch.stack([free + 0.3 * long, free - 0.5 * long, 3 * long + 0.1 * free, long], 1)
    found = penalties(ratings, 3)
    assert found[1] == 0 and found[2] == 1 and found[3] == 1  # one-sided; never enough; itself
    at = PENALTY_GRID.index(round(float(found[0]), 3))
    rest = [spearman(ratings[:, 0] - c * long, long) for c in PENALTY_GRID[: at + 1]]
    assert rest[-1] <= 0.03 and all(x > 0.03 for x in rest[:-1]) and 0.1 < found[0] < 0.5


def test_a_gate_learns_which_attribute_counts() -> None:
    """Prompts of two kinds, each of which is judged by another attribute; the one that does not count is the louder."""
    drawn = torch.Generator().manual_seed(1)
    kind = torch.randint(0, 2, (600,), generator=drawn)
    psi = torch.nn.functional.one_hot(kind, 2).float() * 2 - 1
    gap = torch.randn(600, 2, generator=drawn).double() * 2
    gap[torch.arange(600), kind] = gap[torch.arange(600), kind].abs() / 2
    scores = torch.stack([gap, torch.zeros_like(gap)], 1)
    gate = fit_gate(psi[:400], scores[:400] * 3, hidden=16, steps=1500)
    right = (gate(psi[400:]).double() * gap[400:]).sum(1) > 0
    assert float(right.double().mean()) > 0.8 > 0.7 > float((gap[400:].sum(1) > 0).double().mean())
    assert torch.allclose(Gating(2, 3)(psi).sum(1), torch.ones(600))


def heads(weights: Tensor | None = None, **more: Any) -> HeadReward:
    """Two attributes that are the first two entries of a state of three."""
    given = torch.ones(2).double() if weights is None else weights
    return HeadReward(
        torch.eye(3)[None, :2], torch.zeros(1, 2), torch.zeros(3), torch.ones(3), 0, ("good", "long"), given, **more
    )


class States:
    """A model whose states are numbers in the texts."""

    chats = False
    eos_token_ids = (9,)

    def encode(self, prompt: Any) -> list[int]:
        return [int(x) for x in str(prompt).split()]

    def hidden_states(self, ids: list[list[int]], layers: list[int], **more: Any) -> dict[int, Tensor]:
        rows = [[float(x) for x in row if x != 9][-3:] for row in ids]
        return {layers[0]: torch.tensor(rows)}


def test_the_reward_applies_transform_and_gate() -> None:
    """Against the formula, with a gate whose weights follow from the prompt alone."""
    samples = Samples(["1 0 0 ", "0 1 0 "], ["2 3 1", "4 5 1", "2 3 1"], torch.tensor([0, 0, 1]), torch.zeros(3))
    transform = torch.tensor([[1.0, -0.5], [0.0, 0.0]])
    turned: Any = heads(transform=transform, model=States())
    assert turned.attributes(samples).tolist() == [[0.5, 0.0], [1.5, 0.0], [0.5, 0.0]]
    gate = {
        "inner.weight": torch.eye(3),
        "inner.bias": torch.zeros(3),
        "outer.weight": torch.tensor([[20.0, 0, 0], [0, 20.0, 0]]),
        "outer.bias": torch.zeros(2),
        "mean": torch.zeros(3),
        "std": torch.ones(3),
    }
    both: Any = heads(gate=gate, model=States())
    high, low = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))
    expected = [2 * high + 3 * low, 4 * high + 5 * low, 2 * low + 3 * high]
    assert both(samples).tolist() == pytest.approx(expected, abs=1e-6)


# ----------------------------------------------------------------------------------------------------------- directions

CANDIDATES = {"short": (60, 20), "balanced": (66, 38), "long": (70, 60), "padded": (64, 42)}


@pytest.mark.parametrize(
    ("angle", "expected", "best"),
    [
        (-20, (49.5412, 49.0229, 45.2573, 45.7755), "short"),
        (-15, (52.7792, 53.9160, 52.0857, 50.9489), "balanced"),
        (-10, (55.6155, 58.3987, 58.5177, 55.7345), "long"),
        (20, (63.2220, 75.0165, 86.2997, 74.5052), "long"),
    ],
)
def test_directions_by_hand(angle: float, expected: tuple[float, ...], best: str) -> None:
    """What a direction over two attributes scores; one inside the hull is never the best."""
    turn = torch.tensor([math.cos(math.radians(angle)), math.sin(math.radians(angle))]).double()
    reward: Any = heads(turn, model=States())
    texts = [f"{a} {b} 1" for a, b in CANDIDATES.values()]
    scores = reward(Samples([""], texts, torch.zeros(4).long(), torch.zeros(4)))
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)
    assert list(CANDIDATES)[int(scores.argmax())] == best


@pytest.mark.parametrize(("angle", "weights"), [(-20, (94, -34)), (-10, (98, -17)), (45, (71, 71))])
def test_directions_are_stated_in_whole_weights(angle: float, weights: tuple[int, int]) -> None:
    text = direction_prompt(("helpfulness", "verbosity"), angle).text
    assert f"helpfulness (weight {weights[0]})" in text and f"verbosity (weight {weights[1]})" in text
    with pytest.raises(InputError, match="names"):
        direction_prompt(("one",), 0)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- wrong labels


def _pairs(noise: float, seed: int, width: int = 20, count: int = 2000) -> tuple[Tensor, Tensor, Tensor]:
    """Differences of pairs with flipped labels, further ones with right labels, and the truth."""
    drawn = torch.Generator().manual_seed(seed)
    truth = torch.randn(width, generator=drawn).double()
    z = torch.randn(count + 4000, width, generator=drawn).double()
    z = z * torch.where(z @ truth > 0, 1.0, -1.0).unsqueeze(1)
    flipped = torch.rand(count, generator=drawn) < noise
    return torch.where(flipped.unsqueeze(1), -z[:count], z[:count]), z[count:], truth


def _accuracies(step: float) -> list[float]:
    """Mean accuracy of a plain head and of reviewers on right labels, two seeds, 40% of 2000 labels flipped."""
    found = []
    for seed in range(2):
        z, test, _ = _pairs(0.4, seed)
        both = (plain(z, seed, step=step), collaborative(z, 0.6, seed, step=step))
        found.append([float((test @ head > 0).double().mean()) for head in both])
    mean: list[float] = torch.tensor(found).mean(0).tolist()
    return mean


def test_reviewers_withstand_wrong_labels() -> None:
    """Steps at which a plain head follows the noise (about .75): reviewers are better; small steps average it out."""
    alone, reviewed = _accuracies(1.6)
    assert alone < 0.79 and reviewed > alone + 0.03
    alone, reviewed = _accuracies(0.05)
    assert alone > 0.79 and abs(reviewed - alone) < 0.04
    z, test, _ = _pairs(0.0, 9)
    assert not preferred(test[:400] @ plain(z), test[:400] @ collaborative(z, 0.95))


def test_accuracy_on_right_labels() -> None:
    assert corrected(0.58, 0.4) == pytest.approx(0.9) and corrected(0.3, 0.4) == 0.0 and corrected(0.7, 0.0) == 0.7


WORDS = ("good nice happy", "love good day", "happy calm cat", "bad awful sad", "hate bad night", "sad loud cat")


def _rows(count: int = 64) -> list[dict[str, Any]]:
    prompts = ("the sun", "tell me", "why", "how", "what is the day", "where is the dog", "who", "the tree")
    return [
        {"prompt": prompts[i % 8], "chosen": WORDS[i % 3], "rejected": WORDS[3 + (i * 2 + i // 8) % 3]}
        for i in range(count)
    ]


def test_right_labels_keep_the_plain_head(tiny_lm: Any) -> None:
    made = train_reward(tiny_lm, _rows(), layer=1, l2=0.1, noise_robust=True, noise=0.1)
    same = train_reward(tiny_lm, _rows(), layer=1, l2=0.1)
    assert made.card.metrics["noise_robust"]["kept"] == "plain"
    assert torch.equal(made.tensors["heads"], same.tensors["heads"])
    expected = corrected(made.card.metrics["accuracy"], 0.1)
    assert made.card.metrics["accuracy_on_right_labels"] == pytest.approx(expected, abs=1e-3)


def test_ratings_with_gate_and_length(tiny_lm: Any, tmp_path: Any) -> None:
    rated = [
        {"prompt": r["prompt"], "completion": text, "ratings": {"kind": kind + 0.1 * (i % 3), "words": float(i % 5)}}
        for i, r in enumerate(_rows(40))
        for kind, text in ((1.0, r["chosen"]), (0.0, r["rejected"]))
    ]
    made = train_reward(tiny_lm, rated, gate=_rows(), layer=1, verbosity="words", gate_steps=60)
    assert made.tensors["transform"][1].tolist() == [0.0, 0.0] and made.card.metrics["gate"]["pairs"] == 64
    path = tmp_path / "gated.safetensors"
    made.save(path)
    samples = Samples(["the sun"], list(WORDS), torch.zeros(6).long(), torch.zeros(6))
    reward: Any = parse_reward(str(path)).bind(tiny_lm)  # type: ignore[attr-defined]
    shares = reward.shares(samples)
    assert torch.allclose(shares.sum(1), torch.ones(6).double()) and reward.gate is not None
    expected = (reward.attributes(samples) * shares).sum(1)
    assert torch.allclose(reward(samples), expected, atol=1e-6)
    alone: Any = parse_reward(f"{path}:attribute=kind").bind(tiny_lm)  # type: ignore[attr-defined]
    assert alone.gate is None and torch.allclose(alone(samples), reward.attributes(samples)[:, 0])
    again = train_reward(tiny_lm, rated, gate=_rows(), layer=1, verbosity="words", gate_steps=60)
    assert all(torch.equal(x, again.tensors[name]) for name, x in made.tensors.items())


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"verbosity": "words"}, "verbosity"),
        ({"gate": _rows()}, "gate"),
        ({"noise": 0.6, "noise_robust": True}, "noise"),
        ({"diversity": "seeds", "members": 3}, "diversity"),
    ],
)
def test_settings_that_do_not_fit(tiny_lm: Any, settings: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=field):
        train_reward(tiny_lm, _rows(), **settings)
    with pytest.raises(InputError, match="noise_robust"):
        train_reward(tiny_lm, [{**row, "margin": 1.0} for row in _rows()], noise_robust=True)


# ------------------------------------------------------------------------------------------------------------ hindsight


def test_hindsight_rewards_honesty_and_foresight_promises() -> None:
    """Half of the items lack what is asked for; price .4, worth 1: a claim always sells, and pays in half of the cases.

    Foresight trusts a claim with .6 or .9; what came of it is seen in hindsight, with probability w as it was.
    """
    worth = {"honest": 0.5 * (1 - 0.4), "claim": 0.5 * 1 - 0.4}
    assert worth == pytest.approx({"honest": 0.3, "claim": 0.1})

    def foresight(trust: float) -> dict[str, float]:
        return {"honest": 0.5 * (trust - 0.4), "claim": trust - 0.4}

    assert foresight(0.9) == pytest.approx({"honest": 0.25, "claim": 0.5})
    assert foresight(0.6) == pytest.approx({"honest": 0.1, "claim": 0.2})
    samples = Samples(["sell"], ["honest", "claim"], torch.zeros(2).long(), torch.zeros(2))

    def follows(prompts: list[Any], replies: list[str]) -> list[str]:
        return [f"gained {worth[reply]:.2f}" for reply in replies]

    reward = Hindsight(follows, lambda prompt, reply, then: float(then.split()[1]))
    assert reward(samples).tolist() == pytest.approx([0.3, 0.1])
    assert samples.outputs[int(reward(samples).argmax())] == "honest"
    for w, honest in ((1.0, 0.3), (0.8, 0.2), (0.6, 0.1), (0.5, 0.05)):
        # A simulator that lies says that the opposite held: the item had it where it had not.
        assert 0.5 * w * 0.6 + 0.5 * (1 - w) * -0.4 == pytest.approx(honest)
        assert (honest > 0.1 + 1e-9) == (w > 0.6)


def test_hindsight_reads_replies_with_what_follows() -> None:
    samples = Samples(["a", "b"], ["x", "y", "z"], torch.tensor([0, 0, 1]), torch.zeros(3))
    seen: list[tuple[Any, str, str]] = []

    def look(*row: Any) -> float:
        seen.append(row)
        return 0.0

    Hindsight(lambda p, y: [f"{a}{b}" for a, b in zip(p, y, strict=True)], look, reveal="all")(samples)
    assert seen[2] == ("b", "z", "bz") and seen[0] == ("a", "x", "ax\nHad the reply been 'y': ay")
    long = Hindsight(lambda p, y: ["one two"] * len(y), parse_reward("length"), n=2)
    assert long(samples).tolist() == [3.0, 3.0, 3.0]
    with pytest.raises(InputError, match="sample 1"):
        Hindsight(lambda p, y: ["a", " ", "b"], look)(samples)
    with pytest.raises(InputError, match="reveal"):
        Hindsight(look, look, reveal="some")


def test_hindsight_asks_a_model(tiny_lm: Any) -> None:
    samples = Samples(["the sun"], ["good", "bad"], torch.zeros(2).long(), torch.zeros(2))
    reward = Hindsight(tiny_lm, parse_reward("length"), max_tokens=4, template="{prompt} {reply} why", seed=3)
    texts = tiny_lm.generate(["the sun good why", "the sun bad why"], max_new_tokens=4, seed=3).texts
    assert reward(samples).tolist() == [1.0 + len(text.split()) for text in texts] or "." in "".join(texts)


# ------------------------------------------------------------------------------------------------------------- mismatch


def test_mismatch_by_hand() -> None:
    a, b = (0.1, 0.4, 0.5, 0.8, 0.9), (0.2, 0.5, 0.6, 0.55, 0.3)
    assert kendall(a, b) == pytest.approx(0.2) and mismatch(a, b) == pytest.approx(0.4)
    assert mismatch((1, 1), (0, 1)) == 0.5 and kendall(a, a) == 1
    with pytest.raises(InputError, match="settings"):
        mismatch((1.0,), (1.0,))
