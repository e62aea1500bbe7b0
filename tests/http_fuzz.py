"""Requests and files made up by chance for a running server, and what must hold meanwhile: no answer is a 5xx, a plain
request is not kept waiting, and a restart finds what was there.

Everything is drawn from a seed. Bodies are right ones with some fields replaced by values of any type and size, so that
each gets as far as it can.
"""

from __future__ import annotations

import copy
import json
import random
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from serving_tools import Running

from steer.gguf import save_gguf
from steer.serving.protocol import ChatRequest, CompletionRequest
from steer.serving.wire import EditRequest, SteerRequest

__all__ = ["Fuzz", "control_vector", "hang_up_at_once", "mutated_files"]


VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    2**31,
    2**53,
    2**63,
    -(2**63),
    10**30,
    10**400,
    0.0,
    0.5,
    -0.5,
    1e-300,
    1e30,
    1e308,
    -1e308,
    "",
    "a",
    "0",
    "1-2",
    "all",
    "x" * 5000,
    "1" * 5000,
    "from:" + "9" * 5000,
    "from:1e30",
    "from:-1",
    "\ud800",
    "\udfff\ud800",
    "\x00",
    "\u202e",
    "😀" * 50,
    "e\u0301",
    "<|im_end|>",
    "${HOME}",
    "../../etc/passwd",
    "%s%n",
    [],
    [0],
    ["a"],
    [[]],
    [1e30],
    [None],
    ["a"] * 2000,
    {},
    {"a": 1},
    {"": ""},
    {"x" * 300: None},
    {"type": "text", "text": "hi"},
    [{"type": "text", "text": "hi"}],
    {"type": "json_object"},
]
SCOPES = ["all", "prompt", "last", "generated", "reply", "from:3", "from:999999999"]
SETTINGS: dict[str, list[Any]] = {
    "best-of-n": [{}, {"reject": 0.5}],
    "fk": [
        {},
        {"floor": 0.1},
        {"every": 2, "tempering": 1.5},
        {"resampler": "multinomial"},
        {"lookahead": "rollouts:2"},
    ],
    "svdd": [{}, {"choose": "argmax"}],
    "dts": [{"batch": 2}, {"widening": 1.5, "explore": 1.0}],
    "dts-star": [{"batch": 2}, {"bonus": 1.0, "backup": "max"}],
}

_SAID = [{"role": "user", "content": "tell me about the sun"}]
OWN_ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": _SAID, "max_tokens": 2},
    "/v1/completions": {"prompt": "the sun", "max_tokens": 2},
    "/v1/responses": {"input": _SAID, "max_output_tokens": 2},
    "/v1/messages": {"messages": _SAID, "max_tokens": 2},
    "/v1/chat/completions/batch": {"messages": [_SAID], "max_tokens": 2},
}
"""Of vLLM's server."""


