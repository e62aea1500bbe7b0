"""The server's own description: it says what is taken; requests made up from it (slow) never meet a 5xx."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ValidationError
from serving_tools import serving, write_vector

from steer.serving.protocol import Message
from steer.serving.wire import EditRequest, SteerRequest

VECTOR = {"layers": {"0": [0.5, 1.0]}}


@pytest.mark.parametrize(
    ("model", "given", "right"),
    [
        (Message, {"role": "user", "content": "Hello"}, True),
        (Message, {"role": "user", "content": [{"type": "text", "text": "Hello"}]}, True),
        (Message, {"role": "user", "content": None}, False),
        (Message, {"role": "system", "content": None}, False),
        (Message, {"role": "assistant", "content": None}, True),
        (Message, {"role": "assistant", "content": "Hello", "refusal": None}, True),
        (Message, {"role": "assistant"}, False),
        (EditRequest, {"name": "calm", "strength": 2.0}, True),
        (EditRequest, {"name": "calm", "vector": None}, True),
        (EditRequest, {"vector": VECTOR, "strength": 2.0}, True),
        (EditRequest, {"strength": 2.0}, False),
        (EditRequest, {"name": ""}, False),
        (EditRequest, {"name": "../calm"}, False),
        (EditRequest, {"name": "calm", "vector": VECTOR}, False),
        (EditRequest, {"vector": None}, False),
        (SteerRequest, {"readings": ["calm", "calm.v2"]}, True),
        (SteerRequest, {"readings": ["a/b"]}, False),
        (SteerRequest, {"readings": [""]}, False),
    ],
)
def test_the_description_says_what_the_server_takes(model: type[BaseModel], given: dict[str, Any], right: bool) -> None:
    described = Draft202012Validator(model.model_json_schema()).is_valid(given)
    try:
        model.model_validate(given)
    except ValidationError:
        taken = False
    else:
        taken = True
    assert (described, taken) == (right, right)


@pytest.mark.slow
def test_no_made_up_request_breaks_the_server(tiny_lm_dir: Path, tmp_path: Path, tiny_lm: Any) -> None:
    write_vector(tmp_path / "store" / "calm.safetensors", tiny_lm.info)
    with serving(tiny_lm_dir, "--name", "tiny", "--artifacts", tmp_path / "store") as server:
        checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "schemathesis.cli",
                "run",
                f"{server.url}/openapi.json",
                "--checks",
                checks,
                "--max-examples",
                "60",
                "--seed",
                "1",
                "--phases",
                "examples,coverage,fuzzing",
                "--no-color",
            ],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        written = server.metric('steer_http_answers_total{path="/v1/chat/completions",status="200"}')
        assert written > 10, "some of them were right"
        assert server.get("/health").status_code == 200
