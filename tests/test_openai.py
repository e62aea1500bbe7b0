"""Models behind an OpenAI-compatible endpoint, against a server that draws from known laws."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from openai_server import Chain, Fault, Server, Words
from torch import Tensor

import steer
from steer.adapters import openai
from steer.adapters.openai.connection import EndpointError, Retry
from steer.adapters.openai.values import LocalValue, TextValue
from steer.core import InputError, RawText, Reward, Samples, UnsupportedError
from steer.methods.best_of_n import BestOfN, best_of_n_law
from steer.methods.fk import FKSteering
from steer.methods.prompt import DirectionalStimulus, HintPolicy, SystemPrompt
from steer.methods.value import HeadValue, ValueGuidance, ValueHead
from steer.methods.vector import SteeringVector
from steer.sampling.states import StateStore
from steer.toy import TabularProcess, markov_lm

LETTERS = "xyz"
TOY = markov_lm()


def chain(**settings: Any) -> Chain:
    return Chain(LETTERS, TOY.initial.tolist(), TOY.transition.tolist(), **settings)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(chain()).running() as running:
        yield running


def connect(server: Server, **options: Any) -> openai.EndpointModel:
    options.setdefault("retries", Retry(5, first=0.0))
    return openai.load(server.url, **{"model": server.model, "chat": False, **options})


def letters(text: str) -> list[int]:
    return [LETTERS.index(word) for word in text.split()]


def score(texts: Sequence[str]) -> list[float]:
    """A reward on texts of letters with a value of its own for most of them."""
    return [sum(a * (i + 1) for i, a in enumerate(letters(text))) / 4 - 0.3 * text.count("x") for text in texts]


def reward_of(sequences: Tensor) -> Tensor:
    """The same reward on sequences of tokens `[M, T]`."""
    return torch.tensor(score([" ".join(LETTERS[a] for a in row) for row in sequences.tolist()]), dtype=torch.float64)


def number(text: str) -> int:
    """Place of a text among those of its length, in lexicographic order."""
    return int(sum(a * 3**i for i, a in enumerate(reversed(letters(text)))))


def assert_law(texts: Sequence[str], log_law: Tensor) -> None:
    """Texts of three letters occur as often as a log-law `[27]` says, within five standard errors."""
    counts = torch.bincount(torch.tensor([number(text) for text in texts]), minlength=27).double()
    p, size = log_law.double().exp(), len(texts)
    assert abs(float(p.sum()) - 1) < 1e-9
    assert bool(((counts / size - p).abs() <= 5 * (p * (1 - p) / size).sqrt() + 1e-12).all())


# ------------------------------------------------------------------------------------------------------- exact laws


def cut(process: TabularProcess, k: int, temperature: float) -> TabularProcess:
    """The chain that an endpoint shows which names k tokens, after temperature."""

    def row(p: Tensor) -> Tensor:
        kept = torch.zeros_like(p)
        best = p.sort(descending=True, stable=True).indices[:k]
        kept[best] = p[best] ** (1 / temperature)
        return kept / kept.sum()

    return TabularProcess(row(process.initial), torch.stack([row(p) for p in process.transition]), process.length)


@pytest.mark.parametrize(("k", "temperature", "chat"), [(20, 1.0, False), (20, 0.6, True), (2, 1.0, False)])
def test_guided_texts_have_the_enumerated_law(server: Server, k: int, temperature: float, chat: bool) -> None:
    base = cut(TOY, k, temperature)
    values = base.mean_values(reward_of)

    def toy_value(context: Any, candidates: Tensor) -> Tensor:
        parents = context.prefix @ torch.tensor([3**i for i in reversed(range(context.step))], dtype=torch.long)
        return values[context.step + 1][parents.unsqueeze(1) * 3 + candidates]

    exact = base.edited(ValueGuidance(toy_value, beta=0.4, top_k=0))
    _, log_law = exact.law()
    _, log_base = base.law()

    value = TextValue(lambda texts: [float(values[len(letters(t))][number(t)]) for t in texts])
    model = connect(server, top_logprobs=k, chat=chat, prefill="continue_final_message" if chat else None)
    samples = model.generate(
        "hello",
        edits=ValueGuidance(value),
        beta=0.4,
        n=4000,
        seed=0,
        max_rows=4000,
        max_new_tokens=3,
        temperature=temperature,
    )
    assert_law(samples.texts, log_law)
    place = torch.tensor([number(text) for text in samples.texts])
    assert torch.allclose(samples.log_prob, log_law[place], rtol=0, atol=1e-9)
    assert torch.allclose(samples.base_log_prob, log_base[place], rtol=0, atol=1e-9)
    seen = log_law.isfinite()
    divergence = float((log_law.exp() * (log_law - log_base))[seen].sum())
    error = float(samples.kl.std()) / len(samples) ** 0.5
    assert abs(float(samples.kl.mean()) - divergence) < 5 * error + 1e-12
    assert samples.cost.model_calls == len(server.calls) == samples.cost.generated_tokens <= 13


def test_texts_drawn_by_the_endpoint_have_its_law_and_log_probabilities(server: Server) -> None:
    samples = connect(server, max_choices=128).generate(
        "hello", n=4000, seed=1, max_rows=4000, max_new_tokens=3, logprobs=True
    )
    _, log_law = TOY.law()
    assert_law(samples.texts, log_law)
    place = torch.tensor([number(text) for text in samples.texts])
    assert torch.allclose(samples.log_prob, log_law[place], rtol=0, atol=1e-9)
    assert len(server.calls) == 32 and float(samples.kl.abs().max()) == 0


def test_best_of_n_has_its_exact_law(server: Server) -> None:
    samples = connect(server).generate(
        ["hello"] * 600, sampler="best-of-n", n=4, reward=score, seed=0, max_rows=10_000, max_new_tokens=3
    )
    sequences, log_law = TOY.law()
    assert_law(samples.texts, best_of_n_law(log_law, reward_of(sequences), 4).log())
    assert len(samples.pool) == 2400 and len(server.calls) == 600
    assert samples.cost.prompt_tokens == server.spent["prompt_tokens"]
    assert samples.cost.generated_tokens == server.spent["completion_tokens"] == 3 * 2400


@pytest.mark.parametrize(("block", "guided"), [(1, False), (2, False), (1, True)])
def test_fk_in_blocks_is_unbiased(server: Server, block: int, guided: bool) -> None:
    """`E[Z-hat sum_i w_i 1(x_i = x)]` is `p(x) exp(r(x) / beta)` for every text x, with a guided proposal too."""
    beta, runs = 0.8, 150
    edits = [ValueGuidance(TextValue(score), beta=1.5)] if guided else []
    samples = connect(server).generate(
        ["hello"] * runs,
        sampler=FKSteering(num_particles=6),
        reward=score,
        beta=beta,
        edits=edits,
        seed=2,
        max_rows=10_000,
        block=block,
        max_new_tokens=3,
    )
    log_target, log_z = TOY.target(reward_of, beta)
    mass = samples.weights * samples.log_z.exp()[samples.group]
    place = torch.tensor([number(text) for text in samples.texts])
    estimates = torch.zeros(runs, 27, dtype=torch.float64).index_put((samples.group, place), mass, accumulate=True)
    error = estimates.std(0) / runs**0.5
    wanted = (log_target + log_z).exp()
    assert bool(((estimates.mean(0) - wanted).abs() <= 5 * error + 1e-12).all())
    total = estimates.sum(1)
    assert abs(float(total.mean()) - float(wanted.sum())) < 5 * float(total.std()) / runs**0.5


@pytest.mark.parametrize(
    ("k", "settings"), [(20, {"top_k": 2}), (20, {"top_p": 0.7}), (3, {"top_k": 2, "min_p": 0.5, "temperature": 1.4})]
)
@pytest.mark.parametrize("guided", [False, True])
def test_evidence_under_truncation_is_that_of_the_law_that_is_drawn(
    k: int, settings: dict[str, Any], guided: bool
) -> None:
    """E exp(r) under the chain that the endpoint shows, truncated, edits or not; by default."""
    rows = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.25, 0.65], [0.45, 0.2, 0.35], [0.3, 0.6, 0.1]], dtype=torch.float64)
    whole = TabularProcess(rows[0], rows[1:], 3)
    shown = cut(whole, k, settings.get("temperature", 1.0))
    sizes = {name: x for name, x in settings.items() if name != "temperature"}
    drawn = TabularProcess(*(_truncated(p, **sizes) for p in (shown.initial, shown.transition)), 3)
    edits = [ValueGuidance(TextValue(score), beta=1.5)] if guided else []
    with Server(Chain(LETTERS, rows[0].tolist(), rows[1:].tolist())).running() as server:
        samples = connect(server).generate(
            ["hello"] * 150,
            sampler=FKSteering(num_particles=6),
            reward=score,
            edits=edits,
            seed=2,
            max_rows=10_000,
            block=1,
            max_new_tokens=3,
            top_logprobs=k,
            **settings,
        )
    z = samples.log_z.exp()
    truth = math.exp(drawn.target(reward_of, 1.0)[1])
    assert abs(float(z.mean()) - truth) < 5 * float(z.std()) / len(z) ** 0.5 + 1e-12


def _truncated(p: Tensor, top_k: int = 3, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Laws `[..., 3]` cut by hand."""
    ordered, order = p.sort(dim=-1, descending=True)
    first = torch.where(torch.arange(3) < top_k, ordered, 0.0)
    first = first / first.sum(-1, keepdim=True)
    keep = (first.cumsum(-1) - first < top_p) & (first >= min_p * first[..., :1]) & (first > 0)
    kept = torch.where(keep, first, 0.0)
    return torch.zeros_like(p).scatter(-1, order, kept / kept.sum(-1, keepdim=True))


