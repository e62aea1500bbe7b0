"""Runs one batch of guided and plain requests on an engine of another kind, and prints tokens as JSON.

`python guidance_script.py KIND NEW MODEL FOLDER`, KIND one of `KINDS`, FOLDER the tuned model's.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

KINDS: dict[str, dict[str, Any]] = {
    "eager": {},
    "processes": {},
    "ranks": {"tensor_parallel_size": 2},
    "server": {},
    "compiled": {"enforce_eager": False},
    "v2": {"max_model_len": 128},
}


def main(kind: str, new: int, name: str, folder: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if kind in ("processes", "ranks") else "0"
    if kind == "ranks":
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    if kind == "v2":
        os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")
        import triton.backends as backends

        backends.backends["cpu"] = backends.backends["nvidia"]
    from vllm_tools import PROMPTS, SETTINGS

    from steer import RawText
    from steer.adapters import vllm

    if kind == "server":
        print("RESULT " + json.dumps(served(new, name, folder)), flush=True)
        return
    model = vllm.load(name, **{**SETTINGS, **KINDS[kind], "steer": {"tuned": {"polite": folder}}})
    edits = [None, *([model.edit("polite", w)] for w in (2.0, 1.0, 0.5))]
    prompts = [RawText(p) for p in (PROMPTS[:2] * 2 if kind == "v2" else PROMPTS)]
    samples = model.generate(prompts, edits=edits, temperature=0, max_new_tokens=new)
    print("RESULT " + json.dumps(samples.tokens), flush=True)


def served(new: int, name: str, folder: str) -> list[list[int]]:
    """The same batch as requests to the engine behind a server, which has the tuned model as an edit of its own."""
    import asyncio

    from vllm_tools import PROMPTS, SETTINGS

    from steer import RawText
    from steer.adapters.vllm.server.own_engine import serving_engine
    from steer.adapters.vllm.server.writing import written
    from steer.serving.engine import NamedEdit, Sampling, Steering, Task
    from steer.serving.wire import EditRequest

    settings = {**SETTINGS, "additional_config": {"steer": {"tuned": {"polite": folder}}}}
    engine = serving_engine(name, dtype="float32", settings=settings)
    try:
        assert engine.own_edits == ("polite",)
        tokens = []
        for prompt, weight in zip(PROMPTS, (None, 2.0, 1.0, 0.5), strict=True):
            edits = () if weight is None else (NamedEdit(None, "", EditRequest(name="polite", strength=weight)),)
            task = Task((RawText(prompt),), sampling=Sampling(new, temperature=0.0), steering=Steering(edits))
            work = written(engine.model, engine._client, engine.prepare(task), lambda event: None)
            tokens.append(asyncio.run_coroutine_threadsafe(work, engine._loop).result()[0].tokens)
        return tokens
    finally:
        engine.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
