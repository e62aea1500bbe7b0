"""Metrics, comparisons, races and sweeps: what they compute, and that they keep what was measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train_stimulus import Echo

import steer
from steer.cli import main
from steer.core import InputError
from steer.measure.compare import METHODS, Comparison, Problem, compare
from steer.measure.distances import Target, frechet_distance, interval, mmd, total_variation, unique_share
from steer.measure.guide import SweepSettings, mean_and_error, sweep
from steer.measure.race import Measured, Race, race
from steer.methods.best_of_n import Ancestral
from steer.methods.fk import FKSteering
from steer.rewards import lift
from steer.toy import GaussianProcess, markov_lm
from steer.train.stimulus import train_stimulus


def points(mean: float, spread: float, n: int = 4000, seed: int = 0) -> torch.Tensor:
    x = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # exactly whitened
    return mean + spread * x


def target(x: torch.Tensor, log_weights: torch.Tensor | None = None) -> Target:
    zero = torch.zeros(len(x), dtype=torch.float64)
    return Target.tilted(x, zero.long(), zero if log_weights is None else log_weights)


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    # |m - n|^2 + d (s - t)^2 for multiples of the identity.
    found = frechet_distance(points(1.0, 2.0), target(points(0.0, 0.5, seed=1)))
    assert abs(found - (3 * 1.0 + 3 * 1.5**2)) < 1e-8
    assert abs(frechet_distance(points(1.0, 2.0), target(points(1.0, 2.0)))) < 1e-8


def test_weights_move_the_target() -> None:
    x = torch.cat([points(0.0, 1.0, 2000), points(5.0, 1.0, 2000, seed=1)])
    weights = torch.cat([torch.zeros(2000), torch.full((2000,), 40.0)])
    weighted = target(x, weights)
    assert abs(weighted.ess - 2000) < 1e-6
    assert frechet_distance(points(5.0, 1.0, seed=2), weighted) < 1e-2
    assert frechet_distance(points(0.0, 1.0, seed=2), weighted) > 70


def test_mmd_is_unbiased() -> None:
    pool = points(0.0, 1.0, 500)
    found = [mmd(torch.randn(40, 3, generator=torch.Generator().manual_seed(s)), target(pool), 1.5) for s in range(60)]
    mean, half = interval(found)
    assert abs(mean) < 2.5 * half and min(found) < 0 < max(found)
    assert mmd(points(1.0, 1.0, 200), target(pool), 1.5) > 0.1


def test_histograms_and_uniqueness() -> None:
    x = points(0.0, 1.0, 4)
    labels = torch.tensor([0, 0, 1, 2])
    some = Target(x, torch.tensor([0.5, 0.0, 0.5, 0.0], dtype=torch.float64), labels)
    assert abs(total_variation(torch.tensor([0, 1, 1, 1]), some, 3) - 0.25) < 1e-12
    assert unique_share(torch.tensor([[1.0], [1.0], [2.0], [3.0]])) == 0.75
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2 and abs(half - 4.303 / math.sqrt(3)) < 1e-3 and math.isnan(interval([1.0])[1])


@pytest.fixture(scope="module")
def shoes() -> Any:
    import steer

    return steer.load("fashion-ddpm")


def test_comparison_measures_keeps_and_goes_on(shoes: Any, tmp_path: Path) -> None:
    tasks = [Problem.parse("bright=brightness@0.125")]
    sizes: dict[str, Any] = {"outputs": 12, "particles": 2, "steps": 5, "pool": 96}
    first = compare(shoes, tasks, tmp_path, methods=["best-of-n", "fk"], seeds=1, **sizes)
    assert [x.method for x in first.lines] == ["best-of-n", "fk"]
    compare(shoes, tasks, tmp_path, methods=list(METHODS), seeds=1, budgets=[16, 32], **sizes)
    again = compare(shoes, tasks, tmp_path, methods=["fk"], seeds=2, **sizes)
    assert again.lines[:2] == first.lines  # kept, not measured again
    table = again.tables()
    assert all(name in table for name in METHODS) and "32 rollouts in all" in table
    for line in again.lines:
        assert line.rollouts or line.calls <= 10 + 1e-9, line  # nothing spends more than its share
        assert 0 < line.unique <= 1 and 0 <= line.variation <= 1 and line.frechet > 0
    # FK tilts: brighter than the base by a good part of the way to the target.
    facts = again.targets["bright"]
    fk = [x.reward for x in again.lines if x.method == "fk" and not x.rollouts]
    assert sum(fk) / len(fk) > facts["base"] + 0.3 * (facts["reward"] - facts["base"])
    other = Comparison.read(tmp_path / "results.json", {"steps": 6})
    assert not other.lines


def test_tasks_are_checked() -> None:
    assert Problem.parse("a=class:boot") == Problem("a", "class:boot", 1.0)
    assert Problem.parse("b=brightness - 0.1*contrast@0.5") == Problem("b", "brightness - 0.1*contrast", 0.5)
    for text in ("nothing", "=x", "a=", "a=brightness@x", "a=brightness@0"):
        with pytest.raises(InputError, match="task"):
            Problem.parse(text)


TWOS = lift(lambda outputs: (outputs == 2).sum(-1).double())


def test_race_spends_its_budget_and_finds_more_with_more(tmp_path: Path) -> None:
    process = replace(markov_lm(), length=10)
    found = race(process, ["a", "b"], TWOS, [100, 1000], tmp_path, seeds=3, options={"dts-star": {"levels": 10}})
    assert {(h.method, h.budget) for h in found.heats} == {
        (m, b) for b in (100, 1000) for m in ("best-of-n", "fk", "dts-star")
    }
    for heat in found.heats:
        assert 0.5 * heat.budget <= heat.nfe <= 1.05 * heat.budget and len(heat.rewards) == 3
    for method in ("best-of-n", "fk", "dts-star"):
        few, many = (h.mean for h in found.heats if h.method == method)
        assert many > few or many == 10  # nothing is higher
    again = race(process, ["a", "b"], TWOS, [100, 1000], tmp_path, seeds=3, options={"dts-star": {"levels": 10}})
    assert again.heats == found.heats
    with pytest.raises(InputError, match="methods"):
        race(process, ["a"], TWOS, [100], tmp_path, methods=["vas"])
    with pytest.raises(InputError, match="budgets"):
        race(process, ["a"], TWOS, [], tmp_path)


def test_nothing_is_saved_on_a_baseline_that_does_not_rise() -> None:
    """Ties and noise: best-of-n's largest budget found no more than its smallest."""

    def heat(method: str, nfe: int, *rewards: float) -> Measured:
        return Measured(method, nfe, [list(rewards)], nfe)

    flat = [
        heat("best-of-n", 100, 0.0, 0.1, 0.0),
        heat("best-of-n", 400, 0.0, 0.0, 0.0),
        heat("fk", 100, 0.5, 0.4, 0.6),
    ]
    assert Race({}, flat).saving("fk") is None and Race({}, flat).needs("fk") is None
    table = Race({}, flat).table()
    assert "nan" not in table and "3 prompts are few" in table


