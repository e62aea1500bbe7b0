"""Runs one mixed batch on an engine of another kind, in a process of its own, and prints tokens as JSON.

`python worker_script.py KIND NEW`, KIND one of `KINDS`.
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
    "tensor": {"tensor_parallel_size": 3},  # of 9 heads, 3 of them with keys and values of their own
    "pipeline": {"pipeline_parallel_size": 2},
}
PROCESSES = ("processes", "tensor", "pipeline")


def batch() -> list[tuple[Any, Any]]:
    """Prompts and edits of every kind."""
    from vllm_tools import PROMPTS, controller, vector

    edits = [
        vector(0.3),
        vector(0.3, seed=1, scope="generated"),
        None,
        vector(0.3, seed=2, scope="from:12"),
        controller(),
        [vector(0.6, operator="clamp"), vector(0.1, seed=3)],
        vector(0.5, seed=4, scope="outside: the,."),
        vector(0.5, scope="prompt"),
    ]
    return [(PROMPTS[i % 4], edit) for i, edit in enumerate(edits)]


def small(unembedding: Any = None) -> list[tuple[Any, Any]]:
    """Four requests, for an interpreter of kernels."""
    from vllm_tools import PROMPTS, controller, guide, vector

    edits = [vector(0.3, scope="inside: the,."), None, controller(), guide(unembedding)]
    return [(PROMPTS[min(i, 1)], edit) for i, edit in enumerate(edits)]


def unread() -> list[tuple[Any, Any]]:
    """`batch` without edits that read the prompt or go by tokens of the reply."""
    from vllm_tools import vector

    return [(prompt, vector(0.3, seed=5, layers=[0, 14, 15, 29]) if _reads(edit) else edit) for prompt, edit in batch()]


def _reads(edit: Any) -> bool:
    return hasattr(edit, "network") or bool(edit and not isinstance(edit, list) and edit.scope.marked)


def gated() -> list[tuple[Any, Any]]:
    """`batch` and, on every prompt, a gate that reads it before it is steered from its first token on."""
    from vllm_tools import PROMPTS, directions, vector

    from steer import Gate
    from steer.methods.operators import Probe

    edit = vector(0.3, seed=6, gate=Gate(Probe(directions([9], 2)[9], 0.0), 9))
    return [*batch(), *((prompt, edit) for prompt in PROMPTS)]


def work_of(kind: str, unembedding: Any = None) -> list[tuple[Any, Any]]:
    """What the engine of a kind is asked for."""
    if kind == "v2":
        return small(unembedding)
    return {"tensor": gated, "pipeline": unread}.get(kind, batch)()


def main(kind: str, new: int) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if kind in PROCESSES else "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # ranks may have to share a core
    if kind == "v2":
        os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")
        interpret_kernels()
    from vllm_tools import SETTINGS, each

    from steer.adapters import vllm

    model = vllm.load("smollm2-135m", **{**SETTINGS, **KINDS[kind]})
    if kind == "pipeline":  # on the CPU vLLM 0.32 makes a later rank's buffers only when it compiles
        model.llm.collective_rpc("execute_dummy_batch")
    work = work_of(kind)
    samples = model.generate([p for p, _ in work], edits=each(e for _, e in work), temperature=0, max_new_tokens=new)
    facts: dict[str, Any] = {"tokens": samples.tokens, "fingerprint": model.info.fingerprint}
    facts["norms"] = model.info.residual_norms().tolist()
    if kind == "compiled":
        facts["refused"], facts["after"] = (
            refused(model),
            model.generate(
                [p for p, _ in work], edits=each(e for _, e in work), temperature=0, max_new_tokens=new
            ).tokens,
        )
    if kind == "preempted":
        facts["preemptions"] = COUNT[0]
    if kind not in PROCESSES:
        runner = model.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        facts["runner"] = f"{type(runner).__module__}.{type(runner).__name__}"
    print("RESULT " + json.dumps(facts), flush=True)


def refused(model: Any) -> str:
    """Why a request with three rows does not go with 40 slots for 16 requests."""
    from vllm_tools import PROMPTS, vector

    edits = [vector(0.3, seed=i, scope=scope) for i, scope in enumerate(("prompt", "last", "generated"))]
    try:
        model.generate(PROMPTS[0], edits=edits, max_new_tokens=4)
    except ValueError as error:
        return str(error)
    return ""


def interpret_kernels() -> None:
    """Let the V2 runner work without a GPU. The CPU build of vLLM 0.31 asks for the version of a distribution called
    vllm, which it is not.
    """
    from importlib import metadata

    import triton.backends as backends

    backends.backends["cpu"] = backends.backends["nvidia"]
    original = metadata.version

    def version(name: str) -> str:
        return f"{original('vllm-cpu')}+cpu" if name == "vllm" else original(name)

    metadata.version = version


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
