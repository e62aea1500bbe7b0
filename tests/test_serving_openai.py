"""The contract of `openai_contract` at `steer serve` on transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai_contract import Contract, Target
from serving_tools import serving_here, write_vector

KEY = "a-key-of-the-contract"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, tiny_lm_dir: Path, tiny_lm: Any) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("artifacts")
    vector = write_vector(folder / "calm.safetensors", tiny_lm.info)
    spare = write_vector(tmp_path_factory.mktemp("spare") / "spare.safetensors", tiny_lm.info, seed=7)
    options = ["--artifacts", folder, "--api-key-env", "TEST_KEY", "--name", "tiny", "--max-body-bytes", 20_000]
    with serving_here(tiny_lm_dir, *options, TEST_KEY=KEY) as running:
        yield Target(running.url, KEY, "tiny", tiny_lm, vector, 0.8, spare)


class TestSteerServe(Contract):
    """`steer serve`, the embedded engine."""
