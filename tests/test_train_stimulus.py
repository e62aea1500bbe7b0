"""Stimuli: what hints are drawn, what the rounds converge to, what is measured, and where the result is used."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steer
from steer.core import InputError, RawText, SteerError
from steer.methods.extract import BUCKETS, FEATURES, Extractor, Phrases, draw_laws, phrases_of, reference_hint
from steer.methods.prompt import TEMPLATES, DirectionalStimulus, Template
from steer.rewards import parse_reward
from steer.rewards.text import Rouge, words
from steer.train.stimulus import StimulusSettings, controlled, train_stimulus
from steer.train.stimulus.box import Bench, BlackBox, shares
from steer.train.stimulus.extracting import Drawn, ExtractPolicy
from steer.train.stimulus.learning import Rounds, advantages, moved
from steer.train.stimulus.rows import Row, read_rows, split

# ------------------------------------------------------------------------------------------------ hints and templates


def test_hints_of_references_by_hand() -> None:
    seen = "the red fox jumped over the lazy dog near oslo"
    assert reference_hint(seen, "a lazy dog met the red fox .") == ["lazy dog", "red fox"]
    assert reference_hint(seen, "Oslo: a dog, a fox. The red fox jumped!", most=3) == ["oslo", "dog", "fox"]
    assert reference_hint("a b see", "see a b") == ["see"] and reference_hint(seen, "the over") == []


def test_phrases_by_hand() -> None:
    idf = torch.zeros(BUCKETS)
    found = phrases_of("Big Ben fell. The bell of Big Ben rang 3 times.", idf)
    texts = [" ".join(gram) for gram in found.texts]
    assert texts[:5] == ["big", "big ben", "big ben fell", "ben", "ben fell"] and "the" not in texts
    row = dict(zip(FEATURES, found.features[texts.index("big ben")].tolist(), strict=True))
    assert row["log count"] == pytest.approx(math.log(2)) and row["share of capitalised words"] == 1
    assert (
        row["two words"] == 1 and row["in the first sentence"] == 1 and row["repeated and in the first sentence"] == 1
    )
    assert row["a whole run"] == 0 and row["log mean count of its words"] == pytest.approx(math.log(2))
    big, ben, pair = (texts.index(name) for name in ("big", "ben", "big ben"))
    assert found.nested[big, pair] and found.nested[pair, ben] and not found.nested[big, ben] and found.nested[big, big]
    assert found.hint([texts.index("bell"), big]) == "big; bell"


def test_templates() -> None:
    edit = DirectionalStimulus({"one two three": "a; b", "x": ""}, Template("Say {hint}\n{prompt}", words=2))
    assert edit.rewrite("one two three") == "Say a; b\none two" and edit.rewrite("x") == "x"
    assert Template("Say {hint}\n\n{prompt}").bare("x") == "x" and Template("Say {hint}").bare("x") == "x"
    raw = DirectionalStimulus({"x": "h"}, Template("{prompt}: {hint}", raw=True))
    chat = [{"role": "user", "content": "x"}]
    assert isinstance(raw.rewrite("x"), RawText) and raw.rewrite(chat) == "x: h"
    assert "{hint}" not in TEMPLATES["completion"].bare("x") and TEMPLATES["hint-only"].bare("x").endswith("sentences.")
    with pytest.raises(InputError, match="hint"):
        Template("{prompt}")


# -------------------------------------------------------------------------------------------------------------- oracles


@dataclass
class Table:
    """A policy with one logit for each of some hints, whatever the input."""

    hints: tuple[str, ...]
    free: nn.Parameter
    reference: Tensor = field(default_factory=lambda: torch.zeros(0))
    chunk: int = 7

    def __call__(self, inputs: Sequence[str]) -> list[str]:
        return [self.hints[int(self.free.argmax())]] * len(inputs)

    def draw(self, inputs: Sequence[str], n: int, generator: torch.Generator) -> list[list[Drawn]]:
        law = self.free.detach().softmax(0)
        rows = torch.multinomial(law, n * len(inputs), replacement=True, generator=generator).reshape(-1, n).tolist()
        return [[Drawn(self.hints[i], (i,)) for i in row] for row in rows]

    def terms(self, inputs: Sequence[str], drawn: Sequence[Drawn]) -> tuple[Tensor, Tensor]:
        now, before = self.free.log_softmax(0), self.reference.log_softmax(0)
        gap = (now.exp() * (now - before)).sum()
        return torch.stack([now[one.choice[0]] for one in drawn]), gap.expand(len(drawn))

    def fit(self, rows: Any, settings: Any, **more: Any) -> dict[str, Any]:
        return {}

    def begin(self) -> None:
        self.reference = self.free.detach().clone()

    def weights(self) -> dict[str, nn.Parameter]:
        return {"free": self.free}


SFT, MEANS, COEFFICIENT = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.5, 0.9]).double(), 0.2


def test_the_optimum_in_closed_form() -> None:
    """Oracle 1: `p* ∝ p_SFT exp(E R / c)`, and `E R - c KL = c log Z` there."""
    tilted = SFT * (MEANS / COEFFICIENT).exp()
    best, log_z = tilted / tilted.sum(), float(tilted.sum().log())
    assert torch.allclose(best, torch.tensor([0.059049, 0.158783, 0.782169]).double(), atol=1e-6)
    kl = float((best * (best / SFT).log()).sum())
    assert float(best @ MEANS) == pytest.approx(0.795153, abs=1e-6) and kl == pytest.approx(0.839518, abs=1e-6)
    assert COEFFICIENT * log_z == pytest.approx(0.627249, abs=1e-6)
    assert float(best @ MEANS) - COEFFICIENT * kl == pytest.approx(COEFFICIENT * log_z, abs=1e-9)
    free = nn.Parameter(best.log())
    policy = Table(("a", "b", "c"), free, SFT.log())
    logs, gaps = policy.terms([""] * 3, [Drawn(h, (i,)) for i, h in enumerate("abc")])
    (grad,) = torch.autograd.grad((best @ (MEANS * logs)) - COEFFICIENT * gaps[0], free)
    assert float(grad.abs().max()) < 1e-9


def test_the_rounds_converge_to_the_tilt_by_the_mean_reward() -> None:
    """Oracles 1 and 4: single texts are 0 or 1, and what is learnt is the tilt by their mean, not by each."""
    policy = Table(("a", "b", "c"), nn.Parameter(SFT.log().clone()))
    policy.begin()
    optimizer = torch.optim.Adam([policy.free], lr=0.02)
    draws = torch.Generator().manual_seed(0)
    seen = []
    for number in range(300):
        drawn = policy.draw([""] * 16, 8, draws)
        chance = torch.stack([MEANS[[one.choice[0] for one in row]] for row in drawn])
        rewards = (torch.rand(chance.shape, generator=draws).double() < chance).double()
        moved(policy, optimizer, [""] * 16, drawn, rewards, COEFFICIENT)
        if number >= 200:
            seen.append(policy.free.detach().softmax(0))
    found = torch.stack(seen).mean(0)
    assert float((found - torch.tensor([0.059049, 0.158783, 0.782169]).double()).abs().max()) < 0.05
    assert float((found - torch.tensor([0.236712, 0.348079, 0.415210]).double()).abs().max()) > 0.3


def letters(scores: Sequence[float]) -> ExtractPolicy:
    """The law over three unnested phrases with these scores; two are drawn."""
    width = len(FEATURES)
    made = Extractor(torch.zeros(width), torch.zeros(width), torch.ones(width), torch.zeros(BUCKETS), most=2)
    features = torch.zeros(3, width).double()
    features[:, :3] = torch.eye(3)
    made.kept["x"] = Phrases((("a",), ("b",), ("c",)), features, torch.eye(3, dtype=torch.bool))
    policy = ExtractPolicy(made)
    policy.free.data[:3] = torch.tensor(scores).double()
    return policy


ORDERS = list(permutations(range(3), 2))
WORTH = {frozenset((0, 1)): 0.4, frozenset((0, 2)): 0.1, frozenset((1, 2)): 0.3}
SLOPE = torch.tensor([-0.002252, 0.059135, -0.056884]).double()


def test_draws_without_replacement_by_enumeration() -> None:
    """Oracle 2: laws of ordered draws, the value and its slope by the score function, and the KL."""
    policy = letters((1.0, 0.0, -1.0))
    drawn = [Drawn("", order) for order in ORDERS]
    logs, gaps = policy.terms(["x"] * 6, drawn)
    p = logs.exp()
    expected = {"ab": 0.486330, "ac": 0.178911, "ba": 0.215556, "bc": 0.029172, "ca": 0.065818, "cb": 0.024213}
    found = {"".join("abc"[i] for i in order): float(x) for order, x in zip(ORDERS, p.tolist(), strict=True)}
    assert found == pytest.approx(expected, abs=1e-6)
    worth = torch.tensor([WORTH[frozenset(order)] for order in ORDERS]).double()
    assert float(p @ worth) == pytest.approx(0.321243, abs=1e-6)
    (grad,) = torch.autograd.grad((p.detach() * worth * logs).sum(), policy.free, retain_graph=True)
    assert torch.allclose(grad[:3], SLOPE, atol=1e-6)
    assert float(p @ gaps) == pytest.approx(0.430235, abs=1e-6)
    assert torch.allclose(
        draw_laws(torch.zeros(2), torch.eye(2).bool(), (0, 1)).exp(), torch.tensor([[0.5, 0.5], [0, 1]])
    )


@pytest.mark.parametrize("c", [0.0, 0.3])
def test_leaving_one_out_is_unbiased_of_reward_and_divergence(c: float) -> None:
    """Every pair of draws, weighed by its probability: the mean step is the slope of `E R - c KL`, also though the
    second draw's KL depends on the first.
    """
    policy = letters((1.0, 0.0, -1.0))
    logs, gaps = policy.terms(["x"] * 6, [Drawn("", order) for order in ORDERS])
    worth = torch.tensor([WORTH[frozenset(order)] for order in ORDERS]).double()
    (exact,) = torch.autograd.grad((logs.exp() * (worth - c * gaps)).sum(), policy.free, retain_graph=True)
    mean = torch.zeros_like(exact)
    for i, j in product(range(6), repeat=2):
        gain = advantages((worth - c * gaps.detach())[[i, j]].unsqueeze(0))[0]
        loss = -(gain * logs[[i, j]]).mean() + c * gaps[[i, j]].mean()
        (grad,) = torch.autograd.grad(loss, policy.free, retain_graph=True)
        mean -= float((logs[i] + logs[j]).exp()) * grad
    assert torch.allclose(mean, exact, atol=1e-10)
    if c == 0:
        assert torch.allclose(mean[:3], SLOPE, atol=1e-6)


def test_controller_by_hand() -> None:
    for kl, expected in ((1.0, 0.0051), (0.45, 0.00495), (0.0, 0.0049)):
        assert controlled(0.005, kl, 0.5) == pytest.approx(expected, abs=1e-12)
    assert controlled(0.005, 1.0, 0.5, horizon=1) == pytest.approx(0.006)


def test_advantages_leave_failures_out() -> None:
    found = advantages(torch.tensor([[1.0, 3.0, math.nan], [2.0, math.nan, math.nan]]).double())
    assert found.tolist() == [[-2.0, 2.0, 0.0], [0.0, 0.0, 0.0]]


def test_draws_follow_their_law() -> None:
    """Frequencies of 4000 ordered draws within five standard errors."""
    policy, drawn = letters((1.0, 0.0, -1.0)), torch.Generator().manual_seed(1)
    rows = policy.draw(["x"], 4000, drawn)[0]
    logs, _ = policy.terms(["x"] * 6, [Drawn("", order) for order in ORDERS])
    for order, p in zip(ORDERS, logs.detach().exp().tolist(), strict=True):
        share = sum(one.choice == order for one in rows) / 4000
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / 4000)
    assert policy(["x"]) == ["a; b"]


# ---------------------------------------------------------------------------------------------------------- whole runs


@dataclass
class Echo:
    """A black box that writes some words of what it is asked: of a hint's line where `heeds`."""

    heeds: bool = True
    name: str = "echo"
    fails: frozenset[str] = frozenset()
    calls: int = 0

    def generate(self, prompts: Any, *, seed: int = 0, temperature: float = 0, max_new_tokens: int = 8) -> Any:
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        if any(word in prompt for word in self.fails for prompt in asked):
            raise SteerError("the box is broken")
        self.calls += len(asked)
        texts = [p.partition("mention: ")[2].replace(";", "") if self.heeds else "nothing at all" for p in asked]
        return type("Drawn", (), {"texts": texts, "tokens": None})()