def test_savings_are_read_off_the_curve() -> None:
    def heat(method: str, nfe: float, reward: float) -> Measured:
        return Measured(method, int(nfe), [[reward]] * 3, nfe)

    found = Race({}, [heat("best-of-n", 100, 1.0), heat("best-of-n", 1600, 3.0)])
    found.heats += [heat("fk", 100, 2.0), heat("fk", 400, 4.0), heat("vas", 100, 3.5), heat("dts-star", 1600, 2.0)]
    assert abs(found.saving("fk") - 8) < 1e-9  # half way between 100 and 400 on a log scale: 200
    assert found.saving("vas") == 16 and found.saving("dts-star") is None and found.saving("best-of-n") is None
    assert "8.0x" in found.table()


def test_nothing_is_saved_where_best_of_n_does_not_rise() -> None:
    def heat(method: str, nfe: float, rewards: list[float]) -> Measured:
        return Measured(method, int(nfe), [[x] for x in rewards], nfe)

    flat = Race({}, [heat("best-of-n", 100, [0.1, 0.0, 0.2]), heat("best-of-n", 1600, [0.0, 0.1, 0.3])])
    flat.heats += [heat("fk", 100, [0.5, 0.5, 0.5])]
    assert not flat.rises and "nothing is saved" in flat.table() and "16.0x" not in flat.table()
    single = Race({}, [heat("best-of-n", 100, [-0.0001])])
    assert "nan" not in single.table() and "-0.000" not in single.table()


