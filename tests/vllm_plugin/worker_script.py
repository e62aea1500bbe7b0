"""Runs one mixed batch on an engine of another kind, in a process of its own, and prints tokens as JSON.

`python worker_script.py KIND NEW`, KIND one of `preempted`, `processes`, `compiled`, `v2`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

KINDS: dict[str, dict[str, Any]] = {
    # 14 blocks of 32 tokens for 8 requests that want up to 4 each.
    "preempted": {"num_gpu_blocks_override": 14, "max_num_seqs": 8, "max_model_len": 256},
    "processes": {},
    "compiled": {"enforce_eager": False, "steer": {"reads": [8], "stages": 2, "slots": 40}},
    "v2": {"max_model_len": 128},
}


def batch() -> list[tuple[Any, Any]]:
    """Prompts and edits of every kind."""
    from vllm_tools import PROMPTS, controller, vector

    edits = [vector(0.3), vector(0.3, seed=1, scope="generated"), None, vector(0.3, seed=2, scope="from:12"),
             controller(), [vector(0.6, operator="clamp"), vector(0.1, seed=3)], None,
             vector(0.5, scope="prompt")]  # fmt: skip
    return [(PROMPTS[i % 4], edit) for i, edit in enumerate(edits)]


def small(unembedding: Any = None) -> list[tuple[Any, Any]]:
    """Four requests, for an interpreter of kernels."""
    from vllm_tools import PROMPTS, controller, guide, vector

    edits = [vector(0.3), None, controller(), guide(unembedding)]
    return [(PROMPTS[min(i, 1)], edit) for i, edit in enumerate(edits)]


def main(kind: str, new: int) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if kind == "processes" else "0"
    if kind == "v2":
        os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")
        import triton.backends as backends

        backends.backends["cpu"] = backends.backends["nvidia"]
    from vllm_tools import SETTINGS

    from steer.adapters import vllm

    model = vllm.load("smollm2-135m", **{**SETTINGS, **KINDS[kind]})
    work = small() if kind == "v2" else batch()
    samples = model.generate([p for p, _ in work], edits=[e for _, e in work], temperature=0, max_new_tokens=new)
    facts: dict[str, Any] = {"tokens": samples.tokens}
    if kind == "preempted":
        facts["preemptions"] = COUNT[0]
    if kind != "processes":
        runner = model.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        facts["runner"] = f"{type(runner).__module__}.{type(runner).__name__}"
    print("RESULT " + json.dumps(facts), flush=True)


COUNT = [0]


def count_preemptions() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    original = Scheduler._preempt_request

    def counted(self: Any, *args: Any, **more: Any) -> Any:
        COUNT[0] += 1
        return original(self, *args, **more)

    Scheduler._preempt_request = counted


if __name__ == "__main__":
    if sys.argv[1] == "preempted":
        count_preemptions()
    main(sys.argv[1], int(sys.argv[2]))
