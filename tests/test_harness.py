"""lm-eval and Inspect over a steered model: what the harness computes is what steer computes, steered and not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval_tools import ROWS, evaluated, write_tasks

import steer
from steer.cli import main
from steer.core import InputError

pytest.importorskip("lm_eval")

PAIRS = [{"positive": "the sun is good", "negative": "the rain is bad"}, {"positive": "happy", "negative": "sad"}]


@pytest.fixture(scope="module")
def vector(tiny_lm: Any) -> Any:
    return steer.train_vector(tiny_lm, PAIRS)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def test_a_toy_task_is_what_a_hand_computation_gives(tiny_lm: Any, vector: Any, tasks: Path) -> None:
    from steer.harness.lm_eval import SteerLM

    for edits in ([], [vector(0.6)], [vector(0.6, scope="generated")]):
        found = evaluated(SteerLM(tiny_lm, edits), tasks, "toy_choices", "toy_written")
        hits = 0
        for sample, row in zip(found["samples"]["toy_choices"], ROWS, strict=True):
            process: Any = tiny_lm.process(max_new_tokens=8)
            for edit in edits:
                process = process.edited(edit)
            prompts = [steer.RawText(row["question"])]
            tails = [tiny_lm.tokenizer(f" {c}", add_special_tokens=False)["input_ids"] for c in row["choices"]]
            mine = process.log_likelihood(prompts, torch.zeros(2, dtype=torch.long), tails)
            given = [float(r[0][0]) for r in sample["resps"]]
            assert given == pytest.approx(mine.tolist(), abs=1e-4)
            hits += int(mine.argmax()) == row["gold"]
        assert found["results"]["toy_choices"]["acc,none"] == pytest.approx(hits / 3)
        for sample, row in zip(found["samples"]["toy_written"], ROWS, strict=True):
            text = steer.RawText(row["question"])
            drawn = tiny_lm.generate(text, edits=edits, temperature=0, max_new_tokens=4, stop=["."])
            assert sample["resps"][0][0] == drawn.texts[0]


def test_unsteered_it_is_the_harness_own_class(tiny_lm: Any, tiny_lm_dir: Path, vector: Any, tasks: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from steer.harness.lm_eval import SteerLM

    theirs = evaluated(
        HFLM(pretrained=str(tiny_lm_dir), dtype="float32", device="cpu", batch_size=1), tasks, "toy_choices"
    )
    mine = evaluated(SteerLM(tiny_lm, [vector(0.0)]), tasks, "toy_choices")
    for a, b in zip(mine["samples"]["toy_choices"], theirs["samples"]["toy_choices"], strict=True):
        assert [float(r[0][0]) for r in a["resps"]] == pytest.approx([float(r[0][0]) for r in b["resps"]], abs=1e-4)
        assert [str(r[0][1]) for r in a["resps"]] == [str(r[0][1]) for r in b["resps"]]


def test_rolling_likelihood_is_the_sum_over_the_text(tiny_lm: Any, vector: Any) -> None:
    from lm_eval.api.instance import Instance

    from steer.harness.lm_eval import SteerLM

    text = "the sun is good and a dog is happy"
    model = SteerLM(tiny_lm, [vector(0.5)])
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    ids = tiny_lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    mine, _ = tiny_lm.scorer(len(ids), vector(0.5), 1).score_tokens([[model.prefix_token_id]], [ids])
    assert model.loglikelihood_rolling(asked)[0] == pytest.approx(float(mine[0]), abs=1e-4)
    with pytest.raises(InputError, match="scope=prompt"):
        SteerLM(tiny_lm, [vector(0.5, scope="prompt")]).loglikelihood_rolling(asked)
    with pytest.raises(InputError, match="SystemPrompt"):
        SteerLM(tiny_lm, [steer.SystemPrompt("Be calm.")])


def test_what_does_not_fit_is_cut_on_the_left(tiny_lm: Any) -> None:
    from steer.harness.lm_eval import _fitted

    assert _fitted([1, 2, 3], [4, 5], 10) == ([1, 2, 3], [4, 5])
    assert _fitted([1, 2, 3], [4, 5], 4) == ([2, 3], [4, 5])
    assert _fitted([1], [2, 3, 4, 5], 3) == ([3], [4, 5])


def test_the_command_is_the_harness_with_a_steered_model(
    tiny_lm_dir: Path, tasks: Path, vector: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vector.save(tmp_path / "up.safetensors")
    line = f"lm-eval --model {tiny_lm_dir} --dtype float32 --edit {tmp_path / 'up.safetensors'}:0.6:layers=0,1"
    more = f"--tasks toy_choices --include_path {tasks} --output_path {tmp_path / 'out'} --log_samples"
    done = subprocess.run(
        [sys.executable, "-m", "steer", *line.split(), *more.split()], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "toy_choices" in done.stdout
    assert list((tmp_path / "out").rglob("samples_toy_choices*.jsonl"))
    assert main(["lm-eval", "--model", str(tiny_lm_dir), "--edit", "nowhere.safetensors", "--tasks", "x"]) == 2
    said = capsys.readouterr().err
    assert "nowhere.safetensors" in said and len(said.strip().splitlines()) == 1


def test_an_inspect_task_runs_against_the_provider(
    tiny_lm_dir: Path, tiny_lm: Any, vector: Any, tmp_path: Path
) -> None:
    pytest.importorskip("inspect_ai")
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.scorer import includes

    vector.save(tmp_path / "up.safetensors")
    edit = f"{tmp_path / 'up.safetensors'}:0.6"
    task = Task(
        dataset=[Sample(input="the sun", target="good"), Sample(input="a dog", target="sad")], scorer=includes()
    )
    args = {"edit": edit, "dtype": "float32"}
    drawn = {"max_tokens": 5, "temperature": 0.0, "log_dir": str(tmp_path / "logs"), "display": "none"}
    log = eval(task, model=f"steer/{tiny_lm_dir}", model_args=args, **drawn)[0]
    assert log.status == "success", log.error
    for sample in log.samples or []:
        mine = tiny_lm.generate(
            [[{"role": "user", "content": str(sample.input)}]], edits=vector(0.6), temperature=0, max_new_tokens=5
        )
        assert sample.output.completion == mine.texts[0].strip()
        assert sample.output.usage is not None and sample.output.usage.output_tokens > 0
