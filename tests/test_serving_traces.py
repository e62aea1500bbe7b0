"""Spans of requests: what they hold, whose trace they are part of, and that nothing is imported without them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from fastapi.testclient import TestClient
from serving_tools import CHAT, Idle, write_vector

from steer.cli import main

MISSING = find_spec("opentelemetry") is None or find_spec("opentelemetry.sdk") is None
needs_otel = pytest.mark.skipif(MISSING, reason="opentelemetry-sdk is not there")
ASKED = {"model": "tiny", "messages": CHAT, "max_tokens": 5, "temperature": 0}
SECRET = "a very good dog"


@pytest.fixture(scope="module")
def engine(tiny_lm: Any) -> Iterator[Any]:
    from steer.adapters.transformers.serving.engine import TransformersEngine

    engine = TransformersEngine(tiny_lm, name="tiny", max_rows=8)
    yield engine
    engine.close()


def traced(engine: Any, folder: Path | None = None, text: bool = False) -> tuple[TestClient, Any]:
    """A client of a server, and the spans that it has ended."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from steer.serving.app import AppSettings, create_app
    from steer.serving.traces import Traces

    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    settings = AppSettings(
        artifacts=folder, local=False, inline_vectors=True, traces=Traces(provider, text), limits=_limits()
    )
    return TestClient(create_app(Idle(engine), settings), raise_server_exceptions=False), kept.get_finished_spans


def _limits() -> Any:
    from steer.serving.limits import Limits

    return Limits(tokens=20)


@needs_otel
def test_a_span_says_what_the_answer_says(engine: Any, tiny_lm: Any, tmp_path: Path) -> None:
    write_vector(tmp_path / "calm.safetensors", tiny_lm.info)
    client, spans = traced(engine, tmp_path)
    inline = {"vector": {"layers": {"0": [0.5] * tiny_lm.info.width}}, "strength": 0.1}
    steer = {"edits": [{"name": "calm", "strength": 0.5}, inline], "reward": "sentiment"}
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    answer = client.post(
        "/v1/chat/completions", json={**ASKED, "seed": 3, "steer": steer}, headers={"traceparent": parent}
    ).json()
    (span,) = spans()
    told = dict(span.attributes)
    assert span.name == "chat tiny" and span.kind.name == "SERVER" and span.status.is_ok
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331", "part of its client's trace"
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    wanted = {
        "operation.name": "chat",
        "provider.name": "steer",
        "request.model": "tiny",
        "request.max_tokens": 5,
        "request.temperature": 0.0,
        "request.seed": 3,
        "request.choice.count": 1,
        "request.stream": False,
        "response.id": answer["id"],
        "response.model": "tiny",
        "response.finish_reasons": (answer["choices"][0]["finish_reason"],),
        "usage.input_tokens": answer["usage"]["prompt_tokens"],
        "usage.output_tokens": answer["usage"]["completion_tokens"],
    }
    assert {name: told[f"gen_ai.{name}"] for name in wanted} == wanted
    named, digest = told["steer.request.edits"]
    assert named == "calm" and digest.startswith("sha256:") and told["steer.request.sampler"] == "ancestral"
    for name in ("reward", "kl", "candidates"):
        assert told[f"steer.{name}"] == answer["steer"][name]
    assert told["steer.cost.nfe"] == answer["steer"]["cost"]["nfe"] > 0
    assert not any("messages" in name for name in told) and "sun" not in json.dumps(told, default=str)


@needs_otel
def test_streams_searches_and_plain_requests_have_one_each(engine: Any) -> None:
    client, spans = traced(engine)
    asked = {"model": "tiny", "prompt": "the sun", "max_tokens": 3, "temperature": 0}
    client.post("/v1/completions", json={**asked, "stream": True})
    search = {"sampler": "best-of-n", "candidates": 3, "reward": "sentiment"}
    client.post("/v1/chat/completions", json={**ASKED, "temperature": 1, "steer": search})
    client.post("/v1/chat/completions", json=ASKED)
    whole = client.post("/v1/completions", json=asked).json()
    first, second, third, _ = (dict(span.attributes) for span in spans())
    assert first["gen_ai.operation.name"] == "text_completion" and first["gen_ai.request.stream"]
    assert first["gen_ai.response.time_to_first_chunk"] > 0 and "gen_ai.response.time_to_first_chunk" not in third
    assert first["gen_ai.usage.output_tokens"] == whole["usage"]["completion_tokens"] > 0
    assert second["steer.request.sampler"] == "best-of-n" and second["steer.candidates"] == 3
    assert "steer.kl" not in third and "steer.request.edits" not in third and third["steer.cost.nfe"] > 0


