"""`steer table`: written samples side by side, its means against sums by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from steer.cli import main
from steer.core import InputError
from steer.measure.side_by_side import means_table, read_written, texts_markdown, texts_table


def written(path: Path, texts: list[str], rewards: list[float | None], kind: str = "exact", **more: Any) -> Path:
    entries = [
        {"prompt": f"p{i}", "samples": [{"text": t, "reward": r, "kl": 0.5 * i, "log_weight": 0.0}]}
        for i, (t, r) in enumerate(zip(texts, rewards, strict=True))
    ]
    cost = {"generated_tokens": 1200, "seconds": 2.0}
    path.write_text(json.dumps({"prompts": entries, "kl_kind": kind, "cost": cost} | more))
    return path


def test_means_and_intervals_are_those_by_hand(tmp_path: Path) -> None:
    plain = written(tmp_path / "plain.json", ["a", "b", "c"], [0.0, 1.0, 0.5])
    best = written(tmp_path / "best.json", ["d", "e", "f"], [None, 1.0, 2.0], kind="bound")
    one, other = read_written([plain, best])
    # Mean 0.5, standard deviation 0.5, and 4.303 is Student's t for three of them.
    assert one.mean("reward") == pytest.approx((0.5, 4.303 * 0.5 / math.sqrt(3)))
    assert other.mean("reward") is None
    lines = means_table([one, other]).split("\n")
    assert lines[1].split() == ["plain", "0.500", "+-", "1.242", "0.500", "+-", "1.242", "1,200", "2.0"]
    assert lines[2].split() == ["best", "-", "<=", "0.500", "+-", "1.242", "1,200", "2.0"]
    assert lines[3] == "means over 3 prompts with their 95% intervals"


def test_weights_weigh_and_one_prompt_has_no_interval(tmp_path: Path) -> None:
    samples = [
        {"text": "a", "reward": 1.0, "kl": None, "log_weight": 700.0},
        {"text": "b", "reward": 5.0, "kl": None, "log_weight": 700.0 + math.log(3)},
    ]
    path = written(tmp_path / "fk.json", ["x"], [0.0], prompts=[{"prompt": "p", "samples": samples}])
    (found,) = read_written([path])
    mean, half = found.mean("reward") or (0.0, 0.0)
    assert mean == pytest.approx(0.25 * 1 + 0.75 * 5) and math.isnan(half) and found.texts() == ["b"]
    assert (
        "4.000 " in means_table([found]) and "+-" not in means_table([found]) and "interval" not in means_table([found])
    )


def test_texts_stand_in_columns(tmp_path: Path) -> None:
    files = [written(tmp_path / f"{n}.json", [f"{n} | wrote\nthis", "x" * 60], [0.1, 0.2]) for n in ("plain", "calm")]
    found = read_written(files)
    table = texts_table(found, 60)
    assert max(map(len, table.split("\n"))) <= 60 and table.split("\n")[1].split() == ["prompt", "plain", "calm"]
    assert table.count("x") == 120
    assert texts_markdown(found).split("\n")[2] == r"| p0 | plain \| wrote this | calm \| wrote this |"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = [str(written(tmp_path / f"{n}.json", [f"{n} text"], [0.1])) for n in ("plain", "calm")]
    assert main(["table", *files, "--texts"]) == 0
    out = capsys.readouterr().out
    assert "plain text" in out and "means over 1 prompt" in out
    assert main(["table", *files]) == 0 and "plain text" not in capsys.readouterr().out
    assert main(["table", *files, "--markdown"]) == 0 and "| p0 | plain text | calm text |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["", "[]", '{"prompts": [], "cost": {}}', '{"prompts": [{"prompt": "p"}], "cost": {}}']
)
def test_files_that_do_not_fit_are_refused(content: str, tmp_path: Path) -> None:
    plain = written(tmp_path / "plain.json", ["a"], [0.0])
    other = tmp_path / "other.json"
    other.write_text(content)
    for files in ([plain, other], [plain, tmp_path / "absent.json"], [plain, plain]):
        with pytest.raises(InputError, match="files"):
            read_written(files)
    more = written(tmp_path / "more.json", ["a", "b"], [0.0, 1.0])
    with pytest.raises(InputError, match="the prompts of"):
        read_written([plain, more])
    images = written(tmp_path / "images.json", ["a"], [0.0])
    images.write_text(images.read_text().replace('"text": "a"', '"text": null'))
    with pytest.raises(InputError, match="texts"):
        texts_table(read_written([images]), 80)
