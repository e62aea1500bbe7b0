"""Logs of training: every step's figures as lines of a file, in trackers, and over an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steer
from steer import logs
from steer.core import InputError
from steer.progress import ticking
from steer.train.loop import fit


class Stopped(Exception):
    pass


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def descend(log: Path, work: Path | None, stop: int | None = None) -> list[float]:
    """Fit one number to three, in batches of one row; `stop` is the step that fails."""
    torch.manual_seed(0)
    module, seen = nn.Linear(1, 1, bias=False), 0

    def loss(module: nn.Module, batch: Tensor, epoch: int) -> Tensor:
        nonlocal seen
        seen += 1
        if seen == stop:
            raise Stopped
        return (module(torch.ones(1)) - batch).square().sum()

    with logs.logging_to(log):
        return fit(module, list(torch.tensor([1.0, 2.0, 3.0])), loss, epochs=4, learning_rate=0.1, run={}, work=work)


def test_every_step_is_a_line(tmp_path: Path) -> None:
    history = descend(tmp_path / "run.jsonl", None)
    found = lines(tmp_path / "run.jsonl")
    assert [entry["step"] for entry in found] == list(range(1, 13))
    assert {entry["phase"] for entry in found} == {"training"}
    means = [sum(entry["loss"] for entry in found[i : i + 3]) / 3 for i in range(0, 12, 3)]
    assert means == pytest.approx(history)


def test_a_run_that_goes_on_writes_what_the_whole_one_does(tmp_path: Path) -> None:
    """Steps after the last checkpoint are done again, and stand in the file once; so does a line that was cut."""
    descend(tmp_path / "whole.jsonl", None)
    with pytest.raises(Stopped):
        descend(tmp_path / "run.jsonl", tmp_path / "work", stop=6)
    with (tmp_path / "run.jsonl").open("a") as file:
        file.write('{"phase": "train')
    descend(tmp_path / "run.jsonl", tmp_path / "work")
    plain = [[(e["phase"], e["step"], e["loss"]) for e in lines(tmp_path / f)] for f in ("run.jsonl", "whole.jsonl")]
    assert plain[0] == plain[1]


def test_figures_go_to_the_log_without_a_bar_and_beside_one(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("steer.progress.EVERY", 0.0)
    for shown in (False, True):
        with logs.logging_to(tmp_path / "x.jsonl"), ticking(shown, f"phase {shown}", 2) as tick:
            tick(1, loss=0.5, reward=float("nan"), margin=3.0)
            tick(1)
    found = lines(tmp_path / "x.jsonl")
    assert [(e["phase"], e["loss"], e["reward"], e["margin"]) for e in found] == [
        ("phase False", 0.5, None, 3.0),
        ("phase True", 0.5, None, 3.0),
    ]
    told = capsys.readouterr().err.splitlines()
    assert [line.startswith("phase True: ") and "loss 0.5, reward nan" in line for line in told] == [True, True]


def test_no_log_after_the_block(tmp_path: Path) -> None:
    with logs.logging_to(tmp_path / "x.jsonl"):
        pass
    logs.record("training", 1, {"loss": 1.0})
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("tensorbord", r"^log: got 'tensorbord'; allowed: FILE.jsonl, .*did you mean tensorboard"),
        ("run.json", "^log: got 'run.json'; allowed: FILE.jsonl, "),
        ("nowhere/run.jsonl", "^log: got 'nowhere/run.jsonl'; allowed: a file in a folder that exists"),
        ("comet_ml", r"^log: got 'comet_ml'; allowed: FILE.jsonl, or a tracker that is installed"),
    ],
)
def test_targets_are_checked_first(target: str, said: str) -> None:
    with pytest.raises(InputError, match=said), logs.logging_to(target):
        raise AssertionError("the block was entered")


def test_trackers_get_the_same_figures(tmp_path: Path, monkeypatch: Any) -> None:
    """A tracker of accelerate's kind, which writes down what it is given."""
    from accelerate import tracking
    from accelerate.utils import LoggerType

    told: list[Any] = []

    class Written(tracking.GeneralTracker):
        name, requires_logging_directory = "tensorboard", False

        def __init__(self, run_name: str, *args: Any, **more: Any) -> None:
            super().__init__()

        @property
        def tracker(self) -> None:
            return None

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            told.append(values)

        def log(self, values: dict[str, Any], step: int | None, **more: Any) -> None:
            told.append((step, values))

        def finish(self) -> None:
            told.append("over")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Written)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    with logs.logging_to("tensorboard", folder=tmp_path, settings={"seed": 1, "layers": (1, 2)}):
        logs.record("training", 3, {"loss": 0.5})
    assert told == [{"seed": 1, "layers": "(1, 2)"}, (3, {"training/loss": 0.5}), "over"]


def test_the_command_line_logs(tiny_lm_dir: Path, tmp_path: Path, capsys: Any) -> None:
    from steer.cli import main

    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["the sun", "a dog", "the cat", "the moon"]))
    out, log = tmp_path / "v.safetensors", tmp_path / "run.jsonl"
    told = ["train", "value", "--model", tiny_lm_dir, "--prompts", prompts, "--reward", "length", "--out", out]
    quick = [x for pair in ("samples=4", "max_new_tokens=4", "epochs=3") for x in ("--set", pair)]
    assert main([*map(str, told), *quick, "--log", str(log), "-q"]) == 0
    found = [entry for entry in lines(log) if "loss" in entry]
    assert found and [e["step"] for e in found] == sorted(e["step"] for e in found)
    assert main(["show", str(log), "--plot", str(tmp_path / "run.svg")]) == 0
    assert main(["show", str(out), "--plot", str(tmp_path / "card.png")]) == 0
    assert "loss" in (tmp_path / "run.svg").read_text()
    assert (tmp_path / "card.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["show", str(prompts), "--plot", str(tmp_path / "no.png")]) == 2
    assert main(["show", str(log), "--plot", str(tmp_path / "no.txt")]) == 2
    capsys.readouterr()
    assert main([*map(str, told), *quick, "--overwrite", "--report-to", "paper"]) == 2
    assert "log: got 'paper'" in capsys.readouterr().err
    assert steer.logging_to is logs.logging_to