@needs_otel
def test_what_comes_to_nothing_says_why(engine: Any) -> None:
    client, spans = traced(engine)
    wrong = {"steer": {"edits": [{"name": "nobody"}]}}
    for given, kind in (({"model": SECRET}, "Refused"), (wrong, "InputError"), ({"max_tokens": 21}, "TooLargeError")):
        assert client.post("/v1/chat/completions", json={**ASKED, **given}).status_code >= 400
        span = spans()[-1]
        assert span.attributes["error.type"] == kind and not span.status.is_ok and span.status.description is None
    assert len(spans()) == 3


@needs_otel
def test_texts_are_there_where_they_are_asked_for(engine: Any) -> None:
    client, spans = traced(engine, text=True)
    answer = client.post("/v1/chat/completions", json=ASKED).json()
    client.post("/v1/completions", json={"model": "tiny", "prompt": [[3, 4]], "max_tokens": 2})
    first, second = (dict(span.attributes) for span in spans())
    (message,) = json.loads(first["gen_ai.input.messages"])
    assert message == {"role": "user", "parts": [{"type": "text", "content": CHAT[0]["content"]}]}
    (said,) = json.loads(first["gen_ai.output.messages"])
    assert said["parts"][0]["content"] == answer["choices"][0]["message"]["content"]
    assert json.loads(second["gen_ai.input.messages"])[0]["parts"] == [{"type": "token_ids", "content": [3, 4]}]


@needs_otel
def test_a_collector_gets_them(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP, at the path of the standard, with the header and the name of the environment."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from steer.serving.app import AppSettings, create_app

    taken: list[tuple[str, Any, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.append((self.path, self.headers, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *given: Any) -> None:
            pass

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    Thread(target=collector.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-of-tests=yes")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "tests-of-traces")
    from steer.serving.traces import exported

    traces = exported(f"http://127.0.0.1:{collector.server_address[1]}")
    with TestClient(create_app(Idle(engine), AppSettings(local=False, traces=traces))) as client:
        assert client.post("/v1/chat/completions", json=ASKED).status_code == 200
    collector.shutdown()
    (path, headers, body) = taken[0]
    assert path == "/v1/traces" and headers["x-of-tests"] == "yes"
    assert b"chat tiny" in body and b"tests-of-traces" in body and b"the sun" not in body


def test_without_them_nothing_is_imported() -> None:
    script = (
        "import sys\n"
        "from types import SimpleNamespace\n"
        "import steer.cli.serving, steer.serving.run\n"
        "from steer.serving.app import create_app\n"
        "facts = dict(name='tiny', kind='none', context_length=None, own_edits=(), check_artifact=print)\n"
        "app = create_app(SimpleNamespace(**facts, give_back_memory=print))\n"
        "assert app.state.server.traces is None\n"
        "named = ('opentelemetry.sdk', 'opentelemetry.exporter', 'steer.serving.traces')\n"
        "found = [name for name in sys.modules if name.startswith(named)]\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wrong_options_in_one_line(
    tiny_lm_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from steer.cli import serving

    def said(*options: str) -> str:
        assert main(["serve", "--model", str(tiny_lm_dir), "--port", "0", *options]) != 0
        return capsys.readouterr().err

    assert "otlp: got 'collector:4318'" in said("--otlp", "collector:4318")
    assert "otlp_text" in said("--otlp-text")
    monkeypatch.setattr(serving, "_TRACING", ("no_such_package.sdk",))
    told = said("--otlp", "http://127.0.0.1:4318")
    assert "pip install 'steer-engine[otel]'" in told and told.count("\n") == 1
