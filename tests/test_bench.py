"""The benchmark's statistics, and that a figure runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from steer.bench import __main__ as bench
from steer.bench import bulk, language
from steer.bench.harness import Bench, Figure, alternate, interval, ratios


def test_interval_is_the_extremes_of_few_values_and_inner_order_statistics_of_many() -> None:
    assert interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert interval([1.0]) == (1.0, 1.0)
    # 2 P(Binomial(6, 1/2) = 0) = 1/32 is outside; of 20 values the 6th and 15th hold the median with probability .959.
    assert interval(list(range(6))) == (0, 5)
    assert interval(list(range(20))) == (5, 14)


def test_interval_covers_the_median_as_often_as_it_says() -> None:
    draws = torch.randn(2000, 15, generator=torch.Generator().manual_seed(0)).tolist()
    covered = sum(low <= 0 <= high for low, high in map(interval, draws)) / len(draws)
    assert 0.95 <= covered <= 0.985  # the law of order statistics says .965


def test_alternating_reverses_the_order_every_time() -> None:
    order: list[str] = []
    tasks = [lambda: order.append("a"), lambda: order.append("b")]
    seen = alternate(tasks, 3, clock=lambda task: float(task() is None))
    assert "".join(order) == "abbaab"
    assert seen == [[1.0] * 3, [1.0] * 3]


def test_a_bar_is_met_by_the_median_and_missed_by_the_whole_interval() -> None:
    assert Figure("x", "", [0.9, 0.98, 1.0], at_least=0.97).verdict == "pass"
    assert Figure("x", "", [0.9, 0.98, 1.0], at_most=0.97).verdict == "unclear"
    assert Figure("x", "", [0.98, 0.98, 1.0], at_most=0.97).verdict == "FAIL"
    assert Figure("x", "", [0.9]).verdict == ""
    assert ratios([2.0, 3.0], [1.0, 2.0]) == [2.0, 1.5]


def test_figures_of_a_tiny_model_run(tiny_lm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench.run(Bench(repeats=1, tokens=4, given=tiny_lm), ["steered", "readings", "unsteered", "value"])
    assert [row.name for row in rows] == ["steered"] * 3 + ["readings"] * 2 + ["unsteered"] * 2 + ["value"] * 2
    assert all(row.median > 0 for row in rows)
    assert capsys.readouterr().out.count("batch 8") == 4
    assert tiny_lm.network.generation_config.eos_token_id == 3  # put back


def test_a_bulk_job_and_a_loop_run_the_same_rows(tiny_lm: Any) -> None:
    (row,) = bulk.rate(Bench(repeats=1, given=tiny_lm), rows=4)
    assert row.median > 0 and row.at_least == 0.97


def test_a_share_of_a_bulk_job_says_how_long_it_took(
    tiny_lm: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bulk, "Bench", lambda: Bench(given=tiny_lm))
    bulk.main("12", "0/2")
    assert float(capsys.readouterr().out.splitlines()[-1]) > 0


def test_one_prompt_pass_serves_the_pool(tiny_lm: Any) -> None:
    (row,) = language.best_of_n(Bench(repeats=1, given=tiny_lm), length=20, n=3, tokens=2)
    assert row.median > 0


def test_extraction_says_that_it_was_skipped(tiny_lm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run(Bench(given=tiny_lm), ["extraction"]) == []
    assert "SKIPPED" in capsys.readouterr().out


def test_the_command_writes_json_and_refuses_unknown_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.FIGURES, "made-up", lambda given: iter([Figure("made-up", "", [2.0], at_most=1.0)]))
    assert bench.main(["made-up", "--json", str(tmp_path / "rows.json")]) == 1
    (row,) = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert (row["median"], row["verdict"]) == (2.0, "FAIL")
    with pytest.raises(SystemExit):
        bench.main(["no-such-figure"])
