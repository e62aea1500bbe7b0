"""Requests as the engines behind the server share them: prompts to tokens, limits, and the way of events."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from steer import artifacts
from steer.core import InputError, Prompt, PromptEdit, RawText, Reward, Samples, SteerError, check
from steer.serving.artifact_store import digest
from steer.serving.engine import (
    Delta,
    Ended,
    Event,
    Finished,
    NamedEdit,
    Sampling,
    Steering,
    Task,
    TokenPrompt,
    TooLargeError,
)

__all__ = [
    "AGAIN",
    "Emit",
    "Encoded",
    "Request",
    "Words",
    "check_card",
    "check_rows",
    "check_search",
    "choice_events",
    "edit_errors",
    "read",
    "relayed",
    "rewritten",
    "scored",
    "seed_of",
    "token_ids",
    "unchanged",
]


Emit = Callable[[Event | Exception], None]
"""Takes the events of one request, from any thread; `Finished` or an exception is the last of them."""


class Words(Protocol):
    """The text side of a language model, with its limits."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def context_length(self) -> int | None: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    def encode(self, prompt: Prompt) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def show(self, prompt: Prompt) -> Any: ...


class Encoded(RawText):
    """Text that came as token ids, which stay what they are."""

    ids: tuple[int, ...]

    @classmethod
    def of(cls, text: str, ids: tuple[int, ...]) -> Encoded:
        made = cls(text)
        made.ids = ids
        return made


@dataclass(frozen=True)
class Request:
    """A task whose prompts are tokens and whose length is settled."""

    task: Task
    prompts: tuple[Prompt, ...]
    ids: tuple[tuple[int, ...], ...]
    sampling: Sampling

    @property
    def steering(self) -> Steering:
        return self.task.steering or Steering()

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.task.n

    @property
    def columns(self) -> int:
        """Positions that its longest row has at most."""
        return max(map(len, self.ids)) + self.sampling.max_tokens

    @property
    def penalises(self) -> bool:
        """Whether the law depends on more than the model, its edits and its truncation."""
        s = self.sampling
        return bool(s.frequency_penalty or s.presence_penalty or s.logit_bias)


# ----------------------------------------------------------------------------------------------------------- prompts


def read(task: Task, words: Words) -> Request:
    """The task in tokens. Raises `InputError` that names the field."""
    prompts = tuple(_prompt(p, words) for p in task.prompts)
    ids = tuple(tuple(_encode(p, words)) for p in prompts)
    return Request(task, prompts, ids, _sized(task, ids, words))


def rewritten(request: Request, edits: Sequence[PromptEdit], words: Words, kept: Sequence[bool]) -> Request:
    """The request after edits of its prompt, with those of its edits that are `kept`. The drift of its texts is not
    measured: it would be that to the model under the same hint. Raises `InputError`.
    """
    prompts = list(request.prompts)
    for edit in edits:
        prompts = edit.rewrite_all(prompts)
    steering = request.steering
    named = tuple(edit for edit, keep in zip(steering.edits, kept, strict=True) if keep)
    task = replace(request.task, prompts=tuple(prompts), steering=replace(steering, edits=named, kl=False))
    return read(task, words)


def _prompt(prompt: Prompt | TokenPrompt, words: Words) -> Prompt:
    if not isinstance(prompt, TokenPrompt):
        return prompt
    top = words.vocabulary
    for token in prompt.ids:
        check(0 <= token < top, "prompt", token, f"token ids from 0 to {top - 1}")
    check(len(prompt.ids) > 0, "prompt", [], "at least one token")
    return Encoded.of(words.decode(prompt.ids), prompt.ids)


def _encode(prompt: Prompt, words: Words) -> list[int]:
    if isinstance(prompt, Encoded):
        return list(prompt.ids)
    name = "prompt" if isinstance(prompt, str) else "messages"
    try:
        ids = words.encode(prompt)
    except InputError as error:
        raise InputError(name, error.given, error.allowed) from error
    except Exception as error:  # a chat template is a program of its own, and refuses what it does not know
        raise InputError(name, f"messages that the chat template refuses ({error})", "others") from error
    check(bool(ids), name, "", "a prompt with at least one token")
    return ids


def _sized(task: Task, ids: Sequence[Sequence[int]], words: Words) -> Sampling:
    """The sampling with as many tokens as the context leaves."""
    sampling, limit = task.sampling, words.context_length
    for token, _ in sampling.logit_bias:
        check(0 <= token < words.vocabulary, "logit_bias", token, f"0 to {words.vocabulary - 1}")
    if limit is None:
        return sampling
    longest = max(map(len, ids))
    name = "prompt" if isinstance(task.prompts[0], str | TokenPrompt) else "messages"
    if longest >= limit:
        raise InputError(name, f"{longest} tokens", f"fewer than {limit} tokens, the model's context")
    if sampling.trim:
        return replace(sampling, max_tokens=min(sampling.max_tokens, limit - longest))
    if longest + sampling.max_tokens > limit:
        raise InputError(
            name,
            f"{longest} tokens and max_tokens={sampling.max_tokens}",
            f"at most {limit} tokens in all, the model's context",
        )
    return sampling


def token_ids(prompts: Sequence[Prompt], words: Words) -> list[list[int]]:
    """Token ids of every prompt; those that came as token ids stay what they are."""
    return [list(p.ids) if isinstance(p, Encoded) else words.encode(p) for p in prompts]


def seed_of(sampling: Sampling) -> int:
    """The request's seed, or one of ours."""
    return secrets.randbits(31) if sampling.seed is None else sampling.seed


