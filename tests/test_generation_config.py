"""Every field of a `GenerationConfig` is honoured as transformers honours it, or refused by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import TopKLogitsWarper

import steer
from steer.adapters.language.decoding import Decoding
from steer.adapters.language.generation import decoding_settings
from steer.core import InputError


def _model(tokenizer: Any, **own: Any) -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        initializer_range=0.3,
    )
    network = LlamaForCausalLM(config).eval()
    network.generation_config = GenerationConfig(pad_token_id=1, eos_token_id=3, **own)
    return steer.load(network, tokenizer=tokenizer, name=f"own {own}")


@pytest.fixture(scope="module")
def tokenizer(tiny_lm: Any) -> Any:
    return tiny_lm.tokenizer


def _theirs(model: Any, prompt: str, config: GenerationConfig | None = None, **more: Any) -> list[int]:
    ids = torch.tensor([model.encode(prompt)])
    out = model.network.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, **more)
    return [int(i) for i in out[0, ids.shape[1] :]]


@pytest.mark.parametrize(
    "given",
    [
        {"max_length": 20},
        {"max_length": 20, "min_length": 18},
        {"max_new_tokens": 4, "max_length": 20},
        {"max_length": 30, "min_length": 5, "min_new_tokens": 9},
        {"max_new_tokens": 9, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 9, "suppress_tokens": [7, 9, 11], "bad_words_ids": [[8], [10, 12]]},
        {"max_new_tokens": 9, "eos_token_id": [3, 7]},
        {"max_new_tokens": 9, "eos_token_id": -1, "begin_suppress_tokens": [], "suppress_tokens": []},
        {"max_new_tokens": 9, "typical_p": 1.0, "epsilon_cutoff": 0.0, "encoder_no_repeat_ngram_size": 0},
        {"max_new_tokens": 9, "early_stopping": True, "length_penalty": 2.0, "use_cache": False, "num_beams": 1},
    ],
)
def test_greedy_texts_are_those_of_the_library(given: dict[str, Any], tokenizer: Any) -> None:
    model = _model(tokenizer)
    config = GenerationConfig(**given)
    for prompt in ("the sun", "tell me why the dog sings"):
        assert model.generate(prompt, generation_config=config).tokens[0] == _theirs(model, prompt, config)


OWN = {"repetition_penalty": 2.0, "suppress_tokens": [7, 9], "max_new_tokens": 9}


def test_a_checkpoints_own_settings_are_followed_where_that_is_asked_for(tokenizer: Any) -> None:
    model = _model(tokenizer, **OWN)
    prompt = "tell me why the dog sings"
    theirs = _theirs(model, prompt)
    assert model.generate(prompt, generation_config="checkpoint").tokens[0] == theirs
    # As in the library, what a configuration leaves open is the checkpoint's.
    config = GenerationConfig(no_repeat_ngram_size=1)
    assert model.generate(prompt, generation_config=config).tokens[0] == _theirs(model, prompt, config)
    assert model.generate(prompt, temperature=0, max_new_tokens=9).tokens[0] != theirs


def test_what_is_not_followed_is_said_once(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = _model(tokenizer, do_sample=True, temperature=0.6, top_k=20, repetition_penalty=1.1)
    for _ in range(2):
        model.generate("the sun", max_new_tokens=1, temperature=0.8)
    said = [r.getMessage() for r in caplog.records if r.name == "steer"]
    assert len(said) == 1 and "top_k 20, repetition_penalty 1.1" in said[0] and "temperature 0.6" not in said[0]
    caplog.clear()
    model = _model(tokenizer, min_length=4, stop_strings=["dog"])
    model.generate("the sun", max_new_tokens=1, stop=["cat"])
    assert "(min_length 4)" in caplog.text, "the stop string was set by the user"
    caplog.clear()
    model = _model(tokenizer, do_sample=True, top_k=0, top_p=1.0, temperature=1.0)
    model.generate("the sun", max_new_tokens=1)
    assert not [r for r in caplog.records if r.name == "steer"]


def test_sampling_keeps_what_the_library_keeps(tokenizer: Any) -> None:
    """`do_sample` alone truncates to the 50 likeliest tokens, or to what the checkpoint says."""
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(0))
    kept = TopKLogitsWarper(50)(None, logits).isfinite()  # type: ignore[arg-type]
    decoding = Decoding.create(GenerationConfig(do_sample=True))
    assert torch.equal(decoding.truncated(decoding.tempered(logits)).isfinite(), kept)
    assert Decoding.create(GenerationConfig(do_sample=True), {"top_k": 7, "temperature": 0.5}).top_k == 7
    assert Decoding.create(GenerationConfig(do_sample=True, top_k=0)).top_k == 0
    assert Decoding.create(GenerationConfig(do_sample=True, temperature=0.7)).temperature == 0.7
    assert Decoding.create("checkpoint", {"do_sample": True, "top_p": 0.8}).top_p == 0.8
    assert Decoding.create(GenerationConfig(top_p=0.5)).greedy and Decoding.create().top_k == 0


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_beams", 3),
        ("penalty_alpha", 0.6),
        ("typical_p", 0.9),
        ("sequence_bias", [[[3], 1.0]]),
        ("begin_suppress_tokens", [3]),
        ("forced_eos_token_id", 3),
        ("max_time", 2.0),
        ("token_healing", True),
        ("encoder_repetition_penalty", 1.2),
        ("exponential_decay_length_penalty", (3, 1.1)),
        ("top_h", 0.5),
        ("guidance_scale", 2.0),
        ("remove_invalid_values", True),
        ("tempreature", 0.5),
        ("epsilon_cutoff", 3e-4),
    ],
)
def test_other_fields_are_refused_by_name(name: str, value: Any, tokenizer: Any) -> None:
    config = GenerationConfig()
    setattr(config, name, value)
    with pytest.raises(InputError, match=rf"generation_config\.{name}"):
        _model(tokenizer).generate("the sun", generation_config=config)


def test_no_field_of_the_library_is_dropped_in_silence() -> None:
    """Each is either in the result, without any effect on a text, or refused."""
    from steer.adapters.language.generation import _ELSEWHERE, _WITHOUT_EFFECT

    settings = {f.name for f in fields(Decoding)}
    for name in GenerationConfig().to_dict():
        config = GenerationConfig()
        setattr(config, name, [5] if name.endswith("_ids") else 5)
        if name in _WITHOUT_EFFECT or name in _ELSEWHERE or name.startswith("_"):
            continue
        try:
            made = decoding_settings(config, {}) | decoding_settings(config, {"do_sample": True})
        except InputError as error:
            assert error.field == f"generation_config.{name}"
        else:
            assert name in settings and name in made, name


def test_lengths_that_count_the_prompt_want_prompts_of_one_length(tokenizer: Any) -> None:
    model, config = _model(tokenizer), GenerationConfig(max_length=20)
    for prompts, edits in ((["the sun", "a very good dog"], ()), ("the sun", steer.SystemPrompt("you sings"))):
        with pytest.raises(InputError, match="max_length"):
            model.generate(prompts, edits=edits, generation_config=config)
    with pytest.raises(InputError, match="max_length"):
        model.generate("the sun", generation_config=GenerationConfig(max_length=2))
    with pytest.raises(InputError, match="max_length"):
        model.process(generation_config=config)
    with pytest.raises(InputError, match="generation_config"):
        model.generate("the sun", generation_config={"max_length": 20})
