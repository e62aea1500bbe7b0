"""Contrastive decoding, proxy tuning, clamps into an interval, the first tokens alone, and what a probe reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import steer
from steer.core import InputError, Scope
from steer.edits import split_spec

PAIRS = [("a good dog", "a bad cat"), ("happy day", "sad day"), ("nice sun", "awful sun")]


@pytest.fixture(scope="module")
def vector(tiny_lm: Any) -> Any:
    return steer.train_vector(tiny_lm, PAIRS)


def law(model: Any, edits: Any = ()) -> torch.Tensor:
    """Log-law `[V]` of the first token after a prompt."""
    process: Any = model.process(max_new_tokens=2)
    for edit in edits:
        process = process.edited(edit)
    with process.session():
        state = process.read(process.init(["the sun"], 1, torch.Generator()))
        return process.laws(state)[1][0].double()


def test_contrasts_are_their_formulas(tiny_lm: Any, vector: Any) -> None:
    base, weak, other = law(tiny_lm), law(tiny_lm, [vector(1.0)]), law(tiny_lm, [vector(-1.0)])
    weaker = tiny_lm.process(max_new_tokens=2).edited(vector(1.0))
    strange = tiny_lm.process(max_new_tokens=2).edited(vector(-1.0))
    mixed = torch.where(base >= base.max() + torch.tensor(0.5).log(), base + 0.7 * (base - weak), -torch.inf)
    found = law(tiny_lm, [steer.ContrastiveDecoding(weaker, 0.7, alpha=0.5)])
    assert 1 < int(torch.isfinite(found).sum()) < len(found)
    assert torch.allclose(found.exp(), torch.softmax(mixed, 0), atol=1e-6)
    whole = law(tiny_lm, [steer.ContrastiveDecoding(weaker, 0.7, alpha=0)])
    assert torch.allclose(whole, torch.log_softmax(base + 0.7 * (base - weak), 0), atol=1e-5)
    proxy = law(tiny_lm, [steer.ProxyTuning(strange, weaker, 1.5)])
    assert torch.allclose(proxy, torch.log_softmax(base + 1.5 * (other - weak), 0), atol=1e-5)
    assert torch.equal(law(tiny_lm, [steer.ProxyTuning(strange, weaker, 0.0)]), base)
    for made, field in (
        (lambda: steer.ContrastiveDecoding(weaker, float("nan")), "w"),
        (lambda: steer.ContrastiveDecoding(weaker, alpha=2), "alpha"),
        (lambda: steer.ContrastiveDecoding(tiny_lm), "amateur"),  # type: ignore[arg-type]
        (lambda: steer.ProxyTuning(weaker, tiny_lm), "antiexpert"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=field):
            made()


def test_given_texts_are_scored_under_a_contrast(tiny_lm: Any, vector: Any) -> None:
    edit = steer.ContrastiveDecoding(tiny_lm.process(max_new_tokens=5).edited(vector(1.0)), 0.7, alpha=0)
    drawn = tiny_lm.generate(["the sun", "a cat"], edits=edit, seed=0, max_new_tokens=5, eos_token_id=[])
    process = tiny_lm.scorer(5, edit, 2)
    total, _ = process.score_tokens(process.encode(["the sun", "a cat"]), drawn.tokens)
    assert torch.allclose(total, drawn.log_prob, atol=1e-4)


def test_a_clamp_moves_components_into_its_interval(tiny_lm: Any, vector: Any) -> None:
    norm = float(tiny_lm.residual_norms()[1])
    (term,) = vector(layers="1", operator="clamp", low=-0.1, high=0.3).terms(tiny_lm.info)
    hidden = torch.randn(50, tiny_lm.info.width, generator=torch.Generator().manual_seed(0)) * norm
    direction = vector.tensors["direction.1"] / vector.tensors["direction.1"].norm()
    before, after = hidden @ direction, term.operator(hidden) @ direction
    assert torch.allclose(after, before.clamp(-0.1 * norm, 0.3 * norm), atol=1e-4 * norm)
    rest = hidden - before.unsqueeze(1) * direction
    assert torch.allclose(term.operator(hidden) - after.unsqueeze(1) * direction, rest, atol=1e-4 * norm)
    (one,) = vector(layers="1", operator="clamp", high=0.0).terms(tiny_lm.info)
    assert torch.allclose(one.operator(hidden) @ direction, before.clamp(max=0.0), atol=1e-4 * norm)
    for options, field in (
        ({"low": 0.1}, "low"),
        ({"operator": "clamp", "low": 0.2, "high": 0.1}, "low"),
        ({"operator": "clamp", "high": float("inf")}, "high"),
    ):
        with pytest.raises(InputError, match=field):
            vector(**options)
    with pytest.raises(InputError, match="strength"):
        vector(0.5, operator="clamp", high=0.1)
    assert split_spec("v.safetensors:operator=clamp:high=0.1")[2] == {"operator": "clamp", "high": "0.1"}


def test_the_first_tokens_alone_are_steered(tiny_lm: Any, vector: Any) -> None:
    scope = Scope.parse("first:3")
    assert scope.bounds(10) == (9, 12) and str(scope) == "first:3" and str(Scope.parse("from:7")) == "from:7"
    assert str(Scope.parse("first:1")) == "last"  # the same positions
    assert split_spec("v.safetensors:0.2:scope=first:3") == ("v.safetensors", 0.2, {"scope": "first:3"})
    for bad in ("first:0", "first:", "first:x", "first:-1", "first"):
        with pytest.raises(InputError, match="first:N"):
            Scope.parse(bad)
    ids, tokens = [tiny_lm.encode("the sun is")], [[7, 8, 9, 10, 11, 12]]
    group = torch.zeros(1, dtype=torch.long)
    texts = ["the sun is"]

    def steps(edit: Any) -> torch.Tensor:
        process: Any = tiny_lm.process(max_new_tokens=6)
        process = process if edit is None else process.edited(edit)
        upto = [float(process.log_likelihood(texts, group, [tokens[0][:n]])[0]) for n in range(1, 7)]
        return torch.tensor(upto).diff(prepend=torch.zeros(1))

    first, reply, plain = steps(vector(1.0, scope="first:3")), steps(vector(1.0, scope="reply")), steps(None)
    assert ids and torch.allclose(first[:3], reply[:3], atol=1e-5)
    assert (first - plain)[:3].abs().min() > 1e-4 and (first - reply)[3:].abs().max() > 1e-4


def test_readings_are_projections_and_log_odds(tiny_lm: Any, vector: Any) -> None:
    prompt, text = "the sun", "is good today"
    (found,) = tiny_lm.readings(prompt, [text], vector, layer=1)
    ids = [*tiny_lm.encode(prompt), *tiny_lm.tokenizer(text, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        states = tiny_lm.network(torch.tensor([ids]), output_hidden_states=True).hidden_states
    seen = tiny_lm.hidden_states([ids[: i + 1] for i in range(len(ids))], [1])[1]
    direction = vector.tensors["direction.1"] / vector.tensors["direction.1"].norm()
    want = (seen @ direction / float(tiny_lm.residual_norms()[1]))[len(tiny_lm.encode(prompt)) :]
    assert len(states) == 3 and torch.allclose(found, want, atol=1e-5)
    probe = steer.train_vector(tiny_lm, PAIRS, method="probe")
    best = probe.card.metrics["best_layer"]
    (odds,) = tiny_lm.readings(prompt, [text], probe)
    seen = tiny_lm.hidden_states([ids[: i + 1] for i in range(len(ids))], [best])[best]
    want = seen @ probe.tensors[f"probe.{best}"].float() + float(probe.tensors[f"bias.{best}"])
    assert torch.allclose(odds, want[len(tiny_lm.encode(prompt)) :], atol=1e-4)
    for given, field in (({"layer": 9}, "layer"), ({"texts": ["a", "b"], "prompts": ["a", "b", "c"]}, "texts")):
        with pytest.raises(InputError, match=field):
            tiny_lm.readings(**{"prompts": prompt, "texts": [text], "artifact": vector, **given})


def test_transformers_own_generate_draws_under_edits(tiny_lm: Any, vector: Any) -> None:
    """Unedited it gives transformers' own tokens, greedy and sampled, of rows of unequal length; edited steer's."""
    rows = [tiny_lm.encode(text) for text in ("the sun is good", "a cat")]
    width = max(map(len, rows))
    pad = tiny_lm.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "pad_token_id": pad}
    for settings in ({"do_sample": False}, {"do_sample": True, "top_k": 5, "temperature": 0.7}):
        torch.manual_seed(0)
        own = tiny_lm.network.generate(**given, **settings)
        torch.manual_seed(0)
        assert torch.equal(tiny_lm.network.generate(**given, **settings, custom_generate=steer.hf(tiny_lm)), own)
    edit = vector(1.0, scope="generated")
    steered = tiny_lm.network.generate(**given, do_sample=False, custom_generate=steer.hf(tiny_lm, edit))
    mine = tiny_lm.generate(["the sun is good", "a cat"], edits=edit, temperature=0, max_new_tokens=6)
    for row, tokens in zip(steered[:, width:].tolist(), mine.tokens, strict=True):
        assert row[: len(tokens)] == tokens and set(row[len(tokens) :]) <= {pad}
    with pytest.raises(steer.UnsupportedError, match="num_beams"):
        tiny_lm.network.generate(**given, num_beams=2, custom_generate=steer.hf(tiny_lm))
    with pytest.raises(steer.UnsupportedError, match="SystemPrompt"):
        steer.hf(tiny_lm, steer.SystemPrompt("Be calm."))
