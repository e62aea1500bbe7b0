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

    model = vllm.load(name, **{**SETTINGS, **KINDS[kind], "steer": {"tuned": {"polite": folder}}})
    edits = [None, *(model.edit("polite", w) for w in (2.0, 1.0, 0.5))]
    prompts = [RawText(p) for p in (PROMPTS[:2] * 2 if kind == "v2" else PROMPTS)]
    samples = model.generate(prompts, edits=edits, temperature=0, max_new_tokens=new)
    print("RESULT " + json.dumps(samples.tokens), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
