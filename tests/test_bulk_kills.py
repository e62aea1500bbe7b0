"""Bulk jobs that are killed (-9) at random moments: resumed, they leave the records of a job that was let be."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steer.adapters.transformers.model import LanguageModel
from steer.adapters.transformers.serving.engine import TransformersEngine
from steer.bulk import Requests, run_job
from steer.bulk.source import Shard
from steer.embedded import find
from steer.serving.artifact_store import Store
from steer.serving.limits import Limits
from steer.serving.reward_store import Rewards
from steer.serving.tasks import Tasks

WORDS = ("sun", "rain", "day", "night", "cat", "dog", "house", "tree", "happy", "sad", "love", "hate", "calm", "loud")
LIMITS = Limits(choices=1 << 30, candidates=1 << 30, tokens=1 << 30, total_tokens=1 << 30)


def prompts(path: Path, count: int) -> str:
    given = [{"id": f"r{i}", "prompt": f"tell me about {WORDS[i % len(WORDS)]} {i % 7}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return str(path)


def records(path: Path) -> dict[str, Any]:
    lines = path.read_text(encoding="utf-8").splitlines()
    found = {record["id"]: record for record in map(json.loads, lines)}
    assert len(found) == len(lines), "none twice"
    return found


def answer(model: LanguageModel, source: str, out: Path, tokens: int, shard: Shard | None = None) -> None:
    engine = TransformersEngine(model, max_rows=16, cache_tokens=1 << 20)
    try:
        tasks = Tasks(Store(None, engine.check_artifact), Rewards(), LIMITS)
        worker = Requests(engine, tasks, fields={"max_tokens": tokens}, capacity=32)
        run_job(worker, source, str(out), {}, shard=shard)
    finally:
        engine.close()


class Command:
    """A command line as a process that is begun."""

    def __init__(self, words: list[str]) -> None:
        self._process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()

    def join(self) -> None:
        self._process.wait()


def killed(start: Callable[[], Any], out: Path, kills: int, whole: int, lasted: float, early: float = 0.0) -> None:
    """Start the job `kills` times, and kill it each time: when a random number of bytes was added to what is there, and
    once six tenths of all `whole` are there, at a random moment before it can be at its end; it took `lasted` seconds.
    One time in four it is killed within its first `early` seconds, whatever it has done.
    """
    drawn, most = random.Random(0), int(0.6 * whole)
    for left in range(kills, 0, -1):
        before = size(out)
        late = before >= most
        wanted = before + (1 if late else drawn.randrange(1, max(2, (most - before) // (left + 1))))
        process = start()
        until = time.monotonic() + (drawn.random() * lasted / 40 if late else 600)
        if early and drawn.random() < 0.25:
            until = time.monotonic() + drawn.random() * early
        while process.is_alive() and size(out) < wanted and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(drawn.random() * 0.01)
        assert process.is_alive(), "it was not to end by itself"
        process.kill()
        process.join()


def forked(job: Callable[..., None], *given: Any) -> Callable[[], Any]:
    """What begins a job in a process that has this one's memory."""

    def start() -> Any:
        process = multiprocessing.get_context("fork").Process(target=job, args=given)
        process.start()
        return process

    return start


def size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def same(found: dict[str, Any], wanted: dict[str, Any]) -> int:
    """Check that all are there, and that those that differ do so by rounding alone: a row's numbers differ in their
    last digits with the rows beside it, which now and then changes a token. Returns how many do.
    """
    assert found.keys() == wanted.keys()
    assert all(found[key]["seed"] == wanted[key]["seed"] for key in wanted)
    return sum(found[key] != wanted[key] for key in wanted)


def check_kills(model: LanguageModel, tmp_path: Path, count: int, tokens: int, kills: int) -> int:
    source, whole, out = prompts(tmp_path / "in.jsonl", count), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    began = time.monotonic()
    answer(model, source, whole, tokens)
    killed(forked(answer, model, source, out, tokens), out, kills, size(whole), time.monotonic() - began)
    answer(model, source, out, tokens)
    return same(records(out), records(whole))


def test_a_job_that_is_killed_twenty_times_is_as_one_that_is_not(tmp_path: Path, tiny_lm: LanguageModel) -> None:
    assert check_kills(tiny_lm, tmp_path, 400, 3, 20) <= 1


@pytest.mark.slow
@pytest.mark.skipif(not find("smollm2-135m").fetched, reason="the model is not fetched")
def test_two_hundred_rows_of_a_real_model_killed_twenty_times(tmp_path: Path) -> None:
    import steer

    model = steer.load("smollm2-135m", dtype="float32")
    differ = check_kills(model, tmp_path, 200, 12, 20)
    assert differ <= 2
    source = str(tmp_path / "in.jsonl")
    for i in range(2):
        answer(model, source, tmp_path / f"part{i}.jsonl", 12, Shard(i, 2))
    parts = [records(tmp_path / f"part{i}.jsonl") for i in range(2)]
    assert not parts[0].keys() & parts[1].keys()
    assert same(parts[0] | parts[1], records(tmp_path / "whole.jsonl")) <= 2


@pytest.mark.slow
def test_the_command_is_killed_twenty_times(tmp_path: Path, tiny_lm_dir: Path) -> None:
    """5,000 rows; a kill may come at any moment, while the model is loaded, too."""
    source, whole, out = prompts(tmp_path / "in.jsonl", 5000), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    words = [sys.executable, "-m", "steer", "batch", source]
    more = ["--model", str(tiny_lm_dir), "--dtype", "float32", "--max-new-tokens", "8"]
    began = time.monotonic()
    subprocess.run([*words, str(whole), *more], check=True, capture_output=True)
    lasted = time.monotonic() - began
    killed(lambda: Command([*words, str(out), *more]), out, 20, size(whole), lasted, early=lasted / 4)
    subprocess.run([*words, str(out), *more], check=True, capture_output=True)
    assert same(records(out), records(whole)) <= 5
    for i in range(2):
        part = str(tmp_path / f"part{i}.jsonl")
        subprocess.run([*words, part, *more, "--shard", f"{i}/2"], check=True, capture_output=True)
    parts = [records(tmp_path / f"part{i}.jsonl") for i in range(2)]
    assert len(parts[0]) == len(parts[1]) == 2500
    assert same(parts[0] | parts[1], records(whole)) <= 5


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting takes root")
def test_a_disk_that_is_really_full(tmp_path: Path, tiny_lm_dir: Path) -> None:
    """A small file system of its own, filled by the records; then room is made and the job goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        source = prompts(tmp_path / "in.jsonl", 400)
        command = [sys.executable, "-m", "steer", "batch", source, str(disk / "out.jsonl"), "--max-new-tokens", "4"]
        command += ["--model", str(tiny_lm_dir), "--dtype", "float32"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode not in (0, -9) and "the records so far are kept" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and 0 < len(records(disk / "out.jsonl")) < 400
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        subprocess.run(command, check=True, capture_output=True)
        assert len(records(disk / "out.jsonl")) == 400
    finally:
        subprocess.run(["umount", str(disk)], check=True)