THINGS = [
    "lake",
    "boat",
    "harbour",
    "ferry",
    "storm",
    "captain",
    "island",
    "whale",
    "anchor",
    "sailor",
    "beacon",
    "sea",
]
PLACES = ["Oslo", "Bergen", "Ostby", "Turku", "Riga", "Gdansk", "Kiel", "Malmo", "Visby", "Narvik", "Bodo", "Tromso"]


def rows(count: int = 60) -> list[dict[str, Any]]:
    """Articles whose reference tells of the place, which is capitalised, and never of the rest."""
    made = []
    for i in range(count):
        place, thing, other = PLACES[i % 12], THINGS[(i * 5) % 12], THINGS[(i * 7 + 3) % 12]
        text = f"the {thing} of {place} waited while the {other} {i} was there . nobody knew of {THINGS[(i + 1) % 12]}"
        made.append({"id": str(i), "input": text, "reference": f"{place} ."})
    return made


SHORT: dict[str, Any] = {"most": 1, "inputs": 8, "rounds": 6, "evaluate": 12, "best": 2, "learning_rate": 0.3}


def test_a_stimulus_is_trained_and_measured(tmp_path: Path) -> None:
    box = Echo()
    made = train_stimulus(box, rows(), "rouge:kinds=1", work=tmp_path / "w", **SHORT)
    assert isinstance(made, steer.Artifact)
    metrics = made.card.metrics
    assert metrics["heeded"]["gain"] > 0 and metrics["sft"]["auroc"] > 0.9 and metrics["calls"] == box.calls
    lines = {line["name"]: line for line in metrics["table"]}
    assert set(lines) == {"none", "random", "SFT", "the reference's", "best of 2", "after the rounds"}
    assert lines["the reference's"]["reward"] == pytest.approx(1.0)  # the place alone
    assert lines["SFT"]["over_random"] > 0 and lines["after the rounds"]["over_before"] is not None
    assert made.card.kind == "stimulus" and made.card.model == {"name": "echo"} and made.card.data["rows"] == 48
    edit = made()
    assert edit.rewrite(rows()[0]["input"]) == "Write a news summary in two sentences.\nIt must mention: oslo"

    again = Echo()
    same = train_stimulus(again, rows(), "rouge:kinds=1", work=tmp_path / "w", **SHORT)
    assert again.calls == 0 and artifacts_equal(made, same)
    fresh = train_stimulus(Echo(), rows(), "rouge:kinds=1", **SHORT)
    assert artifacts_equal(made, fresh)


