"""In one mixed batch: unsteered requests equal a plain run, steered ones the transformers adapter, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm_tools import DEPTH, PROMPTS, WIDTH, controller, directions, each, greedy, vector

from steer import Gate, SteeringVector, UnsupportedError
from steer.methods.operators import Probe


def agrees(engine: Any, reference: Any, edits: Any, prompts: Any = None, new: int = 20) -> list[list[int]]:
    """The engine's tokens, which must be the reference's; where steered, they must not be the plain ones."""
    ours, theirs = (greedy(model, prompts, each(edits), new) for model in (engine, reference))
    plain = greedy(reference, prompts, (), new)
    assert ours.tokens == theirs.tokens
    assert (ours.log_prob - theirs.log_prob).abs().max() < 2e-3  # float32, summed over the text
    for mine, edit, unsteered in zip(ours.tokens, edits, plain.tokens, strict=True):
        assert edit is not None or mine == unsteered
    assert any(mine != unsteered for mine, unsteered in zip(ours.tokens, plain.tokens, strict=True))
    return ours.tokens


def test_the_engine_knows_its_model(engine: Any, reference: Any) -> None:
    engine.register("any", vector())
    ours, theirs = engine.info, reference.info
    assert (ours.fingerprint, ours.num_layers, ours.width) == (theirs.fingerprint, DEPTH, WIDTH)
    assert torch.allclose(ours.residual_norms(), theirs.residual_norms(), rtol=1e-4)


@pytest.mark.parametrize("scope", ["all", "prompt", "last", "generated", "reply", "from:5", "from:40", "first:3"])
def test_scopes(scope: str, engine: Any, reference: Any) -> None:
    steering = vector(0.5 if scope in ("prompt", "last") else 0.3, scope=scope)
    agrees(engine, reference, [steering, None, steering, steering], new=28)


@pytest.mark.parametrize(
    "settings",
    [
        {"operator": "ablate", "strength": 1.0},
        {"operator": "clamp", "strength": 0.5},
        {"operator": "clamp", "strength": 1.0, "low": 0.2, "high": 0.5},
        {"operator": "clamp", "strength": 1.0, "high": -0.4},
        {"operator": "clamp", "strength": 0.5, "keep_norm": True},
        {"operator": "add", "strength": 0.4, "keep_norm": True},
        {"operator": "rotate", "strength": 60.0, "references": directions(range(10, 20), 1)},
        {"strength": 0.4, "token_probes": {12: Probe(directions([12], 2)[12], 0.0)}},
    ],
    ids=[
        "ablate",
        "clamp",
        "clamp-interval",
        "clamp-above",
        "clamp-keep-norm",
        "add-keep-norm",
        "rotate",
        "token-probe",
    ],
)
def test_operators(settings: dict[str, Any], engine: Any, reference: Any) -> None:
    strong = vector(settings["strength"], **{k: v for k, v in settings.items() if k != "strength"})
    after = vector(0.1, seed=4, layers=range(12, 15), scope="reply")
    # Order matters: an addition before another operator is another edit than one after it.
    agrees(engine, reference, [strong, None, [strong, after], [after, strong, after]])


def test_gates(engine: Any, reference: Any) -> None:
    """A probe that fires on some of the prompts; the default scope steers the whole prompt, which then runs twice."""
    states = reference.hidden_states([reference.encode(p) for p in PROMPTS], [9])[9]
    apart = states[0] - states[1]
    cut = float((states[0] + states[1]) @ apart / 2)
    fires = (states @ apart > cut).tolist()
    assert fires[0] and not fires[1]
    gated = [vector(gate=Gate(Probe(apart, -cut), 9), scope=scope) for scope in ("all", "reply", "generated")]
    plain = greedy(reference)
    for edit in gated:
        tokens = agrees(engine, reference, [edit, edit, edit, None])
        assert tokens[0] != plain.tokens[0] and tokens[1] == plain.tokens[1]
    agrees(engine, reference, [gated, [gated[1], vector(0.2, seed=7)], None, [vector(0.2, seed=8), gated[0]]])


def test_controllers(engine: Any, reference: Any) -> None:
    """Weights of its own for every prompt, from the first token on; a threshold leaves prompts alone."""
    made = controller(inputs=(4, 8))
    agrees(engine, reference, [made, None, made, made])
    agrees(engine, reference, [controller(scope="generated"), made, [made, vector(0.1)], None])
    states = reference.hidden_states([reference.encode(p) for p in PROMPTS], [8])
    scale = controller().scale(states)[0]
    between = float(scale.sort().values[1:3].mean())
    some = controller(threshold=between)
    tokens = greedy(engine, edits=some).tokens
    plain = greedy(engine).tokens
    assert [mine == p for mine, p in zip(tokens, plain, strict=True)] == (scale < between).tolist()


def test_every_order_of_arrival(engine: Any, reference: Any) -> None:
    """Requests that come and go while others run, one edit each, in three orders."""
    edits = [
        vector(0.3),
        vector(0.3, seed=1, scope="generated"),
        None,
        vector(0.6, operator="clamp"),
        controller(),
        vector(0.3, seed=2, scope="from:12"),
        None,
        vector(0.5, scope="prompt"),
    ]
    prompts = [PROMPTS[i % 4] for i in range(8)]
    lengths = [12, 20, 5, 16, 9, 20, 14, 7]
    want = {i: greedy(reference, prompts[i], [edits[i]], lengths[i]).tokens[0] for i in range(8)}
    for order in ([0, 1, 2, 3, 4, 5, 6, 7], [7, 2, 5, 0, 6, 1, 4, 3], [4, 3, 0, 6, 2, 7, 1, 5]):
        assert staggered(engine, [(i, prompts[i], edits[i], lengths[i]) for i in order]) == want


def staggered(engine: Any, requests: Any) -> dict[int, list[int]]:
    """Tokens by number of requests that enter one by one, two steps apart."""
    process = engine.process(temperature=0, max_new_tokens=1)
    llm = engine.llm.llm_engine
    waiting, done, steps = list(requests), {}, 0
    while waiting or llm.has_unfinished_requests():
        if waiting and steps % 2 == 0:
            i, prompt, edit, new = waiting.pop(0)
            asked = process if edit is None else process.edited(edit)
            llm.add_request(str(i), *asked.request(prompt, new))
        for output in llm.step():
            if output.finished:
                done[int(output.request_id)] = list(output.outputs[0].token_ids)
        steps += 1
    return done


def test_several_continuations_of_one_request(engine: Any, reference: Any) -> None:
    """n > 1 in one request: every child is steered, also by a controller."""
    from vllm import SamplingParams

    for edit in (vector(0.3, scope="generated"), controller()):
        prompt, params = engine.process(temperature=0, max_new_tokens=12).edited(edit).request(PROMPTS[0], 12)
        several = SamplingParams(n=3, temperature=1.0, top_k=1, max_tokens=12, extra_args=params.extra_args)
        outputs = engine.llm.generate([prompt], several, use_tqdm=False)[0].outputs
        want = greedy(reference, PROMPTS[0], edit, 12).tokens[0]
        assert [list(o.token_ids) for o in outputs] == [want] * 3


def test_prefix_cache(engine: Any, reference: Any) -> None:
    """Steered blocks are found again by the same edit, and by nothing else."""
    prompt = PROMPTS[2]
    one, two = vector(0.3, seed=11), vector(0.3, seed=12)
    want = {
        name: greedy(reference, prompt, edit, 8).tokens[0] for name, edit in (("one", one), ("two", two), ("no", ()))
    }
    engine.llm.reset_prefix_cache()
    seen = []
    for name, edit in (("one", one), ("no", ()), ("two", two), ("one", one), ("no", ()), ("two", two)):
        tokens, cached = once(engine, prompt, edit, 8)
        assert tokens == want[name]
        seen.append(cached)
    whole = (len(engine.encode(prompt)) - 1) // 32 * 32
    assert whole >= 32 and seen == [0, 0, 0, whole, whole, whole]


def once(engine: Any, prompt: Any, edit: Any, new: int) -> tuple[list[int], int]:
    """Tokens, and how many of the prompt came from the cache."""
    process = engine.process(temperature=0, max_new_tokens=new)
    asked = process.edited(edit) if edit else process
    output = engine.llm.generate(*asked.request(prompt, new), use_tqdm=False)[0]
    return list(output.outputs[0].token_ids), output.num_cached_tokens


def test_a_scope_that_ends_is_part_of_the_key(engine: Any, reference: Any) -> None:
    """A text that was generated unsteered after a steered prompt differs from the same tokens in a steered prompt."""
    prompt, edit = PROMPTS[3], vector(0.5, seed=13, scope="prompt")
    first = greedy(engine, prompt, edit, 60).tokens[0]
    longer = [*engine.encode(prompt), *first]
    process = engine.process(temperature=0, max_new_tokens=4).edited(edit)
    warm = engine.llm.generate(*process.request(longer, 4), use_tqdm=False)[0]
    engine.llm.reset_prefix_cache()
    cold = engine.llm.generate(*process.request(longer, 4), use_tqdm=False)[0]
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids
    assert warm.num_cached_tokens == 0 and len(longer) > 64


def test_decode_only_steering_shares_the_prompt(engine: Any) -> None:
    prompt = PROMPTS[2]
    engine.llm.reset_prefix_cache()
    whole = (len(engine.encode(prompt)) - 1) // 32 * 32
    assert once(engine, prompt, (), 4)[1] == 0
    assert once(engine, prompt, vector(0.3, seed=14, scope="generated"), 4)[1] == whole
    assert once(engine, prompt, controller(), 4)[1] == whole


def test_a_name_registered_again_is_another_edit(engine: Any, reference: Any) -> None:
    prompt = PROMPTS[2]
    for seed in (21, 22, 21):
        made = vector(0.3, seed=seed)
        engine.register("changing", made)
        want = greedy(reference, prompt, made, 8).tokens
        assert greedy(engine, prompt, engine.edit("changing"), 8).tokens == want
    stronger = SteeringVector(made.directions, 0.5)
    assert (
        greedy(engine, prompt, engine.edit("changing", 0.5), 8).tokens == greedy(reference, prompt, stronger, 8).tokens
    )


def test_scores_of_given_texts(engine: Any, reference: Any) -> None:
    """Log-probabilities of given texts in one mixed batch, whose scopes count from the prompt; others are refused."""
    texts = [" quiet and blue.", " bright.", " of four rooms.", " oak tree"]
    edits = [[vector(0.4)], None, [vector(0.4, scope="generated")], [vector(0.3, scope="reply"), vector(0.2, seed=2)]]
    ours, theirs = (model.score(PROMPTS, texts, edits=edits) for model in (engine, reference))
    assert (ours.log_prob - theirs.log_prob).abs().max() < 2e-3
    assert ours.greedy.tolist() == theirs.greedy.tolist() and ours.tokens.tolist() == theirs.tokens.tolist()
    plain = reference.score(PROMPTS, texts)
    assert (theirs.log_prob - plain.log_prob).abs()[[0, 2, 3]].min() > 1e-3
    with pytest.raises(UnsupportedError, match="without gates"):
        engine.score(PROMPTS[0], [" blue"], edits=vector(gate=Gate(Probe(torch.ones(WIDTH)), 9)))
