"""What a newcomer typed first and was answered badly once: each test is one such thing, asked again."""

from __future__ import annotations

import re
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from serving_tools import serving

import steer
from steer.cli import main
from steer.cli.options import COMMANDS, GenerateOptions
from steer.core import InputError
from steer.edits import OPTIONS
from steer.measure import compare, race
from steer.methods.samplers import SAMPLERS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What a command prints and how it ends; loading a model fails the test."""
    monkeypatch.setattr("steer.cli.session.load", lambda *a, **k: pytest.fail("the model was loaded"))
    monkeypatch.chdir(tmp_path)

    def call(line: str, *more: object) -> tuple[int, str, str]:
        code = main([*line.split(), *map(str, more)])
        return code, *capsys.readouterr()

    return call


# ------------------------------------------------------------------------------------------------------ without a task


@pytest.mark.parametrize("width", [80, 160])
def test_help_is_as_wide_as_the_terminal_and_nothing_is_cut(
    said: Any, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for line in ("--help", "generate --help", "train vector -h", "eval frontier --help"):
        code, out, _ = said(line)
        assert code == 0 and max(map(len, out.split("\n"))) == width
        # A description that does not fit is broken, not cut; dots are of metavars and of ranges.
        assert "…" not in out and not re.search(r"[a-z]\.\.\. *│", out)
        assert "<bool>" not in out and "Path>" not in out  # a switch has no value
    assert "$ steer eval frontier" in out and "<str>" not in out and "<int>" not in out
    listed = said("--help")[1]
    assert all(f"│ {name.split()[0]} " in listed for name in COMMANDS)


def test_version_lists_and_completion(said: Any) -> None:
    assert said("--version")[:2] == (0, f"steer {steer.__version__}\n")
    assert said("-h")[1] == said("--help")[1] and "--install-completion" in said("--help")[1]
    for group, words in (("train", ("vector", "policy")), ("run", ("quickstart", "vas")), ("eval", ("frontier",))):
        code, out, _ = said(group)
        assert code == 2 and all(word in out for word in words)
    assert said("recipes")[1] == said("help recipes")[1] and "sentiment" in said("rewards")[1]


def test_generate_has_no_option_that_it_does_not_read() -> None:
    read = "".join(
        (ROOT / "steer/cli" / f"{name}.py").read_text() for name in ("generating", "showing", "checks", "session")
    )
    for option in fields(GenerateOptions):
        assert re.search(rf"\.{option.name}\b|\"{option.name}\"", read), option.name


# ----------------------------------------------------------------------------------------------------------- mistakes


def test_one_of_two_prompts(said: Any, tiny_lm_dir: Path) -> None:
    asked = f"generate --model {tiny_lm_dir}"
    for more, given in (("", "'neither'"), ("--prompt a --prompts b.json", "'both'")):
        assert f"prompt: got {given}; allowed: --prompt TEXT or --prompts FILE" in said(f"{asked} {more}")[2]


def test_the_reason_stands_before_what_is_allowed(said: Any, tiny_lm_dir: Path) -> None:
    for reward, reason in (("nosuch:fn", "nosuch"), ("sentimant", "did you mean 'sentiment'?")):
        code, _, err = said(f"generate --model {tiny_lm_dir} --prompt a --reward", reward)
        given, _, allowed = err.partition("; allowed: ")
        assert code == 2 and reason in given and allowed and len(given) < 160


@pytest.mark.parametrize("option", ["png", "lineage", "tree", "previews"])
def test_pictures_are_named_as_what_they_are(said: Any, option: str) -> None:
    sampler = {"tree": "dts", "previews": "svdd"}.get(option, "fk")
    line = f"generate --model fashion-ddpm --class bag --sampler {sampler} --reward class:bag --{option} x.jpg"
    code, _, err = said(line)
    assert code == 2 and err.startswith(f"steer: error: {option}: got 'x.jpg'") and ".png" in err


def test_a_strength_beyond_all_bounds(tmp_path: Path, tiny_lm: Any) -> None:
    made = steer.train_vector(tiny_lm, [("a good dog", "a bad cat"), ("happy", "sad")])
    made.save(tmp_path / "v.safetensors")
    for dose in (1e30, float("inf"), float("nan")):
        with pytest.raises(InputError, match="strength: got"):
            steer.load_edit(tmp_path / "v.safetensors", dose)
        with pytest.raises(InputError, match="strength: got"):
            made(-dose)
    with pytest.raises(InputError, match="did you mean layers"):
        made(0.1, layer=1)
    assert set(OPTIONS) == {"vector", "controller", "value", "stimulus", "reft"}


def test_methods_have_one_name_everywhere(said: Any) -> None:
    """Those of `generate` are among those of comparisons and of races, as slugs."""
    assert set(SAMPLERS) <= set(compare.methods_by_name())
    assert {name for name, kind in SAMPLERS.items() if kind.needs_reward} <= set(race.methods_by_name())
    for name in {**compare.methods_by_name(), **race.methods_by_name()}:
        assert re.fullmatch(r"[a-z0-9]+([-+][a-z0-9]+)*", name)
    code, _, err = said("eval distance --model fashion-ddpm --task a=brightness --out c --method FK")
    assert code == 2 and "did you mean fk?" in err


def test_a_budget_below_one_output(tiny_lm: Any, tmp_path: Path) -> None:
    process = tiny_lm.process(max_new_tokens=8)
    with pytest.raises(InputError, match=r"budgets: got 2; allowed: at least \d+"):
        race.race(process, ["the sun"], steer.as_reward("length"), [2, 100], tmp_path)


# ----------------------------------------------------------------------------------------------- recipes and the README


@pytest.mark.parametrize("name", ["quickstart", "vas", "sentiment", "frontier"])
def test_a_recipe_ends_with_what_it_was_for(name: str) -> None:
    told = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    assert told["steps"][-1]["command"] in ("table", "eval strength", "eval frontier")
    assert name != "quickstart" or (
        told["next"].startswith("steer generate") and told["steps"][-1]["settings"]["texts"]
    )


def test_every_recipe_says_what_it_does_and_how_long_it_takes() -> None:
    page = (ROOT / "recipes" / "README.md").read_text()
    rows = dict(re.findall(r"^\| `([\w-]+)` \|.*\|([^|]*)\|$", page, re.MULTILINE))
    told = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert told <= rows.keys() and all(rows[name].strip() for name in told)


def test_the_readme_has_what_makes_its_examples_short_and_readable() -> None:
    page = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```(?:python|console)\n(.*?)```", page, re.DOTALL)
    asked = [call for block in blocks for call in re.findall(r"completions\.create\([^)]*\)", block)]
    assert asked and all("max_tokens=" in call for call in asked)
    drawn = [line for block in blocks for line in block.replace("\\\n", "").split("\n") if "--prompt " in line]
    assert drawn and all("--temperature 0.7" in line and "--max-new-tokens" in line for line in drawn)
    for line in page.split("\n"):  # what is not on the index yet is said to be
        cells = line.split("|")
        here = cells[2] if len(cells) > 3 else line
        assert "install 'steer-engine" not in here, line


# ------------------------------------------------------------------------------------------------------------- serving


def test_a_server_says_what_it_has_and_where_and_makes_no_folder(tiny_lm_dir: Path, tmp_path: Path) -> None:
    """A folder that is not there is perhaps a slip of the pen; three addresses; a line for each request where asked."""
    missing = tmp_path / "typo"
    with serving(tiny_lm_dir, "--name", "tiny", "--artifacts", missing, "--log-requests") as server:
        told = "".join(server.log)
        assert f"{missing} is not there; the first that a client registers makes it" in told
        assert not missing.exists()
        assert all(f"{server.url}{path}" in told for path in ("/v1", "/health", "/openapi.json"))
        assert httpx.get(f"{server.url}/docs").status_code == 200
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "tiny"
        assert httpx.get(f"{server.url}/").status_code in (200, 307, 404)
        end = time.monotonic() + 10
        while not any('"GET /v1/models HTTP/1.1" 200' in line for line in server.log) and time.monotonic() < end:
            time.sleep(0.02)
        assert any('"GET /v1/models HTTP/1.1" 200' in line for line in server.log), server.log