def artifacts_equal(a: Any, b: Any) -> bool:
    return bool(a.card == b.card and all(torch.equal(x, b.tensors[name]) for name, x in a.tensors.items()))


def test_the_reward_alone_teaches(tmp_path: Path) -> None:
    """From equal scores, without a reference: a hint that names a place is worth more."""
    plain = [row["input"] for row in rows()]
    assert read_rows(plain, StimulusSettings()) == read_rows([{"input": text} for text in plain], StimulusSettings())
    reward = parse_reward("keywords:" + ",".join(PLACES))
    long = {**SHORT, "rounds": 25, "inputs": 16, "hints": 6, "calls": 4000}
    made: Any = train_stimulus(Echo(), plain, reward, stage="rl", force=True, beta=0.001, target_kl=2.0, **long)
    rounds = [one["reward"] for one in made.card.metrics["rounds"]]
    assert sum(rounds[-5:]) / 5 > 4 * rounds[0]
    table = {line["name"]: line for line in made.card.metrics["table"]}
    gain = table["after the rounds"]
    assert gain["over_before"] - gain["over_before_half"] > 0 and "the reference's" not in table


def test_a_box_that_ignores_hints_is_named() -> None:
    with pytest.raises(SteerError, match="ignores the hint"):
        train_stimulus(Echo(heeds=False), rows(), "rouge", **SHORT)
    with pytest.raises(SteerError, match=r"does not heed the hint.*force"):
        train_stimulus(Echo(heeds=False), rows(), None, stage="sft", **{**SHORT, "best": 0})


