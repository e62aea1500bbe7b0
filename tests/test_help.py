"""`steer help TOPIC`: every setting of every sampler, as wide as the terminal."""

from __future__ import annotations

import re
import shlex
from dataclasses import MISSING, fields

import pytest
import torch

from steer.artifacts import Card
from steer.cli import main
from steer.cli.help import _TRAINERS, explain, topics
from steer.cli.options import COMMANDS
from steer.core import InputError
from steer.edits import KINDS
from steer.methods.extract import BUCKETS
from steer.methods.samplers import SAMPLERS
from steer.train.objectives.registry import METHODS


@pytest.mark.parametrize("width", [60, 100])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_every_setting_is_there_with_its_default(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = explain(name).split("\n")
    heads = {line.split()[0]: line for line in lines if line and not line.startswith((" ", "steer "))}
    for f in fields(SAMPLERS[name]):
        made = f.default if f.default_factory is MISSING else f.default_factory()
        shown = "none" if made is None else str(made).lower() if isinstance(made, bool) else str(made) or '""'
        shown = {"Preview()": "preview"}.get(shown, shown)  # as the command line takes it
        below = heads[f.name].endswith("see below") and " ".join(shown.split()) in " ".join(" ".join(lines).split())
        assert below or heads[f.name].endswith(f" {shown}"), f.name
    assert all(len(line) <= width for line in lines if line.startswith("    "))
    command = "\n".join(lines).split("\n\n")[-1].replace("\\\n", "")
    assert shlex.split(command)[:2] == ["steer", "generate"] and "KEY=VALUE" in shlex.split(command)
    assert all("`" not in line for line in lines)


def test_what_is_said_of_several_settings_is_said_once() -> None:
    text = explain("fk")
    assert text.count("steps after which particles are weighed") == 1
    start, stop, every = (text.index(f"\n{name} ") for name in ("start", "stop", "every"))
    assert start < stop < every < text.index("steps after which")


@pytest.mark.parametrize("topic", [name for name in topics() if name.startswith("train-")])
def test_settings_of_training_are_all_there(topic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting stands in the table, or is an option of the command; nothing is spelt as Python spells it."""
    monkeypatch.setenv("COLUMNS", "80")
    command, kind = _TRAINERS[topic][0], _TRAINERS[topic][1]()
    text = explain(topic)
    heads = {line.split()[0] for line in text.split("\n") if line and not line.startswith(" ")}
    options = set(re.findall(r"--([a-z-]+)", text))
    for f in fields(kind):
        name = f.name.rstrip("_")
        assert (name in heads) != (name.replace("_", "-") in options), name
        assert name in heads or name in {o.name.rstrip("_") for o in fields(COMMANDS[command])}
    assert not any(word in text for word in ("Annotated", "Literal", "Union", "NoneType", "<class", "typing"))
    assert all(len(line) <= 80 for line in text.split("\n"))


def test_a_string_below_a_field_is_about_it() -> None:
    text = explain("train-value")
    assert re.search(r"td_lambda +a number from 0 to 1 +0\.95\n    Of the returns", text)


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_has_its_entry(name: str) -> None:
    assert explain(name).startswith(name) and METHODS[name].paper in explain(name)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_edit_has_the_keys_that_it_takes(kind: str) -> None:
    """What the help lists is what a loader allows when it refuses a key."""
    extractor = dict.fromkeys(("weights", "mean", "std"), torch.ones(12)) | {"idf": torch.zeros(BUCKETS)}
    listed = [line for line in explain(kind).split("\n\n")[1].split("\n") if not line.startswith((" ", "steer "))]
    with pytest.raises(InputError) as refused:
        KINDS[kind](extractor, Card(kind, {}), None, {"x": 1}, 0)
    allowed = refused.value.allowed.partition(";")[0]
    assert sorted(listed) == ([] if allowed == "none" else allowed.split(", "))


def test_commands_are_topics_too(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in ((["eval", "frontier"], "steer eval frontier [OPTIONS]"), (["serve"], "--artifacts")):
        assert main(["help", *words]) == 0 and said in capsys.readouterr().out
    assert main(["help", "train", "vector"]) == 0 and "held_out" in capsys.readouterr().out
    assert main(["help", "best", "of", "n"]) == 0 and "Draw n outputs" in capsys.readouterr().out
    assert main(["help", "eval", "fronteer"]) == 2 and "help: got 'eval-fronteer'" in capsys.readouterr().err


def test_topics_are_listed_and_misspelt_ones_told(capsys: pytest.CaptureFixture[str]) -> None:
    for topic in topics():
        assert main(["help", topic]) == 0 and capsys.readouterr().out.strip()
    assert main(["help", "best_of_n"]) == 0
    assert main(["help", "dst"]) == 2 and "did you mean dts?" in capsys.readouterr().err