@dataclass
class Fuzz:
    """One server under made-up requests.

    `edits` are names of registered artifacts; `key` and `model` are the server's.
    """

    server: Running
    model: str
    edits: list[str]
    seed: int = 0
    plain: float = 2.0
    """Seconds in which a plain request is answered."""
    always: bool = False
    """Whether every request asks for steering: others are not this server's own."""
    inside: float = 0.0
    """Share of requests to vLLM's own routes, with the steering in `vllm_xargs`."""
    statuses: Counter[int] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    @property
    def headers(self) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self.server.key}"} if self.server.key else {}
        return {**key, "Content-Type": "application/json"}

    # ---- made up

    def right(self) -> tuple[str, dict[str, Any]]:
        """A route and a body that it takes."""
        r = self.random
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": r.randint(1, 4),
            "temperature": 1,
            "seed": r.randint(0, 99),
        }
        path = "/v1/chat/completions" if r.random() < 0.7 else "/v1/completions"
        if path == "/v1/completions":
            body["prompt"] = r.choice(["the sun", ["the sun", "a dog"], [5, 6, 7], [[5, 6], [7]]])
        else:
            body["messages"] = [{"role": "user", "content": "tell me about the sun"}]
        if self.always or r.random() < 0.8:
            body["steer"] = self.steering()
        if r.random() < 0.2:
            body["stream"] = True
        return path, body

    def steering(self) -> dict[str, Any]:
        r = self.random
        steer: dict[str, Any] = {}
        if r.random() < 0.7:
            steer["edits"] = [
                {"name": r.choice(self.edits), "strength": r.choice([0.5, -1, 3.0]), "scope": r.choice(SCOPES)}
                for _ in range(r.randint(1, 3))
            ]
        if r.random() < 0.4:
            sampler = r.choice(list(SETTINGS))
            steer |= {
                "sampler": sampler,
                "candidates": r.randint(1, 4),
                "settings": dict(r.choice(SETTINGS[sampler])),
                "reward": r.choice(["sentiment", "length", "2 * sentiment - length"]),
            }
        return steer

    def wrong(self) -> tuple[str, bytes]:
        """A route and a body in which some fields are of any type and size."""
        if self.random.random() < self.inside:
            return self._wrong_inside()
        path, body = self.right()
        fields = ChatRequest if path.endswith("chat/completions") else CompletionRequest
        for _ in range(self.random.randint(1, 2)):
            self._replace(body, list(fields.model_fields))
        text = json.dumps(body)
        if self.random.random() < 0.03:
            text = self._broken(text)
        return path, text.encode("utf-8", "surrogatepass")

    def _wrong_inside(self) -> tuple[str, bytes]:
        """One of vLLM's own routes and a right body, but for what its `vllm_xargs` say of steering."""
        r = self.random
        path = r.choice(list(OWN_ROUTES))
        steer: Any = {
            "edits": [{"name": r.choice(self.edits), "strength": r.choice([0.5, -1]), "scope": r.choice(SCOPES)}]
        }
        for _ in range(r.randint(0, 2)):
            fields = [*SteerRequest.model_fields, "unknown"]
            edits = [e for e in steer["edits"] if isinstance(e, dict)] if isinstance(steer.get("edits"), list) else []
            place, names = r.choice([(steer, fields), *((e, list(EditRequest.model_fields)) for e in edits)])
            place[r.choice(names)] = copy.deepcopy(r.choice(VALUES))
        given: Any = json.dumps(steer)
        if r.random() < 0.1:
            given = r.choice([self._broken(given), steer, *VALUES])
        body = {"model": self.model, "temperature": 0, "vllm_xargs": {"steer": given}, **OWN_ROUTES[path]}
        return path, json.dumps(body).encode("utf-8", "surrogatepass")

    def _replace(self, body: dict[str, Any], fields: list[str]) -> None:
        r = self.random
        steer = body.get("steer")
        places: list[tuple[dict[str, Any], list[str]]] = [(body, [*fields, "unknown"])]
        if isinstance(steer, dict):
            places.append((steer, [*SteerRequest.model_fields, "unknown"]))
            edits = steer["edits"] if isinstance(steer.get("edits"), list) else []
            places += [(e, list(EditRequest.model_fields)) for e in edits if isinstance(e, dict)] * 2
            if isinstance(steer.get("settings"), dict):
                names = [
                    "floor",
                    "batch",
                    "every",
                    "reject",
                    "choose",
                    "lookahead",
                    "stop",
                    "start",
                    "widening",
                    "tempering",
                ]
                places.append((steer["settings"], names))
        if isinstance(body.get("messages"), list) and body["messages"] and isinstance(body["messages"][0], dict):
            places.append((body["messages"][0], ["role", "content", "name", "refusal", "tool_calls", "audio", "other"]))
        place, names = r.choice(places)
        place[r.choice(names)] = copy.deepcopy(r.choice(VALUES))
        if self.always and body.get("steer") is None:
            body["steer"] = {}

    def _broken(self, text: str) -> str:
        r = self.random
        at = r.randrange(len(text))
        return r.choice(
            [text[:at], text + "}", text[:at] + "\x00" + text[at:], "[" * 50_000, '{"a":' * 5_000, "", "1e999"]
        )

    # ---- sent

    def requests(self, count: int, together: int = 6) -> None:
        """That many, some of whose clients leave; each status is counted, and each 5xx kept with its body."""
        made = [self.wrong() if self.random.random() < 0.9 else self._told() for _ in range(count)]
        with httpx.Client(timeout=120, headers=self.headers) as http, ThreadPoolExecutor(together) as pool:
            list(pool.map(lambda one: self._send(http, *one), made))

    def _told(self) -> tuple[str, bytes]:
        path, body = self.right()
        return path, json.dumps(body).encode()

    def _send(self, http: httpx.Client, path: str, content: bytes) -> None:
        if zlib.crc32(content) % 29 == 0:
            self.server.abandon(path, content, "application/json")
            return
        answer = http.post(self.server.url + path, content=content)
        self._note(answer, content)

    def _note(self, answer: httpx.Response, content: bytes) -> None:
        self.statuses[answer.status_code] += 1
        if answer.status_code >= 500 or b"the server made a mistake" in answer.content:
            self.failed.append(f"{answer.status_code} {answer.text[:200]} for {content[:600]!r}")

    def files(self, files: Iterator[bytes] | list[bytes]) -> None:
        """Send each as an artifact; some clients leave."""
        headers = {**self.headers, "Content-Type": "application/octet-stream"}
        with httpx.Client(timeout=120, headers=headers) as http:
            for i, content in enumerate(files):
                path = f"/v1/steer/artifacts?name=made{i % 7}"
                if i % 11 == 10:
                    self.server.abandon(path, content, "application/octet-stream")
                    continue
                self._note(http.post(self.server.url + path, content=content), content)
                if i % 20 == 0:
                    self._note(http.get(self.server.url + "/v1/steer/artifacts"), b"")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Ask for something plain again and again meanwhile, and note how long it takes."""
        over = threading.Event()
        body = {"model": self.model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}

        def ask() -> None:
            with httpx.Client(timeout=120, headers=self.headers) as http:
                while not over.wait(0.2):
                    began = time.perf_counter()
                    answer = http.post(self.server.url + "/v1/chat/completions", json=body)
                    if answer.status_code != 429:  # a full queue is told at once
                        self._note(answer, b"plain")
                        self.waits.append(time.perf_counter() - began)

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            yield
        finally:
            over.set()
            asking.join()

    def check(self) -> None:
        """What must have held."""
        assert not self.failed, "\n".join(self.failed[:10])
        assert self.statuses[200] and self.statuses[400], self.statuses
        assert max(self.waits) < self.plain, sorted(self.waits)[-5:]


# ------------------------------------------------------------------------------------------------------------- files


def control_vector(folder: Path, width: int = 32) -> bytes:
    """A control vector of llama.cpp's, of two blocks, written into that folder."""
    save_gguf(folder / "whole.gguf", {1: torch.ones(width), 2: torch.ones(width)}, "llama")
    return (folder / "whole.gguf").read_bytes()


