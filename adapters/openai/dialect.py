"""Requests to an OpenAI-compatible endpoint and its answers: chat completions and completions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steer.adapters.openai.connection import Call, EndpointError
from steer.core import Cost, Prompt, RawText, check

__all__ = ["END_TOKENS", "Reply", "ReplyChoice", "Dialect", "Question"]


END_TOKENS = (
    "</s>",
    "<eos>",
    "[EOS]",
    "<EOS>",
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|return|>",
    "<|eot|>",
    "<end_of_turn>",
    "<turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>",
)
"""How tokens that end a text are shown among logprobs by widely used models."""

_RESERVED = frozenset(
    {
        "model",
        "messages",
        "prompt",
        "n",
        "seed",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "stop",
        "logprobs",
        "top_logprobs",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "echo",
        "best_of",
        "continue_final_message",
        "add_generation_prompt",
    }
)

_BROKEN_OFF = (
    "abort",
    "aborted",
    "cancelled",
    "content_filter",
    "error",
    "insufficient_system_resource",
    "network_error",
)
"""What endpoints say of a text that neither its model nor its limit ended."""
PREFILL = ("continue_final_message", "prefix", "last")


@dataclass(frozen=True)
class Question:
    """A prompt as the endpoint is to see it: text to be continued, or a chat's messages."""

    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class ReplyChoice:
    """One text of an answer.

    `ended` says that it came to its end rather than to the limit of tokens; `log_prob` is the sum over its tokens, None
    where the endpoint gave none. `candidates` are the likeliest first tokens, with equal texts added up, as
    `(text, log-probability)` in falling order; a text of None ends it. `missing` says what came instead where no text
    did, such as reasoning alone.
    """

    text: str
    ended: bool
    log_prob: float | None
    candidates: tuple[tuple[str | None, float], ...] | None
    missing: str = ""


@dataclass(frozen=True)
class Reply:
    choices: tuple[ReplyChoice, ...]
    cost: Cost


@dataclass(frozen=True)
class Dialect:
    """What one endpoint understands; see `load` for the fields."""

    model: str
    chat: bool | None = None
    prefill: str | None = None
    send_seed: bool = True
    max_choices: int = 16
    length_field: str = "max_tokens"
    end_tokens: tuple[str, ...] = END_TOKENS
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self.chat is None or isinstance(self.chat, bool), "chat", self.chat, "True, False, None")
        check(self.prefill in (None, *PREFILL), "prefill", self.prefill, f"{', '.join(PREFILL)}, None")
        whole = isinstance(self.max_choices, int) and self.max_choices >= 1
        check(whole, "max_choices", self.max_choices, "an integer of 1 or more")
        fields = ("max_tokens", "max_completion_tokens")
        check(self.length_field in fields, "length_field", self.length_field, ", ".join(fields))
        for name in self.extra:
            check(name not in _RESERVED, "extra", name, "fields that are not set otherwise")

    def encode(self, prompt: Prompt, continued: bool) -> Question:
        """Checks a prompt; `continued` says that texts will be sent back to be continued."""
        if isinstance(prompt, str):
            check(bool(prompt.strip()), "prompt", prompt, "text that is not empty")
            raw = isinstance(prompt, RawText)
            if self.chat is False or (raw and self.chat is None):
                return Question(text=str(prompt))
            check(not raw, "prompt", "raw text", "a chat: this endpoint is asked for chat completions only (chat=True)")
            prompt = [{"role": "user", "content": str(prompt)}]
        check(
            bool(prompt) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in prompt),
            "prompt",
            prompt,
            "text, or messages with role and content",
        )
        check(self.chat is not False, "prompt", "messages", "text: this endpoint is asked for completions (chat=False)")
        resumed = prompt[-1]["role"] == "assistant"
        if continued or resumed:
            check(
                self.prefill is not None,
                "prefill",
                None,
                f"{', '.join(PREFILL)}: the way in which this endpoint "
                "continues a reply that was begun, if it can; or raw text, or chat=False",
            )
        begun = not resumed or isinstance(prompt[-1]["content"], str)
        check(begun, "prompt", "content in parts", "text in the assistant's message that is to be continued")
        return Question(messages=tuple(dict(m) for m in prompt))

    def call(self, question: Question, text: str, tokens: int, seed: int, **fields: Any) -> Call:
        """The request for up to `tokens` tokens after `text`. `fields` that are None are left out."""
        given = {k: v for k, v in fields.items() if v is not None}
        body = {"model": self.model, **self._opening(question, text), self.length_field: tokens, **given, **self.extra}
        if self.send_seed:
            body["seed"] = seed
        return Call("/chat/completions" if question.messages else "/completions", body)

    def _opening(self, question: Question, text: str) -> dict[str, Any]:
        if not question.messages:
            return {"prompt": question.text + text}
        messages = list(question.messages)
        resumed = messages[-1]["role"] == "assistant"
        if not (text or resumed):
            return {"messages": messages}
        begun = messages.pop() if resumed else {"role": "assistant", "content": ""}
        last = {**begun, "content": begun["content"] + text}
        if self.prefill == "prefix":
            last["prefix"] = True
        opening: dict[str, Any] = {"messages": [*messages, last]}
        if self.prefill == "continue_final_message":
            opening |= {"continue_final_message": True, "add_generation_prompt": False}
        return opening

    def logprobs(self, question: Question, top: int | None) -> dict[str, Any]:
        """The fields that ask for log-probabilities: of the `top` likeliest tokens, or of those drawn (0)."""
        if top is None:
            return {}
        if question.messages:
            return {"logprobs": True, "top_logprobs": top or None}
        return {"logprobs": top}

    def answer(self, data: Any, top: int | None) -> Reply:
        """What an answer says. Raises `EndpointError` where it has not the expected shape."""
        try:
            choices = sorted(data["choices"], key=lambda choice: choice.get("index") or 0)
            read = tuple(self._choice(choice, top) for choice in choices)
            drawn = sum(len(_positions(choice)) for choice in choices)
            usage = data.get("usage") or {}
            prompt, generated = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or drawn)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            raise EndpointError(
                f"model {self.model}: its answer has no choices as OpenAI's clients read them"
            ) from None
        cost = Cost(prompt_tokens=prompt, generated_tokens=generated, model_calls=1, nfe=prompt + generated)
        return Reply(read, cost)

    def _choice(self, choice: dict[str, Any], top: int | None) -> ReplyChoice:
        finish = choice.get("finish_reason")
        given = _text(choice["message"]) if "message" in choice else choice["text"]
        instead = _instead(choice.get("message") or {}) if not given else ""
        text, ended = given or "", finish != "length"
        # An end that was drawn at once may be shown as null, where one token was asked for.
        empty = given is not None or (finish == "stop" and bool(top))
        missing = "" if text or (empty and not instead) else self._missing(instead or "null", finish)
        if text and finish in _BROKEN_OFF:
            missing = f"model {self.model}: its text broke off (finish_reason {finish!r})"
        positions = _positions(choice)
        known = all(isinstance(p.log_prob, int | float) for p in positions) and bool(positions)
        return ReplyChoice(
            text=text,
            ended=ended,
            log_prob=sum(p.log_prob for p in positions) if known else None,
            candidates=self._candidates(positions, top, closing=ended and not text) if top else None,
            missing=missing,
        )

    def _missing(self, instead: str, finish: Any) -> str:
        way = "; a larger max_new_tokens may leave room for one" if finish == "length" else ""
        return f"model {self.model}: its answer has no text but {instead} (finish_reason {finish!r}){way}"

    def _candidates(
        self, positions: Sequence[_Position], top: int, closing: bool
    ) -> tuple[tuple[str | None, float], ...] | None:
        if not positions or not positions[0].top:
            return () if closing else None
        first = positions[0]
        likeliest = sorted(first.top, key=lambda t: (-t.log_prob, t.shown))[:top]
        merged: dict[str | None, float] = {}
        for token in likeliest:
            # Where the endpoint ended the text with a token, that token ends texts, whatever its name.
            ends = token.text == "" or token.shown in self.end_tokens or (closing and token.shown == first.shown)
            if not ends and token.text is None:
                continue
            name = None if ends else token.text
            merged[name] = _log_add(merged.get(name, -math.inf), token.log_prob)
        return tuple(sorted(merged.items(), key=lambda item: -item[1]))


