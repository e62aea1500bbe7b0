"""Bulk jobs where things go wrong outside: odd files, odd ids, a kill between two writes, changed settings."""

from __future__ import annotations

import asyncio
import datetime
import gzip
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
from serving_tools import write_vector

import steer
from steer.adapters.transformers.model import LanguageModel
from steer.bulk import run_job
from steer.bulk.results import Results
from steer.bulk.source import MOST_BYTES, Row, Shard, read_rows, survey
from steer.cli import main
from steer.core import InputError, SteerError


class Echo:
    """A worker that answers with its row."""

    capacity = 4

    def __init__(self, slow: float = 0.0, kinds: bool = False) -> None:
        self.slow, self.kinds, self.seen = slow, kinds, list[str]()

    def check_fields(self, names: frozenset[str]) -> None:
        """All are known."""

    def prepare(self, row: Row) -> Any:
        return row.data

    def rows(self, asked: Any) -> int:
        return 1

    async def answer(self, row: Row, asked: Any) -> dict[str, Any]:
        await asyncio.sleep(self.slow)
        self.seen.append(row.id)
        label = [row.number, f"text {row.number}", {"a": row.number}][row.number % 3] if self.kinds else row.number
        return {"id": row.id, "prompt": asked["prompt"], "label": label, "none": {}, "samples": [{"text": "x"}]}

    def failure(self, row: Row, message: str, field: str | None) -> dict[str, Any]:
        return {"id": row.id, "samples": [], "error": {"message": message, "param": field}}

    def close(self) -> None:
        """Nothing is held."""


def rows(count: int) -> list[dict[str, Any]]:
    return [{"id": f"r{i}", "prompt": f"p{i}"} for i in range(count)]


def written(path: Path, given: list[Any]) -> str:
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) + "\n" for row in given)
    )
    return str(path)


def read(path: Path) -> dict[str, dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    found = {record["id"]: record for record in map(json.loads, lines)}
    assert len(found) == len(lines)
    return found


# ------------------------------------------------------------------------------------------------------------- rows


def test_ids_are_what_they_say(tmp_path: Path) -> None:
    """Numbers are their digits, and so the same as a text of those; other alphabets and forms are told apart."""
    ids: list[Any] = [7, "é", "e\u0301", "日本", "a/b", "A", "a", "0x7", -1, " "]
    source = written(tmp_path / "in.jsonl", [{"id": x, "prompt": "p"} for x in ids])
    run_job(Echo(), source, str(tmp_path / "out.jsonl"), {})
    assert list(read(tmp_path / "out.jsonl")) == [str(x) for x in ids]
    for twice in (["7", 7], ["row-1"], ["x", "y", "row-2"]):
        given = [{"id": x, "prompt": "p"} for x in twice]
        source = written(tmp_path / "twice.jsonl", given if len(twice) != 1 else [{"prompt": "a"}, *given])
        if twice == ["x", "y", "row-2"]:
            survey(source)  # row 2 has a name of its own
            continue
        with pytest.raises(InputError, match="an id of its own"):
            run_job(Echo(), source, str(tmp_path / "none.jsonl"), {})
    assert not (tmp_path / "none.jsonl").exists()
    bad = [{"id": x, "prompt": "p"} for x in (1.5, None, True, "", "x" * 257, [])]
    assert all(row.error.startswith("id:") for row in read_rows(bad))


def test_packed_files_are_read_and_hidden_ones_refused(tmp_path: Path) -> None:
    text = "".join(json.dumps(row) + "\r\n" for row in rows(3)).encode()
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "in.CSV.GZ").write_bytes(gzip.compress(b"id,prompt\r\nr0,p0\r\nr1,p1\r\nr2,p2\r\n"))
    for path in (str(tmp_path / "in.jsonl.gz"), f"file://{tmp_path}/in.jsonl.gz", str(tmp_path / "in.CSV.GZ")):
        assert [(row.id, row.data) for row in read_rows(path)] == [(row["id"], row) for row in rows(3)]
    (tmp_path / "hidden.jsonl").write_bytes(gzip.compress(text))
    (tmp_path / "plain.jsonl.gz").write_bytes(text)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(text)[:-12])
    wrong = (("hidden.jsonl", "packed by gzip"), ("plain.jsonl.gz", "gzip wrote"), ("cut.jsonl.gz", "gzip wrote"))
    for name, said in wrong:
        with pytest.raises(InputError, match=said):
            list(read_rows(str(tmp_path / name)))