# ---------------------------------------------------------------------------------- the same texts as a model at hand


@pytest.fixture
def words(tiny_lm: Any) -> Iterator[Server]:
    with Server(Words(tiny_lm), model="tiny").running() as running:
        yield running


PROMPTS = ["the sun", "a very good dog runs"]


def spoken(model: Any, samples: Samples) -> list[list[str]]:
    """The words of a model's texts, special tokens that are not the end among them."""
    return [[w for w in model.tokenizer.convert_ids_to_tokens(row) if w != "</s>"] for row in samples.tokens]


def words_of(samples: Samples) -> list[list[str]]:
    return [text.split() for text in samples.texts]


@pytest.mark.parametrize("way", [{}, {"block": 3}, {"block": 4, "top_logprobs": 5}], ids=["whole", "blocks", "tokens"])
@pytest.mark.parametrize("prefill", [None, "continue_final_message", "prefix", "last"])
def test_greedy_texts_are_those_of_the_model_itself(
    words: Server, tiny_lm: Any, way: dict[str, int], prefill: str | None
) -> None:
    settings: dict[str, Any] = {"temperature": 0, "max_new_tokens": 10}
    if prefill is None:
        prompts: list[Any] = [RawText(p) for p in PROMPTS]
        model = connect(words, chat=None)
        local = tiny_lm.generate([RawText(p) for p in PROMPTS], **settings)
    else:
        words.prefill = prefill
        prompts = list(PROMPTS)
        model = connect(words, chat=None, prefill=prefill)
        local = tiny_lm.generate(prompts, **settings)
    samples = model.generate(prompts, n=2, **settings, **way)
    assert words_of(samples)[::2] == spoken(tiny_lm, local)
    assert samples.texts[::2] == samples.texts[1::2]


