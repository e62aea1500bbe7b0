"""`steer serve` with the real `openai` client: what it has beyond the contract of all servers (`openai_contract`)."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from openai_contract import collected, refused
from serving_tools import Running, serving, serving_here, write_vector

from steer.edits import load_edit

KEY = "a key of the tests"
CHAT = [{"role": "user", "content": "tell me about the sun"}]
SENTIMENT = {"reward": "sentiment", "beta": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_lm: Any) -> Path:
    made = tmp_path_factory.mktemp("artifacts")
    write_vector(made / "calm.safetensors", tiny_lm.info)
    return made


@pytest.fixture(scope="module")
def server(tiny_lm_dir: Path, folder: Path) -> Iterator[Running]:
    options = ["--artifacts", folder, "--api-key-env", "TEST_KEY", "--name", "tiny", "--max-body-bytes", 20_000]
    with serving_here(tiny_lm_dir, *options, TEST_KEY=KEY.replace(" ", "-")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=server.url + "/v1", api_key=KEY.replace(" ", "-"), max_retries=0)


def chat(client: OpenAI, **settings: Any) -> Any:
    steer = settings.pop("steer", None)
    extra = {} if steer is None else {"extra_body": {"steer": steer}}
    given = {"model": "tiny", "messages": CHAT, "max_tokens": 12, **extra, **settings}
    return client.chat.completions.create(**given)


# ------------------------------------------------------------------------------------------------------------- plain


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "steer")
    assert client.models.retrieve("tiny").id == "tiny"
    refused(404, "model", lambda: client.models.retrieve("other"))


def test_token_settings(client: OpenAI, tiny_lm: Any) -> None:
    words = chat(client, temperature=0).choices[0].message.content.split()
    greedy = chat(client, temperature=2, extra_body={"top_k": 1}, seed=1)
    assert greedy.choices[0].message.content.split() == words
    token = tiny_lm.tokenizer.convert_tokens_to_ids("calm")
    biased = chat(client, temperature=0, logit_bias={str(token): 100})
    assert set(biased.choices[0].message.content.split()) == {"calm"}
    once = chat(
        client, temperature=0, logit_bias={str(token): 50}, frequency_penalty=2, presence_penalty=2, max_tokens=30
    )
    assert once.choices[0].message.content.split().count("calm") < 30


# ---------------------------------------------------------------------------------------------------------- steering


def test_steering_is_the_models_own(client: OpenAI, tiny_lm: Any, folder: Path) -> None:
    """Greedy text under an edit equals `generate`; so do its reward and its drift."""
    plain = chat(client, temperature=0)
    for settings in (
        {"strength": 0.8},
        {"strength": -0.5, "layers": "1", "scope": "generated"},
        {"operator": "ablate"},
    ):
        answer = chat(client, temperature=0, steer={"edits": [{"name": "calm", **settings}], **SENTIMENT})
        edit = load_edit(folder / "calm.safetensors", settings.pop("strength", None), model=tiny_lm, **settings)
        alone = tiny_lm.generate(CHAT, edits=edit, reward="sentiment", temperature=0, max_new_tokens=12)
        assert answer.choices[0].message.content == alone.texts[0] != plain.choices[0].message.content
        told = answer.choices[0].steer
        assert told["reward"] == pytest.approx(float(alone.reward[0]))
        assert told["kl"] == pytest.approx(float(alone.kl[0]), rel=1e-3)
        assert answer.steer["candidates"] == 1 and answer.steer["cost"]["reward_calls"] == 1
    unmeasured = chat(client, steer={"edits": [{"name": "calm"}], "kl": False})
    assert unmeasured.choices[0].steer == {"reward": None, "kl": None}


def test_critique_tells_its_rounds(client: OpenAI) -> None:
    asked = {"sampler": "critique", "critic": "length>=100", "settings": {"rounds": 2, "revise": False}}
    chunks = list(chat(client, steer=asked, stream=True, seed=1))
    told = [
        c.steer["progress"]["round"]
        for c in chunks
        if "round" in (c.model_extra.get("steer") or {}).get("progress", {})
    ]
    assert [r["number"] for r in told] == [0, 1, 2] and {r["accepted"] for r in told} == {0.0}
    whole = chat(client, steer={**asked, "critic": "length>=1", "settings": {"rounds": 1}}, seed=1)
    assert whole.steer["cost"]["critic_calls"] == 1
    for wrong, field in (
        ({"critic": "os:getcwd"}, "steer.critic"),
        ({"critic": "model:org/name"}, "steer.critic"),
        ({"critic": None}, "steer.critic"),
        ({"sampler": "best-of-n", "reward": "length", "settings": {}}, "steer.critic"),
        ({"settings": {"votes": 3}}, "steer.settings.votes"),
        ({"settings": {"preset": "refcritc"}}, "steer.settings.preset"),
    ):
        refused(400, field, lambda wrong=wrong: chat(client, steer={**asked, **wrong}))
    many = {**asked, "settings": {"rounds": 10**6, "revise": False}}
    refused(413, "steer.candidates", lambda: chat(client, steer=many))


def test_a_mixed_crowd_writes_what_each_writes_alone(client: OpenAI) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        *(
            {"steer": {"edits": [{"name": "calm", **settings}]}}
            for settings in ({"strength": 1.0}, {"strength": -1.0}, {"strength": 1.0, "operator": "clamp"})
        ),
    ]
    alone = [chat(client, temperature=0, **kind).choices[0].message.content for kind in kinds]
    assert len(set(alone)) == 4
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda i: chat(client, temperature=0, **kinds[i % 4]), range(32)))
    assert [a.choices[0].message.content for a in together] == alone * 8


@pytest.mark.parametrize("sampler", ["svdd", "dts", "dts-star"])
def test_searches(client: OpenAI, sampler: str) -> None:
    steer = {"sampler": sampler, "candidates": 6, "block": 2, **SENTIMENT}
    answer = chat(client, seed=3, n=2, steer=steer)
    again = chat(client, seed=3, n=2, steer=steer)
    assert [c.message.content for c in answer.choices] == [c.message.content for c in again.choices]
    drawn = 6 if sampler.startswith("dts") else 12
    assert answer.steer["candidates"] == drawn
    rewards = [c.steer["reward"] for c in answer.choices]
    assert answer.steer["reward"] == max(rewards)
    assert answer.steer["cost"]["generated_tokens"] >= answer.usage.completion_tokens
    assert answer.usage.completion_tokens <= 24
    texts, _, chunks = collected(chat(client, seed=3, n=2, steer=steer, stream=True))
    assert list(texts.values()) == [c.message.content for c in answer.choices]
    progress = [chunk.steer["progress"] for chunk in chunks if chunk.model_extra.get("steer", {}).get("progress")]
    assert progress and chunks[-1].steer["candidates"] == drawn


def test_a_budget_sets_the_candidates(client: OpenAI) -> None:
    answer = chat(client, steer={"sampler": "best-of-n", "budget": 12 * 5, **SENTIMENT})
    assert answer.steer["candidates"] == 5 and answer.steer["cost"]["generated_tokens"] <= 60
    steer = {"sampler": "best-of-n", "budget": 30, "candidates": 5, **SENTIMENT}
    refused(400, "steer.budget", lambda: chat(client, steer=steer), "60")


# ----------------------------------------------------------------------------------------------------------- refused

WRONG: list[tuple[int, str, dict[str, Any]]] = [
    (400, "temperature", {"temperature": 3}),
    (400, "stop", {"stop": ["a", "b", "c", "d", "e"]}),
    (400, "stream_options", {"stream_options": {"include_usage": True}}),
    (400, "response_format.type", {"response_format": {"type": "json_object"}}),
    (400, "wrong", {"extra_body": {"wrong": 1}}),
    (400, "messages", {"messages": [{"role": "user", "content": "sun " * 200}]}),
    (400, "messages", {"max_tokens": 125}),
    (400, "steer.reward", {"steer": {"reward": "org/model"}}),
    (400, "steer.reward", {"steer": {"reward": "/etc"}}),
    (400, "steer.reward", {"steer": {"reward": "brightness"}}),
    (
        400,
        "steer.settings.num_particles",
        {"steer": {"sampler": "fk", "settings": {"num_particles": 999}, **SENTIMENT}},
    ),
    (400, "steer.edits.layers", {"steer": {"edits": [{"name": "calm", "layers": "7"}]}}),
    (400, "steer.edits.operator", {"steer": {"edits": [{"name": "calm", "operator": "shout"}]}}),
    (400, "steer", {"steer": {"edits": [{"name": "calm"}], "sampler": "fk", **SENTIMENT}}),
    (413, "max_tokens", {"max_tokens": 100_000}),
]


@pytest.mark.parametrize(("status", "field", "settings"), WRONG, ids=lambda x: str(x)[:40])
def test_wrong_fields_are_named(client: OpenAI, status: int, field: str, settings: dict[str, Any]) -> None:
    refused(status, field, lambda: chat(client, **settings), field.split(".")[0])


def test_keys_and_bodies(server: Running, client: OpenAI) -> None:
    stranger = OpenAI(base_url=server.url + "/v1", api_key="another", max_retries=0)
    error = refused(401, None, lambda: chat(stranger))
    assert error.code == "invalid_api_key" and set(error.body) == {"message", "type", "param", "code"}
    assert server.get("/metrics").status_code == 401 and server.get("/openapi.json").status_code == 401
    assert server.get("/health").json() == {"status": "ok"}
    refused(413, None, lambda: chat(client, messages=[{"role": "user", "content": "sun " * 9000}]), "20000")
    headers = {"Authorization": f"Bearer {client.api_key}", "Content-Type": "application/json"}
    assert server.post("/v1/chat/completions", content=b"{", headers=headers).json()["error"]["message"]
    assert server.get("/v1/nothing", headers=headers).json()["error"]["code"] == "not_found"


# ------------------------------------------------------------------------------------------- coming, going, stopping


def test_those_who_leave_stop_their_work(tiny_lm_dir: Path) -> None:
    """A stream, an answer and a search whose clients hang up; then a full queue, and a server that is told to stop."""
    with serving(tiny_lm_dir, "--name", "tiny", "--max-requests", 2, "--drain", 20) as server:
        body = {"model": "tiny", "messages": CHAT, "max_tokens": 100}
        # One rollout a round: some seconds, so that it still runs when a later step of the test asks.
        search = {"sampler": "dts-star", "candidates": 250, "reward": "sentiment", "settings": {"batch": 1}}
        wordy = {"n": 32, "logit_bias": {"3": -100}}
        for more in ({**wordy, "stream": True}, wordy, {"steer": search}):
            left = server.metric("steer_clients_left_total")
            server.hang_up("/v1/chat/completions", {**body, **more})
            assert server.settles("steer_clients_left_total", left + 1), more
            assert server.settles("steer_rows", 0) and server.settles("steer_searches", 0), more
            assert server.metric("steer_inside") == 0
        _check_full_queue(server, {**body, "steer": search})
        _check_draining(server, {**body, "steer": search})


def _check_full_queue(server: Running, body: dict[str, Any]) -> None:
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(server.post, "/v1/chat/completions", json=body) for _ in range(2)]
        assert server.settles("steer_inside", 2)
        third = server.post("/v1/chat/completions", json=body)
        assert third.status_code == 429 and int(third.headers["Retry-After"]) >= 1
        assert third.json()["error"]["type"] == "rate_limit_error"
        assert all(future.result().status_code == 200 for future in running)


def _check_draining(server: Running, body: dict[str, Any]) -> None:
    """What runs is finished, others get 503, and the server ends by itself."""
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=server.url, timeout=60) as late:
        late.get("/health")
        running = pool.submit(server.post, "/v1/chat/completions", json=body)
        assert server.settles("steer_inside", 1)
        server.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 10
        while late.get("/health").status_code == 200 and time.monotonic() < end:
            time.sleep(0.01)
        refusal = late.post("/v1/chat/completions", json=body)
        assert refusal.status_code == 503 and "Retry-After" in refusal.headers
        assert running.result().status_code == 200
        assert len(running.result().json()["choices"]) == 1
    assert server.process.wait(30) == 0
    assert any("stopping" in line for line in server.log)


def test_the_description_says_what_there_is(server: Running, client: OpenAI) -> None:
    headers = {"Authorization": f"Bearer {client.api_key}"}
    schema = server.get("/openapi.json", headers=headers).json()
    paths = schema["paths"]
    assert {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/health",
        "/metrics",
        "/v1/steer/artifacts",
        "/v1/steer/artifacts/{name}",
        "/v1/steer/rewards",
    } <= set(paths)
    answers = paths["/v1/chat/completions"]["post"]["responses"]
    assert {"200", "400", "401", "404", "413", "429", "503"} <= set(answers) and "422" not in answers
    assert "SteerRequest" in schema["components"]["schemas"]
    assert json.dumps(schema).count("HTTPValidationError") == 0
    rewards = server.get("/v1/steer/rewards", headers=headers).json()
    assert {"sentiment", "fluency", "keywords"} <= {r["id"] for r in rewards["data"]}
    assert not {"brightness", "clip", "class"} & {r["id"] for r in rewards["data"]}
