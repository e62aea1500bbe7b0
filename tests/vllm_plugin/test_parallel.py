"""Several ranks: the same mixed batch where every block is split (tensor parallel) and where each rank has some of the
blocks (pipeline parallel). Ranks are processes of their own, so these tests take a minute each.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_engines import run, want
from vllm_tools import MISSING, greedy
from worker_script import work_of

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING or "vLLM is there")]


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_ranks_steer_as_one(kind: str, folder: Any, reference: Any) -> None:
    found, work = run(kind, 16), work_of(kind)
    assert found["tokens"] == want(reference, work, 16)
    assert found["fingerprint"] == reference.info.fingerprint
    assert torch.allclose(torch.tensor(found["norms"]), reference.info.residual_norms(), rtol=1e-4)
    plain = greedy(reference, [prompt for prompt, _ in work], (), 16).tokens
    changed = [mine != unsteered for mine, unsteered in zip(found["tokens"], plain, strict=True)]
    assert not any(was for was, (_, edit) in zip(changed, work, strict=True) if edit is None)
    assert sum(changed) >= 6
    if kind == "tensor":
        assert any(changed[-4:]) and not all(changed[-4:])  # a gate that fires on some of the prompts