def test_a_local_value_guides_an_endpoint_as_it_guides_its_own_model(words: Server, tiny_lm: Any) -> None:
    torch.manual_seed(0)
    head = ValueHead(tiny_lm.info.width, 16, horizon=5)
    torch.nn.init.normal_(head.outer.weight, std=2.0)
    settings: dict[str, Any] = {"temperature": 0, "max_new_tokens": 8, "beta": 0.3}
    local = ValueGuidance(HeadValue(head), top_k=6, tail="mask")
    far = ValueGuidance(LocalValue(tiny_lm, head, max_rows=5), top_k=6, tail="mask")
    model = connect(words, chat=True, prefill="last")
    words.prefill = "last"
    guided = model.generate(PROMPTS, edits=far, **settings)
    assert words_of(guided) == spoken(tiny_lm, tiny_lm.generate(PROMPTS, edits=local, **settings))
    plain = model.generate(PROMPTS, **settings)
    assert guided.texts != plain.texts


def test_a_system_prompt_reaches_the_endpoint_for_the_prompts_that_asked(words: Server, tiny_lm: Any) -> None:
    edits = [[SystemPrompt("you are sad")], None]
    settings: dict[str, Any] = {"temperature": 0, "max_new_tokens": 6}
    samples = connect(words, chat=None).generate(PROMPTS, edits=edits, **settings)
    assert words_of(samples) == spoken(tiny_lm, tiny_lm.generate(PROMPTS, edits=edits, **settings))
    roles = {tuple(m["role"] for m in call["messages"]) for call in words.calls}
    assert roles == {("system", "user"), ("user",)}
    assert samples.kl is None  # a black box scores no texts


def test_a_stimulus_of_a_local_policy_reaches_the_endpoint(words: Server, tiny_lm: Any) -> None:
    edit = DirectionalStimulus(HintPolicy(tiny_lm, "say {prompt}", max_tokens=3), "{prompt} {hint}")
    settings: dict[str, Any] = {"temperature": 0, "max_new_tokens": 6}
    samples = connect(words, chat=None).generate(PROMPTS, edits=edit, **settings)
    assert words_of(samples) == spoken(tiny_lm, tiny_lm.generate(PROMPTS, edits=edit, **settings))
    asked = {call["messages"][-1]["content"] for call in words.calls}
    assert asked == {str(edit.rewrite(p)) for p in PROMPTS} and all(len(text) > 8 for text in asked)


def test_load_by_address(server: Server) -> None:
    model = steer.load(f"openai:{server.url}#chain", chat=False)
    assert model.generate("hello", max_new_tokens=2, seed=0).texts[0].split()
    assert openai.load(server.url).dialect.model == "chain"  # the only one that is served


# ------------------------------------------------------------------------------------------------- rows and requests


def test_a_prompt_is_one_request_and_requests_run_at_once(server: Server) -> None:
    server.delay = 0.05
    connect(server, max_concurrency=4).generate(["hello", "the sun"] * 6, n=3, seed=0, max_new_tokens=2)
    assert len(server.calls) == 12 and all(call["n"] == 3 for call in server.calls)
    assert server.busiest == 4


