"""Servers in processes of their own, `steer serve` and vLLM's, for tests and for the load script."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from steer import artifacts
from steer.artifacts import Card

_VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""A cache of 1 GB, and whatever processor is free: by default every engine of a machine takes the same one."""


CHAT = [{"role": "user", "content": "tell me about the sun"}]


@dataclass
class Running:
    """A server that runs."""

    process: subprocess.Popen[str] | None
    """None: threads of this one."""
    url: str
    """Without `/v1`."""
    log: list[str] = field(default_factory=list)
    key: str = ""

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **more)

    def post(self, path: str, **more: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **more)

    def delete(self, path: str, **more: Any) -> httpx.Response:
        return httpx.delete(self.url + path, timeout=60, **more)

    def metric(self, name: str) -> float:
        """One number of `/v1/steer/metrics`."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        text = self.get("/v1/steer/metrics", headers=headers).text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def settles(self, name: str, value: float, seconds: float = 20) -> bool:
        """Whether a metric comes to `value` in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.metric(name) == value:
                return True
            time.sleep(0.02)
        return False

    def hang_up(self, path: str, body: dict[str, Any]) -> None:
        """Begin a request, and close the connection once the server is at it."""
        with self._asked(path, json.dumps(body).encode(), "application/json"):
            assert self.settles("steer_inside", 1)
            time.sleep(0.05)

    def abandon(self, path: str, content: bytes, kind: str) -> None:
        """Send a request, and close the connection without an answer."""
        with self._asked(path, content, kind):
            pass

    @contextmanager
    def _asked(self, path: str, content: bytes, kind: str) -> Iterator[None]:
        host, port = self.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as wire:
            head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: {kind}\r\n"
            head += f"Authorization: Bearer {self.key}\r\nContent-Length: {len(content)}\r\n\r\n"
            wire.sendall(head.encode() + content)
            yield

    def stop(self, how: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(60)


@contextmanager
def serving(model: str | Path, *arguments: object, **environment: str) -> Iterator[Running]:
    """`steer serve` on a port of the system's choice, ended when the block ends."""
    command = [sys.executable, "-m", "steer", "serve", "--model", str(model), "--port", "0", *map(str, arguments)]
    with _started(command, environment) as running:
        assert running.process is not None and running.process.stderr is not None
        for line in running.process.stderr:
            running.log.append(line)
            if found := re.search(r"serving on (http://\S+)/v1", line):
                running.url = found[1]
                break
        assert running.url, "".join(running.log)
        threading.Thread(target=lambda: running.log.extend(running.process.stderr or ()), daemon=True).start()
        yield running


@contextmanager
def serving_here(model: str | Path, *arguments: object, **environment: str) -> Iterator[Running]:
    """`steer serve` as the command line makes it, on threads of this process, which need not import everything again:
    where a test asks what a server answers, and not how its process starts, stops or logs.
    """
    from steer.cli import main
    from steer.serving import run as runs

    made: list[tuple[Any, list[socket.socket]]] = []

    def keep(app: Any, sockets: list[socket.socket], patience: float, log_requests: bool = False) -> None:
        made.append((runs.server_of(app, patience, log_requests), sockets))

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(runs, "run", keep)
        assert main(["serve", "--model", str(model), "--port", "0", *map(str, arguments)]) == 0
    ((server, sockets),) = made
    thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Running(None, f"http://127.0.0.1:{sockets[0].getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(60)


@contextmanager
def vllm_serving(
    model: str | Path, settings: dict[str, Any], *arguments: object, **environment: str
) -> Iterator[Running]:
    """`vllm serve` with steer in it: float32, eager, small. `settings` are `additional_config["steer"]`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {
        "host": "127.0.0.1",
        "port": port,
        "dtype": "float32",
        "max-model-len": 512,
        "block-size": 32,
        "max-num-seqs": 64,
        "additional-config": json.dumps({"steer": settings}),
    }
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(model),
        "--enforce-eager",
        "--disable-uvicorn-access-log",
        *map(str, arguments),
    ]
    command += [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    with (
        knowing_its_name() as named,
        _started(command, {"VLLM_PLUGINS": "steer,steer_http", **named, **environment}) as running,
    ):
        running.url = f"http://127.0.0.1:{port}"
        threading.Thread(target=lambda: running.log.extend(running.process.stderr or ()), daemon=True).start()
        assert _answers(running, 300), "".join(running.log[-60:])
        yield running


@contextmanager
def knowing_its_name() -> Iterator[dict[str, str]]:
    """What the environment must say so that the command `vllm` starts: it looks for its version under the name "vllm",
    and the CPU build is installed as "vllm-cpu".
    """
    try:
        metadata.version("vllm")
        yield {}
    except metadata.PackageNotFoundError:
        version = f"{metadata.version('vllm-cpu')}+cpu"
        with tempfile.TemporaryDirectory() as folder:
            about = Path(folder) / f"vllm-{version}.dist-info"
            about.mkdir()
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
            yield {"PYTHONPATH": os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))}


@contextmanager
def _started(command: list[str], environment: dict[str, str]) -> Iterator[Running]:
    """A process of a session of its own, all of which is ended when the block ends."""
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, **_VLLM, **environment}, start_new_session=True
    )
    try:
        yield Running(process, "")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(running: Running, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and running.process.poll() is None:
        with suppress(httpx.TransportError):
            if running.get("/health").status_code == 200:
                return True
        time.sleep(0.2)
    return False


def write_vector(
    path: Path, info: Any = None, *, width: int = 32, layers: tuple[int, ...] = (0, 1), seed: int = 1
) -> Path:
    """A steering vector of random directions; of the model in `info`, or of any."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"direction.{layer}": torch.randn(width, generator=generator) for layer in layers}
    entry = {"width": width} if info is None else info.entry()
    artifacts.save(path, tensors, Card("vector", entry, list(layers), {"strength": 1.0}))
    return path


# ------------------------------------------------------------------------------------------------- in one process


class Idle:
    """An engine that stays open when an application of these tests ends."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return (lambda: None) if name == "close" else getattr(self._engine, name)


def http(engine: Any, folder: Path | None, **settings: Any) -> Any:
    from fastapi.testclient import TestClient

    from steer.serving.app import AppSettings, create_app

    rewards = settings.pop("rewards", None)
    app = create_app(Idle(engine), AppSettings(artifacts=folder, local=False, **settings), rewards)
    return TestClient(app, raise_server_exceptions=False)


def steered(client: Any, name: str, **settings: Any) -> Any:
    body = {
        "model": "tiny",
        "messages": CHAT,
        "max_tokens": 8,
        "temperature": 0,
        "steer": {"edits": [{"name": name, **settings}]},
    }
    return client.post("/v1/chat/completions", json=body)


def wrong(answer: Any, status: int, field: str | None, *words: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == field, error
    for word in words:
        assert word in error["message"]


# ---------------------------------------------------------------------------------------------------------- fleets


def fleet(servers: tuple[Running, Running], source: Path, other: Path) -> None:
    """Must hold of any two servers of one model on one folder."""
    a, b = servers
    wrong(steered(b, "calm"), 400, "steer.edits.0.name")
    sent = a.post(
        "/v1/steer/artifacts?name=calm",
        content=source.read_bytes(),
        headers={"Content-Type": "application/octet-stream"},
    )
    assert sent.status_code == 201, sent.text
    answers = [steered(server, "calm", strength=4.0).json() for server in servers]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert b.get("/v1/steer/artifacts/calm").json()["sha256"] == sent.json()["sha256"]
    b.post(
        "/v1/steer/artifacts?name=calm",
        content=other.read_bytes(),
        headers={"Content-Type": "application/octet-stream"},
    )
    changed = [steered(server, "calm", strength=4.0).json() for server in servers]
    assert changed[0]["choices"] == changed[1]["choices"] != answers[0]["choices"]
    assert a.delete("/v1/steer/artifacts/calm").status_code == 200
    assert b.get("/v1/steer/artifacts/calm").status_code == 404
    wrong(steered(b, "calm"), 400, "steer.edits.0.name")

    statuses: list[int] = []

    def send(i: int) -> None:
        path = f"/v1/steer/artifacts?name=own-{i}"
        statuses.append(
            servers[i % 2]
            .post(path, content=source.read_bytes(), headers={"Content-Type": "application/octet-stream"})
            .status_code
        )

    threads = [threading.Thread(target=send, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [201] * 20
    for server in servers:
        listed = server.get("/v1/steer/artifacts").json()["data"]
        assert {entry["id"] for entry in listed} == {f"own-{i}" for i in range(20)}
        assert server.get("/v1/steer/capabilities").json()["shared"]