def test_what_is_no_file_of_rows_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    for name, text in (
        ("empty.jsonl", ""),
        ("blank.jsonl", "\n\n"),
        ("empty.csv", ""),
        ("head.csv", "id,prompt\n"),
        ("a.json", "[]"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match="no rows"):
            run_job(Echo(), str(tmp_path / name), str(tmp_path / "out.jsonl"), {})
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "bad.csv").write_bytes(b"id,prompt\n1,\xff\n")
    for name in ("folder.jsonl", "lost.jsonl", "bad.parquet", "bad.csv", "x.txt", "folder"):
        with pytest.raises(SteerError, match=name):
            run_job(Echo(), str(tmp_path / name), str(tmp_path / "out.jsonl"), {})
    assert not (tmp_path / "out.jsonl").exists()


def test_a_long_row_is_a_row_and_a_longer_one_an_error(tmp_path: Path) -> None:
    given = [{"id": "long", "prompt": "x" * (1 << 20)}, {"id": "more", "prompt": "x" * MOST_BYTES}, *rows(1)]
    summary = run_job(Echo(), written(tmp_path / "in.jsonl", given), str(tmp_path / "out.jsonl"), {})
    found = read(tmp_path / "out.jsonl")
    assert summary.failed == 1 and len(found["long"]["prompt"]) == 1 << 20
    assert str(MOST_BYTES) in found["row-2"]["error"]["message"] and found["r0"]["prompt"] == "p0"


# ---------------------------------------------------------------------------------------------------------- records


def test_parquet_holds_what_json_lines_hold(tmp_path: Path) -> None:
    """Fields of several kinds, empty objects, texts like dates; and a job that goes on after it had ended."""
    from pyarrow import parquet

    given = [{"id": f"r{i}", "prompt": str(datetime.date(2020, 1, i + 1))} for i in range(9)]
    source, out = written(tmp_path / "in.jsonl", given[:5]), tmp_path / "out.parquet"
    run_job(Echo(kinds=True), source, str(out), {})
    written(tmp_path / "in.jsonl", given)
    assert run_job(Echo(kinds=True), source, str(out), {}).before == 5
    run_job(Echo(kinds=True), source, str(tmp_path / "out.jsonl"), {})
    table, plain = parquet.read_table(out).to_pylist(), read(tmp_path / "out.jsonl")
    assert {record["id"] for record in table} == plain.keys()
    for record in table:
        assert record["prompt"] == plain[record["id"]]["prompt"] and record["samples"] == [{"text": "x"}]
        assert json.loads(record["label"]) == plain[record["id"]]["label"] and json.loads(record["none"]) == {}
    # A share without rows has a file, too.
    run_job(Echo(), source, str(tmp_path / "none.parquet"), {}, shard=Shard(20, 30))
    assert parquet.read_table(tmp_path / "none.parquet").num_rows == 0


def test_a_kill_between_the_table_and_the_end_of_its_lines_loses_nothing(tmp_path: Path) -> None:
    source, out = written(tmp_path / "in.jsonl", rows(6)), tmp_path / "out.parquet"
    run_job(Echo(), source, str(out), {}, shard=Shard(0, 2))
    part = tmp_path / "out.parquet.part.jsonl"
    with Results(str(out), {}) as begun:  # what a job leaves that is killed once it has gone on
        assert len(begun.done) == 3
    assert out.is_file() and part.is_file()
    part.write_bytes(part.read_bytes()[:-5])
    worker = Echo()
    assert run_job(worker, source, str(out), {}).before == 2 and len(worker.seen) == 4
    from pyarrow import parquet

    assert sorted(parquet.read_table(out)["id"].to_pylist()) == [f"r{i}" for i in range(6)]
    assert not part.exists()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_process_that_is_killed_goes_on(kind: str, tmp_path: Path) -> None:
    source, out = written(tmp_path / "in.jsonl", rows(2000)), tmp_path / f"out.{kind}"
    lines = out if kind == "jsonl" else tmp_path / "out.parquet.part.jsonl"
    process = multiprocessing.get_context("fork").Process(target=run_job, args=(Echo(slow=0.01), source, str(out), {}))
    process.start()
    while not (lines.is_file() and lines.stat().st_size > 2000):
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    worker = Echo()
    before = run_job(worker, source, str(out), {}).before
    assert 0 < before < 2000 and len(worker.seen) == 2000 - before
    if kind == "jsonl":
        assert {x["id"]: x["prompt"] for x in read(out).values()} == {x["id"]: x["prompt"] for x in rows(2000)}
    assert not (tmp_path / f"out.{kind}.lock").exists()


