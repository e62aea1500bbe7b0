"""Python clients of a steered server, one a run: `python python_clients.py NAME`.

The server's address, key, model and the name of a vector are in STEER_URL, STEER_KEY, STEER_MODEL and STEER_EDIT. Every
client talks in two turns, sends the answer's message back as it came, streams where it can, and steers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

URL, KEY, MODEL, EDIT = (os.environ[f"STEER_{name}"] for name in ("URL", "KEY", "MODEL", "EDIT"))
ASK = [{"role": "user", "content": "Tell me about the sun."}]
AGAIN = {"role": "user", "content": "And the moon?"}
STEER = {"steer": {"edits": [{"name": EDIT, "strength": 2.0}]}}
PLAIN = {"max_tokens": 12, "temperature": 0}


def _differs(plain: str, steered: str) -> None:
    assert plain and steered and plain != steered, (plain, steered)


def _is_refused(call: Callable[[], Any], field: str, status: str = "400") -> None:
    try:
        call()
    except Exception as error:
        assert field in str(error) and status in f"{error} {getattr(error, 'status_code', '')}", error
    else:
        raise AssertionError(f"{field} was taken")


TOOLS = [{"type": "function", "function": {"name": "f", "description": "x", "parameters": {"type": "object"}}}]


def openai() -> None:
    from openai import OpenAI

    client = OpenAI(base_url=URL, api_key=KEY)
    create = client.chat.completions.create
    first = create(model=MODEL, messages=ASK, **PLAIN).choices[0].message
    for message in (first, first.model_dump(), first.to_dict()):
        again = create(model=MODEL, messages=[*ASK, message, AGAIN], service_tier="auto", store=True, **PLAIN)
        assert again.choices[0].message.content
    streamed = create(model=MODEL, messages=ASK, stream=True, stream_options={"include_usage": True}, **PLAIN)
    chunks = list(streamed)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == first.content
    assert chunks[-1].usage.completion_tokens > 0
    steered = create(model=MODEL, messages=ASK, extra_body=STEER, **PLAIN)
    _differs(first.content, steered.choices[0].message.content)
    assert steered.steer["cost"]["generated_tokens"] > 0
    assert client.completions.create(model=MODEL, prompt="The sun", **PLAIN).choices[0].text
    _is_refused(lambda: create(model=MODEL, messages=ASK, tools=TOOLS), "tools")
    _is_refused(lambda: create(model=MODEL, messages=ASK, response_format={"type": "json_object"}), "response_format")
    _is_refused(lambda: client.responses.create(model=MODEL, input="x"), "/v1/chat/completions", "404")


def langchain_openai() -> None:
    from langchain_openai import ChatOpenAI, OpenAI

    made = {"model": MODEL, "base_url": URL, "api_key": KEY, **PLAIN}
    chat = ChatOpenAI(service_tier="auto", **made)
    first = chat.invoke("Tell me about the sun.")
    assert chat.invoke([("user", "Tell me about the sun."), first, ("user", "And the moon?")]).content
    assert "".join(chunk.content for chunk in chat.stream("Tell me about the sun.")) == first.content
    assert len(chat.batch(["Tell me about the sun."] * 3)) == 3
    _differs(first.content, ChatOpenAI(extra_body=STEER, **made).invoke("Tell me about the sun.").content)
    assert OpenAI(**made).invoke("The sun")
    _is_refused(lambda: chat.bind_tools([{"name": "f", "description": "x", "parameters": {}}]).invoke("x"), "tools")


def litellm() -> None:
    import litellm

    made = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": KEY, **PLAIN}
    first = litellm.completion(messages=ASK, **made).choices[0].message
    for message in (first, first.model_dump()):
        assert litellm.completion(messages=[*ASK, message, AGAIN], **made).choices[0].message.content
    streamed = litellm.completion(messages=ASK, stream=True, **made)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == first.content
    steered = litellm.completion(messages=ASK, extra_body=STEER, **made).choices[0].message
    _differs(first.content, steered.content)
    _is_refused(lambda: litellm.completion(messages=ASK, tools=TOOLS, num_retries=0, **made), "tools")


def llama_index() -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    made = {"model": MODEL, "api_base": URL, "api_key": KEY, "max_tokens": 12, "temperature": 0, "context_window": 2048}
    chat = OpenAILike(is_chat_model=True, **made)
    ask = ChatMessage(role="user", content="Tell me about the sun.")
    first = chat.chat([ask]).message
    assert chat.chat([ask, first, ChatMessage(role="user", content="And the moon?")]).message.content
    assert "".join(piece.delta or "" for piece in chat.stream_chat([ask])) == first.content
    steered = OpenAILike(is_chat_model=True, additional_kwargs={"extra_body": STEER}, **made)
    _differs(first.content or "", steered.chat([ask]).message.content or "")
    assert OpenAILike(is_chat_model=False, **made).complete("The sun").text


def instructor() -> None:
    import instructor
    from openai import OpenAI
    from pydantic import BaseModel

    class Place(BaseModel):
        name: str

    for mode, field in ((instructor.Mode.TOOLS, "tool"), (instructor.Mode.JSON, "response_format")):
        client = instructor.from_openai(OpenAI(base_url=URL, api_key=KEY, max_retries=0), mode=mode)

        def ask(client: Any = client) -> Any:
            return client.chat.completions.create(
                model=MODEL, messages=ASK, response_model=Place, max_retries=0, **PLAIN
            )

        _is_refused(ask, field)
    text = client.chat.completions.create(model=MODEL, messages=ASK, response_model=None, extra_body=STEER, **PLAIN)
    assert text.choices[0].message.content


def lm_eval() -> None:
    """The requests of `local-completions` and `local-chat-completions`, as lm-evaluation-harness 0.4 writes them."""
    import httpx

    def post(path: str, body: dict[str, Any]) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.post(f"{URL}{path}", json={"model": MODEL, **body}, headers=headers, timeout=120)

    until = {"prompt": ["The sun", "A dog"], "max_tokens": 12, "temperature": 0, "stop": ["\n\n"], "seed": 1234}
    assert len(post("/completions", until).raise_for_status().json()["choices"]) == 2
    chat = {"messages": ASK, "max_tokens": 12, "temperature": 0, "stop": ["\n\n"], "seed": 1234}
    assert post("/chat/completions", chat).raise_for_status().json()["choices"][0]["message"]["content"]
    likelihood = {"prompt": [[5, 6, 7]], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    plain, steered = (
        post("/completions", likelihood | more).raise_for_status().json()["choices"][0]["logprobs"]
        for more in ({}, STEER)
    )
    for found in (plain, steered):
        assert found["token_logprobs"][0] is None and len(found["token_logprobs"]) >= 4
        assert all(x <= 0 for x in found["token_logprobs"][1:]) and all(found["top_logprobs"][1:])
    assert plain["token_logprobs"][1:] != steered["token_logprobs"][1:]
    refused = post("/chat/completions", chat | {"echo": True})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "echo", refused.text


CLIENTS: dict[str, tuple[Callable[[], None], str]] = {
    "openai": (openai, "openai"),
    "langchain-openai": (langchain_openai, "langchain-openai"),
    "litellm": (litellm, "litellm"),
    "llama-index": (llama_index, "llama-index-llms-openai-like"),
    "instructor": (instructor, "instructor"),
    "lm-eval": (lm_eval, "httpx"),
}

if __name__ == "__main__":
    run, package = CLIENTS[sys.argv[1]]
    run()
    print(metadata.version(package))