def test_endpoints_that_give_fewer_choices_are_asked_again(server: Server) -> None:
    server.most_choices = 2
    samples = connect(server).generate("hello", n=5, seed=0, max_new_tokens=3)
    assert sorted(call.get("n", 1) for call in server.calls) == [1, 3, 5] and all(samples.texts)
    assert len({call["seed"] for call in server.calls}) == 3


def test_an_edit_for_one_prompt_leaves_the_requests_of_the_other(server: Server) -> None:
    model = connect(server)
    plain = model.generate(["hello", "the sun"], n=2, seed=3, max_new_tokens=3)
    before = len(server.calls)
    guide = ValueGuidance(TextValue(score), beta=0.1)
    mixed = model.generate(["hello", "the sun"], n=2, seed=3, max_new_tokens=3, edits=[None, [guide]])
    assert plain.texts[:2] == mixed.texts[:2]
    assert [c for c in server.calls[before:] if c["prompt"].startswith("hello")] == [
        c for c in server.calls[:before] if c["prompt"].startswith("hello")
    ]
    assert float(mixed.kl[:2].abs().max()) == 0 and float(mixed.kl[2:].min()) > 0
    assert mixed.cost.reward_calls == 3 * (len(server.calls) - before - 1)  # three candidates of every law


def test_seeds_repeat_and_can_be_left_out(server: Server) -> None:
    model = connect(server)
    draws = [model.generate("hello", n=20, seed=seed, max_new_tokens=4, block=2).texts for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    server.calls.clear()
    connect(server, send_seed=False).generate("hello", seed=0, max_new_tokens=4)
    assert "seed" not in server.calls[0]


def test_fields_reach_the_endpoint_as_it_wants_them(server: Server) -> None:
    connect(server, length_field="max_completion_tokens", extra={"user": "me"}).generate(
        "hello", seed=0, max_new_tokens=5, temperature=0.5, top_p=0.9, top_k=3, stop=["q"]
    )
    body = server.calls[0]
    assert body.pop("seed") >= 0
    assert body == {
        "model": "chain",
        "prompt": "hello",
        "max_completion_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "stop": ["q"],
        "user": "me",
    }


@pytest.mark.parametrize("way", [{}, {"block": 1}, {"block": 2}, {"top_logprobs": 3}])
def test_stop_strings_end_texts_also_where_two_blocks_meet(server: Server, way: dict[str, int]) -> None:
    settings: dict[str, Any] = {"n": 40, "seed": 0, "max_new_tokens": 12, "max_rows": 99}
    samples = connect(server).generate("hello", stop="x y", **settings, **way)
    assert not any("x y" in text for text in samples.texts)
    ended = [text for text in samples.texts if text.endswith(" ")]
    assert len(ended) > 5 and all(len(text.split()) < 12 for text in ended)


@pytest.mark.parametrize("way", [{}, {"block": 2}, {"top_logprobs": 4}], ids=["whole", "blocks", "tokens"])
@pytest.mark.parametrize("end", ["known", "named", "hidden", "never named"])
def test_texts_end_where_the_endpoint_ends_them(way: dict[str, int], end: str) -> None:
    token = "<|weiter|>" if end == "named" else "</s>"
    hides, never = end in ("hidden", "never named"), end == "never named"
    backend = chain(end=0.3, end_token=token)
    with Server(backend, hides_end=hides, names_end=not never).running() as server:
        model = connect(server, end_tokens=[token])
        samples = model.generate([f"hello {i}" for i in range(120)], seed=0, max_new_tokens=30, **way)
    assert not any(token in text for text in samples.texts)
    size = torch.tensor([len(text.split()) for text in samples.texts], dtype=torch.float64)
    assert abs(float(size.mean()) - 0.7 / 0.3) < 5 * float(size.std()) / len(size) ** 0.5  # geometric


def test_an_end_with_an_unknown_name_is_no_text_where_the_endpoint_stopped(server: Server) -> None:
    shown = {"tokens": ["<|halt|>"], "token_logprobs": [-0.2], "top_logprobs": [{"<|halt|>": -0.2, " x": -1.8}]}
    answer = connect(server).dialect.answer({"choices": [{"text": "", "finish_reason": "stop", "logprobs": shown}]}, 5)
    assert answer.choices[0].candidates == ((None, -0.2), (" x", -1.8))


def test_candidates_that_are_no_text_are_left_out_and_equal_texts_added_up(server: Server) -> None:
    def entry(token: str, p: float, content: bytes | None = None) -> dict[str, Any]:
        return {"token": token, "logprob": float(torch.tensor(p).log()), "bytes": list(content or token.encode())}

    top = [
        entry("a", 0.3),
        entry("\\xe2", 0.25, b"\xe2"),
        entry("b", 0.2),
        entry("\\x62", 0.1, b"b"),
        entry("</s>", 0.05),
    ]
    data = {
        "choices": [
            {
                "message": {"content": "a"},
                "finish_reason": "length",
                "logprobs": {"content": [{**top[0], "top_logprobs": top}]},
            }
        ]
    }
    candidates = connect(server).dialect.answer(data, 5).choices[0].candidates
    assert [name for name, _ in candidates] == ["a", "b", None]
    assert [round(float(torch.tensor(x).exp()), 6) for _, x in candidates] == [0.3, 0.3, 0.05]


def test_rewards_in_words_serve_as_values(words: Server) -> None:
    value = TextValue("keywords:sun")
    model = connect(words, chat=True, prefill="last")
    words.prefill = "last"
    samples = model.generate(
        "hello", edits=ValueGuidance(value), beta=0.02, n=8, seed=0, max_new_tokens=8, reward="keywords:sun"
    )
    plain = model.generate("hello", n=8, seed=0, max_new_tokens=8, reward="keywords:sun")
    assert float(samples.reward.mean()) > float(plain.reward.mean())
    assert float(samples.kl.mean()) > 0


# --------------------------------------------------------------------------------------------------------- failures


def faults(*given: Fault | None) -> Callable[[dict[str, Any]], Fault | None]:
    """One fault after another, then none."""
    left = list(given)
    return lambda body: left.pop(0) if left else None


def test_what_passes_is_tried_again(server: Server) -> None:
    calm = connect(server).generate("hello", n=3, seed=0, max_new_tokens=3)
    waits: list[float] = []
    retry = Retry(5, first=0.4, longest=3.0, sleep=waits.append, jitter=lambda: 0.5)
    busy: Fault = ("status", (429, {"Retry-After": "2.5"}))
    server.fault = faults(busy, ("status", (500, {})), ("drop", None), ("slow", 1.6), ("status", (503, {})))
    server.calls.clear()
    samples = connect(server, retries=retry, timeout=1.0).generate("hello", n=3, seed=0, max_new_tokens=3)
    assert samples.texts == calm.texts and len(server.calls) == 6
    assert waits == pytest.approx([2.5, 0.6, 1.2, 2.25, 2.25])  # 0.4 2^i to at most 3, times 0.75, or as asked
    assert samples.cost.model_calls == 1  # what was answered


def test_a_date_says_when_to_try_again(server: Server) -> None:
    waits: list[float] = []
    server.fault = faults(("status", (429, {"Retry-After": "Wed, 21 Oct 2015 07:28:07 GMT"})))
    retry = Retry(1, first=0.0, sleep=waits.append, now=lambda: 1445412480.0)
    connect(server, retries=retry).generate("hello", max_new_tokens=1)
    assert waits == [7.0]


def test_giving_up_says_why_in_one_line(server: Server) -> None:
    server.fault = lambda body: ("status", (500, {}))
    with pytest.raises(EndpointError, match=r"127\.0\.0\.1:\d+/v1: 500 fault 500 \(after 3 tries, POST") as caught:
        connect(server, retries=Retry(2, first=0.0)).generate("hello", max_new_tokens=1)
    assert caught.value.status == 500 and len(server.calls) == 3 and "\n" not in str(caught.value)
    server.fault = lambda body: ("status", (429, {"Retry-After": "3600"}))
    with pytest.raises(EndpointError, match="asks to wait 3600 s"):
        connect(server).generate("hello", max_new_tokens=1)
    assert len(server.calls) == 4


def test_an_endpoint_that_is_not_there(server: Server) -> None:
    with pytest.raises(EndpointError, match="connection lost"):
        openai.load("http://127.0.0.1:1/v1", model="m", retries=Retry(1, first=0.0)).generate("hello", max_new_tokens=1)


def test_refusals_are_not_repeated_and_name_the_field(server: Server) -> None:
    with pytest.raises(EndpointError, match="400 temperature: must be between 0 and 2") as caught:
        connect(server).generate("hello", temperature=2.5, max_new_tokens=1)
    assert caught.value.param == "temperature" and len(server.calls) == 1
    with pytest.raises(EndpointError, match="404 model: The model 'other' does not exist"):
        connect(server, model="other").generate("hello", max_new_tokens=1)
    assert len(server.calls) == 2


def test_the_key_is_sent_and_never_shown(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = "sk-very-secret"
    monkeypatch.setenv("ANY_KEY", secret)
    server.key = secret
    model = connect(server, key_env="ANY_KEY")
    results = tmp_path / "results.jsonl"
    model.generate("hello", seed=0, max_new_tokens=1, results=results)
    assert server.headers[0]["authorization"] == f"Bearer {secret}"
    assert secret not in repr(model) + repr(model.connection) + repr(model.process()) + results.read_text()
    server.key = "another"
    with pytest.raises(EndpointError, match=r"401 .*Incorrect API key provided: \*\*\*") as caught:
        model.generate(["hello"] * 30, seed=0, max_new_tokens=1)
    assert secret not in repr(caught.value) and len(server.calls) < 31  # those that waited were not sent
    assert caught.value.samples is not None and len(caught.value.samples) == 0
    with pytest.raises(InputError, match="key_env"):
        connect(server, key_env="A_KEY_THAT_IS_NOT_SET")


def broken(body: dict[str, Any]) -> Fault | None:
    return ("status", (500, {})) if "bad" in body["prompt"] else None


def test_what_came_is_kept_and_not_paid_again(server: Server, tmp_path: Path) -> None:
    prompts = ["hello", "bad", "the sun", "day", "night"]
    settings: dict[str, Any] = {"n": 2, "seed": 5, "max_new_tokens": 4}
    whole = connect(server).generate(prompts, **settings)
    server.fault = broken
    model = connect(server, retries=Retry(1, first=0.0))
    results = tmp_path / "results.jsonl"
    with pytest.raises(EndpointError, match="2 of 10 texts failed") as caught:
        model.generate(prompts, results=results, **settings)
    kept = caught.value.samples
    assert kept.group.tolist() == [0, 0, 2, 2, 3, 3, 4, 4]
    assert kept.texts == [t for t, b in zip(whole.texts, whole.group.tolist(), strict=True) if b != 1]
    server.fault = lambda body: None
    server.calls.clear()
    again = model.generate(prompts, results=results, **settings)
    assert again.texts == whole.texts and [call["prompt"] for call in server.calls] == ["bad"]
    assert again.cost.model_calls == 1 and again.cost.generated_tokens == 8
    server.calls.clear()
    model.generate(prompts, results=results, **{**settings, "seed": 6})
    assert len(server.calls) == 5  # another seed asks for other texts


def test_batches_that_were_done_are_kept_too(server: Server) -> None:
    server.fault = broken
    prompts = ["hello", "the sun", "bad", "day", "night"]
    with pytest.raises(EndpointError) as caught:
        connect(server, retries=0).generate(prompts, seed=0, n=1, max_rows=2, max_new_tokens=2)
    kept = caught.value.samples
    assert kept.prompts == prompts[:4] and kept.group.tolist() == [0, 1, 3] and all(kept.texts)


def test_guided_texts_go_on_from_the_file(server: Server, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"edits": ValueGuidance(TextValue(score)), "seed": 0, "n": 5, "max_new_tokens": 6}
    whole = connect(server).generate("hello", **settings)
    asked = len(server.calls)
    results = tmp_path / "results.jsonl"
    server.fault = lambda body: ("status", (500, {})) if len(body["prompt"].split()) > 4 else None
    with pytest.raises(EndpointError):
        connect(server, retries=0).generate("hello", results=results, **settings)
    server.fault = lambda body: None
    server.calls.clear()
    assert connect(server).generate("hello", results=results, **settings).texts == whole.texts
    assert 0 < len(server.calls) < asked and all(len(c["prompt"].split()) > 4 for c in server.calls)


def test_a_torn_line_is_passed_over_and_other_files_are_left_alone(server: Server, tmp_path: Path) -> None:
    results, model = tmp_path / "results.jsonl", connect(server)
    settings: dict[str, Any] = {"seed": 0, "max_new_tokens": 2}
    model.generate(["hello", "the sun"], results=results, **settings)
    content = results.read_bytes()
    results.write_bytes(content[:-20])
    server.calls.clear()
    for _ in range(2):
        model.generate(["hello", "the sun"], results=results, **settings)
    assert len(server.calls) == 1
    entries = [json.loads(line) for line in results.read_text().splitlines() if line.endswith("}")]
    assert entries[0] == {"format": "steer-endpoint-results", "version": 1} and len(entries) == 3
    other = tmp_path / "prompts.jsonl"
    other.write_text('{"prompt": "mine"}\n')
    with pytest.raises(InputError, match="results"):
        model.generate("hello", results=other, **settings)
    assert other.read_text() == '{"prompt": "mine"}\n'
    with pytest.raises(InputError, match="seed"):
        model.generate("hello", results=results, max_new_tokens=2)


def test_answers_that_are_not_of_this_kind(server: Server) -> None:
    with pytest.raises(EndpointError, match="no choices as OpenAI's clients read them"):
        connect(server).dialect.answer({"output": "hello"}, None)
    server.shows_logprobs = False
    with pytest.raises(EndpointError, match="names no likely tokens"):
        connect(server).generate("hello", top_logprobs=5, max_new_tokens=2)
    with pytest.raises(EndpointError, match="logprobs that it was asked for"):
        connect(server).generate("hello", logprobs=True, max_new_tokens=2)


class Odd(Server):
    """A server of chats whose first choice of an answer has another message."""

    message: dict[str, Any]
    finish = "stop"

    def _choice(self, body: dict[str, Any], index: int, chat: bool) -> dict[str, Any]:
        choice = super()._choice(body, index, chat)
        return choice if index else {**choice, "message": self.message, "finish_reason": self.finish}


THOUGHT = "Let me think about it."


@pytest.mark.parametrize(
    ("message", "finish", "came"),
    [
        ({"content": None, "reasoning_content": THOUGHT}, "length", "22 characters of reasoning .*'length'.*room"),
        ({"content": "", "reasoning_content": THOUGHT}, "stop", "22 characters of reasoning .*'stop'"),
        ({"content": None, "reasoning": THOUGHT}, "length", "22 characters of reasoning"),
        ({"content": [{"type": "thinking", "thinking": []}]}, "length", "parts of reasoning"),
        ({"content": "", "thinking": THOUGHT}, "stop", "22 characters of reasoning"),
        ({"content": "", "reasoning_details": [{"type": "reasoning.text", "text": THOUGHT}]}, "stop", "of reasoning"),
        ({"content": "x y"}, "content_filter", "broke off .*'content_filter'"),
        ({"content": "x"}, "error", "broke off .*'error'"),
        ({"content": None}, "length", "no text but null .*'length'"),
        ({"content": None}, "content_filter", "no text but null .*'content_filter'"),
        ({"content": None, "tool_calls": [{"id": "1"}]}, "tool_calls", "calls of tools .*'tool_calls'"),
        ({"content": None, "refusal": "I cannot."}, "stop", "a refusal: I cannot. .*'stop'"),
        ({}, "stop", "no text but null"),
    ],
)
@pytest.mark.parametrize("way", [{}, {"top_logprobs": 5}], ids=["whole", "tokens"])
def test_an_answer_without_a_text_is_no_empty_text(
    message: dict[str, Any], finish: str, came: str, way: dict[str, Any]
) -> None:
    with Odd(chain()).running() as odd:
        odd.message, odd.finish = {"role": "assistant", **message}, finish
        model = connect(odd, chat=True, prefill="continue_final_message")
        if way and finish == "stop" and "null" in came:  # what a text that ends at once may look like
            assert model.generate("hello", max_new_tokens=3, seed=0, **way).texts == [""]
            return
        with pytest.raises(EndpointError, match=came) as caught:
            model.generate(["hello"], sampler=BestOfN(4), reward=len_of, max_new_tokens=3, seed=0, **way)
        # The other choices of the answer were finished, and are there.
        assert caught.value.samples is not None and len(caught.value.samples) == (0 if way else 3)


def len_of(texts: Sequence[str]) -> list[float]:
    return [-float(len(text)) for text in texts]


@pytest.mark.parametrize("content", ["", "x y", [{"type": "text", "text": "x "}, {"type": "text", "text": "y"}]])
def test_texts_may_be_empty_and_come_in_parts(content: Any) -> None:
    with Odd(chain()).running() as odd:
        odd.message = {"role": "assistant", "content": content, "reasoning_content": None, "refusal": None}
        want = "x y" if content else ""
        assert connect(odd, chat=True).generate("hello", max_new_tokens=3, seed=0).texts == [want]


# ------------------------------------------------------------------------------------------- refused before any work


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("ftp://host/v1", "http://"),
        ("host/v1", "http://"),
        ("http://example.org/v1", "https for another machine"),
        ("http://10.0.0.1:8000/v1", "https for another machine"),
        ("http://localhost.example.org/v1", "https for another machine"),
        ("https://host:port/v1", "http://"),
        ("https://me:password@host/v1", "key_env"),
        ("https://host/v1?api-key=1", "http://"),
    ],
)
def test_addresses_that_are_refused(url: str, allowed: str) -> None:
    with pytest.raises(InputError, match="url") as caught:
        openai.load(url, model="m")
    assert allowed in str(caught.value) and "password@" not in str(caught.value)


