"""Training objectives on language models: every method runs, reaches its fixed point, and can be stopped anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from steer.core import InputError, SteerError

pytest.importorskip("trl")
pytest.importorskip("peft")

from steer.adapters.transformers.policy import rows as by_rows  # noqa: E402
from steer.adapters.transformers.policy.folder import load_policy  # noqa: E402
from steer.adapters.transformers.policy.tuning import train_policy  # noqa: E402
from steer.train.objectives.registry import METHODS, NUMBERED, STUDIES  # noqa: E402
from steer.train.policy_folder import read_policy_card  # noqa: E402

THINGS = ["sun", "rain", "day", "night", "dog", "cat", "house", "tree"]
PROMPTS = [f"tell me about the {thing}" for thing in THINGS]
COLUMNS: dict[str, Any] = {
    "completion": "the sun is nice",
    "chosen": "the sun is nice",
    "rejected": "I hate the rain",
    "completions": ["the sun is nice", "I hate the rain", "the day is good"],
    "scores": [1.0, -1.0, 0.5],
    "label": True,
    "solution": "the sun is nice and good",
    "answer": "nice",
    "calls": [],
    "boxes": [[0, 0, 1, 1]],
}
QUICK: dict[str, Any] = {"steps": 2, "learning_rate": 1e-3, "lora_rank": 4, "max_new_tokens": 6, "batch_size": 4}


def bright(texts: list[str]) -> list[float]:
    return [float(sum(word in ("good", "nice", "happy", "love", "sun") for word in text.split())) for text in texts]


def tune(model: Any, method: str, out: Path, **more: Any) -> Path:
    """Tune on this module's rows, quickly."""
    preset = METHODS[method]
    if preset.judged and not preset.columns and method not in ("sft", "kto"):
        more = {"reward": bright, **more}
    rows = [{"prompt": p, **COLUMNS} for p in PROMPTS]
    lora = {"lora_rank": 0} if preset.pieces.get("lora_rank") == 0 else {}
    return train_policy(model, more.pop("data", rows), method=method, out=out, **{**QUICK, **lora, **more})


def weights(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def own(method: str, tmp_path: Path, model: Any) -> dict[str, Any]:
    """What a method is given beside the rows."""
    if method == "salsa":
        soup = tmp_path / "soup"
        if not soup.exists():
            tune(model, "sft", soup, driver="rows")
        return {"soup": str(soup)}
    if method == "tool_call":
        return {"reward": "tool_call + 0.1*length"}
    if method == "vision_boxes":
        return {"reward": "vision_boxes + 0.01*length"}
    if method == "multi_objective":
        return {"reward": "length - 0.5*keywords:sun"}
    return {}


ROWS = [name for name, method in METHODS.items() if not method.native and name != "inpaint"]


def test_every_paper_has_a_row() -> None:
    named = {name for row in NUMBERED for name in row}
    assert len(NUMBERED) == 46 and named <= set(METHODS) | set(STUDIES)
    assert len([row for row in NUMBERED if row[0] in STUDIES]) == 3


@pytest.mark.parametrize("method", ROWS)
def test_every_method_runs(tiny_lm: Any, tmp_path: Path, method: str) -> None:
    """Weights move, the report has its figures, and the folder opens as a policy."""
    out = tune(tiny_lm, method, tmp_path / "out", **own(method, tmp_path, tiny_lm))
    metrics = read_policy_card(out).metrics
    assert metrics["loss"] and (out / "report.json").is_file() and (out / "report.png").stat().st_size > 5000
    tuned = load_policy(tiny_lm, out)
    ids = torch.tensor([tiny_lm.encode(PROMPTS[0])])
    with torch.no_grad():
        change = (tuned.network(ids).logits - tiny_lm.network(ids).logits).abs().max()
    assert float(change) > 1e-6
    report = json.loads((out / "report.json").read_text())["rounds"]
    sampled = METHODS[method].judged and not METHODS[method].columns
    if sampled:
        assert all({"reward", "kl", "entropy", "length", "on_policy"} <= set(row) for row in report)
    if METHODS[method].pieces.get("link") in ("logistic", "square", "hinge") and method != "mixed":
        assert {"chosen", "rejected", "ranking_base", "ranking_policy", "ranking_ideal"} <= set(report[-1])