def test_sweep_of_gaussian_chains() -> None:
    """Between N(0, 1) and N(1, 1): the mean of the output grows as w, plain and corrected, and KL as its square."""
    base, tuned = GaussianProcess(steps=10), GaussianProcess(means=(1.0,), steps=10)
    reward = lift(lambda outputs: outputs[:, 0])
    settings = SweepSettings(ws=[0.0, 1.0, 2.0], outputs=3000, particles=2, seeds=3)
    found = sweep(base, tuned, ["a"], reward, settings)
    assert len(found.points) == 6
    for kind in ("plain", "corrected"):
        points_ = {p.w: p for p in found.points if p.kind == kind}
        assert abs(points_[0.0].reward) < 0.1 and abs(points_[0.0].kl) < 1e-9
        step = points_[1.0].reward
        assert step > 0.5 and abs(points_[2.0].reward - 2 * step) < 0.1
        assert abs(points_[2.0].kl - 4 * points_[1.0].kl) < 0.25 * points_[2.0].kl
    assert "corrected" in found.table()


def test_errors_of_a_sweep_cover_the_truth() -> None:
    """Over repetitions, the standard error that one run reports is the spread of its means, for independent rows and
    for particles with common ancestors.
    """
    process = GaussianProcess(steps=6)
    reward = lift(lambda outputs: outputs[:, 0])
    for sampler, wanted in ((Ancestral(64), None), (FKSteering(128, ess_threshold=None), reward)):
        means, errors = [], []
        for seed in range(150):
            generator = torch.Generator().manual_seed(seed)
            samples = sampler.run(process, ["a", "b"], generator=generator, reward=wanted, beta=2.0)
            mean, error = mean_and_error(samples, reward(samples))
            means.append(mean)
            errors.append(error)
        spread = torch.tensor(means).std()
        assert 0.8 < torch.tensor(errors).mean() / spread < 1.25


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_commands_print_tables_and_draw(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_lm_dir: Path) -> None:
    code, out, err = run(
        capsys,
        "eval",
        "distance",
        "--model",
        "fashion-ddpm",
        "--task",
        "bright=brightness@0.2",
        "--outputs",
        "6",
        "--steps",
        "3",
        "--pool",
        "24",
        "--seeds",
        "2",
        "--method",
        "ancestral",
        "--method",
        "fk",
        "--budgets",
        "8,16",
        "--out",
        str(tmp_path / "c"),
    )
    assert code == 0, err
    assert "Frechet" in out and (tmp_path / "c/curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "c/methods.png").read_bytes()[:4] == b"\x89PNG" and "methods.png" in out
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["the sun", "hello world"]), encoding="utf-8")
    code, out, err = run(
        capsys,
        "race",  # an old name, taken with a note
        "--model",
        str(tiny_lm_dir),
        "--prompts",
        str(prompts),
        "--reward",
        "keywords:dog,sun,happy",
        "--budgets",
        "60,200",
        "--seeds",
        "2",
        "--max-new-tokens",
        "8",
        "--block",
        "2",
        "--set",
        "dts-star.bonus=0.2",
        "--out",
        str(tmp_path / "r"),
    )
    assert code == 0, err
    assert "race is `steer eval search` now" in err and (tmp_path / "r/page.html").is_file()
    assert "dts-star" in out and (tmp_path / "r/race.png").read_bytes()[:4] == b"\x89PNG"