@pytest.mark.parametrize("url", ["https://api.example.org/v1", "http://[::1]:8000/v1/", "http://localhost/v1"])
def test_addresses_that_are_taken(url: str) -> None:
    assert openai.load(url, model="m").url == url.rstrip("/")
    assert openai.load("http://10.0.0.1/v1", model="m", insecure=True).url == "http://10.0.0.1/v1"


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("top_logprobs", 21),
        ("max_concurrency", 0),
        ("retries", -1),
        ("timeout", 0),
        ("prefill", "yes"),
        ("chat", "no"),
        ("extra", {"n": 3}),
        ("max_choices", 0),
        ("length_field", "length"),
    ],
)
def test_options_out_of_range(field: str, given: Any) -> None:
    with pytest.raises(InputError, match=f"^{field}: "):
        openai.load("http://127.0.0.1:9/v1", model="m", **{field: given})


def test_requests_that_cannot_be_met_ask_nothing(server: Server, tiny_lm: Any) -> None:
    model = connect(server, chat=None)
    guide = ValueGuidance(TextValue(score))
    vector = SteeringVector({0: torch.ones(4)}, strength=1.0)
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (UnsupportedError, "hidden site", {"edits": vector}),
        (UnsupportedError, "TextValue", {"edits": ValueGuidance(HeadValue(ValueHead(4)))}),
        (UnsupportedError, "TextValue", {"edits": ValueGuidance(HeadValue(ValueHead(4), source=tiny_lm.process()))}),
        (UnsupportedError, "temperature above 0", {"sampler": FKSteering(), "reward": score, "temperature": 0}),
        (UnsupportedError, "can score text", {"reward": "fluency"}),
        (InputError, "prefill", {"edits": guide}),
        (InputError, "prefill", {"block": 4}),
        (InputError, "block", {"block": 0}),
        (InputError, "top_logprobs", {"top_logprobs": 50}),
        (InputError, "logprobs", {"logprobs": True, "temperature": 0.7}),
        (InputError, "repetition_penalty", {"repetition_penalty": 1.2}),
        (UnsupportedError, "stream", {"stream": True}),
        (InputError, "seed", {"results": "results.jsonl"}),
    ]
    for kind, message, settings in refused:
        with pytest.raises(kind, match=message):
            model.generate("hello", **settings)
    raw = connect(server)
    with pytest.raises(InputError, match="messages"):
        raw.generate("hello", edits=SystemPrompt("you are sad"))
    with pytest.raises(InputError, match="raw text"):
        connect(server, chat=True).generate(RawText("hello"))
    with pytest.raises(UnsupportedError, match="correct=False"):
        model.generate("hello", sampler=FKSteering(), reward=score, edits=SystemPrompt("you are sad"))
    assert not server.calls


