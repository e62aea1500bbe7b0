"""Counters of the server, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steer.serving.artifact_store import Store
from steer.serving.engine import Engine
from steer.serving.gate import Gate

__all__ = ["CountedRequests", "Metrics"]


_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 300)


class Metrics:
    """One server's counters, in a registry of their own."""

    def __init__(self, engine: Engine, gate: Gate, store: Store) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Now(engine, gate, store))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self._registry)

        self.answers = counter("steer_http_answers", "Answers by path and status.", "path", "status")
        self.requests = counter("steer_requests", "Requests for text by kind.", "kind")
        self.prompt_tokens = counter("steer_prompt_tokens", "Tokens of prompts.")
        self.returned_tokens = counter("steer_returned_tokens", "Tokens of choices that came back.")
        self.generated_tokens = counter("steer_generated_tokens", "Tokens that were drawn, of every candidate.")
        self.reward_calls = counter("steer_reward_calls", "Texts that were scored.")
        self.left = counter("steer_clients_left", "Requests whose client went away.")
        self.seconds = Histogram(
            "steer_request_seconds",
            "From a request's arrival to its end.",
            ["kind"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.first_token = Histogram(
            "steer_first_text_seconds",
            "From a request's arrival to its first text.",
            ["kind"],
            buckets=_SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """Everything in Prometheus's text format."""
        return generate_latest(self._registry)


class _Now(Collector):
    """Gauges, read when they are asked for."""

    def __init__(self, engine: Engine, gate: Gate, store: Store) -> None:
        self._engine, self._gate, self._store = engine, gate, store

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        load = self._engine.load()
        for name, text, value in (
            ("steer_inside", "Requests that run or wait.", self._gate.inside),
            ("steer_rows", "Texts that are being written.", load.rows),
            ("steer_searches", "Searches that take turns.", load.searches),
            ("steer_waiting", "Requests that wait for room.", load.waiting),
            ("steer_cache_bytes", "Memory of the running batch's cache.", load.cache_bytes),
            ("steer_artifacts", "Registered artifacts.", len(self._store)),
            ("steer_artifact_bytes", "Bytes of registered artifacts.", self._store.nbytes),
        ):
            yield GaugeMetricFamily(name, text, value=value)


class CountedRequests:
    """ASGI middleware that counts answers by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = "none"

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            # The pattern of the route, not the path: clients do not choose the names of counters.
            route = scope.get("route")
            self.metrics.answers.labels(getattr(route, "path", "other"), status).inc()