def test_failures_are_dropped_until_there_are_too_many() -> None:
    """One input of 48 has a hint that breaks the box, which is a twelfth of its round's."""
    settings = StimulusSettings(**SHORT)
    known = split(read_rows(rows(), settings), None, settings).learnt[0]
    place = known.reference.split()[0]  # type: ignore[union-attr]
    data = [
        {**r, "input": r["input"].replace(place, "Zagreb"), "reference": "Zagreb ."} if r["id"] == known.key else r
        for r in rows()
    ]
    short = {**SHORT, "inputs": 12, "probe": 4}
    made: Any = train_stimulus(Echo(fails=frozenset({"zagreb"})), data, "rouge:kinds=1", force=True, **short)
    assert 0 < max(one["failed"] for one in made.card.metrics["rounds"]) <= 0.1
    with pytest.raises(SteerError, match=r"% of the texts of round 1 failed: the box is broken"):
        train_stimulus(Echo(fails=frozenset({"oslo", "riga", "kiel", "visby"})), rows(), "rouge:kinds=1", **SHORT)


def test_the_budget_ends_the_rounds() -> None:
    reward = parse_reward("keywords:" + ",".join(PLACES))
    short = {**SHORT, "rounds": 50, "evaluate": 4, "probe": 4, "learning_rate": 1e-3, "most": 2}
    made: Any = train_stimulus(Echo(), rows(), reward, stage="rl", force=True, calls=150, **short)
    assert 0 < len(made.card.metrics["rounds"]) < 50 and "150 calls" in made.card.metrics["stopped"]
    assert made.card.metrics["calls"] <= 150


