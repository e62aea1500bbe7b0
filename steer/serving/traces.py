"""Spans of OpenTelemetry, one for each request for text. Only servers that trace import this module.

Attributes have the names of the semantic conventions for generative AI where there is one (`gen_ai.*`); what they have
no name for is `steer.*`, as in the answer. Texts of prompts and answers are left out unless they are asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import steer
from steer.serving.answers import Answer
from steer.serving.engine import NamedEdit, Task, TokenPrompt
from steer.serving.wire import SteerRequest

__all__ = ["Trace", "Traces", "exported"]


def exported(url: str, text: bool = False) -> Traces:
    """Spans that go to a collector over HTTP, in batches beside the requests; one that cannot be reached holds nobody
    up. Headers, sampling and the service's name are those of the standard variables (`OTEL_EXPORTER_OTLP_HEADERS`,
    `OTEL_TRACES_SAMPLER`, `OTEL_SERVICE_NAME`, default "steer").
    """
    endpoint = url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1/traces"
    given = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = TracerProvider(resource=Resource.create({} if given else {SERVICE_NAME: "steer"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Traces(provider, text)


class Traces:
    """Begins the span of each request; with `text`, spans hold what was asked and what was answered."""

    def __init__(self, provider: TracerProvider, text: bool = False) -> None:
        self._provider, self._text = provider, text
        self._tracer = provider.get_tracer("steer.serving", steer.__version__)
        self._parents = TraceContextTextMapPropagator()

    def begin(self, operation: str, model: str, headers: Mapping[str, str]) -> Trace:
        """A request has come: `chat` or `text_completion`. It is part of its client's trace where it says so."""
        span = self._tracer.start_span(
            f"{operation} {model}",
            context=self._parents.extract(headers),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "steer",
                "gen_ai.request.model": model,
            },
        )
        return Trace(span, self._text)

    def close(self) -> None:
        """Send what has not been sent. Blocks."""
        self._provider.shutdown()


class Trace:
    """The span of one request. The first of `failed` and `ended` ends it."""

    def __init__(self, span: Span, text: bool) -> None:
        self._span, self._text, self._over = span, text, False

    def prepared(self, task: Task, asked: SteerRequest | None) -> None:
        """The request was read; `asked` is its steering as it, or the server's default, says it."""
        sampling, steering = task.sampling, task.steering
        self._set(
            {
                "gen_ai.request.choice.count": len(task.prompts) * task.n,
                "gen_ai.request.max_tokens": sampling.max_tokens,
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.request.top_p": sampling.top_p,
                "gen_ai.request.top_k": sampling.top_k or None,
                "gen_ai.request.seed": sampling.seed,
                "gen_ai.request.frequency_penalty": sampling.frequency_penalty or None,
                "gen_ai.request.presence_penalty": sampling.presence_penalty or None,
                "gen_ai.request.stream": task.stream,
            }
        )
        if steering is not None and asked is not None:
            edits, sampler = [_name(edit) for edit in steering.edits], asked.sampler or "ancestral"
            told = {"sampler": sampler, "edits": edits, "reward": asked.reward, "beta": asked.beta}
            self._set({f"steer.request.{name}": x for name, x in told.items()})
        if self._text:
            self._set({"gen_ai.input.messages": json.dumps([m for p in task.prompts for m in _messages(p)])})

    def began(self, seconds: float) -> None:
        """The first text is there, this long after the request came."""
        self._set({"gen_ai.response.time_to_first_chunk": seconds})

    def failed(self, kind: str, message: str = "") -> None:
        """The request came to nothing. Messages of errors may quote it, and are left out with its text."""
        if not self._over:
            self._set({"error.type": kind})
            self._span.set_status(Status(StatusCode.ERROR, message if self._text else None))
            self._end()

    def ended(self, answer: Answer) -> None:
        """The request was answered."""
        if self._over:
            return
        usage, told = answer.usage(), answer.steer()
        self._set(
            {
                "gen_ai.response.id": answer.id,
                "gen_ai.response.model": answer.model,
                "gen_ai.response.finish_reasons": [ended.reason for ended in answer.ended],
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
            }
        )
        if told is not None:
            self._set({f"steer.{name}": getattr(told, name) for name in ("reward", "kl", "candidates")})
        if answer.finished is not None:
            self._set({f"steer.cost.{name}": x for name, x in asdict(answer.finished.cost).items()})
        if self._text:
            said = [
                {"role": "assistant", "parts": [_part(text)], "finish_reason": ended.reason}
                for text, ended in zip(answer.texts, answer.ended, strict=True)
            ]
            self._set({"gen_ai.output.messages": json.dumps(said)})
        self._end()

    def _set(self, attributes: Mapping[str, Any]) -> None:
        self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})

    def _end(self) -> None:
        self._over = True
        self._span.end()


def _name(edit: NamedEdit) -> str:
    """An edit by its name, and a vector of the request's own by its digest."""
    return edit.request.name if edit.inline is None else f"sha256:{edit.digest[:16]}"


def _part(text: str) -> dict[str, Any]:
    return {"type": "text", "content": text}


def _messages(prompt: Any) -> Sequence[dict[str, Any]]:
    if isinstance(prompt, TokenPrompt):
        return [{"role": "user", "parts": [{"type": "token_ids", "content": list(prompt.ids)}]}]
    if isinstance(prompt, str):
        return [{"role": "user", "parts": [_part(prompt)]}]
    return [{"role": message["role"], "parts": [_part(message["content"])]} for message in prompt]
