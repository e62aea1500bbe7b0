"""Q-heads: the law that the transformers adapter draws from, greedy and at a temperature."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm_tools import PROMPTS, WIDTH, greedy, guide, vector

from steer.core import InputError
from steer.methods.value import HeadValue, ValueGuidance, ValueHead


@pytest.mark.parametrize("more", [{}, {"tail": "mask", "top_k": 5}, {"top_k": 0}, {"strength": -2.0}, {"horizon": 6}])
def test_greedy(more: dict[str, Any], engine: Any, reference: Any) -> None:
    """Guided and unguided requests in one batch, some steered as well, some under two heads."""
    one, two = guide(reference.info.unembedding(), **more), guide(reference.info.unembedding(), 1)
    edits = [[one], None, [two, vector(0.2)], [one, two]]
    ours, theirs = greedy(engine, edits=edits, new=16), greedy(reference, edits=edits, new=16)
    assert ours.tokens == theirs.tokens
    plain = greedy(reference, new=16).tokens
    assert ours.tokens[1] == plain[1] and ours.tokens[0] != plain[0] and ours.tokens[3] != plain[3]


def test_beta_is_the_runs_unless_the_head_has_its_own(engine: Any, reference: Any) -> None:
    made = guide(reference.info.unembedding(), beta=None)
    for beta in (0.01, 0.05):
        ours, theirs = (greedy(m, edits=made, new=12, beta=beta).tokens for m in (engine, reference))
        assert ours == theirs
    engine.register("value", made)
    named = engine.edit("value", beta=0.01)
    assert greedy(engine, edits=named, new=12).tokens == greedy(reference, edits=made, new=12, beta=0.01).tokens


def test_the_tilt_acts_after_temperature(engine: Any, reference: Any) -> None:
    """The probability of each drawn token is what the transformers adapter gives the same text."""
    made = guide(reference.info.unembedding(), beta=0.05, horizon=8)
    samples = engine.generate(PROMPTS[:2], edits=made, temperature=0.7, max_new_tokens=8, seed=1, eos_token_id=[])
    process = reference.process(temperature=0.7, max_new_tokens=8, eos_token_id=[]).edited(made)
    for b, tokens in enumerate(samples.tokens):
        state, total = process.init([PROMPTS[b]], 1, torch.Generator()), 0.0
        for token in tokens:
            state = process.read(state)
            _, law = process.laws(state)
            total += float(law[0, token])
            state = taken(state, token)
        assert abs(total - float(samples.log_prob[b])) < 5e-3


def taken(state: Any, token: int) -> Any:
    """The state after a token that was drawn elsewhere."""
    prefix, real = state.prefix.clone(), state.real.clone()
    prefix[:, state.filled], real[:, state.filled] = token, True
    return replace(state, prefix=prefix, real=real, filled=state.filled + 1, length=state.length + 1, unread=True)


@pytest.mark.parametrize(("vocabulary", "k"), [(49152, 20), (49169, 20), (5184, 20), (300, 20), (64, 64)])
def test_the_likeliest_candidates(vocabulary: int, k: int) -> None:
    """Against `topk` of the whole row, with masked tokens and, in bfloat16's precision, many equal ones."""
    pytest.importorskip("vllm")
    from steer.adapters.vllm.plugin.values import likeliest

    logits = torch.randn(16, vocabulary, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    logits[3, 40:] = -torch.inf
    logits[4] = 0.0
    logits[5, -3:] = 9.0
    found = likeliest(logits, k)
    assert torch.equal(logits.gather(1, found).sort(descending=True).values, logits.topk(k, -1).values)
    assert all(len(set(row.tolist())) == k for row in found)


def test_a_scalar_head_is_refused(engine: Any) -> None:
    with pytest.raises(InputError, match="Q-head"):
        engine.register("scalar", ValueGuidance(HeadValue(ValueHead(WIDTH, 8))))
