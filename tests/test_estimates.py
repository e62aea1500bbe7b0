"""Estimates before a job: what `--dry-run` counts, against what the job then reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steer.cli import main
from steer.cli.estimates import evaluations
from steer.cli.options import (
    DistanceOptions,
    FrontierOptions,
    GenerateOptions,
    GuidanceOptions,
    SearchOptions,
    StrengthOptions,
    TrainValueOptions,
    TrainVectorOptions,
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(["the sun", "a dog", "hello"]))
    return path


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"n": 5},
        {"sampler": "best-of-n", "n": 4, "reward": "length"},
        {"sampler": "fk", "reward": "length", "set": ["num_particles=6"]},
        {"sampler": "svdd", "reward": "length", "set": ["num_candidates=3"]},
        {"sampler": "dts-star", "reward": "length", "set": ["rollouts=10", "batch=2"]},
    ],
)
def test_generate_takes_no_more_than_was_said(
    tiny_lm_dir: Path, prompts: Path, capsys: Any, more: dict[str, Any]
) -> None:
    options = GenerateOptions(model=str(tiny_lm_dir), prompts=prompts, max_new_tokens=6, **more)
    told = ["generate", "--model", str(tiny_lm_dir), "--prompts", str(prompts), "--max-new-tokens", "6", "--json"]
    for name, value in more.items():
        told += [x for one in (value if isinstance(value, list) else [value]) for x in (f"--{name}", str(one))]
    assert main([*told, "-q"]) == 0
    spent = json.loads(capsys.readouterr().out)["cost"]["generated_tokens"]
    count = evaluations(options)
    assert count is not None and spent <= count <= 4 * spent, (spent, count)


def test_a_dry_run_says_cost_and_time_and_draws_nothing(
    tiny_lm_dir: Path, prompts: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "texts.json"
    told = [
        "generate",
        "--model",
        str(tiny_lm_dir),
        "--prompts",
        str(prompts),
        "--max-new-tokens",
        "7",
        "--out",
        str(out),
    ]
    assert main([*told, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "nothing was run; about 21 tokens at most, " in shown.err and " at the pace of a short try" in shown.err
    assert not shown.out and not out.exists()


def test_counts_of_the_other_jobs(tiny_lm_dir: Path, prompts: Path, tmp_path: Path) -> None:
    """By hand."""
    model, out = str(tiny_lm_dir), tmp_path / "out"
    strength = StrengthOptions(
        model=model,
        edit="v.safetensors",
        prompts=prompts,
        out=out,
        strengths="-1,0,1",
        n=2,
        max_new_tokens=5,
        system="x",
    )
    assert evaluations(strength) == 3 * 2 * 5 * (1 + 2 * 2 + 1)
    frontier = FrontierOptions(
        model=model, prompts=prompts, reward="length", out=out, method=["best-of-n"], n=4, max_new_tokens=10
    )
    assert evaluations(frontier) == 3 * 10 * (4 + 2 + 4 + 8 + 16)
    search = SearchOptions(
        model=model, prompts=prompts, reward="length", out=out, method=["fk", "dts-star"], budgets="100,200", seeds=2
    )
    assert evaluations(search) == 3 * 2 * 2 * 300
    distance = DistanceOptions(
        model="fashion-ddpm",
        task=["a=brightness"],
        out=out,
        method=["fk"],
        outputs=10,
        particles=2,
        steps=5,
        seeds=2,
        pool=8,
    )
    assert evaluations(distance) == 2 * 10 * 2 * 5 + 8 * 5
    guidance = GuidanceOptions(
        model=model, tuned=out, reward="length", prompts=prompts, out=out, w="0,1", outputs=4, particles=2, seeds=1
    )
    assert evaluations(guidance) == 3 * 2 * 4 * 32 * 2 * 3
    value = TrainValueOptions(model=model, prompts=prompts, reward="length", out=out, set=["samples=4"])
    assert evaluations(value) == 3 * 4 * 32
    assert evaluations(TrainVectorOptions(model=model, pairs=prompts, out=out)) is None
