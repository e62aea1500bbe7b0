"""Recipes: read strictly, checked as a whole, run in order with one model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from steer.cli import jobs, main, session
from steer.cli import recipe as recipes
from steer.cli.options import COMMANDS
from steer.cli.recipe import load_recipe, shipped
from steer.cli.session import Session
from steer.cli.values import build, coerce
from steer.core import InputError, SteerError

TWO_STEPS = """
description: fit a vector, then see what it does
variables:
  prompts: ${recipes}/prompts.json
  strength: 0.2
next: steer show ${out}/v.safetensors
steps:
  - name: fit
    command: train vector
    settings: {model: MODEL, pairs: "${recipes}/pairs.jsonl", out: "${out}/v.safetensors", set: {l2: 0.5}}
  - command: eval strength
    settings:
      model: MODEL
      edit: ${out}/v.safetensors:scope=reply
      prompts: ${prompts}
      strengths: [-0.2, 0.2]
      reward: length
      max_new_tokens: 4
      out: ${out}/report
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_lm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shipped recipes, with `fit` in it."""
    made = tmp_path / "shipped"
    made.mkdir()
    monkeypatch.setattr(recipes, "_folder", lambda: made)
    monkeypatch.chdir(tmp_path)
    rows = [{"positive": f"good {w}", "negative": f"bad {w}"} for w in ("cat", "dog", "sun", "rain")]
    (made / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (made / "prompts.json").write_text('["a cat", "hello"]')
    (made / "fit.yaml").write_text(TWO_STEPS.replace("MODEL", str(tiny_lm_dir)))
    return made


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_a_vector_is_trained_and_evaluated_with_one_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = MagicMock(wraps=session.load)
    monkeypatch.setattr(session, "load", load)
    assert main(["run", "fit"]) == 0
    load.assert_called_once()
    assert {p.name for p in Path("out/fit").iterdir()} == {"v.safetensors", "report"}
    assert json.loads(Path("out/fit/report/report.json").read_text())["rows"]
    output = capsys.readouterr()
    assert "[2/2] 2: eval strength" in output.err and "steered" in output.out
    assert output.err.endswith("next: steer show ./out/fit/v.safetensors\n")


def test_variables_and_overrides(folder: Path) -> None:
    assert set(shipped()) == {"fit"}
    made = load_recipe("fit", ["out=elsewhere", "prompts=p.json", "fit.seed=7", "2.temperature=0.5"])
    given: list[Any] = [step.options for step in made.steps]
    fit, evaluation = given
    assert fit.out == Path("elsewhere/v.safetensors") and fit.seed == 7 and fit.set == ["l2=0.5"]
    assert evaluation.prompts == Path("p.json") and evaluation.temperature == 0.5
    assert evaluation.strengths == "-0.2,0.2" and evaluation.edit == "elsewhere/v.safetensors:scope=reply"
    assert fit.pairs == folder / "pairs.jsonl"


def test_a_single_job_takes_its_options_directly(folder: Path, tmp_path: Path) -> None:
    path = written(
        tmp_path, "variables: {k: 3}\ncommand: generate\nsettings: {model: m, prompt: 'k is ${k}', n: '${k}'}\n"
    )
    options: Any = load_recipe(path, ["seed=2", "temperature=1e-1"]).steps[0].options
    assert (options.prompt, options.n, options.seed, options.temperature) == ("k is 3", 3, 2, 0.1)
    options = load_recipe(path, ["k=5"]).steps[0].options
    assert options.n == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("description:", "descripton:"), ["descripton", "did you mean description?"]),
        (("command: eval strength", "command: eval strenght"), ["eval strenght", "did you mean eval strength?"]),
        (("max_new_tokens", "max_tokens"), ["max_tokens", "did you mean max_new_tokens?"]),
        (("max_new_tokens: 4", "max_new_tokens: four"), ["max_new_tokens", "four", "an integer"]),
        (("max_new_tokens: 4", "max_new_tokens: 0"), ["step 2 (eval strength)", "max_new_tokens"]),
        (("strengths: [-0.2, 0.2]", "strengths: [-0.2, much]"), ["strengths"]),
        (("${prompts}", "${promts}"), ["promts", "did you mean prompts?"]),
        (("${prompts}", "absent.json"), ["absent.json"]),
        (("{l2: 0.5}", "{l3: 0.5}"), ["l3", "did you mean l2?"]),
        (("edit: ${out}/v.saf", "edit: ${out}/w.saf"), ["w.safetensors"]),
        (("      out: ${out}/report\n", ""), ["also needed: out"]),
        (("steps:", "command: eval\nsteps:"), ["either command and settings, or steps"]),
        (("name: fit", "name: '2'"), ["names that differ"]),
        (("description:", "- x\ndescription:"), ["YAML"]),
        (
            ("description: fit a vector, then see what it does", "description: !!python/object/apply:os.getcwd []"),
            ["YAML"],
        ),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, str],
    words: list[str],
) -> None:
    monkeypatch.setattr(session, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    text = (folder / "fit.yaml").read_text()
    assert change[0] in text
    (folder / "fit.yaml").write_text(text.replace(*change))
    assert main(["run", "fit"]) == 2
    output = capsys.readouterr()
    lines = output.err.strip().splitlines()
    assert output.out == "" and len(lines) == 1 and lines[0].startswith("steer: error: ")
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("override", "word"),
    [("seed=1", "fit.OPTION"), ("fit.sed=1", "did you mean seed?"), ("fit", "key=value"), ("recipes=x", "recipes")],
)
def test_overrides_that_fit_nothing(folder: Path, override: str, word: str) -> None:
    with pytest.raises(InputError, match=word):
        load_recipe("fit", [override])


def test_unknown_recipe(folder: Path) -> None:
    with pytest.raises(InputError, match="did you mean fit"):
        load_recipe("fitt")


@pytest.mark.parametrize("content", ["", "3", "[]", "steps: []", "steps: [3]", "steps: [{command: eval, settings: 3}]"])
def test_files_that_are_no_recipes(folder: Path, tmp_path: Path, content: str) -> None:
    with pytest.raises(SteerError):
        load_recipe(written(tmp_path, content))


@pytest.mark.parametrize(
    ("given", "hint", "wanted"),
    [
        ("3", int, 3),
        ("1e-3", float, 1e-3),
        (2, float, 2.0),
        ("yes", bool, True),
        ("none", int | None, None),
        ("4", int | None, 4),
        ("1,2", list[int], [1, 2]),
        ("0.5, 1", tuple[float, ...], (0.5, 1.0)),
        ({"a": 1, "b": [1, 2]}, list[str], ["a=1", "b=1,2"]),
        ("x", list[str], ["x"]),
        ("p", Path, Path("p")),
        ([0.1, 2], str, "0.1,2"),
    ],
)
def test_values_take_the_declared_type(given: Any, hint: Any, wanted: Any) -> None:
    assert coerce("x", given, hint) == wanted


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("3.5", int),
        (True, int),
        (True, float),
        ("maybe", bool),
        (3, str),
        (3, Path),
        ("a", int | None),
        ("x", dict),
        (2.0, int),
    ],
)
def test_values_that_do_not_fit(given: Any, hint: Any) -> None:
    with pytest.raises(InputError):
        coerce("x", given, hint)


def test_every_command_has_a_job_and_one_declaration(tmp_path: Path) -> None:
    assert set(jobs.JOBS) == set(COMMANDS)
    with pytest.raises(InputError, match="also needed"):
        build(COMMANDS["eval strength"], {}, "here")
    assert Session(io.StringIO()).models == {}
