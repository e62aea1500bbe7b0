"""A small OpenAI-compatible server for tests: real laws over HTTP on the loopback, with faults on demand."""

from __future__ import annotations

import contextlib
import json
import math
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

import torch

END = "</s>"


class Backend(Protocol):
    def opening(self, body: dict[str, Any]) -> Any:
        """What stands before the first token: of a chat with `messages`, or of `prompt`."""

    def law(self, before: Any, text: str) -> dict[str, float]:
        """Log-probability of every next token, the end among them."""


@dataclass(frozen=True)
class Chain:
    """A Markov chain over letters that are words of one text; what stands before the first letter makes no difference.

    `initial` `[V]`, `transition` `[V, V]`; `end` is the probability with which a text ends before each letter.
    """

    letters: str
    initial: Sequence[float]
    transition: Sequence[Sequence[float]]
    end: float = 0.0
    end_token: str = END

    def opening(self, body: dict[str, Any]) -> str:
        if "messages" not in body:
            return body["prompt"]
        last = body["messages"][-1]
        return last["content"] if last["role"] == "assistant" else ""

    def law(self, before: str, text: str) -> dict[str, float]:
        words = (before + text).split()
        last = words[-1] if words else ""
        known = len(last) == 1 and last in self.letters
        row = self.transition[self.letters.index(last)] if known else self.initial
        law = {f" {a}": math.log(p * (1 - self.end)) for a, p in zip(self.letters, row, strict=True) if p}
        return {**law, **({self.end_token: math.log(self.end)} if self.end else {})}


@dataclass
class Words:
    """A language model whose tokens are words, such as the tests' tiny one."""

    model: Any
    laws: dict[tuple[int, ...], dict[str, float]] = field(default_factory=dict)

    def opening(self, body: dict[str, Any]) -> str:
        if "messages" not in body:
            return body["prompt"]
        going = body["messages"][-1]["role"] == "assistant"
        return self.model.tokenizer.apply_chat_template(
            body["messages"], tokenize=False, add_generation_prompt=not going, continue_final_message=going
        )

    @torch.inference_mode()
    def law(self, before: str, text: str) -> dict[str, float]:
        ids = tuple(self.model.tokenizer(before + text, add_special_tokens=False)["input_ids"])
        if ids not in self.laws:
            logits = self.model.network(torch.tensor([ids])).logits[0, -1].double()
            names = self.model.tokenizer.convert_ids_to_tokens(list(range(len(logits))))
            shown = [name if name == END else f" {name}" for name in names]
            self.laws[ids] = dict(zip(shown, torch.log_softmax(logits, -1).tolist(), strict=True))
        return self.laws[ids]


Fault = tuple[str, Any]
"""`("status", (429, {"Retry-After": "3"}))`, `("drop", None)` or `("slow", seconds)`."""


