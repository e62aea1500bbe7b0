"""Requests that clients really send: messages sent back as they came, fields that say nothing, bodies as people
write them, web pages; and fields of any type and size.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_tools import CHAT, http, serving, write_vector, wrong

from steer.adapters.transformers.serving.engine import TransformersEngine
from steer.cli import main
from steer.core import InputError
from steer.serving.run import listen

ANSWER = {"role": "assistant", "content": "the sun is nice"}
BODY = {"model": "tiny", "messages": CHAT, "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def engine(tiny_lm: Any) -> Iterator[TransformersEngine]:
    made = TransformersEngine(tiny_lm, name="tiny")
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(engine: TransformersEngine, tmp_path_factory: pytest.TempPathFactory, tiny_lm: Any) -> Any:
    folder = tmp_path_factory.mktemp("store")
    write_vector(folder / "calm.safetensors", tiny_lm.info)
    return http(engine, folder)


def chat(client: Any, **settings: Any) -> Any:
    return client.post("/v1/chat/completions", json={**BODY, **settings})


# ---------------------------------------------------------------------------------------------------------- messages

EMPTY: list[dict[str, Any]] = [
    {"refusal": None},
    {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None},
    {"refusal": "", "annotations": None, "tool_calls": []},
    {"reasoning_content": None, "provider_specific_fields": None, "parsed": None},
    {"name": None},
]


def test_an_answers_message_can_be_sent_back(client: Any) -> None:
    message = chat(client).json()["choices"][0]["message"]
    assert message["refusal"] is None
    again = [*CHAT, message, {"role": "user", "content": "why"}]
    bare = [*CHAT, {"role": "assistant", "content": message["content"]}, {"role": "user", "content": "why"}]
    told = [chat(client, messages=messages).json()["choices"][0]["message"] for messages in (again, bare)]
    assert told[0] == told[1]


@pytest.mark.parametrize("extra", EMPTY, ids=str)
def test_empty_extras_of_a_message_change_nothing(client: Any, extra: dict[str, Any]) -> None:
    plain, given = (
        chat(client, messages=[*CHAT, {**ANSWER, **more}, {"role": "user", "content": "why"}]) for more in ({}, extra)
    )
    assert given.status_code == 200, given.text
    assert given.json()["choices"] == plain.json()["choices"]


def test_a_content_that_is_null_is_an_empty_text_of_the_assistants(client: Any) -> None:
    null, empty = (
        chat(client, messages=[*CHAT, {"role": "assistant", "content": content}, {"role": "user", "content": "why"}])
        for content in (None, "")
    )
    assert null.status_code == 200 and null.json()["choices"] == empty.json()["choices"]
    assert null.json()["usage"] == empty.json()["usage"]
    for role in ("user", "system"):
        wrong(chat(client, messages=[{"role": role, "content": None}]), 400, "messages.0.content")
    wrong(chat(client, messages=[{"role": "assistant"}]), 400, "messages.0.content", "missing")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tool_calls", [{"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}]),
        ("function_call", {"name": "f", "arguments": "{}"}),
        ("refusal", "I will not"),
        ("audio", {"id": "x"}),
        ("reasoning_content", "let me think"),
        ("annotations", [{"type": "url_citation"}]),
    ],
)
def test_what_a_message_says_beside_its_text_is_refused_by_name(client: Any, field: str, value: Any) -> None:
    wrong(chat(client, messages=[*CHAT, {**ANSWER, field: value}]), 400, f"messages.1.{field}")


# ------------------------------------------------------------------------------------------------------------ fields

NOTHING: list[dict[str, Any]] = [
    {"service_tier": "auto"},
    {"prompt_cache_key": "k"},
    {"safety_identifier": "x"},
    {"store": True},
    {"store": False},
    {"prompt_cache_retention": "24h"},
    {"metadata": {"a": "b"}},
    {"user": "me"},
    {"parallel_tool_calls": True},
    {"tools": []},
    {"functions": []},
    {"tool_choice": "auto"},
    {"modalities": ["text"]},
    {"prediction": {"type": "content", "content": "the sun"}},
    {"reasoning_effort": None},
    {"logit_bias": {}},
    {"response_format": {"type": "text"}},
    {"web_search_options": None, "audio": None, "verbosity": None},
    {"stop": ""},
    {"logprobs": False, "top_logprobs": 0},
    {"best_of": 1, "use_beam_search": False, "ignore_eos": False, "min_tokens": 0},
    {"repetition_penalty": 1.0, "length_penalty": 1, "no_repeat_ngram_size": 0},
    {"skip_special_tokens": True, "spaces_between_special_tokens": True, "include_stop_str_in_output": False},
    {"cache_prompt": True, "keep_alive": "5m", "request_id": "a"},
    {"top_k": -1, "echo": False, "priority": 0, "safe_prompt": False},
    {"continue_final_message": False, "add_generation_prompt": True},
]


@pytest.mark.parametrize("extra", NOTHING, ids=str)
def test_fields_that_change_nothing_about_the_text_are_taken(client: Any, extra: dict[str, Any]) -> None:
    answer = chat(client, **extra)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == chat(client).json()["choices"]


CONTINUED: list[tuple[dict[str, Any], dict[str, Any], int]] = [
    ({}, {"continue_final_message": True, "add_generation_prompt": False}, 200),
    ({"prefix": True}, {}, 200),
    ({}, {"continue_final_message": False}, 400),
    ({}, {"add_generation_prompt": True}, 400),
    ({"prefix": False}, {}, 400),
]
"""What other servers are told so that they continue a reply: beside it, and in the request."""


@pytest.mark.parametrize(("beside", "settings", "status"), CONTINUED, ids=str)
def test_a_reply_is_continued_however_that_is_asked_for(
    client: Any, beside: dict[str, Any], settings: dict[str, Any], status: int
) -> None:
    answer = chat(client, messages=[*CHAT, {**ANSWER, **beside}], **settings)
    assert answer.status_code == status, answer.text
    if status == 200:
        assert answer.json()["choices"] == chat(client, messages=[*CHAT, ANSWER]).json()["choices"]
    else:
        assert "is continued" in answer.json()["error"]["message"]


def test_a_prefix_that_is_not_last(client: Any) -> None:
    early = [{**ANSWER, "prefix": True}, {"role": "user", "content": "why"}]
    wrong(chat(client, messages=[*CHAT, *early]), 400, "messages")


def test_streams_without_obfuscation(client: Any) -> None:
    options = {"include_usage": True, "include_obfuscation": False}
    answer = chat(client, stream=True, stream_options=options)
    assert answer.status_code == 200 and '"completion_tokens"' in answer.text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("functions", [{"name": "f"}]),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("web_search_options", {"a": 1}),
        ("audio", {"voice": "x"}),
        ("tool_choice", "required"),
        ("repetition_penalty", 1.2),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("temprature", 0),
        ("top_k", -2),
        ("continue_final_message", True),
        ("add_generation_prompt", False),
        ("echo", True),
        ("priority", 3),
    ],
)
def test_fields_that_would_change_the_text_are_refused_by_name(client: Any, field: str, value: Any) -> None:
    wrong(chat(client, **{field: value}), 400, field)


# ------------------------------------------------------------------------------------------------------------ bodies


@pytest.mark.parametrize(
    "kind", [None, "application/x-www-form-urlencoded", "text/plain", "text/json; charset=utf-8", "multipart/form-data"]
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/steer/rewards"])
def test_a_body_that_does_not_say_that_it_is_json(client: Any, path: str, kind: str | None) -> None:
    """What `curl -d '{...}'` sends, and its siblings."""
    headers = {} if kind is None else {"Content-Type": kind}
    wrong(client.post(path, content=json.dumps(BODY), headers=headers), 415, None, "application/json")


@pytest.mark.parametrize(
    "kind", ["application/json", "application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.api+json"]
)
def test_a_body_that_says_that_it_is_json(client: Any, kind: str) -> None:
    answer = client.post("/v1/chat/completions", content=json.dumps(BODY), headers={"Content-Type": kind})
    assert answer.status_code == 200


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/nothing", "/"])
def test_routes_that_are_not_there_name_those_that_are(client: Any, path: str) -> None:
    answer = client.post(path, json={"model": "tiny", "input": "x"})
    wrong(answer, 404, None, path, "/v1/chat/completions", "/v1/completions")
    assert answer.json()["error"]["code"] == "not_found"


# ---------------------------------------------------------------------------------------------------------- web pages

PAGE = {"Origin": "https://chat.example", "Host": "localhost:8000"}
PREFLIGHT = {
    **PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


@pytest.mark.parametrize(
    "origins", [["https://chat.example"], ["https://other.example", "https://chat.example"], ["*"]]
)
@pytest.mark.parametrize("keys", [[], ["k"]])
def test_a_page_that_was_let_in(engine: TransformersEngine, origins: list[str], keys: list[str]) -> None:
    page = http(engine, None, origins=origins, keys=keys)
    before = page.options("/v1/chat/completions", headers=PREFLIGHT)
    assert before.status_code == 200 and "POST" in before.headers["access-control-allow-methods"]
    assert "authorization" in before.headers["access-control-allow-headers"]
    headers = {**PAGE, **({"Authorization": "Bearer k"} if keys else {})}
    answer = page.post("/v1/chat/completions", json=BODY, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] in (PAGE["Origin"], "*")
    refusal = page.post("/v1/chat/completions", json={**BODY, "n": 0}, headers=headers)
    assert refusal.status_code == 400 and "access-control-allow-origin" in refusal.headers, "pages can read errors too"
    if keys:
        stranger = page.post("/v1/chat/completions", json=BODY, headers=PAGE)
        assert stranger.status_code == 401 and "access-control-allow-origin" in stranger.headers
    if origins != ["*"]:
        other = {**PREFLIGHT, "Origin": "https://evil.example"}
        assert "access-control-allow-origin" not in page.options("/v1/completions", headers=other).headers
        assert page.get("/v1/models", headers=other).status_code in (401, 403)


def test_no_page_is_let_in_unasked(engine: TransformersEngine) -> None:
    page = http(engine, None)
    for answer in (page.options("/v1/chat/completions", headers=PREFLIGHT), page.get("/v1/models", headers=PAGE)):
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
        assert "--allow-origin" in answer.json()["error"]["message"]


@pytest.mark.parametrize("origin", ["chat.example", "https://chat.example/path", "", "https://"])
def test_an_origin_is_one_as_browsers_send_it(origin: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model", "smollm2-135m", "--allow-origin", origin]) != 0
    assert "allow_origin" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- types and sizes of fields

REWARDED = {"sampler": "best-of-n", "reward": "sentiment"}
HUGE: list[tuple[str, dict[str, Any]]] = [
    ("steer.settings.floor", {"steer": {**REWARDED, "sampler": "fk", "settings": {"floor": "x"}}}),
    ("steer.settings.batch", {"steer": {**REWARDED, "sampler": "dts", "settings": {"batch": ""}}}),
    ("steer.settings.batch", {"steer": {**REWARDED, "sampler": "dts-star", "settings": {"batch": None}}}),
    ("steer.settings.reject", {"steer": {**REWARDED, "settings": {"reject": True}}}),
    ("steer.settings.choose", {"steer": {**REWARDED, "sampler": "svdd", "settings": {"choose": 3}}}),
    (
        "steer.settings.lookahead",
        {"steer": {**REWARDED, "sampler": "fk", "settings": {"lookahead": "rollouts:" + "9" * 200}}},
    ),
    ("steer.settings.every", {"steer": {**REWARDED, "sampler": "fk", "settings": {"every": 2**63}}}),
    ("steer.settings.floor", {"steer": {**REWARDED, "sampler": "fk", "settings": {"floor": 1e300}}}),
    ("top_k", {"top_k": 2**63}),
    ("top_k", {"top_k": 1e30}),
    ("seed", {"seed": 10**30}),
    ("steer.edits.0.top_k", {"steer": {"edits": [{"name": "calm", "top_k": 2**63}]}}),
    ("steer.edits.0.layers", {"steer": {"edits": [{"name": "calm", "layers": "1" * 5000}]}}),
    ("steer.edits.layers", {"steer": {"edits": [{"name": "calm", "layers": "1" * 900}]}}),
    ("steer.edits.layers", {"steer": {"edits": [{"name": "calm", "layers": "0-99999"}]}}),
    ("steer.edits.layers", {"steer": {"edits": [{"name": "calm", "layers": ",".join(["0-99999"] * 100)}]}}),
    ("steer.edits.0.layers.0", {"steer": {"edits": [{"name": "calm", "layers": [10**20]}]}}),
    ("steer.edits.0.layers.0", {"steer": {"edits": [{"name": "calm", "layers": [-1]}]}}),
    ("steer.edits.0.scope", {"steer": {"edits": [{"name": "calm", "scope": "from:" + "1" * 5000}]}}),
    ("steer.edits.scope", {"steer": {"edits": [{"name": "calm", "scope": "from:" + "1" * 31}]}}),
    ("steer.edits.scope", {"steer": {"edits": [{"name": "calm", "scope": "from:1e30"}]}}),
    ("steer.edits.0.strength", {"steer": {"edits": [{"name": "calm", "strength": 1e30}]}}),
    ("steer.edits.0.strength", {"steer": {"edits": [{"name": "calm", "strength": -1e308}]}}),
    ("steer.edits.0.strength", {"steer": {"edits": [{"name": "calm", "strength": 10**400}]}}),
    ("steer.edits.0.unit", {"steer": {"edits": [{"name": "calm", "unit": "\ud800"}]}}),
    ("steer.beta", {"steer": {"beta": 1e-300, **REWARDED}}),
    ("steer.budget", {"steer": {"budget": 2**70, **REWARDED}}),
    ("steer.reward", {"steer": {"reward": "(" * 4000}}),
    ("steer.reward", {"steer": {"reward": "-" * 4000 + "sentiment"}}),
]


@pytest.mark.parametrize(("field", "settings"), HUGE, ids=range(len(HUGE)))
def test_fields_are_typed_and_bounded(client: Any, field: str, settings: dict[str, Any]) -> None:
    content = json.dumps({**BODY, **settings})
    answer = client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    wrong(answer, 400, field)


def test_settings_that_a_sampler_declares_are_taken_as_it_declares_them(client: Any) -> None:
    settings = {"ess_threshold": None, "every": 2, "resampler": "ssp", "tempering": 1, "lookahead": "preview"}
    steer = {"sampler": "fk", "candidates": 3, "block": 2, "settings": settings, "reward": "sentiment"}
    answer = chat(client, temperature=1, steer=steer)
    assert answer.status_code == 200, answer.text


# --------------------------------------------------------------------------------------------------- start and stop


def test_a_port_that_is_taken_is_said_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_lm_dir: Path
) -> None:
    from steer.cli import serving as command

    def load(*given: Any) -> Any:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(command, "start_engine", load)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--model", str(tiny_lm_dir), "--port", str(taken.getsockname()[1])]) != 0
    told = capsys.readouterr().err
    assert "port" in told and "Traceback" not in told


def test_every_address_of_a_host_has_the_same_port() -> None:
    sockets = listen("localhost", 0)
    try:
        assert len({one.getsockname()[1] for one in sockets}) == 1
        with pytest.raises(InputError, match="port"):
            listen("localhost", sockets[0].getsockname()[1])
        with pytest.raises(InputError, match="port"):
            listen("no-such-host.invalid", 0)
    finally:
        for one in sockets:
            one.close()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_both_signals_let_streams_end_whole(tiny_lm_dir: Path, tmp_path: Path, tiny_lm: Any, how: int) -> None:
    """Twenty streams that were asked for when the signal came: all whole, whichever signal it was. Later ones: 503."""
    write_vector(tmp_path / "calm.safetensors", tiny_lm.info)
    body = {**BODY, "max_tokens": 100, "logit_bias": {"3": -100}, "stream": True, "steer": {}}
    with serving(tiny_lm_dir, "--name", "tiny", "--artifacts", tmp_path) as server:
        (line,) = [line for line in server.log if "serving on" in line]
        assert all(url in line for url in ("/v1", "/health", "/openapi.json")) and "calm" in line
        host, port = server.url.removeprefix("http://").split(":")
        content = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        with ExitStack() as stack, httpx.Client(timeout=60) as late:
            late.get(f"{server.url}/health")
            wires = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(20)]
            for wire in wires:
                wire.sendall(f"{head}Connection: close\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
            server.process.send_signal(how)
            end = time.monotonic() + 10
            while late.get(f"{server.url}/health").status_code == 200 and time.monotonic() < end:
                time.sleep(0.01)
            assert late.post(f"{server.url}/v1/chat/completions", json=body).status_code == 503
            for wire in wires:
                wire.settimeout(60)
                told = b"".join(iter(lambda wire=wire: wire.recv(1 << 16), b""))
                assert told.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in told
                assert b'"finish_reason": "length"' in told
        assert server.process.wait(30) == 0


def test_every_line_of_the_page_of_clients_has_a_script() -> None:
    """`make clients` finds each by its name in the table."""
    folder = Path(__file__).parent / "clients"
    page = (folder.parent.parent / "steer" / "serving" / "CLIENTS.md").read_text(encoding="utf-8").partition("\n## ")[0]
    names = re.findall(r"^\| ([^|]+?) +\|", page, re.MULTILINE)[1:]
    scripts = (folder / "python_clients.py").read_text() + (folder / "javascript_clients.mjs").read_text()
    assert len(names) >= 9
    for name in names:
        assert name == "curl" or f'"{name.removesuffix(" (Python)")}":' in scripts, name
