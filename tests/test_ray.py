"""Bulk jobs on a Ray cluster of this machine: the records are those of a job without Ray, and none is lost."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steer.adapters.ray import Answers, Cluster, run_on_ray
from steer.bulk.source import Row
from steer.cli import main
from steer.core import InputError

WORDS = ("sun", "rain", "day", "night", "cat", "dog", "house", "tree")


class Echo:
    """A worker that answers with the length of a prompt, and slowly where it is told to."""

    capacity = 4

    def __init__(self, note: str = "") -> None:
        self.note = note
        if note:
            Path(note).joinpath(str(os.getpid())).touch()

    def check_fields(self, names: frozenset[str]) -> None:
        """All are known."""

    def prepare(self, row: Row) -> Any:
        assert row.data is not None
        if row.data["prompt"] == "bad":
            raise InputError("prompt", "bad", "a good one")
        return row.data["prompt"]

    def rows(self, asked: Any) -> int:
        return 1

    async def answer(self, row: Row, asked: Any) -> dict[str, Any]:
        time.sleep(0.05 if self.note else 0)
        return {"id": row.id, "length": len(asked)}

    def failure(self, row: Row, message: str, field: str | None) -> dict[str, Any]:
        return {"id": row.id, "error": {"message": message, "param": field}}

    def close(self) -> None:
        """Nothing is held."""


def given(count: int) -> list[Row]:
    return [Row(i + 1, f"r{i}", {"prompt": "x" * (i % 7 + 1)}) for i in range(count)]


def test_a_batch_of_rows_becomes_records() -> None:
    rows = {
        "number": [1, 2, 3],
        "id": ["a", "b", "c"],
        "row": ['{"prompt": "four"}', '{"prompt": "bad"}', ""],
        "error": ["", "", "not JSON"],
    }
    found = [json.loads(text) for text in Answers(Echo)(rows)["record"]]
    assert {record["id"]: record.get("length") for record in found} == {"a": 4, "b": None, "c": None}
    told = {record["id"]: record["error"]["message"] for record in found if "error" in record}
    assert told == {"b": "prompt: got 'bad'; allowed: a good one", "c": "not JSON"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--engine-on", "spark"), "engine_on: got 'spark'; allowed: ray, or ray:ADDRESS"),
        (("--engine-on", "ray", "--actors", "0"), "actors: got"),
        (("--actors", "2"), "actors: got"),
    ],
)
def test_what_cannot_be_is_one_line(
    words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}\n')
    command = ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--model", "smollm2-135m"]
    assert main([*command, *words]) == 2
    assert said in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- with Ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # actors find `Echo` there
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_an_actor_that_is_killed_loses_nothing(cluster: Any, tmp_path: Path) -> None:
    rows = given(60)

    def make() -> Echo:
        return Echo(str(tmp_path))

    def kill() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.1)
        time.sleep(0.5)
        os.kill(int(next(tmp_path.iterdir()).name), signal.SIGKILL)

    threading.Thread(target=kill).start()
    found = list(run_on_ray(make, Cluster(actors=2, batch=5), iter(rows)))
    assert sorted(record["id"] for record in found) == sorted(row.id for row in rows)
    assert all(record["length"] == len(rows[int(record["id"][1:])].data["prompt"]) for record in found)  # type: ignore[index]
    assert len(list(tmp_path.iterdir())) > 2, "another actor was started"


def records(path: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {record["id"]: record for record in lines}
    assert len(found) == len(lines)
    return found


@pytest.mark.slow
def test_best_of_n_on_two_actors_is_that_of_one_process(cluster: Any, tiny_lm_dir: Path, tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "prompt": f"tell me about the {WORDS[i % 8]} {i % 5}"} for i in range(24)]
    rows[3]["nonsense"] = ""  # kept below
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    command = ["batch", str(tmp_path / "in.jsonl")]
    more = ["--model", str(tiny_lm_dir), "--dtype", "float32", "--max-new-tokens", "6", "--keep", "nonsense"]
    more += ["--sampler", "best-of-n", "-n", "4", "--reward", "length"]
    assert main([*command, str(tmp_path / "plain.jsonl"), *more]) == 0
    assert main([*command, str(tmp_path / "ray.jsonl"), *more, "--engine-on", "ray", "--actors", "2"]) == 0
    assert records(tmp_path / "ray.jsonl") == records(tmp_path / "plain.jsonl")


@pytest.mark.slow
def test_images_by_fk_on_two_actors_are_those_of_one_process(cluster: Any, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"id": f"i{i}", "prompt": c}) + "\n" for i, c in enumerate(("bag", "coat", "dress")))
    )
    command, more = ["batch", str(tmp_path / "in.jsonl")], ["--model", "fashion-ddpm", "--steps", "4"]
    more += ["--sampler", "fk", "-n", "2", "--reward", "brightness"]
    assert main([*command, str(tmp_path / "plain.jsonl"), *more]) == 0
    assert main([*command, str(tmp_path / "ray.jsonl"), *more, "--engine-on", "ray", "--actors", "2"]) == 0
    plain, found = records(tmp_path / "plain.jsonl"), records(tmp_path / "ray.jsonl")
    assert plain.keys() == found.keys()
    for name, record in plain.items():
        assert record["seed"] == found[name]["seed"]
        for one, other in zip(record["samples"], found[name]["samples"], strict=True):
            assert one["reward"] == pytest.approx(other["reward"], rel=1e-5)
            a, b = (tmp_path / f"{kind}.jsonl.images" for kind in ("plain", "ray"))
            assert (a / Path(one["image"]).name).read_bytes() == (b / Path(other["image"]).name).read_bytes()