def _text(message: dict[str, Any]) -> str | None:
    """The text of a message; that of its parts, where it comes in parts."""
    content = message.get("content")
    if not isinstance(content, list):
        return content
    return "".join(part["text"] for part in content if part.get("type") in ("text", "output_text"))


def _instead(message: dict[str, Any]) -> str:
    """What a message holds in place of a text, in words; empty where it holds nothing."""
    content = message.get("content")
    thoughts = [part for part in content if part.get("type") not in ("text", "output_text")] if content else []
    named = [said for name, said in message.items() if said and re.search("reason|think|thought", name)]
    reasoning = next((said for said in named if isinstance(said, str)), named or thoughts)
    refusal, calls = message.get("refusal"), message.get("tool_calls") or message.get("function_call")
    size = f"{len(reasoning)} characters of" if isinstance(reasoning, str) else "parts of"
    found = [
        f"{size} reasoning" if reasoning else "",
        f"a refusal: {refusal}" if refusal else "",
        "calls of tools" if calls else "",
        "audio" if message.get("audio") else "",
    ]
    return " and ".join(what for what in found if what)


@dataclass(frozen=True)
class _Token:
    """`shown` is its name; `text` what it adds to a text, None where that is part of a character."""

    shown: str
    text: str | None
    log_prob: float


@dataclass(frozen=True)
class _Position:
    shown: str
    log_prob: Any
    top: tuple[_Token, ...]


def _positions(choice: dict[str, Any]) -> list[_Position]:
    """The logprobs of a choice, in the shape of chats (`content`) or of completions (`tokens`)."""
    given = choice.get("logprobs") or {}
    if given.get("content"):
        return [
            _Position(p["token"], p.get("logprob"), tuple(_token(t) for t in p.get("top_logprobs") or ()))
            for p in given["content"]
        ]
    tokens, log_probs = given.get("tokens") or [], given.get("token_logprobs") or []
    tops = given.get("top_logprobs") or [None] * len(tokens)
    return [
        _Position(shown, log_prob, tuple(_token({"token": t, "logprob": x}) for t, x in (top or {}).items()))
        for shown, log_prob, top in zip(tokens, log_probs, tops, strict=True)
    ]


def _log_add(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def _token(entry: dict[str, Any]) -> _Token:
    shown, content = str(entry["token"]), entry.get("bytes")
    text: str | None = shown
    if content:
        try:
            text = bytes(content).decode()
        except (UnicodeDecodeError, ValueError):
            text = None
    elif "\ufffd" in shown or shown.startswith("bytes:"):
        text = None
    return _Token(shown, text, float(entry["logprob"]))
