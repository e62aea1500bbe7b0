"""Answers as OpenAI's clients read them, whole or as a stream of chunks, from an engine's events."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from steer.serving.engine import Delta, Ended, Event, Finished, Progress, Started, Task, TokenLogprob
from steer.serving.protocol import (
    AssistantMessage,
    ChatAnswer,
    ChatChoice,
    ChatLogprob,
    ChatLogprobs,
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    CostAnswer,
    ReadChoice,
    SteerAnswer,
    SteerChoice,
    TopLogprob,
    Usage,
)

__all__ = ["Answer", "Chat", "Completion"]


@dataclass
class _Choice:
    """What has come of one choice."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    ended: Ended | None = None
    offset: int = 0
    """Characters of tokens that were reported before, in streams."""


class Answer(ABC):
    """Collects the events of one request. `add` yields the chunks of a stream, `whole` the answer without one."""

    prefix = ""
    chunk_object = ""
    operation = ""
    """What traces call it."""

    def __init__(self, model: str, task: Task, usage: bool = False) -> None:
        self.model, self.task, self.usage_wanted = model, task, usage
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self.prompt_tokens = 0
        self.finished: Finished | None = None
        self._choices = [_Choice() for _ in range(len(task.prompts) * task.n)]
        self._held: Ended | None = None

    # ---- collecting

    def collect(self, event: Event) -> None:
        """Take note of an event."""
        if isinstance(event, Started):
            self.prompt_tokens = event.prompt_tokens
        elif isinstance(event, Delta):
            self._choices[event.choice].text.append(event.text)
            self._choices[event.choice].logprobs += event.logprobs
        elif isinstance(event, Ended):
            self._choices[event.choice].ended = event
        elif isinstance(event, Finished):
            self.finished = event

    @property
    def ended(self) -> list[Ended]:
        """Choices that are complete."""
        return [choice.ended for choice in self._choices if choice.ended is not None]

    @property
    def texts(self) -> list[str]:
        """Of all choices, as far as they have come."""
        return ["".join(choice.text) for choice in self._choices]

    def usage(self) -> Usage:
        """As OpenAI counts: tokens of the choices that come back."""
        drawn = sum(ended.tokens for ended in self.ended)
        return Usage(prompt_tokens=self.prompt_tokens, completion_tokens=drawn, total_tokens=self.prompt_tokens + drawn)

    def steer(self) -> SteerAnswer | None:
        """What steering came to, where it was asked for."""
        if self.task.steering is None or self.finished is None:
            return None
        rewards = [number for e in self.ended if (number := _finite(e.reward)) is not None]
        drifts = [number for e in self.ended if (number := _finite(e.kl)) is not None]
        return SteerAnswer(
            reward=max(rewards, default=None),
            candidates=self.finished.candidates,
            kl=sum(drifts) / len(drifts) if drifts else None,
            cost=CostAnswer(**asdict(self.finished.cost)),
        )

    def choice_steer(self, ended: Ended) -> SteerChoice | None:
        """The same for one choice."""
        if self.task.steering is None:
            return None
        told = {"reward": _finite(ended.reward), "kl": _finite(ended.kl)}
        if ended.readings is None:
            return SteerChoice(**told)
        read = {name: [_finite(x) for x in row] for name, row in ended.readings.items()}
        return ReadChoice(**told, readings=read, stopped=ended.stopped)

    @abstractmethod
    def whole(self) -> ChatAnswer | CompletionAnswer:
        """The answer, once everything has come."""

    # ---- streaming

    def add(self, event: Event) -> Iterator[dict[str, Any]]:
        """The chunks that an event leads to."""
        self.collect(event)
        if isinstance(event, Started):
            yield from self._openings()
        elif isinstance(event, Progress):
            yield self._chunk(self._nothing(0), {"progress": {k: v for k, v in asdict(event).items() if v is not None}})
        elif isinstance(event, Delta):
            yield from self._release()
            if event.text or event.logprobs:
                yield self._chunk(self._piece(event))
        elif isinstance(event, Ended):
            yield from self._release()
            self._held = event
        else:
            steer = self.steer()
            yield from self._release(None if steer is None else steer.model_dump())
            if self.usage_wanted:
                yield {**self._chunk(None), "usage": self.usage().model_dump()}

    def _release(self, steer: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """The last chunk of a choice. It is held back until something follows it: the last of all tells what the whole
        request came to.
        """
        if self._held is not None:
            mine = self.choice_steer(self._held)
            end = {**self._nothing(self._held.choice), "finish_reason": self._held.reason}
            yield self._chunk(end if mine is None else {**end, "steer": mine.model_dump()}, steer)
            self._held = None

    def _chunk(self, choice: dict[str, Any] | None, steer: dict[str, Any] | None = None) -> dict[str, Any]:
        made: dict[str, Any] = {
            "id": self.id,
            "object": self.chunk_object,
            "created": self.created,
            "model": self.model,
            "choices": [] if choice is None else [choice],
        }
        if self.usage_wanted:
            made["usage"] = None
        if steer is not None:
            made["steer"] = steer
        return made

    def _openings(self) -> Iterator[dict[str, Any]]:
        yield from ()

    @abstractmethod
    def _nothing(self, index: int) -> dict[str, Any]:
        """A choice's part of a chunk that adds no text."""

    @abstractmethod
    def _piece(self, event: Delta) -> dict[str, Any]:
        """A choice's part of a chunk with new text."""


class Chat(Answer):
    """Of `/v1/chat/completions`."""

    prefix, chunk_object, operation = "chatcmpl", "chat.completion.chunk", "chat"

    def whole(self) -> ChatAnswer:
        choices = [
            ChatChoice(
                index=i,
                message=AssistantMessage(content="".join(c.text)),
                finish_reason=ended.reason,
                logprobs=self._named(c.logprobs),
                steer=self.choice_steer(ended),
            )
            for i, (c, ended) in enumerate(zip(self._choices, self.ended, strict=True))
        ]
        return ChatAnswer(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=self.usage(), steer=self.steer()
        )

    def _openings(self) -> Iterator[dict[str, Any]]:
        for i in range(len(self._choices)):
            yield self._chunk({**self._nothing(i), "delta": {"role": "assistant", "content": ""}})

    def _nothing(self, index: int) -> dict[str, Any]:
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": None}

    def _piece(self, event: Delta) -> dict[str, Any]:
        named = self._named(event.logprobs)
        return {
            **self._nothing(event.choice),
            "delta": {"content": event.text},
            "logprobs": None if named is None else named.model_dump(),
        }

    def _named(self, tokens: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        if self.task.sampling.logprobs is None:
            return None

        def plain(t: TokenLogprob) -> dict[str, Any]:
            return {"token": t.token, "logprob": t.logprob, "bytes": list(t.bytes)}

        return ChatLogprobs(
            content=[ChatLogprob(**plain(t), top_logprobs=[TopLogprob(**plain(o)) for o in t.top]) for t in tokens]
        )


class Completion(Answer):
    """Of `/v1/completions`."""

    prefix, chunk_object, operation = "cmpl", "text_completion", "text_completion"

    def whole(self) -> CompletionAnswer:
        choices = [
            CompletionChoice(
                index=i,
                text="".join(c.text),
                finish_reason=ended.reason,
                logprobs=self._named(c, c.logprobs),
                steer=self.choice_steer(ended),
            )
            for i, (c, ended) in enumerate(zip(self._choices, self.ended, strict=True))
        ]
        return CompletionAnswer(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=self.usage(), steer=self.steer()
        )

    def _nothing(self, index: int) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": None}

    def _piece(self, event: Delta) -> dict[str, Any]:
        named = self._named(self._choices[event.choice], event.logprobs)
        return {
            **self._nothing(event.choice),
            "text": event.text,
            "logprobs": None if named is None else named.model_dump(),
        }

    def _named(self, choice: _Choice, tokens: Sequence[TokenLogprob]) -> CompletionLogprobs | None:
        if self.task.sampling.logprobs is None:
            return None
        offsets = []
        for t in tokens:
            offsets.append(choice.offset)
            choice.offset += len(t.token)
        return CompletionLogprobs(
            tokens=[t.token for t in tokens],
            token_logprobs=[t.logprob for t in tokens],
            top_logprobs=[
                None if t.logprob is None else {o.token: o.logprob for o in (*t.top, t) if o.logprob is not None}
                for t in tokens
            ],
            text_offset=offsets,
        )


def _finite(x: float | None) -> float | None:
    """JSON knows no NaN and no infinity."""
    return x if x is not None and abs(x) < float("inf") else None
