"""The family `steer eval`: goals, concepts, reliability and rankings against numbers by hand, and its report."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import steer
from steer.cli import main
from steer.cli.options import COMMANDS, RENAMED, EvalOptions
from steer.cli.recipe import load_recipe
from steer.core import InputError, Reward, Samples, SteerError
from steer.measure.concept import (
    Base,
    Concept,
    ConceptSettings,
    ModelJudge,
    RuleJudge,
    Written,
    cut,
    evaluate_concepts,
    harmonic,
    parse_rating,
)
from steer.measure.distances import interval
from steer.measure.frontier import Frontier, Point
from steer.measure.goals import (
    DIMENSIONS,
    GoalSettings,
    Scale,
    binned,
    coverage_share,
    measure_goals,
    metrics,
    mtld,
    request,
    uniform_weights,
)
from steer.measure.rankings import Pair, accuracy, idealised, rank_pairs, wilson
from steer.measure.reliability import Choice, effectiveness, entanglement, measure_reliability, slopes, spearman
from steer.rewards import as_reward, lift

PAIRS = [{"positive": "the sun is good", "negative": "the rain is bad"}, {"positive": "happy", "negative": "sad"}]


def rows(*values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------- steerability


def test_steerability_of_three_answers_is_worked_out_by_hand() -> None:
    """From (.5, .5) to (.8, .5): .7, .6 goes two thirds of the way and a third aside; .2, .5 goes back."""
    source, goal = rows((0.5, 0.5)).expand(3, 2), rows((0.8, 0.5)).expand(3, 2)
    found = metrics(source, goal, rows((0.7, 0.6), (0.9, 0.5), (0.2, 0.5)))
    assert found["error"].tolist() == pytest.approx([0.1414213562, 0.1, 0.6], abs=1e-8)
    assert found["miscalibration"].tolist() == pytest.approx([1 / 3, 1 / 3, 2], abs=1e-8)
    assert found["orthogonality"].tolist() == pytest.approx([0.4472135955, 0, 0], abs=1e-8)
    with pytest.raises(InputError, match="shift of 0"):
        metrics(source, source, goal)


def test_error_is_the_hypotenuse_and_orthogonality_the_sine() -> None:
    generator = torch.Generator().manual_seed(0)
    z0, goal, z = (torch.rand(200, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    found = metrics(z0, goal, z)
    d, moved, missed = goal - z0, z - z0, goal - z
    along = (missed * d).sum(1) / d.norm(dim=1)
    across = (missed.square().sum(1) - along.square()).clamp_min(0).sqrt()
    assert torch.allclose(found["error"].square(), along.square() + across.square(), atol=1e-12)
    cosine = (moved * d).sum(1) / moved.norm(dim=1) / d.norm(dim=1)
    assert torch.allclose(found["orthogonality"], (1 - cosine.square()).clamp_min(0).sqrt(), atol=1e-7)
    assert torch.allclose(found["miscalibration"], along.abs() / d.norm(dim=1), atol=1e-12)


def test_bins_have_no_overflow_at_the_end_of_the_scale() -> None:
    source = rows((1.0,), (0.95,), (0.95,), (0.5,), (0.5,), (0.5,))
    there = binned(source, rows((1.0,), (0.99,), (1.0,), (0.65,), (0.0,), (1.0,)))
    assert ((there - source) * 7).round().squeeze(1).tolist() == [0, 0, 0, 1, -2, 3]


def test_lexical_diversity_is_counted_by_hand() -> None:
    assert mtld("the cat sat on the mat the cat ran") == pytest.approx(9, abs=1e-12)
    assert mtld("a b a c") == pytest.approx((4 + 4 / (0.25 / 0.28)) / 2, abs=1e-12) == pytest.approx(4.24)
    assert mtld("one two three") == 3 and mtld("") == 0


def test_scales_span_the_central_part_and_clip() -> None:
    values = torch.stack([torch.linspace(0, 100, 101), torch.linspace(5, 6, 101)], 1)
    scale = Scale.fit(["a", "b"], values)
    assert scale.low == pytest.approx((2.5, 5.025)) and scale.high == pytest.approx((97.5, 5.975))
    assert scale(rows((50, 5.5), (0, 7))).flatten().tolist() == pytest.approx([0.5, 0.5, 0, 1])
    with pytest.raises(InputError, match="at least 20"):
        Scale.fit(["a"], values[:19, :1])
    with pytest.raises(InputError, match=r"dimension b.*varies"):
        Scale.fit(["a", "b"], torch.stack([values[:, 0], torch.ones(101)], 1))


def test_coverage_of_three_weights_and_of_uniform_points() -> None:
    weights = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert coverage_share(weights) == pytest.approx(2.6666666667 / 3) == pytest.approx(0.8888888889)
    generator = torch.Generator().manual_seed(0)
    even = torch.rand(400, 2, generator=generator, dtype=torch.float64)
    corner = 0.5 + 0.15 * torch.randn(400, 2, generator=generator, dtype=torch.float64)
    w, good = uniform_weights(even, generator)
    _, bad = uniform_weights(corner.clamp(0, 1), generator)
    assert abs(float(w.sum()) - 1) < 1e-12 and good.share > 0.8 and abs(good.auc - 0.5) < 0.08
    assert bad.share < 0.6 and bad.auc > 0.75


def test_requests_say_how_much() -> None:
    text = request("Hello.", {"length": 0.15, "sentiment": -0.6, "pace": 0.3}, negative=True)
    assert "slightly longer, much more negative, higher in pace. Do not change anything else" in text
    assert text.endswith("\n\nHello.")


class Obedient:
    """A model whose dimension `x` answers are what the prompt asks for; it stands for a model that can be told."""

    def generate(self, prompts: list[str], *, edits: Any, n: int, seed: int, **_: Any) -> Any:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(prompts) * n, generator=generator) * 0.1
        moved = []
        for i, prompt in enumerate(p for p in prompts for _ in range(n)):
            x, y = map(float, prompt.split("\n\n")[1].split())
            by = 0.3 * ("higher in x" in prompt) - 0.3 * ("lower in x" in prompt)
            mine = edits[i // n] if edits and isinstance(edits[0], list) else edits
            by += sum(0.5 * edit.strength for edit in mine)
            moved.append(f"{x + by + float(noise[i]):.4f} {y:.4f}")
        zero = torch.zeros(len(moved), dtype=torch.float64)
        return Samples(prompts, moved, torch.arange(len(moved)) // n, zero)


def test_a_model_that_obeys_is_steerable_and_slopes_are_those_of_its_edit() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Push:
        strength: float = 1.0

    texts = [f"{i / 40:.3f} {(i * 7 % 40) / 40:.3f}" for i in range(40)]
    x = lift(lambda outputs: torch.tensor([float(t.split()[0]) for t in outputs]))
    y = lift(lambda outputs: torch.tensor([float(t.split()[1]) for t in outputs]))
    settings = GoalSettings(sources=20, goals=8, active=1, best_of=8)
    found = measure_goals(Obedient(), texts, {"x": x, "y": y}, {"x": Push()}, settings)
    by = {r.method: r for r in found.rows}
    assert list(by) == ["prompt", "prompt + negative", "best of 8", "edits", "edits + prompt"]
    # A unit of strength moves x by .5; the scale's span is 95% of about 0 to .975, and clips what leaves it.
    assert 0.3 < found.slopes["x"] < 0.55
    assert by["best of 8"].error < by["prompt"].error and by["best of 8"].error_high < by["prompt"].error_high
    assert by["prompt"].error_low <= by["prompt"].error <= by["prompt"].error_high
    assert found.coverage.share > 0.3 and len(found.deciles["prompt"]) == 10 and "20 sources x 8 goals" in found.table()
    with pytest.raises(InputError, match="active"):
        measure_goals(Obedient(), texts, {"x": x, "y": y}, None, GoalSettings(active=3))
    broken = lift(lambda outputs: torch.tensor([math.inf] * len(outputs)))
    with pytest.raises(InputError, match=r"dimension y.*sample 0"):
        measure_goals(Obedient(), texts, {"x": x, "y": broken}, None, settings)


# ------------------------------------------------------------------------------------------------------------ concepts


def test_harmonic_means_and_ratings() -> None:
    assert harmonic(torch.tensor([[2, 1, 2], [2, 2, 2], [0, 2, 2], [1, 1, 1]])).tolist() == pytest.approx(
        [1.5, 2, 0, 1]
    )
    assert [parse_rating(t) for t in ("Rating: 1 ... Rating: 2.", "rating: **0**", "Rating: 3", "good")] == [
        *(2, 0),
        *(None, None),
    ]
    assert cut(torch.tensor([0.0, 5, 6, 9, 9.5]), torch.arange(11)).tolist() == [0, 0, 1, 1, 2]


def test_the_rules_judge_as_they_say() -> None:
    concept = Concept("the sea", ("sea", "wave", "salt"), None)
    plain = Written(["rain falls on the roof today"] * 4, torch.full((4,), 10.0))
    base = Base(plain, plain)
    told = Written(
        ["no word of it here", "the sea was calm", "sea and wave and salt", "sea sea sea sea sea sea"],
        torch.tensor([12.5, 12.6, 20.1, 5.0]),
    )
    found = RuleJudge().rate(concept, ["Why does rain fall?"] * 4, told, base)
    assert found[:, 0].tolist() == [0, 1, 2, 1] and found[:, 2].tolist() == [2, 1, 0, 0]
    assert found[:, 1].tolist() == [0, 0, 0, 0]  # none has more of the question's words than the usual text


class Writer:
    """A model that writes the same text whatever is asked."""

    def generate(self, prompts: list[str], **_: Any) -> Samples:
        zero = torch.zeros(len(prompts), dtype=torch.float64)
        texts = ["words that say this and that"] * len(prompts)
        return Samples(prompts, texts, torch.arange(len(prompts)), zero)

    def log_likelihood(self, samples: Samples) -> tuple[torch.Tensor, torch.Tensor]:
        one = torch.ones(len(samples), dtype=torch.float64)
        return -one, one


def test_factors_are_chosen_and_reported_on_different_halves() -> None:
    """Under pure noise the factor that is best on the prompts that chose it looks better than it is; on others not."""
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Nothing:
        strength: float = 1.0

    class Noise:
        name = "noise"
        generator = torch.Generator().manual_seed(0)

        def rate(self, concept: Any, instructions: Any, written: Any, base: Any) -> torch.Tensor:
            return torch.randint(1, 3, (len(instructions), 3), generator=self.generator)

    levels = torch.tensor(list(itertools.product((1, 2), repeat=3)))
    truth = float(harmonic(levels).mean())
    split, same = [], []
    for kept, whole in ((split, True), (same, False)):
        for _ in range(30):
            concepts, settings = [Concept("x", ("x",), Nothing())], ConceptSettings(split=whole)
            report = evaluate_concepts(Writer(), concepts, ["Go on."] * 12, Noise(), settings)
            kept.append(next(r.score for r in report.rows if r.method == "vector"))
    honest, half = interval(split)
    assert abs(honest - truth) < 2.5 * half and interval(same)[0] - interval(same)[1] > truth
    assert "optimistic" in report.table()
    with pytest.raises(InputError, match="no-split"):
        evaluate_concepts(Writer(), concepts, ["Go on."], Noise())


def test_a_judge_that_cannot_be_read_ends_the_run() -> None:
    class Model:
        def generate(self, prompts: list[str], **_: Any) -> Any:
            class Drawn:
                texts = ["Rating: 2"] * (len(prompts) - 1) + ["I would not say"]

            return Drawn

    judge, concept = ModelJudge(Model(), "model:x"), Concept("x", ("x",), None)
    many = Written(["a"] * 10, torch.ones(10))
    assert judge.rate(concept, ["?"] * 10, many, Base(many, many)).sum() == 58 and judge.unread == 1
    with pytest.raises(SteerError, match="2 of 33 answers have no rating"):
        judge.rate(concept, ["?"], Written(["a"], torch.ones(1)), Base(many, many))


# --------------------------------------------------------------------------------------------- reliability and rankings


def test_slopes_of_three_prompts() -> None:
    propensities = rows((-0.5, 0.1, 0.9), (0.3, 0.2, -0.1), (0, 0, 0.3))
    found = slopes((-1, 0, 1), propensities)
    assert found.tolist() == pytest.approx([0.7, -0.2, 0.15], abs=1e-12)
    assert float(found.mean()) == pytest.approx(0.2166666667) and float((found < 0).double().mean()) == 1 / 3
    assert spearman((-1, 0, 1), propensities).tolist() == pytest.approx([1, -1, math.sqrt(3) / 2])


def test_effectiveness_and_entanglement() -> None:
    assert effectiveness((0.5, 0.9), (0.8, 0.85)) == pytest.approx(0.05, abs=1e-12)
    assert effectiveness((1.0,), (0.9,)) == pytest.approx(-0.1)
    before, after = (0.6, 0.7, 0.3), (0.5, 0.72, 0.3)
    assert entanglement(before, after) == pytest.approx(0.058878, abs=1e-6)
    assert entanglement(before, after, falls=True) == pytest.approx(0.1) and entanglement((1,), (1,), falls=True) == 0


def test_idealised_accuracy_falls_with_beta() -> None:
    ratios, agreement = torch.tensor([0.5, -1.2, -3]), torch.tensor([0.7, 0.9, 0.6])
    found = [idealised(ratios, agreement, beta) for beta in (0.1, 0.5, 2)]
    assert found == pytest.approx([1, 2 / 3, 1 / 3])
    assert accuracy(torch.tensor([1.0, 0.0, -1.0, 0.0])) == 0.5
    low, high = wilson(0.8, 10)
    assert (low, high) == pytest.approx((0.490162, 0.943318), abs=1e-5) and wilson(1.0, 5)[1] == pytest.approx(1)


@pytest.fixture(scope="module")
def vector(tiny_lm: Any) -> Any:
    return steer.train_vector(tiny_lm, PAIRS)


def test_texts_are_scored_as_the_library_scores_them(tiny_lm: Any) -> None:
    texts = ["the sun", "a dog is happy", "rain"]
    found = tiny_lm.score("hello world", texts)
    ids = tiny_lm.encode("hello world")
    for i, text in enumerate(texts):
        tail = tiny_lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = tiny_lm.network(torch.tensor([[*ids, *tail]])).logits[0, len(ids) - 1 : -1].double()
        picked = torch.log_softmax(logits, -1)[torch.arange(len(tail)), tail]
        assert float(found.log_prob[i]) == pytest.approx(float(picked.sum()), abs=1e-4)
        assert bool(found.greedy[i]) == bool((logits.argmax(-1) == torch.tensor(tail)).all())
        assert float(found.mean[i]) == pytest.approx(float(picked.mean()), abs=1e-4)
    alone = tiny_lm.score(["hello world", "a cat"], ["the sun", "rain"], edits=[None, None])
    assert float(alone.log_prob[0]) == pytest.approx(float(found.log_prob[0]), abs=1e-4)
    for bad, field in (
        (([], "x"), "prompts"),
        (("x", []), "texts"),
        (("x", [""]), r"texts\[0\]"),
        ((["a", "b"], ["c"]), "texts"),
    ):
        with pytest.raises(InputError, match=field):
            tiny_lm.score(*bad)


def test_scores_under_an_edit_are_those_of_generation(tiny_lm: Any, vector: Any) -> None:
    """What was drawn under hidden edits, and under edits of the next token, is as likely as when it was drawn."""
    value = steer.train_value(tiny_lm, ["the sun", "a cat", "hello"], "length", samples=4, max_new_tokens=4)
    for edits in (
        vector(0.5),
        vector(0.5, scope="generated"),
        vector(0.5, scope="reply"),
        value(beta=0.5, model=tiny_lm),
    ):
        drawn = tiny_lm.generate(["the sun", "a cat"], edits=edits, seed=0, max_new_tokens=5, eos_token_id=[])
        process = tiny_lm.scorer(5, edits, 2)
        total, _ = process.score_tokens(process.encode(["the sun", "a cat"]), drawn.tokens)
        assert torch.allclose(total, drawn.log_prob, atol=1e-4)


def test_pairs_are_ranked_by_every_judge(tiny_lm: Any, vector: Any) -> None:
    pairs = [
        Pair("the sun", "is good", "is bad"),
        Pair("a cat", "happy dog", "sad rain", 0.6),
        Pair("x", "good", "good"),
    ]
    found = rank_pairs(pairs, rewards={"sentiment": as_reward("sentiment")}, model=tiny_lm, edits={"v": vector(0.5)})
    by = {(r.judge, r.by): r.accuracy for r in found.rankings}
    assert by[("sentiment", "reward")] == pytest.approx(2.5 / 3)
    scores = [[tiny_lm.score(p.prompt, [t]).log_prob for t in (p.chosen, p.rejected)] for p in pairs]
    margins = torch.cat([a - b for a, b in scores])
    assert by[("model", "sum")] == accuracy(margins)
    ideal = idealised(margins, torch.tensor([0.99, 0.6, 0.99]), 0.1)
    assert by[("perfect DPO", "idealised")] == ideal and ("v", "a token") in by
    with pytest.raises(InputError, match="agreement"):
        rank_pairs([Pair("a", "b", "c", 1.0)], model=tiny_lm)


def test_an_edit_moves_choices_by_its_slope(tiny_lm: Any, vector: Any) -> None:
    choices = [Choice("the sun is", "good", ("bad",)), Choice("a dog is", "happy", ("sad", "bad"))]
    sides = {"rest": [Choice("hello", "world", ("rain",))]}
    found = measure_reliability(tiny_lm, {"up": choices}, vector(), [-0.5, 0.5], sides=sides)
    assert [s.strength for s in found.strengths] == [-0.5, 0.0, 0.5]
    by_strength = []
    for s in (-0.5, 0.0, 0.5):
        answers = tiny_lm.score(["the sun is"] * 2, ["good", "bad"], edits=vector(s) if s else ())
        by_strength.append(float(answers.log_prob[0] - answers.log_prob[1]))
    assert found.slopes[0] == pytest.approx(by_strength[2] - by_strength[0], abs=1e-4)
    assert found.strengths[1].effectiveness == 0 and found.strengths[1].entanglement == 0
    assert "steered the wrong way" in found.table()


# ------------------------------------------------------------------------------------------------------------ frontier


def point(method: str, rewards: list[float], kls: list[float] | None, tokens: float = 10) -> Point:
    return Point(method, "", rewards, kls, "exact", tokens)


def test_points_that_none_beats_and_methods_at_equal_drift() -> None:
    found = Frontier(
        [
            point("base", [0, 0], [0, 0]),
            point("a", [1, 3], [1, 1]),
            point("a", [3, 5], [3, 3]),
            point("b", [1, 1], [2, 2]),
            point("c", [9, 9], None),
        ],
        candidates=8,
    )
    assert [(p.method, p.kl and p.kl[0]) for p in found.non_dominated()] == [("base", 0), ("a", 1), ("a", 3)]
    assert found.at_kl(2) == {"a": 3, "b": 1, "c": None} and found.at_kl(0.5)["a"] == 1
    mean, half = found.intervals_at_kl(2)["a"] or (0, 0)
    assert mean == 3 and half == pytest.approx(interval([2, 4])[1])
    assert "at KL 2: a 3.000" in found.table() and "not there: c" in found.table()
    cheap = Frontier([*found.points, point("d", [1, 1], [2, 2], tokens=1)])
    assert [p.method for p in cheap.non_dominated()] == ["base", "a", "a", "d"]


def test_every_setting_draws_as_many_texts(tiny_lm: Any, vector: Any) -> None:
    prompts = ["the sun", "a cat", "hello"]
    methods = {
        "best": [{"sampler": "best-of-n", "n": n} for n in (2, 4)],
        "fk": [{"sampler": "fk", "num_particles": 4, "beta": 1.0}],
        "tree": [{"sampler": "dts-star", "rollouts": 4, "batch": 2}],
        "v": [{"edits": vector(0.5)}],
    }
    settings: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": [], "candidates": 8, "also": ["sentiment"]}
    found = steer.frontier(tiny_lm, prompts, "length", methods, **settings)
    assert [p.tokens for p in found.points if p.method != "tree"] == [32] * 5
    assert all(len(p.rewards) == len(p.also["sentiment"]) == 3 for p in found.points)
    again = tiny_lm.generate(
        prompts * 4, sampler="best-of-n", n=2, reward="length", seed=0, max_new_tokens=4, eos_token_id=[]
    )
    assert found.points[1].rewards == pytest.approx(again.mean_reward().reshape(4, 3).mean(0).tolist())
    assert "every point drew 8 texts" in found.table()
    with pytest.raises(InputError, match="multiple of 3"):
        steer.frontier(tiny_lm, prompts, "length", {"b": [{"sampler": "best-of-n", "n": 3}]}, candidates=8)


# -------------------------------------------------------------------------------------------------------- command line


def test_the_family_is_one() -> None:
    family = {name: kind for name, kind in COMMANDS.items() if name.startswith("eval ")}
    assert {name.split()[1] for name in family} == {
        *("strength", "frontier", "search", "distance", "guidance"),
        *("goals", "concept", "reliability", "pairs"),
    }
    assert all(issubclass(kind, EvalOptions) for kind in family.values())
    assert set(RENAMED.values()) <= set(family)


@pytest.fixture(scope="module")
def files(tiny_lm: Any, vector: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    vector.save(folder / "up.safetensors")
    tale = "the sun is good and a dog is happy . rain is sad but the cat sat on a mat"
    tale_words = tale.split()
    texts = [" ".join(tale_words[i % 7 : i % 7 + 3 + i % 9]) + "." for i in range(30)]
    data: dict[str, list[Any]] = {
        "texts": [{"prompt": text} for text in texts],
        "concepts": [{"concept": "sun", "words": ["sun"], "edit": str(folder / "up.safetensors")}],
        "choices": [{"prompt": "the sun is", "wanted": "good", "other": "bad"}] * 3,
        "side": [{"prompt": "hello", "wanted": "world", "other": ["rain", "dog"]}],
        "pairs": [{"prompt": "a dog", "chosen": "is happy", "rejected": "is sad"}] * 4,
        "prompts": [{"prompt": "the sun"}, {"prompt": "a cat"}, {"prompt": "hello"}, {"prompt": "why"}],
    }
    for name, content in data.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    return folder


LINES = {
    "goals": "--texts {f}/texts.jsonl --dimension difficulty --dimension length --dimension sentiment --active 2 "
    "--sources 3 --goals 2 --best-of 2 --edit length={f}/up.safetensors --max-new-tokens 4",
    "concept": "--concepts {f}/concepts.jsonl --prompts {f}/prompts.jsonl --factors 1,2 --max-new-tokens 6",
    "reliability": "--edit {f}/up.safetensors --choices up={f}/choices.jsonl --side {f}/side.jsonl "
    "--strengths=-0.5,0.5",
    "pairs": "--pairs {f}/pairs.jsonl --reward sentiment --edit {f}/up.safetensors:0.5",
}


@pytest.mark.parametrize("name", list(LINES))
def test_a_report_is_a_page_with_its_numbers_and_its_recipe(
    name: str, files: Path, tiny_lm_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"eval {name} --model {tiny_lm_dir} --dtype float32 --out {tmp_path} {LINES[name].format(f=files)}"
    assert main(line.split()) == 0, capsys.readouterr().err
    capsys.readouterr()
    page = (tmp_path / "page.html").read_text()
    assert "data:image/png;base64," in page and f"eval {name}" in page and "nan" not in page.lower().split("base64")[0]
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / f"{name}.json").read_text())
    table = list(csv.DictReader((tmp_path / f"{name}.csv").open()))
    assert table
    step = load_recipe(tmp_path / "recipe.yaml").steps[0]
    assert step.command == f"eval {name}" and step.options.out == tmp_path  # type: ignore[attr-defined]
    first = (tmp_path / f"{name}.json").read_bytes()
    assert main(["run", str(tmp_path / "recipe.yaml")]) == 0
    assert (tmp_path / f"{name}.json").read_bytes() == first


BAD = [
    ("goals --texts {f}/prompts.jsonl", "texts"),
    ("goals --texts {f}/texts.jsonl --dimension lenght", "did you mean length?"),
    ("goals --texts {f}/texts.jsonl --edit pace={f}/up.safetensors", "edit"),
    ("goals --texts {f}/texts.jsonl --active 5", "active"),
    ("concept --concepts {f}/pairs.jsonl --prompts {f}/prompts.jsonl", "concept"),
    ("concept --concepts {f}/concepts.jsonl --prompts {f}/prompts.jsonl --factors 0,1", "factors"),
    (
        "concept --concepts {f}/concepts.jsonl --prompts {f}/prompts.jsonl --judge sentimant",
        "did you mean 'sentiment'?",
    ),
    ("concept --concepts {f}/concepts.jsonl --prompts {f}/side.jsonl", "prompts"),
    ("reliability --edit {f}/up.safetensors --choices {f}/pairs.jsonl", "wanted"),
    ("reliability --edit {f}/up.safetensors --choices {f}/choices.jsonl --side {f}/choices.jsonl", "side"),
    ("reliability --edit {f}/up.safetensors --choices {f}/choices.jsonl --strengths 0", "strengths"),
    ("pairs --pairs {f}/prompts.jsonl", "chosen"),
    ("pairs --pairs {f}/pairs.jsonl --beta 0", "beta"),
    ("pairs --pairs {f}/pairs.jsonl --tuned nowhere", "tuned"),
    ("frontier --prompts {f}/prompts.jsonl --reward sentiment --also brightness", "brightness"),
]


@pytest.mark.parametrize(("line", "field"), BAD, ids=[line for line, _ in BAD])
def test_bad_requests_end_with_one_line(
    line: str, field: str, files: Path, tiny_lm_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["eval", *line.format(f=files).split(), "--model", str(tiny_lm_dir), "--out", str(tmp_path / "x")]
    assert main(given) == 2
    said = capsys.readouterr()
    assert said.out == "" and field in said.err and len(said.err.strip().splitlines()) == 1, said.err


def test_shipped_dimensions_measure_texts() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    samples = Samples(["", ""], ["the cat sat on the mat the cat ran", "good"], torch.arange(2), zero)
    length = DIMENSIONS["length"]
    assert isinstance(length, Reward)
    assert length(samples).tolist() == pytest.approx([math.log(10), math.log(2)])
