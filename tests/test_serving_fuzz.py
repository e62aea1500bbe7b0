"""`steer serve` under requests and files made up by chance: a sample in the quick suite, all of it in the slow one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from http_fuzz import Fuzz, control_vector, hang_up_at_once, mutated_files
from serving_tools import serving, write_vector

from steer.core import InputError
from steer.gguf import load_gguf


@pytest.mark.parametrize(
    ("runs", "requests", "files", "patience"),
    [(2, 50, 12, 20.0), pytest.param(5, 1000, 100, 2.0, marks=pytest.mark.slow)],
)
def test_nothing_that_is_sent_breaks_the_server(
    tiny_lm_dir: Path, tmp_path: Path, tiny_lm: Any, runs: int, requests: int, files: int, patience: float
) -> None:
    """Runs of one server with restarts between, which find what the last one had. `patience`: seconds for a plain
    request; in the quick suite, other tests run beside it.
    """
    store = tmp_path / "store"
    whole = write_vector(store / "calm.safetensors", tiny_lm.info).read_bytes()
    foreign = control_vector(tmp_path)
    kept: list[str] = []
    for part in range(runs):
        with serving(tiny_lm_dir, "--name", "tiny", "--artifacts", store, "--max-tokens", 16) as server:
            listed = server.get("/v1/steer/artifacts").json()["data"]
            assert [entry["id"] for entry in listed if entry["id"] in kept] == kept, "a restart finds what was there"
            fuzz = Fuzz(server, "tiny", ["calm", "calm", *kept, "nobody"], seed=part, plain=patience)
            with fuzz.watched():
                fuzz.requests(requests)
                fuzz.files(mutated_files(whole, files, seed=part))
                fuzz.files(mutated_files(foreign, files, seed=part))
                hang_up_at_once(server)
            fuzz.check()
            assert server.settles("steer_inside", 0)
            kept = [entry["id"] for entry in server.get("/v1/steer/artifacts").json()["data"]]
            assert "calm" in kept
            assert server.stop() == 0
            assert not any("Traceback" in line for line in server.log), "".join(server.log)[-3000:]


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_mutated_gguf_files_are_refused_or_read(tmp_path: Path, count: int) -> None:
    path = tmp_path / "x.gguf"
    refused = 0
    for content in mutated_files(control_vector(tmp_path), count):
        path.write_bytes(content)
        try:
            load_gguf(path)
        except InputError:
            refused += 1
    assert refused > count // 4