def test_the_rows_are_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path / "in.jsonl", rows(2))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "in.jsonl")
    before = Path(source).read_bytes()
    for target in (source, str(tmp_path / "link.jsonl"), f"{tmp_path}/./in.jsonl"):
        assert main(["batch", source, target, "--model", "smollm2-135m", "--overwrite"]) == 2
        assert "another file than the rows" in capsys.readouterr().err
    assert Path(source).read_bytes() == before


def test_an_edit_that_was_trained_again_is_another_job(
    tmp_path: Path, tiny_lm: Any, tiny_lm_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = written(tmp_path / "in.jsonl", [{"prompt": "the sun"}]), tmp_path / "out.jsonl"
    edit = write_vector(tmp_path / "calm.safetensors", tiny_lm.info, seed=1)
    command = ["batch", source, str(out), "--model", str(tiny_lm_dir), "--max-new-tokens", "2", "--edit", str(edit)]
    assert main(command) == 0
    write_vector(edit, tiny_lm.info, seed=2)
    capsys.readouterr()
    assert main(command) == 2 and "calm.safetensors within was" in capsys.readouterr().err


def test_images_of_any_id_have_names_of_their_own(tmp_path: Path) -> None:
    from steer.bulk.outputs import _file_name

    ids = ["a", ".a", "..", ".", "a/b", "a_2f_b", "日" * 256, "日" * 255 + "本", "_", " "]
    names = [_file_name(x) for x in ids]
    assert len(set(names)) == len(ids) and all(0 < len(x) <= 200 and x[0] != "." and "/" not in x for x in names)


# ----------------------------------------------------------------------------------------------------------- Python


def test_a_model_maps_rows(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    given: list[Any] = [{"id": i, "prompt": f"tell me {w}", "label": w} for i, w in enumerate(("sun", "cat", "dog"))]
    settings: dict[str, Any] = {"max_new_tokens": 5, "keep": ["label"]}
    found = tiny_lm.map(given, **settings)
    assert [record["id"] for record in found] == ["0", "1", "2"] and [r["label"] for r in found] == [
        "sun",
        "cat",
        "dog",
    ]
    assert tiny_lm.map(given[::-1], **settings)[::-1] == found and tiny_lm.map(given, seed=1, **settings) != found
    source = written(tmp_path / "in.jsonl", given)
    assert tiny_lm.map(source, **settings) == found
    assert tiny_lm.map(given, out=tmp_path / "out.jsonl", **settings) == found
    assert tiny_lm.map(given, out=tmp_path / "out.jsonl", **settings) == found
    with pytest.raises(InputError, match="seed was 0, now 3"):
        tiny_lm.map(given, out=tmp_path / "out.jsonl", seed=3, **settings)
    greedy = tiny_lm.map(["the sun", [{"role": "user", "content": "a cat"}]], temperature=0, max_new_tokens=4)
    alone = tiny_lm.generate(["the sun", "a cat"], temperature=0, max_new_tokens=4)
    assert [record["samples"][0]["text"] for record in greedy] == alone.texts

    async def notebook() -> Any:
        return tiny_lm.map(given, **settings)

    assert asyncio.run(notebook()) == found


def test_a_model_maps_rows_under_steering(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    calm = steer.load_artifact(write_vector(tmp_path / "calm.safetensors", tiny_lm.info))
    said = tiny_lm.map(["the sun"], edits=f"{tmp_path}/calm.safetensors:0.3", temperature=0, max_new_tokens=6)
    kept = tiny_lm.map(["the sun"], edits=calm(0.3), temperature=0, max_new_tokens=6)  # a call of `generate`
    assert said[0]["samples"][0]["text"] == kept[0]["samples"][0]["text"]
    assert tiny_lm.map(["the sun"], edits=calm, max_new_tokens=6, temperature=0)[0].get("error") is None
    lengths = [0]

    def words(texts: list[str]) -> list[float]:
        lengths[0] += len(texts)
        return [float(len(text)) for text in texts]

    best = tiny_lm.map(["the sun", "a cat"], sampler="best-of-n", n=4, reward=words, max_new_tokens=5)
    assert lengths == [8] and all(r["cost"]["reward_calls"] == 4 for r in best)
    assert [r["samples"][0]["reward"] for r in best] == [len(r["samples"][0]["text"]) for r in best]
    failed, fine = tiny_lm.map([{"prompt": "sun", "temperature": 9}, "sun"], max_new_tokens=2)
    assert failed["error"]["param"] == "temperature" and fine["samples"]
    for wrong, field in (
        ({"temprature": 1}, "temprature"),
        ({"overwrite": True}, "overwrite"),
        ({"sampler": "best"}, "sampler"),
    ):
        with pytest.raises(InputError, match=field):
            tiny_lm.map(["sun"], **wrong)  # type: ignore[arg-type]