def test_values_of_texts_guide_endpoints_only(tiny_lm: Any) -> None:
    with pytest.raises(InputError, match="behind an endpoint"):
        tiny_lm.generate("hello", edits=ValueGuidance(TextValue(score)), max_new_tokens=2)
    with pytest.raises(InputError, match="value"):
        TextValue(None)


@pytest.mark.parametrize("library", ["httpx", "httpx2"])
def test_either_library_carries_the_requests(server: Server, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    other = {"httpx": "httpx2", "httpx2": "httpx"}[library]
    monkeypatch.setitem(sys.modules, other, None)  # importing it raises ImportError
    server.fault = faults(("drop", None), ("slow", 1.6))
    model = connect(server, timeout=1.0)
    assert type(model.connection._client).__module__.split(".")[0] == library
    assert model.generate("hello", seed=0, max_new_tokens=2).texts[0].split() and len(server.calls) == 3


def test_without_a_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("httpx", "httpx2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(steer.SteerError, match="pip install httpx"):
        openai.load("http://127.0.0.1:9/v1", model="m")


def test_best_of_n_and_its_pool_by_a_reward_object(server: Server) -> None:
    class Letters(Reward):
        def score(self, samples: Samples) -> Tensor:
            return torch.tensor([float(text.count("z")) for text in samples.texts])

    samples = connect(server).generate(["hello", "day"], sampler=BestOfN(6), reward=Letters(), seed=0, max_new_tokens=4)
    assert len(samples) == 2 and samples.reward.tolist() == [
        float(samples.pool.reward[samples.pool.group == b].max()) for b in range(2)
    ]


def test_the_command_line_asks_endpoints(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    from steer.cli import main

    asked = ["generate", "--model", f"openai:{server.url}#chain", "--prompt", "hello", "--max-new-tokens", "3"]
    assert main([*asked, "--sampler", "best-of-n", "--n", "4", "--reward", "length", "--seed", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (sample,) = found["prompts"][0]["samples"]
    assert len(letters(sample["text"])) == 3 and sample["reward"] is not None
    for more in (["--edit", "x.safetensors"], ["--stream"], ["--device", "cpu"], ["--repetition-penalty", "1.2"]):
        assert main([*asked, *more]) == 2
        assert more[0].removeprefix("--").replace("-", "_") in capsys.readouterr().err


def test_a_tree_keeps_texts_of_different_lengths(server: Server) -> None:
    """Chunks of packed texts are as wide as their longest; leaves of several chunks are read together."""
    process = connect(server).process(max_new_tokens=6, block=2, top_logprobs=3)
    began = process.init(["hello"], 2, torch.Generator().manual_seed(0))
    store = StateStore(process, ["hello"], 0)
    short, long = (replace(began, texts=texts) for texts in (("x", "x y"), ("x y z x", "")))
    assert [store.add_leaves(short), store.add_leaves(long)] == [0, 1]
    assert store.leaves([(1, 0), (0, 1), (0, 0), (1, 1)]).texts == ("x y z x", "x y", "x", "")
    chunks = [store.add(short), store.add(long), store.add(began)]
    rows, _ = store.rows([(chunks[1], 0), (chunks[0], 1)])
    assert rows.texts == ("x y z x", "x y")


@pytest.mark.parametrize("sampler", ["dts", "dts-star"])
def test_a_tree_over_an_endpoint_draws_here(sampler: str, server: Server) -> None:
    best = connect(server).generate(
        "hello",
        sampler=sampler,
        rollouts=24,
        batch=4,
        n=2,
        reward=score,
        beta=0.3,
        seed=0,
        block=2,
        max_new_tokens=5,
        top_logprobs=3,
    )
    assert len(best.texts) == 2 and best.reward.tolist() == pytest.approx(score(best.texts))