def mutated_files(whole: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Files like this one, damaged: bits turned over, cut, lengthened, numbers and words of the header replaced."""
    r = random.Random(seed)
    for _ in range(count):
        made = bytearray(whole)
        for _ in range(r.choice([1, 1, 2, 8])):
            _damage(made, r)
        yield bytes(made)


def _damage(made: bytearray, r: random.Random) -> None:
    head = min(len(made), 1500)
    kind = r.randrange(6)
    at = r.randrange(head) if head else 0
    if kind <= 1 and made:
        made[at] ^= 1 << r.randrange(8)
    elif kind == 2:
        del made[r.randrange(len(made) + 1) :]
    elif kind == 3:
        made[at:at] = bytes(r.randrange(256) for _ in range(r.randint(1, 64)))
    elif kind == 4:
        made[at : at + 8] = struct.pack("<Q", r.choice([0, 1, 2**16, 2**31, 2**40, 2**63, 2**64 - 1]))
    else:
        with suppress(ValueError):
            digits = [i for i in range(8, head) if chr(made[i]).isdecimal()]
            at = r.choice(digits or [at])
            made[at : at + 1] = r.choice([b"-1", b"99999999999", b"1e999", b'"a"', b"[[]]", b"null", b"NaN"])


def hang_up_at_once(server: Running) -> None:
    """Connections that say nothing, or half of a request."""
    host, port = server.url.removeprefix("http://").split(":")
    for said in (
        b"",
        b"POST /v1/chat",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\n{",
        b"\x16\x03\x01\x02",
    ):
        with socket.create_connection((host, int(port))) as wire:
            wire.sendall(said)
