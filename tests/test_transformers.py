"""The transformers adapter: families by structure, padding, caches, scopes, hooks, scoring."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from steer.adapters.transformers import tracking
from steer.adapters.transformers.hooks import recording
from steer.adapters.transformers.model import LanguageModel
from steer.core import InputError, RawText, Scope, SteerError
from steer.methods.operators import Ablate, Add, Clamp, KeepNorm, Probe, Rotate, Where
from steer.methods.prompt import DirectionalStimulus, HintPolicy, SystemPrompt
from steer.methods.value import HeadValue, LogitValue, QHead, ValueGuidance, ValueHead
from steer.methods.vector import Gate, SteeringVector

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 70}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2},
    "qwen2": {"intermediate_size": 48, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "mistral": {"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": None},
    "phi3": {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 1},
    "phi": {"intermediate_size": 48},
    "gpt2": {"n_positions": 64},
    "gpt_neox": {"intermediate_size": 48},
}


def build(family: str, tokenizer: Any, **more: Any) -> LanguageModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    limit = {} if family == "gpt2" else {"max_position_embeddings": 64}
    config = AutoConfig.for_model(
        family, **{**SMALL, **limit, **FAMILIES[family], **more}, initializer_range=0.2, bos_token_id=2, eos_token_id=3
    )
    return LanguageModel(AutoModelForCausalLM.from_config(config), tokenizer, family)


def vector(model: LanguageModel, layers: tuple[int, ...] = (1,), **settings: Any) -> SteeringVector:
    generator = torch.Generator().manual_seed(1)
    made = {layer: torch.randn(model.info.width, generator=generator) for layer in layers}
    return SteeringVector(made, **{"strength": 1.0, "unit": "raw", **settings})


def greedy(model: LanguageModel, prompts: Any, edits: Any = (), new: int = 8, **settings: Any) -> Any:
    return model.generate(prompts, edits=edits, temperature=0, max_new_tokens=new, eos_token_id=[], seed=0, **settings)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_families(family: str, tiny_lm: LanguageModel) -> None:
    """Blocks are found, generation equals the library's own, steering equals a hook on the block, and nothing stays."""
    model = build(family, tiny_lm.tokenizer)
    assert len(model.blocks) == 3
    before = {k: v.clone() for k, v in model.network.state_dict().items()}
    prompts = [RawText("the sun runs"), RawText("a very good dog")]
    ours = greedy(model, prompts)
    for prompt, tokens in zip(prompts, ours.tokens, strict=True):
        ids = torch.tensor([model.encode(prompt)])
        theirs = model.network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=1,
        )
        assert tokens == theirs[0, ids.shape[1] :].tolist()
    steering = vector(model)
    steered = greedy(model, prompts, steering)
    add = steering.directions[1]
    handle = model.blocks[1].register_forward_hook(
        lambda m, a, out: (out[0] + add, *out[1:]) if isinstance(out, tuple) else out + add
    )
    try:
        reference = [_uncached(model, prompt, 8) for prompt in prompts]
    finally:
        handle.remove()
    assert steered.tokens == reference and steered.tokens != ours.tokens
    after = model.network.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(block._forward_hooks or "forward" in block.__dict__ for block in model.blocks)


