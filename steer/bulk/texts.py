"""Rows of texts as requests to an engine that serves, so that rows of any length decode together."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from steer.bulk.source import Row, spent
from steer.core import InputError, check
from steer.seeds import mixed
from steer.serving.answers import Answer, Chat, Completion
from steer.serving.engine import Engine, Task
from steer.serving.protocol import ChatAnswer, ChatRequest, CompletionRequest
from steer.serving.tasks import Tasks
from steer.serving.wire import field_of, nearest, wanted

__all__ = ["Requests"]

_OPENAI = {"custom_id", "method", "url", "body"}
_ROUTES = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}
_ROW_FIELDS = (ChatRequest.model_fields.keys() | {"prompt", "id"}) - {"stream", "stream_options"}


@dataclass(frozen=True)
class _Asked:
    """One row's request, checked; `rows` texts of it decode together."""

    task: Task
    prepared: Any
    answer: Answer
    rows: int
    seed: int
    kept: dict[str, Any]
    openai: bool


class Requests:
    """Answers rows through an engine.

    A row is a line of OpenAI's batch format (`custom_id`, `url`, `body`), or an object with `prompt` (a user's words;
    plain text for models without a chat template) or `messages`, beside fields of a request: `temperature`,
    `max_tokens`, `n`, `seed`, `steer` and so on. Any other field is refused by name unless it is in `keep`, which the
    record then carries.

    Args:
        engine: what generates.
        tasks: reads requests; its default steers rows that have no `steer` of their own.
        fields: of requests, where a row has none of its own.
        system: a system message before every `prompt`.
        seed: rows without a seed get one that follows from this and their id.
        keep: further fields, which are carried into the record.
        capacity: texts that are in the engine at one time, waiting ones among them.
    """

    def __init__(
        self,
        engine: Engine,
        tasks: Tasks,
        *,
        fields: Mapping[str, Any] | None = None,
        system: str | None = None,
        seed: int = 0,
        keep: frozenset[str] = frozenset(),
        capacity: int = 64,
    ) -> None:
        self.engine, self.tasks, self.seed, self.keep, self.capacity = engine, tasks, seed, keep, capacity
        self._system = system
        self._fields = {k: v for k, v in (fields or {}).items() if v is not None}

    def check_fields(self, names: frozenset[str]) -> None:
        """Raise `InputError` for columns that are neither a row's nor kept."""
        check_fields(names, self.keep)

    def rows(self, asked: _Asked) -> int:
        """Texts that a row has in the engine at one time."""
        return min(asked.rows, self.capacity)

    def prepare(self, row: Row) -> _Asked:
        """A row's request, checked. Raises `SteerError`."""
        data = dict(row.data or {})
        openai = data.keys() >= _OPENAI
        kept = {name: data.pop(name) for name in self.keep & data.keys()}
        asked, kind, answer = self._openai(data) if openai else self._plain(data)
        asked.setdefault("model", self.engine.name)
        check(asked["model"] == self.engine.name, "model", asked["model"], f"{self.engine.name}, or no model")
        check(not asked.get("stream"), "stream", True, "unset: records are whole")
        prompt = asked.pop("prompt") if not openai and "prompt" in asked else None
        if prompt is not None:
            check(isinstance(prompt, str) and bool(prompt), "prompt", prompt, "a text")
            check("messages" not in asked, "prompt", prompt, "one of prompt and messages")
            opening = [] if self._system is None else [{"role": "system", "content": self._system}]
            asked["messages"] = [*opening, {"role": "user", "content": prompt}]
        request = _read(kind, asked)
        task = self.tasks.chat(request) if isinstance(request, ChatRequest) else self.tasks.completion(request)
        seed = task.sampling.seed if task.sampling.seed is not None else mixed("bulk", self.seed, row.id) % 2**63
        task = replace(task, sampling=replace(task.sampling, seed=seed), stream=False)
        if prompt is not None:
            task = replace(task, prompts=(prompt,)) if self._system is None else task
            kept["prompt"] = prompt
        elif not openai:
            kept["messages"] = asked["messages"]
        steering = task.steering
        rows = task.n * len(task.prompts) if steering is None or steering.sampler is None else steering.sampler.rows
        made = answer(self.engine.name, task)
        made.id = f"{made.prefix}-{mixed(seed, row.id):016x}"
        return _Asked(task, self.engine.prepare(task), made, rows, seed, kept, openai)

    async def answer(self, row: Row, asked: _Asked) -> dict[str, Any]:
        """The row's record."""
        async with aclosing(self.engine.run(asked.prepared)) as events:
            async for event in events:
                asked.answer.collect(event)
        whole = asked.answer.whole()
        if asked.openai:
            response = {"status_code": 200, "request_id": whole.id, "body": whole.model_dump()}
            return {"id": row.id, "custom_id": row.id, "response": response, "error": None, **asked.kept}
        assert isinstance(whole, ChatAnswer)
        samples = [
            {
                "text": choice.message.content,
                "finish_reason": choice.finish_reason,
                **({} if choice.steer is None else choice.steer.model_dump()),
            }
            for choice in whole.choices
        ]
        record = {"id": row.id, **asked.kept, "samples": samples, "seed": asked.seed}
        assert asked.answer.finished is not None
        return {**record, "cost": spent(asked.answer.finished.cost)}

    def failure(self, row: Row, message: str, field: str | None) -> dict[str, Any]:
        """The record of a row that failed."""
        error = {"message": message, "param": field}
        kept = {name: row.data[name] for name in self.keep & row.data.keys()} if row.data else {}
        if row.data and row.data.keys() >= _OPENAI:
            return {"id": row.id, "custom_id": row.id, "response": None, "error": error, **kept}
        return {"id": row.id, **kept, "samples": [], "error": error}

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()

    # ---- rows

    def _openai(self, data: dict[str, Any]) -> tuple[dict[str, Any], type, type[Answer]]:
        url, body = data["url"], data["body"]
        check(url in _ROUTES, "url", url, ", ".join(_ROUTES))
        check(data["method"] == "POST", "method", data["method"], "POST")
        check(isinstance(body, dict), "body", body, "an object, the body of a request")
        kind = _ROUTES[url]
        return self._filled(body, kind), kind, Chat if kind is ChatRequest else Completion

    def _plain(self, data: dict[str, Any]) -> tuple[dict[str, Any], type, type[Answer]]:
        data.pop("id", None)
        check("prompt" in data or "messages" in data, "prompt", None, "a row with a prompt or messages")
        return self._filled(data, ChatRequest), ChatRequest, Chat

    def _filled(self, given: dict[str, Any], kind: type) -> dict[str, Any]:
        """The fields of a row over those of the job."""
        return {k: v for k, v in self._fields.items() if k in kind.model_fields and k not in given} | given  # type: ignore[attr-defined]


def _read(kind: type, given: dict[str, Any]) -> Any:
    try:
        return kind.model_validate(given)  # type: ignore[attr-defined]
    except ValidationError as error:
        first = nearest(error.errors())
        field = ".".join(field_of(first["loc"])) or "row"
        if first["type"] == "extra_forbidden":
            raise InputError(field, first.get("input"), "no such field") from None
        raise InputError(field, first.get("input"), wanted(first).removeprefix("allowed: ")) from None


def check_fields(names: frozenset[str], keep: frozenset[str]) -> None:
    """Raise `InputError` for columns that are neither a request's nor kept."""
    unknown = sorted(names - _ROW_FIELDS - keep - _OPENAI)
    check(not unknown, "source", f"a field {', '.join(unknown)}", f"{', '.join(sorted(_ROW_FIELDS))}, or --keep NAME")