def test_texts_are_judged_whole_and_asked_once(tmp_path: Path) -> None:
    class Long(Echo):
        def generate(self, prompts: Any, **more: Any) -> Any:
            drawn = super().generate(prompts, **more)
            drawn.texts = ["One ends. Two is cut"] * len(prompts)
            drawn.tokens = [[5] * 8] * len(prompts)
            return drawn

    path = tmp_path / "texts.jsonl"
    box = BlackBox(Long(), {"temperature": 0, "max_new_tokens": 8}, path=path)
    bench = Bench(box, Template("{prompt} {hint}"), parse_reward("length"))
    assert bench.texts(["x", "x", "y"], ["h", "h", "h"]) == [["One ends."]] * 3 and box.model.calls == 2
    assert bench.worth(["x"], ["h"]).tolist() == [2.0] and box.tokens == 16
    path.write_text(path.read_text() + '\n{"key": "cut sho')
    later = BlackBox(Echo(), {"temperature": 0, "max_new_tokens": 8}, path=path)
    later.model.name = "echo"
    assert len(later.known) == 2 and later.new(["x h"], 1) == 1  # known, yet not asked for in this run
    assert shares(["one two", "x", ""], [["One ends."], [None], ["x"]]).nan_to_num(-1).tolist() == [0.5, -1, -1]


