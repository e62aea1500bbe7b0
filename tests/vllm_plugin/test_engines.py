"""The same batch on other engines: memory too small for it, processes of their own, compiled, the V2 runner."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm_tools import MISSING, each, greedy
from worker_script import work_of

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING or "vLLM is there")


def run(kind: str, new: int) -> dict[str, Any]:
    script = Path(__file__).with_name("worker_script.py")
    done = subprocess.run([sys.executable, str(script), kind, str(new)], capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert found, done.stdout[-2000:] + done.stderr[-4000:]
    return dict(json.loads(found[0].removeprefix("RESULT ")))


def want(reference: Any, work: Any, new: int) -> list[list[int]]:
    return greedy(reference, [p for p, _ in work], each(e for _, e in work), new).tokens


def test_preemption(folder: Any, reference: Any) -> None:
    found = run("preempted", 40)
    assert found["preemptions"] >= 2
    assert found["tokens"] == want(reference, work_of("preempted"), 40)


def test_an_engine_in_processes_of_its_own(folder: Any, reference: Any) -> None:
    assert run("processes", 12)["tokens"] == want(reference, work_of("processes"), 12)


@pytest.mark.slow
def test_compiled(folder: Any, reference: Any) -> None:
    found = run("compiled", 20)
    assert found["tokens"] == found["after"] == want(reference, work_of("compiled"), 20)
    assert "steer.edits" in found["refused"] and "slots of 48 or more" in found["refused"]


@pytest.mark.slow
def test_the_v2_runner(folder: Any, reference: Any) -> None:
    found = run("v2", 5)
    assert found["runner"].startswith("vllm.v1.worker.cpu.model_runner") or ".gpu.model_runner" in found["runner"]
    assert found["tokens"] == want(reference, work_of("v2", reference.info.unembedding()), 5)
