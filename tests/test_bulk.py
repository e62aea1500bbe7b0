"""Bulk jobs: rows in, records out, none twice, none lost, whatever stops them."""

from __future__ import annotations

import csv
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from steer.adapters.transformers.model import LanguageModel
from steer.adapters.transformers.serving.engine import TransformersEngine
from steer.bulk import Requests, Summary, run_job
from steer.bulk.results import Results
from steer.bulk.source import MOST_BYTES, Shard, read_rows, survey
from steer.cli import main
from steer.core import InputError, SteerError
from steer.serving.artifact_store import Store
from steer.serving.limits import Limits
from steer.serving.reward_store import Rewards
from steer.serving.tasks import Tasks

WORDS = ("sun", "rain", "day", "night", "cat", "dog", "house", "tree", "happy", "sad", "love", "hate", "calm", "loud")
LIMITS = Limits(choices=1 << 30, candidates=1 << 30, tokens=1 << 30, total_tokens=1 << 30)


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"id": f"r{i}", "prompt": f"tell me about {WORDS[i % len(WORDS)]} {i % 7}", **more} for i in range(count)]


def written(path: Path, given: list[Any]) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in given))
    return str(path)


def records(path: Path | str) -> dict[str, dict[str, Any]]:
    lines = Path(path).read_text().splitlines()
    found = {record["id"]: record for record in map(json.loads, lines)}
    assert len(found) == len(lines), "an id has one record"
    return found


@contextmanager
def answering(model: LanguageModel, **settings: Any) -> Iterator[Requests]:
    engine = TransformersEngine(model, max_rows=8, cache_tokens=1 << 20)
    given = {"fields": {"max_tokens": 6}, "capacity": 16, **settings}
    try:
        yield Requests(engine, Tasks(Store(None, engine.check_artifact), Rewards(), LIMITS), **given)
    finally:
        engine.close()


def done(model: LanguageModel, source: str, out: Path | str, *, job: Any = None, **settings: Any) -> Summary:
    mine = {k: settings.pop(k) for k in ("fields", "keep", "seed", "system") if k in settings}
    with answering(model, **mine) as worker:
        return run_job(worker, source, str(out), job or {}, **settings)


# -------------------------------------------------------------------------------------------------------------- rows


def test_rows_of_every_format_are_the_same(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    given = [{"id": "é 1", "prompt": "the\u2028sun"}, {"id": "b", "prompt": "a, 'day'"}, {"id": "7", "prompt": "cat"}]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(r).encode() for r in given) + b"\n\n")
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, ["id", "prompt", "none"])
        table.writeheader()
        table.writerows(given)
    parquet.write_table(Table.from_pylist([{**r, "none": None} for r in given]), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(given, indent=1), encoding="utf-8-sig")
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "file"):
        path = f"file://{tmp_path}/a.jsonl" if name == "file" else str(tmp_path / name)
        assert [(row.number, row.id, row.data) for row in read_rows(path)] == [
            (n, r["id"], r) for n, r in enumerate(given, 1)
        ]


def test_rows_that_cannot_be_read_say_so(tmp_path: Path) -> None:
    long = json.dumps({"id": "long", "prompt": "x" * (MOST_BYTES + 5)}) + "\n"
    path = written(
        tmp_path / "in.jsonl",
        [
            '{"id": "a"\n',
            '"only words"\n',
            '[{"role": "user", "content": "hi"}]\n',
            long,
            "17\n",
            '{"id": [1]}\n',
            '{"id": "s", "prompt": "\\ud800"}\n',
            '{"prompt": "last"}',
        ],
    )
    found = list(read_rows(path))
    assert [row.id for row in found] == [f"row-{n}" for n in range(1, 9)]
    assert [bool(row.error) for row in found] == [True, False, False, True, True, True, True, False]
    assert found[1].data == {"prompt": "only words"} and str(MOST_BYTES) in found[3].error
    assert "not JSON" in found[0].error and "id:" in found[5].error and "UTF-8" in found[6].error