def _uncached(model: LanguageModel, prompt: str, new: int) -> list[int]:
    ids = model.encode(prompt)
    start = len(ids)
    with torch.no_grad():
        for _ in range(new):
            ids = [*ids, int(model.network(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids[start:]


def test_mixed_lengths_equal_one_by_one(tiny_lm: LanguageModel) -> None:
    prompts = ["the sun", "hello", "a very good dog runs and sings , says the cat"]
    steering = vector(tiny_lm, (0, 1), scope="all")
    for edits in ((), steering):
        together = greedy(tiny_lm, prompts, edits).tokens
        assert together == [greedy(tiny_lm, p, edits).tokens[0] for p in prompts]


@pytest.mark.parametrize("scope", ["all", "prompt", "last", "generated", "reply", "from:3", "from:14"])
def test_scopes_are_absolute_positions(scope: str, tiny_lm: LanguageModel) -> None:
    """Against a pass without cache over the whole text, masked by hand at absolute positions."""
    steering = vector(tiny_lm, (0, 1), scope=scope)
    prompts = ["the sun", "a very good dog runs and sings"]
    drawn = greedy(tiny_lm, prompts, steering)
    for prompt, tokens in zip(prompts, drawn.tokens, strict=True):
        ids = tiny_lm.encode(prompt)
        start, stop = Scope.parse(scope).bounds(len(ids))
        text = list(ids)
        for want in tokens:
            where = torch.tensor([[start <= i < stop for i in range(len(text))]]).unsqueeze(-1)
            program = {
                layer: (lambda h, v=v, w=where: torch.where(w, h + v, h)) for layer, v in steering.directions.items()
            }
            with torch.no_grad(), tiny_lm.hooks.running(program):
                logits = tiny_lm.network(torch.tensor([text]), use_cache=False).logits[0, -1]
            assert int(logits.argmax()) == want
            text.append(want)


def test_generated_scope_begins_with_the_second_token(tiny_lm: LanguageModel) -> None:
    plain = greedy(tiny_lm, "the sun").tokens[0]
    late = greedy(tiny_lm, "the sun", vector(tiny_lm, strength=30.0, scope="generated")).tokens[0]
    reply = greedy(tiny_lm, "the sun", vector(tiny_lm, strength=30.0, scope="reply")).tokens[0]
    assert late[0] == plain[0] and late[1:] != plain[1:] and reply[0] != plain[0]


def test_one_batch_different_edits(tiny_lm: LanguageModel) -> None:
    """Unsteered rows are bit-equal to a plain run; each steered row is what it is alone."""
    prompts = ["the sun", "the sun", "hello world", "a dog"]
    one, two = vector(tiny_lm, (0,), strength=8.0), vector(tiny_lm, (1,), strength=-8.0, scope="reply")
    plain = tiny_lm.generate(prompts, max_new_tokens=8, seed=4)
    mixed = tiny_lm.generate(prompts, edits=[[one], None, [one, two], []], max_new_tokens=8, seed=4)
    for row in (1, 3):
        assert mixed.tokens[row] == plain.tokens[row]
        assert float(mixed.log_prob[row]) == float(plain.log_prob[row])
        assert float(mixed.kl[row]) == 0.0
    assert float(mixed.kl[0]) > 0 and float(mixed.kl[2]) > 0
    settings = {"temperature": 0, "max_new_tokens": 8}
    together = tiny_lm.generate(prompts, edits=[[one], None, [one, two], [two]], **settings).tokens
    alone = [
        tiny_lm.generate(p, edits=e, **settings).tokens[0]
        for p, e in zip(prompts, [one, [], [one, two], two], strict=True)
    ]
    assert together == alone
    with pytest.raises(InputError, match="edits: got '2 entries'"):
        tiny_lm.generate(prompts, edits=[[one], None])


def test_logits_of_unsteered_rows_keep_their_bits(tiny_lm: LanguageModel) -> None:
    ids = [tiny_lm.encode("the sun"), tiny_lm.encode("hello cat")]
    steering = vector(tiny_lm, (0, 1), strength=5.0)
    plain, _ = tracking.start(tiny_lm.body, ids, (), 1, hidden=False)
    mixed, _ = tracking.start(tiny_lm.body, ids, [(steering, frozenset({0}))], 1, hidden=False)
    assert torch.equal(plain.logits[1], mixed.logits[1]) and not torch.equal(plain.logits[0], mixed.logits[0])
    token = torch.tensor([5, 6])
    plain, _ = tracking.advance(plain, token)
    mixed, _ = tracking.advance(mixed, token)
    assert torch.equal(plain.logits[1], mixed.logits[1]) and not torch.equal(plain.logits[0], mixed.logits[0])


class Operations(TorchDispatchMode, list[str]):
    """The operations on tensors inside, by name."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.append(str(func))
        return func(*args, **(kwargs or {}))


def test_constants_are_merged_into_one_addition(tiny_lm: LanguageModel) -> None:
    edits = [(vector(tiny_lm, (0, 1), strength=s), None) for s in (1.0, -0.5, 2.0)]
    track, _ = tracking.start(tiny_lm.body, [tiny_lm.encode("the sun")], edits, 2, hidden=False)
    program = track.plan.decode(track.position, torch.tensor([5, 5]))
    hidden = torch.randn(2, 1, 32)
    want = hidden + 2.5 * edits[0][0].directions[1]
    assert set(program) == {0, 1} and torch.allclose(program[1](hidden), want, atol=1e-5)
    with Operations() as done:
        program[1](hidden)
    assert done == ["aten.add.Tensor"]


def test_zero_strength_is_the_unhooked_model(tiny_lm: LanguageModel) -> None:
    steering = vector(tiny_lm, (0, 1), strength=0.0)
    assert steering.terms(tiny_lm.info) == []
    plain, zero = tiny_lm.generate("the sun", seed=1), tiny_lm.generate("the sun", edits=steering, seed=1)
    assert plain.tokens == zero.tokens and torch.equal(plain.log_prob, zero.log_prob)


def test_hooks_leave_nothing_behind_when_the_model_raises(tiny_lm: LanguageModel) -> None:
    # The library keeps hooks of its own once hidden states were asked of it.
    before = [(list(block._forward_hooks), block.forward) for block in tiny_lm.blocks]

    class Broken(Add):
        def __call__(self, hidden: Tensor) -> Tensor:
            raise RuntimeError("broken")

        @property
        def constant(self) -> None:  # type: ignore[override]
            return None

    with pytest.raises(RuntimeError, match="broken"), tiny_lm.hooks.running({0: Broken(torch.zeros(32))}):
        tiny_lm.network(torch.tensor([[4, 5]]))
    assert [(list(block._forward_hooks), block.forward) for block in tiny_lm.blocks] == before
    assert not any("forward" in block.__dict__ for block in tiny_lm.blocks)


def test_hooks_respect_a_forward_that_was_there(tiny_lm: LanguageModel) -> None:
    """Device placement puts its own forward on a block; ours stands around it and gives it back."""
    block = tiny_lm.blocks[0]
    inner = block.forward

    def placed(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    block.forward = placed
    try:
        with tiny_lm.hooks.running({0: lambda h: h + 1}), tiny_lm.hooks.running({0: lambda h: h + 1, 1: lambda h: h}):
            assert block.forward is not placed
        assert block.forward is placed
    finally:
        del block.forward


def test_two_models_in_one_process_are_independent(tiny_lm: LanguageModel) -> None:
    other = build("llama", tiny_lm.tokenizer)
    plain = greedy(other, RawText("the sun")).tokens
    with tiny_lm.hooks.running({0: lambda h: h * 0}):
        assert greedy(other, RawText("the sun")).tokens == plain


def test_bf16(tiny_lm_dir: Any) -> None:
    from steer.adapters.transformers.model import load

    model = load(tiny_lm_dir, dtype="bfloat16")
    out = greedy(model, ["the sun", "hello"], vector(model, (0, 1), strength=3.0))
    assert len(out) == 2 and model.info.fingerprint == load(tiny_lm_dir, dtype="float32").info.fingerprint


# ---------------------------------------------------------------------------------------------------------- operators


def test_operators_in_closed_form() -> None:
    torch.manual_seed(0)
    h, d = torch.randn(5, 3, 16), torch.nn.functional.normalize(torch.randn(16), dim=0)
    second = torch.randn(16)
    assert torch.allclose(Ablate(d)(h) @ d, torch.zeros(5, 3), atol=1e-5)
    assert torch.allclose(Ablate(d, 0.5)(h) @ d, 0.5 * (h @ d), atol=1e-5)
    assert torch.allclose(Clamp(d, 2.0, 2.0)(h) @ d, torch.full((5, 3), 2.0), atol=1e-5)
    clamped = Clamp(d, low=0.0)(h)
    assert torch.allclose(clamped @ d, (h @ d).clamp_min(0), atol=1e-5)
    kept = KeepNorm(Add(3 * d))(h)
    assert torch.allclose(kept.norm(dim=-1), h.norm(dim=-1), atol=1e-4)
    assert torch.allclose(torch.nn.functional.cosine_similarity(kept, h + 3 * d, dim=-1), torch.ones(5, 3), atol=1e-5)
    rotate = Rotate(d, second, 30.0)
    turned = rotate(h)
    assert torch.allclose(turned.norm(dim=-1), h.norm(dim=-1), atol=1e-4)
    e = torch.nn.functional.normalize(second - (second @ d) * d, dim=0)
    angle = torch.atan2(turned @ d, turned @ e) - torch.atan2(h @ d, h @ e)
    assert torch.allclose(torch.remainder(angle, 2 * math.pi), torch.full((5, 3), math.radians(30)), atol=1e-4)
    aimed = Rotate(d, second, 70.0, absolute=True)(h)
    assert torch.allclose(torch.atan2(aimed @ d, aimed @ e), torch.full((5, 3), math.radians(70)), atol=1e-4)
    probe = Probe(d, -0.2)
    where = Where(probe, Add(d))(h)
    assert torch.equal(where != h, ((h @ d) > 0.2).unsqueeze(-1).expand_as(h) & (d != 0))


def test_gate_decides_for_each_row(tiny_lm: LanguageModel) -> None:
    prompts = ["the sun", "a very good dog runs"]
    ids = [tiny_lm.encode(p) for p in prompts]
    at_end = tiny_lm.hidden_states(ids, [1])[1]
    weight = at_end[0] - at_end[1]
    bias = -float((at_end[0] + at_end[1]) @ weight) / 2
    steering = vector(tiny_lm, (0,), strength=9.0)
    gated = replace(steering, gate=Gate(Probe(weight, bias), 1))
    out = greedy(tiny_lm, prompts, gated)
    assert out.tokens[0] == greedy(tiny_lm, prompts[0], steering).tokens[0]
    assert out.tokens[1] == greedy(tiny_lm, prompts[1]).tokens[0]
    # A reply-only gate re-runs just the last position; the outcome is the same as re-running the prompt.
    reply = replace(gated, scope=Scope.parse("reply"))
    assert (
        greedy(tiny_lm, prompts, reply).tokens[0]
        == greedy(tiny_lm, prompts[0], replace(steering, scope="reply")).tokens[0]
    )


def test_vector_arithmetic(tiny_lm: LanguageModel) -> None:
    norms = tiny_lm.residual_norms()
    a = vector(tiny_lm, (0, 1), strength=0.3, unit="norm").normalised()
    b = vector(tiny_lm, (1,), strength=0.5, unit="norm").normalised()

    def pushes(v: SteeringVector) -> dict[int, Tensor]:
        return {t.layer: t.operator.constant for t in v.terms(tiny_lm.info)}

    assert float(pushes(b)[1].norm()) == pytest.approx(0.5 * float(norms[1]), rel=1e-4)
    assert float(pushes(a)[1].norm()) == pytest.approx(0.15 * float(norms[1]), rel=1e-4)
    both = pushes(2 * a - b)
    assert torch.allclose(both[1], 2 * pushes(a)[1] - pushes(b)[1], atol=1e-5)
    assert torch.allclose(both[0], 2 * pushes(a)[0], atol=1e-5)
    apart = a.without(b)
    assert abs(float(apart.directions[1] @ b.directions[1])) < 1e-5
    control = a.random(0)
    assert float(control.directions[1].norm()) == pytest.approx(float(a.directions[1].norm()), rel=1e-5)


# --------------------------------------------------------------------------------------------------- kl and likelihood


def test_kl_of_hidden_edits_against_uncached_passes(tiny_lm: LanguageModel) -> None:
    steering = vector(tiny_lm, (0, 1), strength=2.0)
    out = tiny_lm.generate(
        ["the sun", "a good dog runs"], edits=steering, max_new_tokens=6, temperature=0.8, top_p=0.9, seed=2
    )
    add = {layer: (lambda h, v=v: h + 2.0 * v) for layer, v in steering.directions.items()}
    for b, prompt in enumerate(["the sun", "a good dog runs"]):
        ids, tokens = tiny_lm.encode(prompt), out.tokens[b]
        whole = torch.tensor([ids + tokens])
        with torch.no_grad():
            base = torch.log_softmax(tiny_lm.network(whole).logits[0] / 0.8, -1)
            with tiny_lm.hooks.running(add):
                law = torch.log_softmax(tiny_lm.network(whole).logits[0] / 0.8, -1)
        total = 0.0
        for t in range(len(tokens)):
            p, q = base[len(ids) + t - 1].double(), law[len(ids) + t - 1].double().exp()
            order = q.argsort(descending=True)
            keep = order[: int((q[order].cumsum(0) < 0.9).sum()) + 1]
            cut = torch.zeros_like(q)
            cut[keep] = q[keep] / q[keep].sum()
            total += float((cut[keep] * (cut[keep].log() - p[keep])).sum())
        assert float(out.kl[b]) == pytest.approx(total, abs=2e-4)


def test_kl_estimate_of_mixed_edits_is_unbiased_enough(tiny_lm: LanguageModel) -> None:
    """Hidden and transition edits together: the recorded log q minus the base's log p, token by token."""
    guide = ValueGuidance(LogitValue(tiny_lm.process(max_new_tokens=4)), beta=2.0, top_k=8)
    out = tiny_lm.generate(
        ["the sun"] * 8, edits=[vector(tiny_lm, (0,), strength=1.0), guide], max_new_tokens=4, seed=0
    )
    process = tiny_lm.process(max_new_tokens=4)
    want = out.log_prob - process.log_likelihood(["the sun"] * 8, out.group, out.tokens)
    assert torch.allclose(out.kl, want)


def test_log_likelihood_is_that_of_an_uncached_pass(tiny_lm: LanguageModel) -> None:
    out = tiny_lm.generate(["the sun", "hello"], n=3, max_new_tokens=7, seed=0)
    assert torch.allclose(tiny_lm.log_likelihood(out)[0], out.log_prob, atol=1e-4)
    assert tiny_lm.log_likelihood(out)[1].tolist() == [len(t) for t in out.tokens]


def test_system_prompt_has_a_kl_and_keeps_the_prompt(tiny_lm: LanguageModel) -> None:
    out = tiny_lm.generate("the sun", edits=SystemPrompt("you sings"), max_new_tokens=5, seed=0)
    assert out.prompts == ["the sun"] and float(out.kl[0]) > 0
    with pytest.raises(InputError):
        SystemPrompt(" ")


def test_directional_stimuli_take_their_place_in_prompts_and_chats(tiny_lm: LanguageModel) -> None:
    asked: list[list[str]] = []

    def policy(inputs: list[str]) -> list[str]:
        asked.append(inputs)
        return [f" {text.split()[0]}; {{prompt}} " for text in inputs]

    edit = DirectionalStimulus(policy, "hello {hint} the {prompt}")
    chat = [{"role": "system", "content": "you"}, {"role": "user", "content": "the sun"}]
    prompts = ["the sun", RawText("a dog"), chat, "a cat"]
    rewritten = [
        "hello the; {prompt} the the sun",
        RawText("hello a; {prompt} the a dog"),
        [chat[0], {"role": "user", "content": "hello the; {prompt} the the sun"}],
        "a cat",
    ]
    assert edit.rewrite_all(prompts[:3]) == rewritten[:3] and isinstance(edit.rewrite(prompts[1]), RawText)
    settings: dict[str, Any] = {"max_new_tokens": 5, "seed": 0}
    out = tiny_lm.generate(prompts, edits=[[edit], [edit], [edit], None], **settings)
    assert out.prompts == prompts and out.texts == tiny_lm.generate(rewritten, **settings).texts
    assert asked == [["the sun", "a dog"]]  # together, and never again
    table = DirectionalStimulus({"the sun": "a dog"}, "{prompt} {hint}")
    assert table.rewrite("the sun") == "the sun a dog"
    with pytest.raises(InputError, match="table of hints"):
        tiny_lm.generate("a cat", edits=table)
    with pytest.raises(InputError, match="template"):
        DirectionalStimulus(policy, "{prompt}")
    with pytest.raises(SteerError, match="1 inputs"):
        tiny_lm.generate("a cat", edits=DirectionalStimulus(lambda inputs: []))


def test_a_model_writes_the_hints(tiny_lm: LanguageModel) -> None:
    policy = HintPolicy(tiny_lm, "say {prompt}", max_tokens=4)
    hint = tiny_lm.generate("say the sun", temperature=0, max_new_tokens=4, stop=["\n"]).texts[0]
    assert DirectionalStimulus(policy, "{hint}/{prompt}").rewrite("the sun") == f"{hint.strip()}/the sun"


# --------------------------------------------------------------------------------------------------------------- values


def heads(model: LanguageModel) -> tuple[QHead, ValueHead]:
    torch.manual_seed(3)
    q, v = QHead(model.info.width, 8, horizon=4), ValueHead(model.info.width, 8, horizon=4)
    for head in (q, v):
        torch.nn.init.normal_(head.outer.weight, std=1.0)
    return q.eval().requires_grad_(False), v.eval().requires_grad_(False)


@pytest.mark.parametrize("tail", ["mean", "mask"])
@pytest.mark.parametrize("kind", ["q", "v"])
def test_value_guidance_in_every_form(kind: str, tail: str, tiny_lm: LanguageModel) -> None:
    """Q-head, and scalar head in one tree-attention step, against uncached passes; on the model and in lockstep."""
    q, v = heads(tiny_lm)
    embeddings = tiny_lm.info.unembedding()
    for source in (None, tiny_lm.process(max_new_tokens=6)):
        value = HeadValue(q if kind == "q" else v, embeddings if kind == "q" else None, source)
        guide = ValueGuidance(value, beta=0.5, top_k=5, tail=tail)
        prompts = ["the sun", "a very good dog runs"]
        out = greedy(tiny_lm, prompts, guide, new=6)
        for prompt, tokens in zip(prompts, out.tokens, strict=True):
            text = tiny_lm.encode(prompt)
            for drawn, want in enumerate(tokens):
                left = torch.tensor(5 - drawn)
                with torch.no_grad():
                    hidden = tiny_lm.trunk(torch.tensor([text])).last_hidden_state[0, -1]
                    logits = torch.log_softmax(tiny_lm.network(torch.tensor([text])).logits[0, -1], -1)
                    top = logits.topk(5).indices
                    if kind == "q":
                        score = q(hidden, embeddings[top], left)
                    else:
                        after = [tiny_lm.trunk(torch.tensor([[*text, int(a)]])).last_hidden_state[0, -1] for a in top]
                        score = v(torch.stack(after), left)
                pushed = torch.full_like(logits, -torch.inf) if tail == "mask" else logits.clone()
                pushed[top] = logits[top] + (score - score.mean()) / 0.5
                assert int(pushed.argmax()) == want
                text.append(want)


def test_value_guidance_survives_forks(tiny_lm: LanguageModel) -> None:
    _, v = heads(tiny_lm)
    companion = tiny_lm.process(max_new_tokens=6)
    process = tiny_lm.process(max_new_tokens=6, temperature=0, eos_token_id=[]).edited(
        ValueGuidance(HeadValue(v, None, companion), beta=0.5, top_k=4)
    )
    generator = torch.Generator().manual_seed(0)
    state = process.init(["the sun", "hello"], 1, generator)
    state = process.propose(state, generator)
    state = process.gather(state, torch.tensor([1, 0, 1]))
    while not process.done(state):
        state = process.propose(state, generator)
    alone = greedy(tiny_lm, ["the sun", "hello"], ValueGuidance(HeadValue(v), beta=0.5, top_k=4), new=6).tokens
    assert process.decode(state).tokens == [alone[1], alone[0], alone[1]]


def test_beta_of_the_run_reaches_the_head_and_temperature_does_not(tiny_lm: LanguageModel) -> None:
    q, _ = heads(tiny_lm)
    value = HeadValue(q, tiny_lm.info.unembedding())
    free, fixed = ValueGuidance(value), ValueGuidance(value, beta=0.25)
    for tau in (1.0, 0.5):
        a = tiny_lm.generate("the sun", edits=free, beta=0.25, temperature=tau, seed=0)
        b = tiny_lm.generate("the sun", edits=fixed, beta=4.0, temperature=tau, seed=0)
        assert a.tokens == b.tokens
    context = _Fixed(torch.log_softmax(torch.randn(2, 7), -1))
    shifted = ValueGuidance(lambda c, a: a.double(), beta=2.0, top_k=0).shift(context.base, context)
    assert torch.allclose((shifted - context.base)[:, 6] - (shifted - context.base)[:, 0], torch.tensor(3.0))


class _Fixed:
    step = 0

    def __init__(self, base: Tensor) -> None:
        self.base = base


# --------------------------------------------------------------------------------------- what transformers users know


def test_generation_config_processors_criteria_and_streamers(tiny_lm: LanguageModel) -> None:
    from transformers import GenerationConfig
    from transformers.generation import LogitsProcessor, StoppingCriteria
    from transformers.generation.streamers import BaseStreamer

    ids = torch.tensor([tiny_lm.encode("the sun")])
    config = GenerationConfig(
        max_new_tokens=9,
        do_sample=False,
        repetition_penalty=1.7,
        no_repeat_ngram_size=2,
        eos_token_id=3,
        pad_token_id=1,
    )
    theirs = tiny_lm.network.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    ours = tiny_lm.generate("the sun", generation_config=config)
    assert ours.tokens[0] == theirs[0, ids.shape[1] :].tolist()

    class Only(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)

    class After(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= ids.shape[1] + 3)

    out = tiny_lm.generate("the sun", logits_processor=[Only()], stopping_criteria=[After()], max_new_tokens=9)
    assert out.tokens == [[7, 7, 7]]

    class Heard(BaseStreamer):
        def __init__(self) -> None:
            self.seen: list[list[int]] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.seen.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    heard = Heard()
    out = tiny_lm.generate("the sun", stream=heard, seed=0, max_new_tokens=5)
    assert heard.ended and heard.seen[0] == ids[0].tolist() and [t for s in heard.seen[1:] for t in s] == out.tokens[0]
    pieces = tiny_lm.generate(["the sun", "hello"], stream=True, seed=0, max_new_tokens=5)
    texts = ["", ""]
    for piece in pieces:
        texts[piece.prompt] += piece.text
    assert texts == pieces.samples.texts == tiny_lm.generate(["the sun", "hello"], seed=0, max_new_tokens=5).texts
    # A stop string is never shown, not even its beginning; the pieces are the final texts.
    settings: dict[str, Any] = {"stop": ["dog runs", "cat"], "max_new_tokens": 12, "n": 8, "seed": 0}
    pieces = tiny_lm.generate(["the sun", "hello"], stream=True, **settings)
    rows = [""] * 16
    for piece in pieces:
        rows[piece.row] += piece.text
    assert rows == pieces.samples.texts == tiny_lm.generate(["the sun", "hello"], **settings).texts
    with pytest.raises(InputError, match="num_beams"):
        tiny_lm.generate("hello", generation_config=GenerationConfig(num_beams=3))


def test_stop_strings_and_end_of_sequence(tiny_lm: LanguageModel) -> None:
    out = tiny_lm.generate(["the sun"] * 32, stop=["dog", "cat"], max_new_tokens=12, seed=0)
    assert all("dog" not in t and "cat" not in t for t in out.texts)
    ended = [tokens for tokens in out.tokens if tokens[-1] == 3]
    assert ended and all(3 not in tokens[:-1] for tokens in out.tokens)


@pytest.mark.parametrize(
    "settings", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.8, "temperature": 0.7}]
)
def test_truncation_equals_the_library(settings: dict[str, Any], tiny_lm: LanguageModel) -> None:
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    made = LogitsProcessorList()
    for name, kind in (
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
    ):
        if name in settings:
            made.append(kind(settings[name]))
    torch.manual_seed(0)
    logits = torch.randn(6, 50) * 2
    theirs = torch.softmax(made(None, logits), -1)
    decoding = tiny_lm.process(**settings).decoding
    assert torch.allclose(decoding.truncated(decoding.tempered(logits)).exp(), theirs, atol=1e-6)


def test_draws_follow_the_law(tiny_lm: LanguageModel) -> None:
    law = torch.log_softmax(torch.tensor([0.3, -1.0, 2.0, -torch.inf, 0.0]), -1)
    n = 20_000
    drawn = tiny_lm.process().decoding.draw(law.expand(n, -1), torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=5).double() / n
    assert bool(((share - law.exp()).abs() <= 5 * (law.exp() * (1 - law.exp()) / n).sqrt()).all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompts": ""}, "prompt: got ''"),
        ({"prompts": []}, "prompts: got"),
        ({"prompts": "the " * 140}, "prompts.0.: got"),
        ({"prompts": "the sun", "n": 0}, "n: got 0"),
        ({"prompts": "the sun", "beta": 0}, "beta: got 0"),
        ({"prompts": "the sun", "temperature": -1}, "temperature: got -1"),
        ({"prompts": "the sun", "max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"prompts": "the sun", "top_p": 0}, "top_p: got 0"),
        ({"prompts": "the sun", "topp": 0.5}, "got 'topp'"),
        ({"prompts": "the sun", "sampler": "best"}, "sampler: got 'best'"),
        ({"prompts": "the sun", "sampler": "best-of-n"}, "reward: got None"),
    ],
)
def test_bad_input_is_refused_before_any_work(call: dict[str, Any], message: str, tiny_lm: LanguageModel) -> None:
    with recording(tiny_lm.blocks, [0]) as seen, pytest.raises(InputError, match=message):
        tiny_lm.generate(**call)
    assert not seen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"directions": {5: torch.ones(32)}}, "layer: got 5"),
        ({"directions": {0: torch.ones(16)}}, "width 16"),
        ({"directions": {0: torch.full((32,), torch.nan)}}, "NaN"),
        ({"strength": float("inf")}, "strength: got inf"),
        ({"operator": "push"}, "operator: got 'push'"),
        ({"scope": "later"}, "scope: got 'later'"),
        ({"model": {"fingerprint": "0123", "name": "other"}}, "made for other"),
    ],
)
def test_bad_vectors_are_refused(change: dict[str, Any], message: str, tiny_lm: LanguageModel) -> None:
    with pytest.raises(InputError, match=message):
        tiny_lm.generate("the sun", edits=replace(vector(tiny_lm, (0,)), **change))
