"""Several processes of vLLM's server: API processes, data-parallel engines, replicas on one folder of artifacts."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from serving_tools import CHAT, Running, fleet, vllm_serving, write_vector
from vllm_tools import DEPTH, MISSING, WIDTH

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]

BYTES = {"Content-Type": "application/octet-stream"}
PROMPTS = ("tell me about the sun", "how is the rain", "why is the cat sad", "say something about the night")


def settings(store: Path) -> dict[str, Any]:
    return {"server": {"artifacts": str(store)}}


def vector(path: Path, seed: int = 1) -> Path:
    return write_vector(path, width=WIDTH, layers=tuple(range(DEPTH)), seed=seed)


def answered(server: Running, prompt: str, body: dict[str, Any]) -> Any:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": prompt}], "max_tokens": 12, "temperature": 0}
    answer = server.post("/v1/chat/completions", json={**asked, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def steered_texts(server: Running) -> list[str]:
    """Texts of prompts that are plain, steered by the field, steered in vLLM's own requests, and searched for."""
    edit = {"edits": [{"name": "calm", "strength": 3.0}]}
    bodies: list[dict[str, Any]] = [
        {},
        {"steer": edit},
        {"vllm_xargs": {"steer": json.dumps(edit)}},
        {"steer": {**edit, "sampler": "best-of-n", "candidates": 3, "reward": "length"}, "temperature": 1.0, "seed": 1},
    ]
    return [answered(server, prompt, body) for body in bodies for prompt in PROMPTS]


def test_replicas_on_one_folder(folder: Path, tmp_path: Path) -> None:
    sources = [vector(tmp_path / f"{i}.safetensors", i) for i in range(2)]
    words = ("--served-model-name", "tiny")
    with ExitStack() as stack:
        servers = [stack.enter_context(vllm_serving(folder, settings(tmp_path / "store"), *words)) for _ in range(2)]
        fleet((servers[0], servers[1]), *sources)


@pytest.mark.parametrize("more", [("--data-parallel-size", "2"), ("--api-server-count", "2")])
def test_many_processes_answer_as_one_engine(more: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    """Token for token, whichever process takes a request; what one of them is sent, all know."""
    source, words = vector(tmp_path / "v.safetensors"), ("--served-model-name", "tiny")
    with vllm_serving(folder, settings(tmp_path / "one"), *words) as server:
        server.post("/v1/steer/artifacts?name=calm", content=source.read_bytes(), headers=BYTES).raise_for_status()
        wanted = steered_texts(server)
    assert len(set(wanted)) > len(PROMPTS)
    with vllm_serving(folder, settings(tmp_path / "many"), *words, *more) as server:
        server.post("/v1/steer/artifacts?name=calm", content=source.read_bytes(), headers=BYTES).raise_for_status()
        for _ in range(3):  # each time in whatever process it comes to
            assert steered_texts(server) == wanted
        server.delete("/v1/steer/artifacts/calm").raise_for_status()
        for _ in range(6):
            assert server.get("/v1/steer/artifacts/calm").status_code == 404
        body = {"model": "tiny", "messages": CHAT, "steer": {"edits": [{"name": "calm"}]}}
        assert server.post("/v1/chat/completions", json=body).status_code == 400