@pytest.mark.parametrize("shard", ["1/1", "2/2", "-1/2", "a/b", "1", "0/0", ""])
def test_shards_are_written_i_of_n(shard: str) -> None:
    with pytest.raises(InputError, match="shard"):
        Shard.parse(shard)


def test_two_rows_with_one_id_are_refused_before_anything_is_drawn(tmp_path: Path, tiny_lm: LanguageModel) -> None:
    path = written(tmp_path / "in.jsonl", [*rows(3), {"id": "r1", "prompt": "cat"}])
    with pytest.raises(InputError, match=r"r1 in rows 2 and 4"):
        done(tiny_lm, path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    assert survey(written(tmp_path / "b.jsonl", rows(7)), Shard(1, 3)).rows == 2


def test_columns_that_no_request_has_are_refused_or_kept(tmp_path: Path, tiny_lm: LanguageModel) -> None:
    path = written(tmp_path / "in.jsonl", rows(2, label="x", temprature=0))
    with pytest.raises(InputError, match="label, temprature"):
        done(tiny_lm, path, tmp_path / "out.jsonl")
    done(tiny_lm, path, tmp_path / "out.jsonl", keep=frozenset({"label", "temprature"}))
    assert records(tmp_path / "out.jsonl")["r1"]["label"] == "x"


# ----------------------------------------------------------------------------------------------------------- records


def test_a_row_gets_what_a_request_alone_gets(tmp_path: Path, tiny_lm: LanguageModel) -> None:
    """Greedy rows against `generate`; the others depend on seed and id alone, not on place, company or shard."""
    greedy = written(tmp_path / "greedy.jsonl", rows(9, temperature=0))
    done(tiny_lm, greedy, tmp_path / "greedy.out.jsonl")
    alone = {r["id"]: tiny_lm.generate(r["prompt"], temperature=0, max_new_tokens=6).texts[0] for r in rows(9)}
    assert {k: r["samples"][0]["text"] for k, r in records(tmp_path / "greedy.out.jsonl").items()} == alone

    given = rows(20)
    done(tiny_lm, written(tmp_path / "in.jsonl", given), tmp_path / "whole.jsonl")
    whole = records(tmp_path / "whole.jsonl")
    done(tiny_lm, written(tmp_path / "back.jsonl", given[::-1][:11]), tmp_path / "some.jsonl")
    assert records(tmp_path / "some.jsonl").items() <= whole.items()
    for i in (0, 1):
        done(tiny_lm, str(tmp_path / "in.jsonl"), tmp_path / f"part{i}.jsonl", shard=Shard(i, 2))
    assert records(tmp_path / "part0.jsonl") | records(tmp_path / "part1.jsonl") == whole
    assert not records(tmp_path / "part0.jsonl").keys() & records(tmp_path / "part1.jsonl").keys()
    done(tiny_lm, str(tmp_path / "in.jsonl"), tmp_path / "other.jsonl", seed=1)
    assert records(tmp_path / "other.jsonl") != whole


def test_rows_steer_as_requests_do(tmp_path: Path, tiny_lm: LanguageModel) -> None:
    best = {"sampler": "best-of-n", "candidates": 6, "reward": "sentiment"}
    fk = {"sampler": "fk", "candidates": 4, "reward": "sentiment", "beta": 0.1}
    body = {"messages": [{"role": "user", "content": "sun"}], "max_tokens": 4}
    line = {"method": "POST", "url": "/v1/chat/completions"}
    given = [
        {"id": "best", "prompt": "tell me", "steer": best, "max_tokens": 5},
        {"id": "fk", "messages": body["messages"], "steer": fk, "n": 2},
        {"custom_id": "api", "body": body, **line},
        {"custom_id": "raw", "body": {"prompt": "the sun", "max_tokens": 3}, **line, "url": "/v1/completions"},
        {"custom_id": "no", "body": {**body, "temperature": 9}, **line},
        {"custom_id": "lost", "body": body, **line, "url": "/v1/embeddings"},
        {"id": "unknown", "prompt": "sun", "steer": {"edits": [{"name": "calm"}]}},
        {"id": "model", "prompt": "sun", "model": "gpt-4"},
        {"id": "long", "prompt": "sun " * 300},
    ]
    summary = done(tiny_lm, written(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl")
    found = records(tmp_path / "out.jsonl")
    assert summary.done == len(given) and summary.failed == 5, found
    assert found["best"]["cost"]["reward_calls"] == 6 and found["best"]["samples"][0]["reward"] is not None
    assert len(found["fk"]["samples"]) == 2
    assert found["api"]["response"]["body"]["usage"]["completion_tokens"] <= 4 and found["api"]["error"] is None
    assert found["raw"]["response"]["body"]["object"] == "text_completion"
    assert found["no"]["response"] is None and found["no"]["error"]["param"] == "temperature"
    assert found["lost"]["error"]["param"] == "url" and "calm" in found["unknown"]["error"]["message"]
    assert found["model"]["error"]["param"] == "model" and "context" in found["long"]["error"]["message"]


def test_failures_may_be_few_and_are_done_again_when_asked(tmp_path: Path, tiny_lm: LanguageModel) -> None:
    bad = [{"id": f"bad{i}", "prompt": "sun", "temperature": 9} for i in range(4)]
    path = written(tmp_path / "in.jsonl", [*rows(3), *bad])
    with pytest.raises(SteerError, match="3 rows failed, 2 may"):
        done(tiny_lm, path, tmp_path / "out.jsonl", max_failures=2)
    written(tmp_path / "in.jsonl", rows(3) + [{**row, "temperature": 1} for row in bad])
    summary = done(tiny_lm, path, tmp_path / "out.jsonl", retry_failed=True)
    found = records(tmp_path / "out.jsonl")
    assert summary.failed == 0 and len(found) == 7 and all("error" not in record for record in found.values())


def test_an_engine_that_is_broken_ends_the_job(tmp_path: Path, tiny_lm: LanguageModel) -> None:
    with answering(tiny_lm) as worker:
        worker.engine.close()
        with pytest.raises(SteerError, match="10 rows failed one after another"):
            run_job(worker, written(tmp_path / "in.jsonl", rows(60)), str(tmp_path / "out.jsonl"), {})
    assert len(records(tmp_path / "out.jsonl")) < 60


# --------------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("kind", ["jsonl", "url"])
def test_a_job_that_is_cut_anywhere_goes_on(kind: str, tmp_path: Path, tiny_lm: LanguageModel) -> None:
    """Records as an uninterrupted job writes them, after cuts within a line and between lines."""
    path = written(tmp_path / "in.jsonl", rows(24))
    done(tiny_lm, path, tmp_path / "whole.jsonl")
    out = f"file://{tmp_path}/out.jsonl" if kind == "url" else str(tmp_path / "out.jsonl")
    done(tiny_lm, path, out, shard=Shard(0, 3))
    if kind == "jsonl":
        with (tmp_path / "out.jsonl").open("rb+") as file:
            file.truncate(file.seek(0, os.SEEK_END) - 9)
    done(tiny_lm, path, out, shard=Shard(1, 3))
    summary = done(tiny_lm, path, out)
    assert summary.before == 15 + (kind == "url") and records(tmp_path / "out.jsonl") == records(
        tmp_path / "whole.jsonl"
    )
    before = (tmp_path / "out.jsonl").stat()
    assert done(tiny_lm, path, out).done == 0
    assert kind == "url" or (tmp_path / "out.jsonl").stat().st_ino == before.st_ino
    assert not list(tmp_path.glob("*.lock")) and not list(tmp_path.glob("*.parts"))


def test_parquet_is_made_at_the_end_and_goes_on(tmp_path: Path, tiny_lm: LanguageModel) -> None:
    from pyarrow import parquet

    path, out = written(tmp_path / "in.jsonl", rows(5)), tmp_path / "out.parquet"
    done(tiny_lm, path, out)
    written(tmp_path / "in.jsonl", [*rows(8), "{\n"])
    summary = done(tiny_lm, path, out)
    found = {record["id"]: record for record in parquet.read_table(out).to_pylist()}
    assert summary.before == 5 and summary.done == 4 and len(found) == 9
    assert found["r7"]["samples"][0]["text"] and found["row-9"]["error"]["message"].startswith("not JSON")
    assert not (tmp_path / "out.parquet.part.jsonl").exists()


def test_another_job_is_refused_and_what_differs_is_named(tmp_path: Path, tiny_lm: LanguageModel) -> None:
    path, out = written(tmp_path / "in.jsonl", rows(2)), tmp_path / "out.jsonl"
    done(tiny_lm, path, out, job={"seed": 0, "model": "tiny"})
    with pytest.raises(InputError, match="seed was 0, now 1"):
        done(tiny_lm, path, out, job={"seed": 1, "model": "tiny"})
    done(tiny_lm, path, out, job={"seed": 1, "model": "tiny"}, overwrite=True)
    for text, why in (('{"a": 1}\n', "no record"), ("words\n", "no record"), ('{"id": "x"}\n', "job.json beside it")):
        other = tmp_path / "other.jsonl"
        other.write_text(text)
        with pytest.raises(InputError, match=why):
            done(tiny_lm, path, other)
        assert other.read_text() == text
    with Results(str(out), {"seed": 1, "model": "tiny"}), pytest.raises(SteerError, match="another job writes"):
        done(tiny_lm, path, out, job={"seed": 1, "model": "tiny"})


def test_a_full_disk_keeps_what_is_whole(tmp_path: Path, tiny_lm: LanguageModel) -> None:
    """A limit on the size of files stands for the disk."""
    path, out = written(tmp_path / "in.jsonl", rows(12)), tmp_path / "out.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with pytest.raises(SteerError, match=r"cannot write .*the records so far are kept"):
            done(tiny_lm, path, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = records(out)
    assert 0 < len(kept) < 12
    done(tiny_lm, path, out)
    done(tiny_lm, path, tmp_path / "whole.jsonl")
    assert records(out) == records(tmp_path / "whole.jsonl")


# ------------------------------------------------------------------------------------------------------------ others


def test_images_lie_beside_their_records(tmp_path: Path) -> None:
    from PIL import Image

    given = [{"id": "a/../b", "prompt": "boot"}, {"id": "c", "prompt": "bag", "n": 0}, {"id": "d"}]
    path, out = written(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl"
    command = ["batch", path, str(out), "--model", "fashion-ddpm", "--steps", "3", "--sampler", "fk"]
    command += ["--set", "num_particles=2", "--reward", "brightness"]
    assert main(command) == 0
    found = records(out)
    assert found["d"]["error"]["param"] == "prompt" and found["c"]["error"]["param"] == "n"
    sample = found["a/../b"]["samples"][0]
    assert Image.open(tmp_path / sample["image"]).size == (28, 28) and sample["reward"] is not None
    assert len(list((tmp_path / "out.jsonl.images").iterdir())) == len(found["a/../b"]["samples"])


def test_the_command(tmp_path: Path, tiny_lm_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = written(tmp_path / "in.jsonl", rows(5)), tmp_path / "out.jsonl"
    command = ["batch", path, str(out), "--model", str(tiny_lm_dir), "--max-new-tokens", "5"]
    command += ["--sampler", "best-of-n", "-n", "3", "--reward", "sentiment - 0.1*profanity"]
    assert main([*command, "--dry-run"]) == 0 and not out.exists()
    assert main(command) == 0 and "5 rows" in capsys.readouterr().out
    assert all(record["cost"]["reward_calls"] == 3 for record in records(out).values())
    assert main([*command, "--seed", "1"]) == 2 and "seed was 0, now 1" in capsys.readouterr().err
    for wrong, why in ((["--shard", "3/2"], "shard"), (["--max-rows", "0"], "max_rows"), (["--engine", "x"], "engine")):
        assert main([*command, *wrong]) == 2 and why in capsys.readouterr().err
    for place in (1, 2):
        assert main([*command[:place], "rows.txt", *command[place + 1 :]]) == 2
        assert "rows.txt" in capsys.readouterr().err
