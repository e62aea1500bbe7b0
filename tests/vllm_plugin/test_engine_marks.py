"""Scopes that go by tokens of the reply, inside the engine: token by token those of the transformers adapter."""

from __future__ import annotations

from typing import Any

import pytest
from vllm_tools import PROMPTS, controller, each, greedy, vector

from steer import Gate, InputError
from steer.methods.operators import Probe

INSIDE, OUTSIDE = "inside: the,.", "outside: the,."


def agrees(engine: Any, reference: Any, edits: Any, prompts: Any = None, new: int = 28, **more: Any) -> Any:
    ours, theirs = (greedy(model, prompts, each(edits), new, **more) for model in (engine, reference))
    assert ours.tokens == theirs.tokens
    return ours.tokens


@pytest.mark.parametrize("scope", [INSIDE, OUTSIDE, "inside: of, and", "outside: and, the"])
def test_one_mixed_batch(scope: str, engine: Any, reference: Any) -> None:
    strong = vector(0.5, scope=scope)
    found = agrees(engine, reference, [strong, None, strong, [strong, vector(0.2, seed=4, scope="first:3")]])
    plain, always = (greedy(reference, edits=e, new=28).tokens for e in ((), vector(0.5, scope="reply")))
    if scope in (INSIDE, OUTSIDE):
        assert any(found[i] not in (plain[i], always[i]) for i in (0, 2))
    agrees(engine, reference, [vector(0.4, scope=INSIDE), strong, vector(0.4, scope=OUTSIDE), controller(scope=scope)])


def test_gates_decide_once_and_marks_go_on(engine: Any, reference: Any) -> None:
    states = reference.hidden_states([reference.encode(p) for p in PROMPTS], [9])[9]
    apart = states[0] - states[1]
    gated = vector(0.5, scope=OUTSIDE, gate=Gate(Probe(apart, -float((states[0] + states[1]) @ apart / 2)), 9))
    agrees(engine, reference, [gated, gated, [gated, vector(0.2, seed=3, scope=INSIDE)], None])


def test_texts_in_blocks_scored_texts_and_the_cache(engine: Any, reference: Any) -> None:
    """A text that goes on in a second request counts from its own prompt; a given one is scored as it would be drawn;
    blocks of the cache are found again by the same edit alone.
    """
    edit = vector(0.5, scope=INSIDE)
    whole = agrees(engine, reference, [edit] * 4)
    assert greedy(engine, edits=edit, new=28, block=5).tokens == whole
    texts = [" Near the lake. The water is of the sky", " the end.", " of the city", " oak. In the wood."]
    edits = [[edit], None, [vector(0.5, scope=OUTSIDE)], [edit, vector(0.2, seed=2)]]
    ours, theirs = (model.score(PROMPTS, texts, edits=edits) for model in (engine, reference))
    assert (ours.log_prob - theirs.log_prob).abs().max() < 2e-3
    assert ours.greedy.tolist() == theirs.greedy.tolist()
    engine.llm.reset_prefix_cache()
    for mine in (edit, vector(0.5, scope=OUTSIDE), edit, vector(0.5, scope="reply")):
        agrees(engine, reference, [mine], [PROMPTS[2]], new=20)


def test_drawn_texts_are_drawn_from_that_law(engine: Any, reference: Any) -> None:
    """Several choices of one prompt: the log-probabilities that the engine tells are the reference's."""
    edit = vector(0.4, scope=OUTSIDE)
    drawn = engine.generate(PROMPTS[:2], edits=edit, n=3, max_new_tokens=16, temperature=1.0, seed=4)
    for tokens, group, told in zip(drawn.tokens, drawn.group.tolist(), drawn.log_prob.tolist(), strict=True):
        process = reference.scorer(len(tokens), edit, 1)
        scored = process.score_tokens([reference.encode(PROMPTS[group])], [tokens])[0]
        assert told == pytest.approx(float(scored[0]), abs=2e-3)


def test_a_model_without_marks_is_refused_by_name(engine: Any) -> None:
    for scope, said in (("thinking", "<think>"), ("outside-tools", "<tool_call>"), ("inside:.,qqq zzz", "qqq zzz")):
        with pytest.raises(InputError, match=said):
            engine.process(max_new_tokens=4).edited(vector(0.3, scope=scope))
