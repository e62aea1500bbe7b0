"""Architectures: one small model of each kind in the quick suite, all that the library has in the slow one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from architectures import (
    NEW,
    PROMPTS,
    TINY,
    Library,
    configuration,
    kind_of,
    names,
    network,
    tokenizer,
    tried,
    verdict,
)

import steer
from steer.core import SteerError, UnsupportedError

KINDS = {
    "LlamaConfig": "attention",
    "MistralConfig": "sliding windows",
    "JambaConfig": "hybrid of attention and Mamba",
    "Qwen3NextConfig": "hybrid of attention and a delta rule",
    "FalconH1Config": "attention and Mamba in one block",
    "MambaConfig": "recurrent, without padding",
    "RecurrentGemmaConfig": "states in the network's own modules",
    "GPTNeoConfig": "local attention by columns",
    "MptConfig": "distances by columns",
    "BartConfig": "positions by columns",
    "Gemma3nTextConfig": "several residual streams",
    "Llama4TextConfig": "a trunk that its prefix does not name",
    "Gemma3Config": "multimodal wrapper",
}
"""What the quick suite tries, and for what it stands."""

REFUSED = {
    "MiniMaxConfig": "does not continue a text as a single pass",
    "DeepseekV4Config": "several residual streams",
    "BertConfig": "attends both ways",
    "RwkvConfig": "takes no cache",
    "XLNetConfig": "takes no cache",
    "xLSTMConfig": "memory of a kind of its own",
    "ProphetNetConfig": "one residual stream",
}


@pytest.mark.parametrize("name", KINDS)
def test_one_of_each_kind(name: str) -> None:
    found, note = verdict(tried(kind_of(name)))
    assert found == "right", note


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    found, note = verdict(tried(kind_of(name)))
    assert found == "refused"
    assert REFUSED[name] in note


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_every_architecture_is_right_or_refused(name: str) -> None:
    found, note = verdict(tried(kind_of(name)))
    if found in ("not built", "not run by the library"):
        pytest.skip(f"{found}: {note}")
    assert found in ("right", "refused"), note


# ------------------------------------------------------------------------------------------------- the check at load


def llama(**more: Any) -> Any:
    return network(transformers.LlamaConfig(**TINY | more))


def test_a_network_that_swallows_its_cache_is_refused() -> None:
    """As the library's modules do with arguments that they do not know."""

    class Swallowing(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
            kwargs.pop("cache", None), kwargs.pop("past_key_values", None)
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

    with pytest.raises(UnsupportedError, match="takes no cache that steer knows"):
        steer.load(Swallowing(transformers.LlamaConfig(**TINY)).eval(), tokenizer=tokenizer())


class Forgetful(transformers.LlamaForCausalLM):
    """Takes a cache and passes over it."""

    def forward(self, input_ids: Any = None, cache: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().forward(input_ids=input_ids, use_cache=False)


def test_a_network_that_forgets_is_refused_and_can_be_loaded_all_the_same() -> None:
    net = Forgetful(transformers.LlamaConfig(**TINY)).eval()
    with pytest.raises(UnsupportedError, match=r"single pass of the library.*check=False"):
        steer.load(net, tokenizer=tokenizer())
    lm = steer.load(net, tokenizer=tokenizer(), check=False)
    assert len(lm.generate("Hi", max_new_tokens=2, seed=0)) == 1


def test_a_network_with_a_wrong_padding_mask_goes_by_lengths_and_says_so_once() -> None:
    class Seeing(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            return super().forward(*args, attention_mask=None, **kwargs)

        forward.__signature__ = __import__("inspect").signature(transformers.LlamaForCausalLM.forward)  # type: ignore[attr-defined]

    torch.manual_seed(0)
    net, words = Seeing(transformers.LlamaConfig(**TINY, initializer_range=0.3)).eval(), tokenizer()
    with pytest.warns(UserWarning, match="not right where rows of unequal length") as said:
        lm = steer.load(net, tokenizer=words)
        drawn = lm.generate(list(PROMPTS), temperature=0, max_new_tokens=NEW)
    assert len(said) == 1
    assert [list(t) for t in drawn.tokens] == Library(net, words).texts(PROMPTS)


def test_half_precision_is_no_fault() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.bfloat16, torch.float16):
            lm = steer.load(llama().to(dtype), tokenizer=tokenizer())
            assert all(lm.body.allows(name) for name in ("pads", "chunks", "gaps", "branches", "shares"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.ao.quantization", "ignore:.*quantize")
def test_eight_bits_are_no_fault() -> None:
    """Whose activations are rounded by the largest of the batch, so that rows do change each other a little."""
    net = torch.ao.quantization.quantize_dynamic(llama(hidden_size=64), {torch.nn.Linear}, torch.qint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm = steer.load(net, tokenizer=tokenizer())
        assert all(lm.body.allows(name) for name in ("pads", "chunks", "gaps", "branches", "shares"))


def test_the_name_that_the_library_has_today() -> None:
    """No warning of the library's: arguments go by the names that `forward` has."""
    from starlette.testclient import TestClient

    from steer.adapters.transformers.serving.engine import TransformersEngine
    from steer.serving.app import create_app

    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for net in (llama(), network(configuration(transformers.MambaConfig))):
            lm = steer.load(net, tokenizer=tokenizer())
            lm.generate(list(PROMPTS), n=2, max_new_tokens=4, sampler="fk", reward="length", seed=0)
            lm.hidden_states([[3, 4, 5, 6, 7, 8, 9, 10, 11], [3, 4, 5, 6, 7, 8, 9, 10, 12]])
            lm.residual_norms()
            with TestClient(create_app(TransformersEngine(lm, name="m")), base_url="http://127.0.0.1:8000") as client:
                body = {"model": "m", "prompt": "Hi", "max_tokens": 2}
                assert client.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize("name", ["JambaConfig", "MambaConfig", "RecurrentGemmaConfig", "Qwen3NextConfig"])
def test_recurrent_models_are_served_with_searches(name: str) -> None:
    from starlette.testclient import TestClient

    from steer.adapters.transformers.serving.engine import TransformersEngine
    from steer.serving.app import create_app

    net, words = network(configuration(kind_of(name))), tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm = steer.load(net, tokenizer=words)
        app = create_app(TransformersEngine(lm, name="m"))
    want = [words.decode(tokens, skip_special_tokens=True) for tokens in Library(net, words).texts(PROMPTS[:2])]
    plain = {"model": "m", "prompt": list(PROMPTS[:2]), "max_tokens": NEW, "temperature": 0, "n": 2}
    search = {"model": "m", "prompt": PROMPTS[0], "max_tokens": 4, "seed": 0}
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        said = client.post("/v1/completions", json=plain)
        assert [c["text"] for c in said.json()["choices"]] == [text for text in want for _ in range(2)]
        for name in ("fk", "best-of-n"):
            steering = {"sampler": name, "candidates": 3, "reward": "length"}
            said = client.post("/v1/completions", json=search | {"steer": steering})
            assert said.status_code == 200, said.text


# -------------------------------------------------------------------------------------------------------- contexts


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"max_position_embeddings": 24, "rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


@pytest.mark.parametrize(
    ("given", "context"),
    [
        (rope("yarn", factor=4.0, original_max_position_embeddings=24), 96),
        (rope("dynamic", factor=4.0), 96),
        (rope("linear", factor=4.0), 24),
        (rope("default"), 24),
    ],
)
def test_context_with_a_scaled_rope(given: dict[str, Any], context: int) -> None:
    lm = steer.load(llama(**given), tokenizer=tokenizer())
    assert lm.context_length == context
    with pytest.raises(SteerError, match=f"at most {context} tokens"):
        lm.generate("Hi", max_new_tokens=context)


def test_context_by_option() -> None:
    lm = steer.load(llama(max_position_embeddings=24), tokenizer=tokenizer(), context_length=48)
    assert len(lm.generate("Hi", max_new_tokens=40, seed=0)) == 1


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rows_past_a_stretched_context_leave_each_other_alone(kind: str) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4} if kind == "longrope" else {}
    net, words = llama(**rope(kind, factor=4.0, original_max_position_embeddings=24, **factors)), tokenizer()
    lm = steer.load(net, tokenizer=words, context_length=96)
    long = f"{PROMPTS[1]} and then"
    want = [Library(net, words).text(p, 30) for p in (PROMPTS[0], long, "Hi")]
    got = lm.generate([PROMPTS[0], long, "Hi"], n=2, temperature=0, max_new_tokens=30)
    assert [list(t) for t in got.tokens] == [row for row in want for _ in range(2)]