@dataclass
class Server:
    """What it serves, how it behaves, and what it was asked (`calls`, in order of arrival)."""

    backend: Backend
    model: str = "chain"
    key: str | None = None
    most_choices: int | None = None
    hides_end: bool = False
    """Whether the end that it drew has no logprobs."""
    names_end: bool = True
    """Whether the end is among the likeliest tokens."""
    shows_logprobs: bool = True
    prefill: str = "continue_final_message"
    fault: Callable[[dict[str, Any]], Fault | None] = lambda body: None
    delay: float = 0.0
    calls: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    spent: dict[str, int] = field(default_factory=lambda: {"prompt_tokens": 0, "completion_tokens": 0})
    busiest: int = 0
    url: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _busy: int = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[Server]:
        owner = self

        class Handler(_Handler):
            server_state = owner

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        try:
            yield self
        finally:
            http.shutdown()
            http.server_close()

    # ---- answers

    def complete(self, body: dict[str, Any], chat: bool) -> tuple[int, dict[str, Any]]:
        if body.get("model") != self.model:
            return 404, _error("model", f"The model {body.get('model')!r} does not exist.")
        if not 0 <= body.get("temperature", 1) <= 2:
            return 400, _error("temperature", "must be between 0 and 2")
        if chat and (wrong := self._wrong_prefill(body)):
            return 400, wrong
        n = min(body.get("n", 1), self.most_choices or body.get("n", 1))
        with self._lock:
            choices = [self._choice(body, i, chat) for i in range(n)]
            usage = {
                "prompt_tokens": len(json.dumps(body.get("messages", body.get("prompt"))).split()),
                "completion_tokens": sum(choice.pop("drawn") for choice in choices),
            }
            for name, count in usage.items():
                self.spent[name] += count
        return 200, {"object": "text_completion", "choices": choices, "usage": usage}

    def _wrong_prefill(self, body: dict[str, Any]) -> dict[str, Any] | None:
        last = body["messages"][-1]
        begun = last["role"] == "assistant"
        told = {
            "continue_final_message": bool(body.get("continue_final_message")),
            "prefix": bool(last.get("prefix")),
            "last": begun,
        }
        if begun and not told[self.prefill]:
            return _error("messages", "the last message must be the user's")
        return None

    def _choice(self, body: dict[str, Any], index: int, chat: bool) -> dict[str, Any]:
        before, text, drawn = self.backend.opening(body), "", []
        noise = random.Random(f"{body.get('seed', time.perf_counter())} {index}")
        finish = "length"
        for _ in range(body.get("max_tokens", 16)):
            law = self.backend.law(before, text)
            token = _draw(law, body.get("temperature", 1), noise)
            drawn.append((token, law))
            if token == getattr(self.backend, "end_token", END):
                finish = "stop"
                break
            text += token
            stopped = [at for at in (text.find(s) for s in body.get("stop", ())) if at >= 0]
            if stopped:
                text, finish = text[: min(stopped)], "stop"
                break
        content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        shown = drawn[:-1] if self.hides_end and finish == "stop" else drawn
        return {
            "index": index,
            **content,
            "finish_reason": finish,
            "drawn": len(drawn),
            "logprobs": self._logprobs(body, shown, chat),
        }

    def _logprobs(self, body: dict[str, Any], drawn: Sequence[tuple[str, dict[str, float]]], chat: bool) -> Any:
        asked = body.get("logprobs")
        if not self.shows_logprobs or asked is None or asked is False:
            return None
        count = body.get("top_logprobs", 0) if chat else asked
        hidden = None if self.names_end else getattr(self.backend, "end_token", END)
        named = [[item for item in law.items() if item[0] != hidden] for _, law in drawn]
        tops = [sorted(law, key=lambda item: -item[1])[:count] for law in named]
        pairs = list(zip(tops, drawn, strict=True))
        if not chat:
            return {
                "tokens": [token for token, _ in drawn],
                "token_logprobs": [law[token] for token, law in drawn],
                # The drawn token is there as well, as in vLLM, so one more than was asked for.
                "top_logprobs": [
                    dict(top) | {token: law[token]} for top, (token, law) in zip(tops, drawn, strict=True)
                ],
            }
        return {
            "content": [
                {
                    "token": token,
                    "logprob": law[token],
                    "bytes": list(token.encode()),
                    "top_logprobs": [{"token": t, "logprob": x, "bytes": list(t.encode())} for t, x in top],
                }
                for top, (token, law) in pairs
            ]
        }


def _draw(law: dict[str, float], temperature: float, noise: random.Random) -> str:
    if temperature == 0:
        return max(law, key=lambda token: law[token])
    tokens = list(law)
    return noise.choices(tokens, [math.exp(law[t] / temperature) for t in tokens])[0]


def _error(param: str | None, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": None}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and content leave together
    server_state: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        state = self.server_state
        self._answer(200, {"object": "list", "data": [{"id": state.model, "object": "model"}]})

    def do_POST(self) -> None:
        state = self.server_state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with state._lock:
            state.calls.append(body)
            state.headers.append({k.lower(): v for k, v in self.headers.items()})
            state._busy += 1
            state.busiest = max(state.busiest, state._busy)
            fault = state.fault(body)
        try:
            time.sleep(state.delay)
            self._reply(body, fault)
        finally:
            with state._lock:
                state._busy -= 1

    def _reply(self, body: dict[str, Any], fault: Fault | None) -> None:
        state = self.server_state
        kind, detail = fault or ("", None)
        given = self.headers.get("Authorization", "")
        if kind == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif kind == "status":
            self._answer(detail[0], _error(None, f"fault {detail[0]}"), detail[1])
        elif state.key is not None and given != f"Bearer {state.key}":
            self._answer(401, _error(None, f"Incorrect API key provided: {given.removeprefix('Bearer ')}."))
        else:
            if kind == "slow":
                time.sleep(detail)
            with contextlib.suppress(OSError):  # the client may have gone
                self._answer(*state.complete(body, self.path.endswith("/chat/completions")))

    def _answer(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
