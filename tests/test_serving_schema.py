"""Requests made up from the server's own description: never a 5xx, and answers as described. Slow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving_tools import serving, write_vector


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
