"""The GPU checks without a GPU: that they are skipped loudly, and that every part runs and is shown."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import shadow_device  # noqa: F401
import torch

import steer
from steer.bench import gpu


@pytest.fixture(scope="module")
def load(tiny_lm_dir: Path) -> Any:
    """Loads a model once for a device and a precision, without the check at load, which has tests of its own."""

    @cache
    def load(device: str, dtype: str) -> Any:
        return steer.load(tiny_lm_dir, device=device, dtype=dtype, attn_implementation="eager", check=False)

    return load


@pytest.fixture
def card(load: Any) -> gpu.Card:
    return gpu.Card("shadow", quick=True, tests=Path(__file__).parent, load=load)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_card_it_says_that_nothing_was_tried(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--json", str(tmp_path / "gpu.json")]) == 0
    assert "GPU CHECKS SKIPPED" in capfd.readouterr().err and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        gpu.main(["everything"])


def test_every_section_runs_and_the_page_shows_it(
    card: gpu.Card, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = gpu.measure(card)
    found = results["sections"]
    assert {name: part["status"] for name, part in found.items()} == {
        "machine": "ok",
        "suite": "ok",
        "parity": "ok",
        "waits": "skipped",
        "costs": found["costs"]["status"],
        "memory": "skipped",
        "vllm": "skipped",
    }
    assert found["suite"]["passed"] >= 3 and found["suite"]["failed"] == []
    assert len(found["costs"]["rows"]) == 7 and all(row["median"] > 0 for row in found["costs"]["rows"])
    parity = found["parity"]
    assert 0 <= parity["float32"]["kl_plain"] < 1e-9 < parity["bfloat16"]["kl_plain"] < 0.05
    assert math.isclose(parity["float32"]["drift"], parity["float32"]["drift_float32_cpu"], rel_tol=1e-4)
    assert parity["float32"]["drift"] > 1e-4
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(results))
    capsys.readouterr()
    assert gpu.main(["--page", str(file)]) == 0
    shown = capsys.readouterr().out
    for part in ("# GPU checks on shadow (quick)", "## parity: ok", "| bfloat16 |", "## waits: skipped", "- why: only"):
        assert part in shown
    assert all(row["what"] in shown for row in found["costs"]["rows"])


def test_a_section_that_fails_is_a_finding(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others still run, and the exit status tells. Which device it is does not matter here; the CPU is quicker."""
    monkeypatch.setitem(gpu.SECTIONS, "memory", lambda card: 1 / 0)
    monkeypatch.setattr(gpu, "BOUNDS", {"bfloat16": 0.0})
    found = gpu.measure(gpu.Card("cpu", quick=True, load=load), ["memory", "parity"])["sections"]
    assert found["memory"]["status"] == "FAILED" and "ZeroDivisionError" in found["memory"]["why"]
    assert found["parity"]["status"] == "FAILED" and found["parity"]["bfloat16"]["ok"] is False