BAD = [
    (["eval", "distance", "--task", "x"], "task"),
    (["eval", "distance", "--task", "a=brightness", "--method", "magic"], "method"),
    (["eval", "distance", "--task", "a=sentiment"], "reward"),
    (["eval", "distance", "--task", "a=brightness", "--seeds", "0"], "seeds"),
    (["eval", "distance", "--task", "a=brightness", "--budgets", "1.5"], "budgets"),
    (["eval", "distance", "--task", "a=brightness", "--curve", "b"], "curve"),
    (["eval", "search", "--reward", "brightness", "--budgets", "x"], "budgets"),
    (["eval", "search", "--reward", "brightness", "--budgets", "100", "--method", "vas"], "method"),
    (["eval", "search", "--reward", "brightness", "--budgets", "100", "--set", "bonus=1"], "set"),
    (["eval", "search", "--reward", "brightness", "--budgets", "100", "--set", "dts-star.bonus=x"], "bonus"),
    (["eval", "guidance", "--tuned", "nowhere", "--reward", "brightness"], "tuned"),
    (["eval", "guidance", "--tuned", ".", "--reward", "brightness", "--w", "1,x"], "w:"),
]


@pytest.mark.parametrize(("arguments", "field"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_requests_end_with_one_line(
    arguments: list[str], field: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, command, *rest = arguments
    code, out, err = run(capsys, "eval", command, "--model", "fashion-ddpm", "--out", str(tmp_path / "x"), *rest)
    assert code == 2 and out == "" and field in err and len(err.strip().splitlines()) == 1, err


def test_methods_by_reward_against_kl_on_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_lm_dir: Path
) -> None:
    """A vector swept, a system prompt, best-of-n and FK on one set of prompts: numbers that `generate` gives again."""
    model = steer.load(tiny_lm_dir, dtype="float32")
    pairs = [{"positive": "the sun is good", "negative": "the rain is bad"}, {"positive": "happy", "negative": "sad"}]
    steer.train_vector(model, pairs).save(tmp_path / "up.safetensors")
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["the sun", "hello world", "a dog"]), encoding="utf-8")
    line = f"eval frontier --model {tiny_lm_dir} --dtype float32 --prompts {prompts} --reward keywords:dog,sun --n 4"
    rows = [{"input": f"the {a} of {b}", "hint": b} for a in ("sun", "rain", "dog", "cat", "tree") for b in "abcde"]
    hints = train_stimulus(Echo(), rows, stage="sft", evaluate=0, force=True)
    hints.save(tmp_path / "hints.safetensors")
    more = f"--edit {tmp_path / 'hints.safetensors'} --edit {tmp_path / 'up.safetensors'} --strengths 0.2,0.4"
    more += f" --max-new-tokens 6 --out {tmp_path / 'f'}"
    code, out, err = run(capsys, *line.split(), *more.split())
    assert code == 0, err
    found = json.loads((tmp_path / "f/frontier.json").read_text())["points"]
    assert [p["method"] for p in found] == ["base", *["best-of-n"] * 4, *["fk"] * 3, "hints", "up", "up"]
    assert (tmp_path / "f/frontier.png").read_bytes()[:4] == b"\x89PNG" and "kind of KL" in out
    up = steer.load_edit(tmp_path / "up.safetensors", strength=0.4, model=model)
    again = model.generate(
        ["the sun", "hello world", "a dog"], edits=up, reward="keywords:dog,sun", n=4, seed=0, max_new_tokens=6
    )
    # What has no strength is one point.
    hinted = model.generate(["the sun", "hello world", "a dog"], edits=hints(), n=4, seed=0, max_new_tokens=6)
    assert found[-3]["kls"] == pytest.approx(hinted.mean(hinted.kl).tolist(), rel=1e-5)
    assert found[-1]["kls"] == pytest.approx(again.mean(again.kl).tolist(), rel=1e-5)
    assert found[-1]["rewards"] == pytest.approx(again.mean_reward().tolist())
    assert run(capsys, *line.split(), "--method", "magic", "--out", str(tmp_path / "g"))[0] == 2
