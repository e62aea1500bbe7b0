"""The contract of every server with the real `openai` client: subclass `Contract` and give it a fixture `target`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIStatusError, OpenAI

from steer.core import RawText
from steer.edits import load_edit

CHAT = [{"role": "user", "content": "tell me about the sun"}]
PROMPTS = ["the sun", "a very good dog"]
SENTIMENT = {"reward": "sentiment", "beta": 0.2}
TOKENS = 12


@dataclass(frozen=True)
class Target:
    """A server, and what its answers are compared with.

    Its limit on bodies is 20,000 bytes, it asks for a key, and it takes artifacts.
    """

    url: str
    key: str
    model: str
    reference: Any
    """The same weights in the transformers adapter, float32."""
    vector: Path
    """A steering vector that is registered under its name; its file is the folder's."""
    strength: float
    """At which it changes a greedy answer."""
    spare: Path
    """Another, to be sent."""
    written: dict[str, Any] = field(default_factory=dict)
    """What the transformers adapter wrote before."""

    @cached_property
    def client(self) -> OpenAI:
        return self.stranger(self.key)

    def stranger(self, key: str) -> OpenAI:
        return OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def edit(self, **settings: Any) -> dict[str, Any]:
        return {"edits": [{"name": self.vector.stem, "strength": self.strength, **settings}]}

    def chat(self, steer: Any = None, client: OpenAI | None = None, **settings: Any) -> Any:
        if steer is not None:
            settings["extra_body"] = {**settings.get("extra_body", {}), "steer": steer}
        given = {"model": self.model, "messages": CHAT, "max_tokens": TOKENS, **settings}
        return (client or self.client).chat.completions.create(**given)

    def completion(self, steer: Any = None, **settings: Any) -> Any:
        if steer is not None:
            settings["extra_body"] = {"steer": steer}
        given = {"model": self.model, "prompt": PROMPTS[0], "max_tokens": TOKENS, **settings}
        return self.client.completions.create(**given)

    def expected(self, prompts: Any = CHAT, strength: float | None = None, **settings: Any) -> Any:
        """What the transformers adapter writes, greedily; with `strength`, under the vector."""
        asked = repr((prompts, strength, settings))
        if asked not in self.written:
            edits = () if strength is None else load_edit(self.vector, strength, model=self.reference)
            settings |= {"edits": edits, "temperature": 0, "max_new_tokens": TOKENS}
            self.written[asked] = self.reference.generate(prompts, **settings)
        return self.written[asked]


def texts(answer: Any) -> list[str]:
    return [c.message.content if hasattr(c, "message") else c.text for c in answer.choices]


def collected(stream: Any) -> tuple[dict[int, str], dict[int, str], list[Any]]:
    """Texts and finish reasons by choice, and all chunks."""
    chunks = list(stream)
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        piece = choice.delta.content if hasattr(choice, "delta") else choice.text
        texts[choice.index] = texts.get(choice.index, "") + (piece or "")
        if choice.finish_reason:
            assert choice.index not in reasons
            reasons[choice.index] = choice.finish_reason
    return texts, reasons, chunks


def refused(status: int, field: str | None, call: Callable[[], Any], *words: str) -> Any:
    with pytest.raises(APIStatusError) as caught:
        call()
    error = caught.value
    assert error.status_code == status and error.param == field, error.message
    for word in words:
        assert word in error.message
    return error


WRONG: list[tuple[int, str, dict[str, Any]]] = [
    (400, "temperature", {"temperature": -1}),
    (400, "n", {"n": 0, "steer": SENTIMENT}),
    (400, "top_logprobs", {"top_logprobs": 3, "steer": SENTIMENT}),
    (400, "tools", {"tools": [{"type": "function", "function": {"name": "f"}}], "steer": SENTIMENT}),
    (400, "logit_bias", {"logit_bias": {"999999": 1}, "steer": SENTIMENT}),
    (400, "messages.0.role", {"messages": [{"role": "wizard", "content": "x"}], "steer": SENTIMENT}),
    (400, "steer.wrong", {"steer": {"wrong": 1}}),
    (400, "steer.beta", {"steer": {"beta": 0}}),
    (400, "steer.sampler", {"steer": {"sampler": "magic", **SENTIMENT}}),
    (400, "steer.reward", {"steer": {"sampler": "best-of-n"}}),
    (400, "steer.reward", {"steer": {"reward": "os:system"}}),
    (400, "steer.candidates", {"steer": {"candidates": 3}}),
    (400, "steer.settings.resampler", {"steer": {"sampler": "fk", "settings": {"resampler": "x"}, **SENTIMENT}}),
    (400, "steer.edits.0.name", {"steer": {"edits": [{"name": "nobody"}]}}),
    (400, "steer.edits.0.name", {"steer": {"edits": [{"name": "../calm"}]}}),
    (400, "logprobs", {"logprobs": True, "steer": {"sampler": "best-of-n", **SENTIMENT}}),
    (404, "model", {"model": "gpt-4"}),
    (404, "model", {"model": "gpt-4", "steer": SENTIMENT}),
    (413, "max_tokens", {"max_tokens": 100_000, "steer": SENTIMENT}),
    (413, "n", {"n": 500, "steer": SENTIMENT}),
    (413, "steer.candidates", {"steer": {"sampler": "best-of-n", "candidates": 5000, **SENTIMENT}}),
]


