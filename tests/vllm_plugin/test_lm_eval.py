"""EleutherAI's harness over a steered engine: likelihoods by hand, and what it writes, as on transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_tools import WIDTH, vector

from steer import Gate, InputError, RawText, SystemPrompt, UnsupportedError
from steer.methods.operators import Probe

pytest.importorskip("lm_eval")

from lm_eval_tools import ROWS, evaluated, write_tasks


@pytest.mark.parametrize("scope", [None, "all", "generated"])
def test_a_toy_task_is_what_a_hand_computation_gives(
    engine: Any, reference: Any, tmp_path: Path, scope: str | None
) -> None:
    from steer.harness.lm_eval import SteerLM

    steering = None if scope is None else vector(8.0, scope=scope, unit="raw")
    edits = [] if steering is None else [steering]
    found = evaluated(SteerLM(engine, edits), write_tasks(tmp_path), "toy_choices", "toy_written")
    hits = 0
    for sample, row in zip(found["samples"]["toy_choices"], ROWS, strict=True):
        given = [float(answer[0][0]) for answer in sample["resps"]]
        by_hand = _by_hand(reference, row, steering)
        assert given == pytest.approx(by_hand, abs=2e-3)
        hits += by_hand.index(max(by_hand)) == row["gold"]
    assert found["results"]["toy_choices"]["acc,none"] == pytest.approx(hits / len(ROWS))
    for sample, row in zip(found["samples"]["toy_written"], ROWS, strict=True):
        drawn = reference.generate(RawText(row["question"]), edits=edits, temperature=0, max_new_tokens=4, stop=["."])
        assert sample["resps"][0][0] == drawn.texts[0]


def _by_hand(model: Any, row: Any, steering: Any) -> list[float]:
    """Log-probability of each choice from the library's own network, the vector added by hooks of this test."""
    sums = []
    for choice in row["choices"]:
        context, tail = (
            model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (row["question"], f" {choice}")
        )
        ids = torch.tensor([[*context, *tail]])
        reached = torch.arange(ids.shape[1]) >= (len(context) if steering and str(steering.scope) == "generated" else 0)
        hooks = []
        for layer, direction in (steering.directions if steering else {}).items():
            added = steering.strength * reached[:, None] * direction
            block = model.network.model.layers[layer]
            hooks.append(block.register_forward_hook(lambda block, given, out, added=added: out + added))
        with torch.inference_mode():
            law = model.network(ids).logits[0].log_softmax(-1)
        for hook in hooks:
            hook.remove()
        sums.append(float(sum(law[len(context) + i - 1, token] for i, token in enumerate(tail))))
    return sums


def test_what_no_likelihood_can_be_told_of_is_refused(engine: Any, tmp_path: Path) -> None:
    from steer.harness.lm_eval import SteerLM

    gated = vector(0.5, gate=Gate(Probe(torch.ones(WIDTH)), 9))
    with pytest.raises(UnsupportedError, match="without gates"):
        evaluated(SteerLM(engine, [gated]), write_tasks(tmp_path), "toy_choices")
    with pytest.raises(InputError, match="SystemPrompt"):
        SteerLM(engine, [SystemPrompt("Be calm.")])