# ------------------------------------------------------------------------------------------------------------ limits


def check_rows(request: Request, max_rows: int, cache_tokens: int | None = None) -> None:
    """Raise `TooLargeError` for more choices than can decode together."""
    rows = request.choices
    if rows > max_rows:
        raise TooLargeError("n", f"{rows} choices", f"at most {max_rows} rows that decode together")
    if cache_tokens is not None and rows * request.columns > cache_tokens:
        raise TooLargeError(
            "max_tokens",
            f"{rows} choices of up to {request.columns} tokens with their prompt",
            f"at most {cache_tokens} tokens in all, the room of the cache",
        )


def check_search(request: Request, max_rows: int, cache_tokens: int | None = None) -> None:
    """Raise `InputError` for what no search does, `TooLargeError` for one that does not fit."""
    sampling, sampler = request.sampling, request.steering.sampler
    assert sampler is not None
    for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
        check(not getattr(sampling, name), name, getattr(sampling, name), "unset: a search draws without it")
    check(sampling.logprobs is None, "logprobs", True, "unset: a search reports rewards, not log-probabilities")
    rows = sampler.rows
    if rows > max_rows or (cache_tokens is not None and rows * request.columns > cache_tokens):
        room = "" if cache_tokens is None else f" and {cache_tokens} tokens"
        raise TooLargeError(
            "steer.candidates",
            f"{rows} rows of up to {request.columns} tokens at once",
            f"at most {max_rows} rows{room}",
        )


# --------------------------------------------------------------------------------------------------------- artifacts


def check_card(path: Path) -> None:
    """Raise `InputError` for an artifact that asks for other files."""
    card = artifacts.read_card(path)
    for name in ("gate", "tokens"):
        check(not card.settings.get(name), "artifact", f"a card that names a file ({name})", "a card without")


AGAIN = "register it again, or restart the server"


@contextmanager
def unchanged(named: NamedEdit, field: str = "steer.edits") -> Iterator[None]:
    """Have an artifact's file read. Raises `InputError` where it is not what was registered, before and after."""
    _check_unchanged(named, field)
    yield
    _check_unchanged(named, field)


def _check_unchanged(named: NamedEdit, field: str) -> None:
    if named.path is None:
        return
    name = named.request.name
    try:
        same = digest(named.path) == named.digest
    except OSError:
        given = f"{name} (its file is gone)"
        raise InputError(f"{field}.name", given, f"an artifact whose file is there; {AGAIN}") from None
    allowed = f"an artifact whose file is the one registered; {AGAIN}"
    check(same, f"{field}.name", f"{name} (its file was replaced)", allowed)


@contextmanager
def edit_errors(name: str, options: Any, field: str = "steer.edits") -> Iterator[None]:
    """Whatever is wrong with an artifact under a request's `options` becomes an `InputError` of `field`."""
    try:
        yield
    except SteerError as error:
        if isinstance(error, InputError) and error.field.startswith("steer."):
            raise
        given, allowed = (error.given, error.allowed) if isinstance(error, InputError) else (name, str(error))
        where = f"{field}.{error.field}" if isinstance(error, InputError) and options else field
        raise InputError(where, given, allowed) from error
    except Exception as error:  # whatever somebody's file is made to lead to
        why = f"{name} (cannot be used: {type(error).__name__}: {error})"
        raise InputError(field, why, "an artifact as steer writes it") from error


# ------------------------------------------------------------------------------------------------------------ events


async def relayed(begin: Callable[[Emit], Callable[[], None]], last: type = Finished) -> AsyncGenerator[Event]:
    """The events that other threads emit, up to the first of the kind `last`. `begin` starts the work and returns what
    stops it, which is called in any case.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[Event | Exception] = asyncio.Queue()

    def emit(event: Event | Exception) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(events.put_nowait, event)

    stop = begin(emit)
    try:
        while True:
            event = await events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if isinstance(event, last):
                return
    finally:
        stop()


def scored(
    request: Request, words: Words, reward: Reward, texts: Sequence[str], tokens: Sequence[Sequence[int]]
) -> list[float]:
    """Rewards of finished choices, in order."""
    samples = Samples(
        prompts=[words.show(p) for p in request.prompts],
        outputs=list(texts),
        tokens=[list(row) for row in tokens],
        group=torch.arange(len(texts)) // request.task.n,
        log_weight=torch.zeros(len(texts), dtype=torch.float64),
    )
    return [float(x) for x in reward(samples)]


def choice_events(request: Request, words: Words, samples: Samples, kl: torch.Tensor | None) -> Iterator[Delta | Ended]:
    """The choices that a search came to, prompt by prompt; `kl` `[N]` as far as it is known."""
    limit, eos, stop = request.sampling.max_tokens, frozenset(words.eos_token_ids), request.steering.stop
    assert samples.tokens is not None
    for choice, i in enumerate(samples.group.argsort(stable=True).tolist()):
        tokens, text = samples.tokens[i], samples.texts[i]
        read: dict[str, list[float]] | None = None
        if samples.readings is not None:
            read = {name: rows[i].tolist() for name, rows in samples.readings.items()}
        stopped = stop is not None and read is not None and bool(stop.met(read[stop.name][-1]))
        cut = stopped or words.decode(tokens) != text
        whole = len(tokens) >= limit and tokens[-1] not in eos and not cut
        reason: Literal["stop", "length"] = "length" if whole else "stop"
        yield Delta(choice, text)
        reward = None if samples.reward is None else float(samples.reward[i])
        yield Ended(choice, reason, len(tokens), reward, None if kl is None else float(kl[i]), read, stopped)
