"""`steer help TOPIC`: every setting of every sampler, as wide as the terminal."""

from __future__ import annotations

from dataclasses import MISSING, fields

import pytest

from steer.cli import main
from steer.cli.help import explain, topics
from steer.methods.samplers import SAMPLERS


@pytest.mark.parametrize("width", [60, 100])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_every_setting_is_there_with_its_default(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = explain(name).split("\n")
    heads = {line.split()[0]: line for line in lines if line and not line.startswith((" ", "steer "))}
    for f in fields(SAMPLERS[name]):
        made = f.default if f.default_factory is MISSING else f.default_factory()
        assert heads[f.name].endswith(" none" if made is None else f" {made}"), f.name
    assert all(len(line) <= width for line in lines if line.startswith("    "))
    assert all("`" not in line for line in lines)


def test_what_is_said_of_several_settings_is_said_once() -> None:
    text = explain("fk")
    assert text.count("steps after which particles are weighed") == 1
    start, stop, every = (text.index(f"\n{name} ") for name in ("start", "stop", "every"))
    assert start < stop < every < text.index("steps after which")


def test_topics_are_listed_and_misspelt_ones_told(capsys: pytest.CaptureFixture[str]) -> None:
    for topic in topics():
        assert main(["help", topic]) == 0 and capsys.readouterr().out.strip()
    assert main(["help", "best_of_n"]) == 0
    assert main(["help", "dst"]) == 2 and "did you mean dts?" in capsys.readouterr().err