def test_rouge_of_rows() -> None:
    assert Rouge("a cat", ("1",)).rate("a dog") == pytest.approx(0.5)
    reward = parse_reward("rouge:kinds=1")
    assert repr(reward) == "rouge:kinds=1" and repr(parse_reward('rouge:kinds="1/2"')) == 'rouge:kinds="1/2"'
    assert repr(parse_reward("rouge")) == "rouge"
    with pytest.raises(InputError, match="reference"):
        steer.score(["x"], reward, prompts=["y"])


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("data", "settings", "reward", "field"),
    [
        (rows(19), {}, "rouge", "at least 20"),
        ([*rows(25), {"reference": "x"}], {}, "rouge", r"data\[25\]\.input"),
        ([*rows(25), {"input": "a new one", "reference": 3}], {}, "rouge", r"data\[25\]\.reference"),
        ([{"input": r["input"]} for r in rows()], {}, "sentiment", "rows with reference or hint"),
        ([{"input": r["input"], "hint": "a"} for r in rows()], {}, "rouge", r"data\[0\]\.reference"),
        (rows(), {"stage": "rl"}, None, "reward"),
        (rows(), {}, "brightness", "brightness"),
        (rows(), {"template": "Say it: {prompt}"}, "rouge", "template"),
        (rows(), {"template": "hint-olny"}, "rouge", "template"),
        (rows(), {"calls": 20}, "rouge", "calls"),
        (rows(), {"policy": "lm"}, "rouge", "policy"),
        (rows(), {"hints": 1}, "rouge", "hints"),
        (rows(), {"moste": 3}, "rouge", "most"),
    ],
)
def test_bad_input_is_named_before_the_box_is_asked(data: Any, settings: Any, reward: Any, field: str) -> None:
    box = Echo()
    with pytest.raises(InputError, match=field):
        train_stimulus(box, data, reward, **settings)
    assert box.calls == 0


def test_splits() -> None:
    settings = StimulusSettings()
    doubled = read_rows([*rows(40), {**rows(3)[1], "reference": "other"}], settings)
    parts = split(doubled, None, settings)
    assert parts.doubles == 1 and len(parts.learnt) == 32 and len(parts.held) == 8
    assert not {row.key for row in parts.learnt} & {row.key for row in parts.held}
    with pytest.raises(InputError, match=r"test\[1\]"):
        split(
            read_rows(rows(30), settings),
            read_rows([{"input": "new"}, {"input": rows()[4]["input"]}], settings),
            settings,
        )


# ---------------------------------------------------------------------------------------------------------- killed runs


_KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_train_stimulus import SHORT, Echo, rows
from steer.train.stimulus import train_stimulus

class Slow(Echo):
    def generate(self, prompts, **more):
        time.sleep(0.1)
        return super().generate(prompts, **more)

train_stimulus(Slow(), rows(), "rouge:kinds=1", work=Path({work!r}), **SHORT)
"""


def test_a_killed_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    work = tmp_path / "w"
    code = _KILLED.format(tests=str(Path(__file__).parent), work=str(work))
    running = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 300
    while not (work / "state.safetensors").is_file() and running.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert (work / "state.safetensors").is_file()
    box = Echo()
    resumed = train_stimulus(box, rows(), "rouge:kinds=1", work=work, **SHORT)
    whole = Echo()
    assert artifacts_equal(resumed, train_stimulus(whole, rows(), "rouge:kinds=1", **SHORT)) and box.calls < whole.calls


def test_a_run_of_rounds_is_its_seed_alone() -> None:
    """The same seed draws the same rounds; another policy state in `work` is refused."""
    settings = StimulusSettings(**{**SHORT, "seed": 3})
    found = []
    for _ in range(2):
        policy = ExtractPolicy.of([row["input"] for row in rows()], settings)
        policy.begin()
        bench = Bench(
            BlackBox(Echo(), {"temperature": 0, "max_new_tokens": 8}),
            settings.slots,
            parse_reward("keywords:Oslo,Riga"),
        )
        learnt = [Row(r["id"], r["input"], None, ()) for r in rows()]
        Rounds(policy, learnt, bench, settings)()
        found.append(policy.free.detach().clone())
    assert torch.equal(*found) and bool((found[0] != 0).any()) and words("Oslo") == ["oslo"]
