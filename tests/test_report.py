"""The report: what it measures is what a direct computation gives, and it says where steering breaks."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steer.core import InputError
from steer.measure.report import (
    Report,
    ReportRow,
    _breaks,
    _interval,
    _jackknife,
    _ratio_interval,
    default_strengths,
    evaluate,
)
from steer.measure.tables import ranged
from steer.methods.prompt import SystemPrompt
from steer.methods.vector import SteeringVector
from steer.pictures.charts import draw_report
from steer.rewards import distinct_n

PROMPTS = ["a cat", "hello world", "the sun is", "why"]


@pytest.fixture(scope="module")
def edit() -> SteeringVector:
    generator = torch.Generator().manual_seed(0)
    return SteeringVector({layer: torch.randn(32, generator=generator) for layer in (0, 1)}).normalised()


@pytest.fixture(scope="module")
def report(tiny_lm: Any, edit: SteeringVector) -> Report:
    return evaluate(
        tiny_lm,
        PROMPTS,
        edit,
        strengths=[0.4, -0.4],
        reward="length",
        seed=3,
        max_new_tokens=8,
        n=2,
        system="a calm dog",
    )


def test_rows(report: Report) -> None:
    kinds = [(row.kind, row.strength) for row in report.rows]
    assert kinds == [
        ("unsteered", 0.0),
        ("steered", -0.4),
        ("steered", 0.4),
        ("random", -0.4),
        ("random", 0.4),
        ("system", None),
    ]
    assert [row.strength for row in report.of("random")] == [-0.4, 0.0, 0.4]
    base = report.rows[0]
    assert base.kl == 0 and base.perplexity_ratio == 1
    assert all(row.kl > 0 for row in report.rows[1:])  # type: ignore[operator]
    assert all(row.reward_low <= row.reward <= row.reward_high for row in report.rows)
    assert all(len(row.examples) == 2 and row.examples[0]["prompt"] == "a cat" for row in report.rows)


def test_a_row_is_what_a_direct_computation_gives(tiny_lm: Any, edit: SteeringVector, report: Report) -> None:
    made = tiny_lm.generate(PROMPTS, edits=replace(edit, strength=0.4), reward="length", seed=3, max_new_tokens=8, n=2)
    total, tokens = tiny_lm.log_likelihood(made)
    row = report.rows[2]
    assert row.reward == pytest.approx(float(made.reward.mean()), abs=1e-12)
    assert row.kl == pytest.approx(float(made.kl.mean()), rel=1e-6)
    assert row.kl_per_token == pytest.approx(float(made.kl.sum() / tokens.sum()), rel=1e-6)
    assert row.perplexity == pytest.approx(math.exp(-float(total.sum() / tokens.sum())), rel=1e-6)
    assert row.distinct_2 == distinct_n(made.texts, 2) and row.tokens == float(tokens.mean())
    per_prompt = torch.stack([made.kl.view(4, 2).sum(1), tokens.view(4, 2).sum(1).double()])
    draws = torch.randint(4, (20_000, 4), generator=torch.Generator().manual_seed(5))
    ratio = per_prompt[0, draws].sum(1) / per_prompt[1, draws].sum(1)
    ends = torch.quantile(ratio.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert (row.kl_low, row.kl_high) == pytest.approx(ends, rel=0.05)


def test_the_system_prompt_is_measured_against_the_plain_prompt(tiny_lm: Any, report: Report) -> None:
    made = tiny_lm.generate(PROMPTS, edits=SystemPrompt("a calm dog"), reward="length", seed=3, max_new_tokens=8, n=2)
    assert report.rows[-1].kl == pytest.approx(float(made.kl.mean()), rel=1e-6)


def test_random_directions_alternate_between_prompts(tiny_lm: Any, edit: SteeringVector, report: Report) -> None:
    pair = [replace(edit.random(seed), strength=0.4) for seed in (1, 2)]
    edits = [[pair[0]], [pair[1]], [pair[0]], [pair[1]]]
    made = tiny_lm.generate(PROMPTS, edits=edits, reward="length", seed=3, max_new_tokens=8, n=2)
    assert report.rows[4].kl == pytest.approx(float(made.kl.mean()), rel=1e-6)


def test_one_prompt_without_a_control(tiny_lm: Any, edit: SteeringVector) -> None:
    made = evaluate(tiny_lm, ["a cat"], edit, strengths=[0.1], reward="length", max_new_tokens=3, control=False)
    assert [row.kind for row in made.rows] == ["unsteered", "steered"]
    both = evaluate(tiny_lm, ["a cat"], edit, strengths=[0.1], reward="length", max_new_tokens=3)
    assert [row.kind for row in both.rows] == ["unsteered", "steered", "random"]


def test_nothing_runs_where_the_edit_does_not_fit(tiny_lm: Any) -> None:
    with pytest.raises(InputError, match="width 48"):
        evaluate(tiny_lm, PROMPTS, SteeringVector({0: torch.ones(48)}), reward="length")
    with pytest.raises(InputError, match="strength"):
        evaluate(tiny_lm, PROMPTS, SystemPrompt("x"))
    with pytest.raises(InputError, match="prompts"):
        evaluate(tiny_lm, [], SteeringVector({0: torch.ones(32)}))


def test_bootstrap_interval() -> None:
    # 2000 draws of a mean of 400: its quantiles lie within 0.02 of the normal ones, 5 standard errors of a quantile.
    values = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    low, high = _interval(values)
    half = 1.96 * float(values.std(correction=0)) / 20
    assert low == pytest.approx(float(values.mean()) - half, abs=0.02)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.02)


def test_the_jackknife_of_distinct_2() -> None:
    """Of two prompts by hand: all bigrams differ, and leaving one out leaves shares of 1 and 1/2."""
    one, two = ["a b a b a"], ["x y z"]
    shares = [distinct_n(two, 2), distinct_n(one, 2)]
    half = 1.96 * abs(shares[0] - shares[1]) / 2
    whole = distinct_n(one + two, 2)
    assert _jackknife([one, two]) == pytest.approx((max(0.0, whole - half), min(1.0, whole + half)))
    assert _jackknife([one]) == (None, None)


def test_pictures_on_ones_own_axes(report: Report, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots(2, 2)
    draw_report(report, ax=axes)
    assert [axis.get_title(loc="left") or axis.get_title() for axis in axes.flat] == [
        "Reward",
        "Drift",
        "Fluency",
        "Diversity",
    ]
    assert all(axis.collections for axis in axes.flat), "an interval on every panel"
    alone = Figure().subplots(2, 2)
    draw_report(replace(report, rows=[row for row in report.rows if row.kind != "random"]), ax=alone)
    named = [{line.get_label() for line in one[0][0].get_lines()} for one in (axes, alone)]
    assert "random direction, same norm" in named[0] - named[1] and "steered" in named[1]
    shown = [row.distinct_2 for row in report.rows if row.distinct_2 is not None]
    assert 0 <= axes[1][1].get_ylim()[0] < min(shown) and max(shown) <= axes[1][1].get_ylim()[1] < 1.05
    with pytest.raises(InputError, match="ax: got '1 axes'; allowed: 4 of matplotlib's axes"):
        draw_report(report, ax=axes[0][0])
    with pytest.raises(InputError, match="path: "):
        draw_report(report)


def test_the_interval_of_a_ratio_is_that_of_its_prompts() -> None:
    """Against the normal approximation of the log ratio, whose differences by prompt are independent."""
    draws = torch.Generator().manual_seed(2)
    tokens = torch.full((400,), 10.0)
    base, mine = (torch.randn(400, generator=draws) * 3 + mean for mean in (20, 24))
    low, high = _ratio_interval(torch.stack([mine, tokens], 1), torch.stack([base, tokens], 1))
    gap = (mine - base).double() / 10
    half = 1.96 * float(gap.std(correction=0)) / 20
    assert math.log(low) == pytest.approx(float(gap.mean()) - half, abs=0.01)
    assert math.log(high) == pytest.approx(float(gap.mean()) + half, abs=0.01)


def test_no_verdict_from_almost_nothing() -> None:
    """A ratio whose interval reaches below the limit breaks nothing; few prompts are named."""
    rows = [_row("unsteered", 0.0), replace(_row("steered", 0.2, 28.0), ratio_low=1.2, ratio_high=6.0)]
    assert _breaks(rows) == []
    report = Report("m", "a", "r", {"prompts": 4}, rows, [])
    assert (
        "4 prompts are few" in report.verdict and "few" not in Report("m", "a", "r", {"prompts": 40}, rows, []).verdict
    )


@pytest.mark.parametrize(
    ("mean", "half", "shown"),
    [
        (-0.0001, 0.2, "0.000 ±0.200"),
        (0.5, math.nan, "0.500"),
        (-0.5, 0.01, "-0.500 ±0.010"),
        (math.nan, math.nan, "-"),
    ],
)
def test_numbers_are_written_plainly(mean: float, half: float, shown: str) -> None:
    assert ranged(mean, half) == shown


def _row(kind: str, strength: float, perplexity: float = 10.0, distinct: float = 0.8) -> ReportRow:
    return ReportRow(
        kind=kind,
        strength=strength,
        reward=strength,
        reward_low=strength - 0.1,
        reward_high=strength + 0.1,
        kl=strength**2,
        kl_per_token=strength**2 / 10,
        perplexity=perplexity,
        perplexity_ratio=perplexity / 10,
        ratio_low=perplexity / 10 - 0.05,
        ratio_high=perplexity / 10 + 0.05,
        distinct_1=distinct,
        distinct_2=distinct,
        distinct_3=distinct,
        tokens=10.0,
    )


def test_breaks_are_the_first_on_each_side() -> None:
    rows = [
        _row("unsteered", 0.0),
        _row("steered", -0.2, 16.0),
        _row("steered", -0.1, 14.0),
        _row("steered", 0.1),
        _row("steered", 0.2, 12.0, 0.3),
        _row("steered", 0.3, 99.0),
        _row("random", 0.1, 99.0),
    ]
    found = _breaks(rows)
    assert [b.strength for b in found] == [-0.2, 0.2]
    assert "perplexity" in found[0].reason and "distinct-2" in found[1].reason
    made = Report("tiny", "calm", "sentiment", {}, rows, found)
    assert "breaks at -0.2" in made.verdict and made.table().count("< breaks") == 2
    assert "no strength" in replace(made, breaks=[]).verdict


@pytest.mark.parametrize(("suffix", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_suffix_is_the_format(report: Report, tmp_path: Path, suffix: str, begins: bytes) -> None:
    draw_report(report, tmp_path / f"r.{suffix}")
    assert (tmp_path / f"r.{suffix}").read_bytes().startswith(begins)


def test_other_suffixes_are_refused(report: Report, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.png, \.svg, \.pdf"):
        draw_report(report, tmp_path / "r.jpg")


def test_writing(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path / "new" / "folder")
    draw_report(report, tmp_path / "new" / "folder" / "report.png")
    files = {p.name: p for p in (tmp_path / "new" / "folder").iterdir()}
    assert set(files) == {"report.json", "report.png"}
    found = json.loads(files["report.json"].read_text())
    assert len(found["rows"]) == 6 and found["verdict"] == report.verdict and found["settings"]["seed"] == 3
    assert files["report.png"].read_bytes().startswith(b"\x89PNG")


def test_a_report_without_numbers_is_still_json_and_a_picture(tmp_path: Path) -> None:
    rows = [_row("unsteered", 0.0), replace(_row("steered", 1.0, 1e5), reward=math.nan, kl=None, kl_per_token=None)]
    report = Report("tiny", "calm", "sentiment", {}, rows, _breaks(rows))
    report.write(tmp_path)
    draw_report(report, tmp_path / "report.png")
    assert json.loads((tmp_path / "report.json").read_text())["rows"][1]["reward"] is None


def test_default_strengths(edit: SteeringVector) -> None:
    assert default_strengths(edit) == [-0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.3]
    assert default_strengths(replace(edit, operator="ablate")) == [0.0, 0.5, 1.0]
    many = replace(edit, directions=dict.fromkeys(range(10), torch.ones(32)))
    assert max(default_strengths(many)) == 0.3  # the layers share the dose


def test_the_sweep_is_kept_in_the_card(report: Report, tmp_path: Path) -> None:
    from steer.artifacts import Card, load, save

    path = tmp_path / "a.safetensors"
    save(path, {"0": torch.ones(2)}, Card(kind="vector", model={"name": "x"}, metrics={"best_layer": 1}))
    report.keep(path)
    tensors, card = load(path)
    assert torch.equal(tensors["0"], torch.ones(2)) and card.metrics["best_layer"] == 1
    assert [row[0] for row in card.metrics["sweep"]] == [-0.4, 0.0, 0.4]
    assert card.metrics["sweep"][0][1] == pytest.approx(report.of("steered")[0].perplexity_ratio, abs=1e-4)
    assert [row[2] for row in card.metrics["sweep"]] == [
        x in {b.strength for b in report.breaks} for x in (-0.4, 0.0, 0.4)
    ]
    with pytest.raises(InputError):
        report.keep(tmp_path / "nothing.safetensors")