class Contract:
    """Plain and steered text, whole and streamed, what is refused, and artifacts over HTTP."""

    # ---- what is read, and where edits act

    def test_every_token_is_read(self, target: Target) -> None:
        name = target.vector.stem
        answer = target.chat(temperature=0, steer={**target.edit(), "readings": [name]})
        own = target.expected(strength=target.strength, readings={name: str(target.vector)})
        assert texts(answer) == own.texts
        told = answer.choices[0].steer["readings"][name]
        assert told == pytest.approx(own.readings[name][0].tolist(), abs=1e-3)
        refused(400, "steer.readings.0", lambda: target.chat(steer={"readings": ["../calm"]}))

    def test_edits_of_a_part_of_the_reply(self, target: Target) -> None:
        """The part is marked by two tokens that the reply itself has."""
        words = target.reference.tokenizer.convert_ids_to_tokens(target.expected().tokens[0])
        opening, closing = [word for word in dict.fromkeys(words) if "," not in word][1:3]
        for scope in (f"inside:{opening},{closing}", f"outside:{opening},{closing}"):
            edit = load_edit(target.vector, target.strength, model=target.reference, scope=scope)
            own = target.reference.generate(CHAT, edits=edit, temperature=0, max_new_tokens=TOKENS)
            assert texts(target.chat(temperature=0, steer=target.edit(scope=scope))) == own.texts
        refused(400, "steer.edits.scope", lambda: target.chat(steer=target.edit(scope="thinking")), "<think>")

    # ---- plain

    def test_the_model_is_listed(self, target: Target) -> None:
        assert target.model in [model.id for model in target.client.models.list().data]

    def test_greedy_text_is_what_the_model_writes(self, target: Target) -> None:
        answer, alone = target.chat(temperature=0), target.expected()
        assert texts(answer) == alone.texts
        assert answer.choices[0].message.role == "assistant" and answer.object == "chat.completion"
        assert answer.usage.prompt_tokens == len(target.reference.encode(CHAT))
        assert answer.usage.completion_tokens == len(alone.tokens[0])
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert getattr(answer, "steer", None) is None

    def test_greedy_completions(self, target: Target) -> None:
        raw = [RawText(prompt) for prompt in PROMPTS]
        alone = target.expected(raw)
        answer = target.completion(prompt=PROMPTS, temperature=0)
        assert texts(answer) == alone.texts and answer.object == "text_completion"
        by_ids = target.completion(prompt=[target.reference.encode(prompt) for prompt in raw], temperature=0)
        assert texts(by_ids) == alone.texts
        streamed, _, _ = collected(target.completion(temperature=0, stream=True))
        assert streamed == {0: alone.texts[0]}
        drawn = [target.completion(prompt=PROMPTS, n=2, seed=4, max_tokens=tokens) for tokens in (TOKENS, 2)]
        assert [c.index for c in drawn[0].choices] == [0, 1, 2, 3]
        assert all(long.startswith(short) for long, short in zip(*map(texts, drawn), strict=True))

    @pytest.mark.parametrize("steer", [None, SENTIMENT], ids=["plain", "steered"])
    def test_streams_say_the_same_piece_by_piece(self, target: Target, steer: Any) -> None:
        settings = {"seed": 5, "n": 3, "steer": steer}
        whole = target.chat(**settings)
        found, reasons, chunks = collected(target.chat(**settings, stream=True, stream_options={"include_usage": True}))
        assert list(dict(sorted(found.items())).values()) == texts(whole) and len(set(texts(whole))) > 1
        assert reasons == {c.index: c.finish_reason for c in whole.choices}
        assert len(chunks) > 8 and all(chunk.usage is None for chunk in chunks[:-1])
        assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert {chunk.id for chunk in chunks} == {chunks[0].id}
        quiet = list(target.chat(stream=True, steer=steer))
        assert all(chunk.choices for chunk in quiet) and quiet[0].choices[0].delta.role == "assistant"

    @pytest.mark.parametrize("steer", [None, SENTIMENT], ids=["plain", "steered"])
    def test_a_seed_repeats_in_any_company(self, target: Target, steer: Any) -> None:
        alone = texts(target.chat(seed=11, n=2, steer=steer))
        with ThreadPoolExecutor(6) as pool:
            settings = [{"seed": 11, "n": 2} if i % 3 == 0 else {"seed": i, "top_p": 0.8} for i in range(9)]
            answers = list(pool.map(lambda s: texts(target.chat(**s, steer=steer)), settings))
        assert alone[0] != alone[1] and len({answer[0] for answer in answers}) > 3
        assert answers[::3] == [alone] * 3

    @pytest.mark.parametrize("strength", [False, True], ids=["plain", "steered"])
    def test_where_a_text_ends(self, target: Target, strength: bool) -> None:
        steer = target.edit() if strength else None
        text = texts(target.chat(temperature=0, steer=steer))[0]
        word = text.split()[2]
        stopped = target.chat(temperature=0, stop=["zzz", word], steer=steer)
        assert texts(stopped) == [text[: text.index(word)]] and stopped.choices[0].finish_reason == "stop"
        found, reasons, _ = collected(target.chat(temperature=0, stop=word, stream=True, steer=steer))
        assert [found[0]] == texts(stopped) and reasons[0] == "stop"
        cut = target.chat(temperature=0, max_completion_tokens=3, steer=steer)
        assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 3

    @pytest.mark.parametrize("strength", [False, True], ids=["plain", "steered"])
    def test_logprobs(self, target: Target, strength: bool) -> None:
        settings = {"steer": {**target.edit(), "kl": False} if strength else None, "temperature": 0}
        alone = target.expected(strength=target.strength if strength else None)
        answer = target.chat(logprobs=True, top_logprobs=3, **settings)
        content = answer.choices[0].logprobs.content
        assert len(content) == answer.usage.completion_tokens
        assert sum(t.logprob for t in content) == pytest.approx(float(alone.log_prob[0]), abs=1e-2)
        for t in content:
            assert bytes(t.bytes).decode() == t.token
            assert len(t.top_logprobs) == 3 and t.top_logprobs[0].token == t.token
            assert t.top_logprobs[0].logprob >= t.top_logprobs[1].logprob >= t.top_logprobs[2].logprob
        _, _, chunks = collected(target.chat(logprobs=True, stream=True, **settings))
        streamed = [t for k in chunks for c in k.choices if c.logprobs for t in c.logprobs.content]
        assert [t.token for t in streamed] == [t.token for t in content]
        named = target.completion(logprobs=2, **settings).choices[0].logprobs
        assert len(named.tokens) == len(named.token_logprobs) == len(named.text_offset) == len(named.top_logprobs) > 0

    # ---- steering

    def test_steering_is_the_models_own_and_leaves_others_alone(self, target: Target) -> None:
        """Greedy text under an edit equals the adapter's, also in company; so do its reward and its drift."""
        plain = texts(target.chat(temperature=0))
        alone = target.expected(strength=target.strength, reward="sentiment")
        steer = {**target.edit(), **SENTIMENT}
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(lambda i: target.chat(temperature=0, steer=steer if i % 2 else None), range(6)))
        assert [texts(answer) for answer in together[::2]] == [plain] * 3 == [target.expected().texts] * 3
        for answer in together[1::2]:
            assert texts(answer) == alone.texts != plain
            told = answer.choices[0].steer
            assert told["reward"] == pytest.approx(float(alone.reward[0])) == answer.steer["reward"]
            assert answer.steer["candidates"] == 1 and answer.steer["cost"]["reward_calls"] == 1
        completed = target.completion(temperature=0, steer=target.edit())
        assert texts(completed) == target.expected(RawText(PROMPTS[0]), target.strength).texts
        measured, unmeasured = (target.chat(steer={**target.edit(), "kl": kl}, n=4, seed=1) for kl in (True, False))
        assert measured.steer["kl"] == pytest.approx(sum(c.steer["kl"] for c in measured.choices) / 4) != 0
        assert [c.steer for c in unmeasured.choices] == [{"reward": None, "kl": None}] * 4

    @pytest.mark.parametrize("sampler", ["best-of-n", "fk"])
    def test_searches(self, target: Target, sampler: str) -> None:
        steer = {"sampler": sampler, "candidates": 6, **({} if sampler == "best-of-n" else {"block": 4}), **SENTIMENT}
        answer, again = (target.chat(seed=3, n=2, steer=steer) for _ in range(2))
        assert texts(answer) == texts(again) and len(answer.choices) == 2
        assert answer.steer["candidates"] == 12 and set(answer.steer) == {"reward", "candidates", "kl", "cost"}
        assert answer.steer["reward"] == max(c.steer["reward"] for c in answer.choices)
        assert answer.steer["cost"]["generated_tokens"] > answer.usage.completion_tokens
        assert answer.steer["cost"]["reward_calls"] >= 12 and answer.usage.completion_tokens <= 2 * TOKENS
        found, _, chunks = collected(target.chat(seed=3, n=2, steer=steer, stream=True))
        assert list(dict(sorted(found.items())).values()) == texts(answer)
        kinds = ["progress" if "progress" in (getattr(c, "steer", None) or {}) else _kind(c) for c in chunks]
        assert "progress" in kinds and kinds.index("progress") < kinds.index("text")
        assert chunks[-1].steer["candidates"] == 12

    def test_best_of_n_is_the_best(self, target: Target) -> None:
        plain = [target.chat(seed=i, steer={"reward": "sentiment"}).steer["reward"] for i in range(6)]
        best = [
            target.chat(seed=i, steer={"sampler": "best-of-n", "candidates": 8, **SENTIMENT}).steer["reward"]
            for i in range(6)
        ]
        assert sum(best) / 6 > sum(plain) / 6 + 0.2

    # ---- refused

    @pytest.mark.parametrize(("status", "field", "settings"), WRONG, ids=lambda x: str(x)[:40])
    def test_wrong_fields_are_named(self, target: Target, status: int, field: str, settings: dict[str, Any]) -> None:
        refused(status, field, lambda: target.chat(**settings), field.split(".")[0])

    def test_a_wrong_key(self, target: Target) -> None:
        stranger = target.stranger("another")
        for steer in (None, SENTIMENT):
            refused(401, None, lambda steer=steer: target.chat(client=stranger, steer=steer))
        for path in ("artifacts", "rewards", "metrics", "openapi.json"):
            assert httpx.get(f"{target.url}/v1/steer/{path}", timeout=60).status_code == 401
            assert httpx.get(f"{target.url}/v1/steer/{path}", headers=target.headers, timeout=60).status_code == 200
        sent = httpx.post(f"{target.url}/v1/steer/artifacts?name=x", content=b"x", timeout=60)
        assert sent.status_code == 401
        assert httpx.get(f"{target.url}/health", timeout=60).status_code == 200

    def test_a_body_that_is_too_large(self, target: Target) -> None:
        messages = [{"role": "user", "content": "sun " * 9000}]
        refused(413, None, lambda: target.chat(messages=messages, steer=SENTIMENT), "20000")
        body = b'{"messages": [' + b" " * 30_000 + b'], "steer": {}}'
        headers = {**target.headers, "Content-Type": "application/json"}
        pieces = (body[i : i + 5000] for i in range(0, len(body), 5000))
        undeclared = httpx.post(f"{target.url}/v1/chat/completions", content=pieces, headers=headers, timeout=60)
        assert undeclared.status_code == 413

    # ---- artifacts and rewards

    def test_artifacts_come_and_go(self, target: Target) -> None:
        with httpx.Client(base_url=f"{target.url}/v1/steer", headers=target.headers, timeout=60) as http:
            steer = {"edits": [{"name": "sent", "strength": target.strength}]}
            refused(400, "steer.edits.0.name", lambda: target.chat(steer=steer), "sent")
            sent = http.post("/artifacts", files={"file": ("sent.safetensors", target.spare.read_bytes())})
            assert sent.status_code == 201 and sent.json()["kind"] == "vector" and not sent.json()["fixed"]
            listed = {entry["id"]: entry for entry in http.get("/artifacts").json()["data"]}
            assert listed["sent"] == sent.json() and listed[target.vector.stem]["fixed"]
            assert texts(target.chat(temperature=0, steer=steer)) != target.expected().texts
            assert http.delete("/artifacts/sent").json()["deleted"] is True
            assert http.get("/artifacts/sent").status_code == http.delete("/artifacts/sent").status_code == 404
            refused(400, "steer.edits.0.name", lambda: target.chat(steer=steer), "sent")
            junk = http.post(
                "/artifacts?name=junk", content=b"junk", headers={"Content-Type": "application/octet-stream"}
            )
            assert junk.status_code == 400 and junk.json()["error"]["message"]

    def test_rewards_come_and_go(self, target: Target) -> None:
        steer = {"reward": "twice + 1"}
        refused(400, "steer.reward", lambda: target.chat(steer=steer), "twice")
        with httpx.Client(base_url=f"{target.url}/v1/steer", headers=target.headers, timeout=60) as http:
            sent = http.post("/rewards", json={"name": "twice", "reward": "2 * sentiment"})
            assert sent.status_code == 201 and "twice" in [entry["id"] for entry in http.get("/rewards").json()["data"]]
            told = [target.chat(temperature=0, steer=s).steer["reward"] for s in (steer, {"reward": "sentiment"})]
            assert told[0] == pytest.approx(2 * told[1] + 1)
            assert http.delete("/rewards/twice").json()["deleted"] is True
        refused(400, "steer.reward", lambda: target.chat(steer=steer), "twice")


def _kind(chunk: Any) -> str:
    return "text" if any(c.delta.content for c in chunk.choices) else "other"
