"""The two servers on vLLM under requests and files made up by chance, as `tests/test_serving_fuzz.py` is for the third.

A small random model: what is tried are the servers, and thousands of requests are to be had in minutes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from http_fuzz import Fuzz, control_vector, hang_up_at_once, mutated_files
from serving_tools import Running, serving, vllm_serving, write_vector
from vllm_tools import MISSING

pytestmark = [pytest.mark.skipif(bool(MISSING), reason=MISSING), pytest.mark.slow]

RUNS, REQUESTS, FILES = 4, 1250, 125
LIMITS = {"body_bytes": 200_000, "requests": 32, "tokens": 16}
WIDTH = 64


@pytest.fixture(scope="module")
def served_dir(tiny_lm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The words of `tiny_lm_dir` over a network whose heads are as wide as vLLM's kernels for CPUs want them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "served"
    shutil.copytree(tiny_lm_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny_lm_dir)
    config.update(
        {
            "max_position_embeddings": 512,
            "hidden_size": WIDTH,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": WIDTH // 2,
        }
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def own_server(model: Path, store: Path) -> Any:
    settings = {"server": {"artifacts": str(store), "limits": LIMITS}}
    return vllm_serving(model, settings, "--served-model-name", "tiny")


def steer_serve(model: Path, store: Path) -> Any:
    return serving(model, "--engine", "vllm", "--artifacts", store, "--name", "tiny", "--max-tokens", 16)


@pytest.mark.parametrize(
    ("serve", "inside"), [(own_server, 0.3), (steer_serve, 0.0)], ids=["vllm-serve", "steer-serve"]
)
def test_nothing_that_is_sent_breaks_it(
    served_dir: Path, tmp_path: Path, serve: Callable[[Path, Path], Any], inside: float
) -> None:
    """Restarts between, which find what the last run had."""
    store = tmp_path / "store"
    whole = write_vector(store / "calm.safetensors", width=WIDTH).read_bytes()
    foreign = control_vector(tmp_path, WIDTH)
    kept: list[str] = []
    for part in range(RUNS):
        with serve(served_dir, store) as server:
            listed = _listed(server)
            assert [name for name in listed if name in kept] == kept, "a restart finds what was there"
            fuzz = Fuzz(server, "tiny", ["calm", "calm", *kept, "nobody"], seed=part, always=inside > 0, inside=inside)
            with fuzz.watched():
                fuzz.requests(REQUESTS)
                fuzz.files(mutated_files(whole, FILES, seed=part))
                fuzz.files(mutated_files(foreign, FILES, seed=part))
                hang_up_at_once(server)
            fuzz.check()
            assert server.settles("steer_inside", 0)
            kept = _listed(server)
            assert "calm" in kept
            assert server.stop() == 0
            # vLLM's own route of messages logs every refusal with its traceback.
            ours = [line for line in server.log if "[api_router.py:" not in line]
            assert not any("Traceback" in line for line in ours), "".join(ours)[-3000:]


def _listed(server: Running) -> list[str]:
    return [entry["id"] for entry in server.get("/v1/steer/artifacts").json()["data"]]
