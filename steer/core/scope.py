"""Scopes: at which positions of a text an edit acts, by number, or between tokens that mark a part of the reply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from steer.core.errors import InputError, check

__all__ = ["Marks", "Scope"]

_THINKING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
)
_TOOLS = (
    ("<tool_call>", "</tool_call>"),
    ("<|tool_call>", "<tool_call|>"),
    ("<|START_ACTION|>", "<|END_ACTION|>"),
    ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ("<|python_tag|>", "<|eom_id|>"),
)
_PARTS = {"thinking": _THINKING, "tools": _TOOLS}
"""Tokens that open and close a part of a reply, as the templates of open models write them."""


@dataclass(frozen=True)
class Marks:
    """Tokens between which a scope acts, or outside of which. What counts is the last of them that was read, of the
    prompt's too: a template may open the part itself.
    """

    opening: tuple[int, ...]
    closing: tuple[int, ...]
    inside: bool

    def last(self, tokens: Sequence[int]) -> bool | None:
        """Whether the part is open after these tokens; None where none of them is a mark."""
        for token in reversed(tokens):
            if token in self.opening or token in self.closing:
                return token in self.opening
        return None


@dataclass(frozen=True)
class Scope:
    """The token positions at which a hidden edit acts, absolute and without padding: `start <= position < stop`.

    A bound counts from the start of the prompt, or, where `*_at_reply` is set, from the prompt's length. Of these
    positions `marked` leaves those that lie in a part of the reply, or with `inside=False` those that do not.
    """

    start: int = 0
    stop: int | None = None
    start_at_reply: bool = False
    stop_at_reply: bool = False
    marked: str = ""
    """`thinking`, `tools`, or `OPEN,CLOSE`: the two tokens that open and close the part."""
    inside: bool = True

    NAMES: ClassVar[str] = (
        "all, prompt, last, generated, reply, from:K, first:N, thinking, answer, outside-tools, inside:OPEN,CLOSE, "
        "outside:OPEN,CLOSE"
    )

    @classmethod
    def parse(cls, text: str | Scope) -> Scope:
        """`all`; `prompt`; `last` (the last prompt position, which chooses the first token); `generated` (positions
        of generated tokens, so from the second token on); `reply` (last + generated: every choice of a token);
        `from:K` (absolute position K and later); `first:N` (the choices of the first N generated tokens: the last
        prompt position and the N - 1 after it).

        Parts of the reply, by the tokens that mark them: `thinking` (the choices between `<think>` and `</think>`, the
        latter's included, or what the tokenizer has in their place), `answer` (every other choice of the reply, so
        also whether to think at all), `outside-tools` (every choice but those of a tool call's contents and its end),
        `inside:OPEN,CLOSE` and `outside:OPEN,CLOSE` for two tokens of one's own.
        """
        if isinstance(text, Scope):
            return text
        reply = cls(start=-1, start_at_reply=True)
        named = {
            "all": cls(),
            "prompt": cls(stop=0, stop_at_reply=True),
            "last": cls(start=-1, stop=0, start_at_reply=True, stop_at_reply=True),
            "generated": cls(start_at_reply=True),
            "reply": reply,
            "thinking": cls._part("thinking", True),
            "answer": cls._part("thinking", False),
            "outside-tools": cls._part("tools", False),
        }
        if text in named:
            return named[text]
        kind, _, rest = str(text).partition(":")
        if kind in ("inside", "outside"):
            opening, _, closing = rest.partition(",")
            check(bool(opening and closing and opening != closing), "scope", text, cls.NAMES)
            return cls._part(rest, kind == "inside")
        good = kind in ("from", "first") and rest.isascii() and rest.isdecimal() and len(rest) <= 9
        check(good and (kind == "from" or int(rest) >= 1), "scope", text, cls.NAMES)
        if kind == "from":
            return cls(start=int(rest))
        return cls(start=-1, stop=int(rest) - 1, start_at_reply=True, stop_at_reply=True)

    @classmethod
    def _part(cls, marked: str, inside: bool) -> Scope:
        return cls(start=-1, start_at_reply=True, marked=marked, inside=inside)

    @property
    def name(self) -> str | None:
        """The text that parses to it; None for bounds that have none."""
        names = ["all", "prompt", "last", "generated", "reply", f"from:{max(self.start, 0)}"]
        names += [f"first:{self.stop + 1}"] if self.stop is not None and self.stop >= 0 else []
        names += ["thinking", "answer", "outside-tools"]
        if "," in self.marked:
            names = [f"{'inside' if self.inside else 'outside'}:{self.marked}"]
        return next((name for name in names if Scope.parse(name) == self), None)

    def __str__(self) -> str:
        return self.name or repr(self)

    def bounds(self, prompt_length: int) -> tuple[int, float]:
        """`(start, stop)` for a prompt of this length; `stop` is infinite where the scope has no end."""
        start = self.start + (prompt_length if self.start_at_reply else 0)
        stop = float("inf") if self.stop is None else self.stop + (prompt_length if self.stop_at_reply else 0)
        return max(start, 0), stop

    def marks(self, token_id: Callable[[str], int | None]) -> Marks | None:
        """The tokens that it goes by, by their ids; None where it goes by numbers alone. Raises `InputError` where the
        tokenizer has none of them.
        """
        if not self.marked:
            return None
        pairs = _PARTS.get(self.marked) or (tuple(self.marked.split(",", 1)),)
        found = [(token_id(opening), token_id(closing)) for opening, closing in pairs]
        known = [(a, b) for a, b in found if a is not None and b is not None]
        if not known:
            written = " or ".join(f"{opening!r} and {closing!r}" for opening, closing in pairs)
            raise InputError("scope", str(self), f"a model whose tokenizer has the tokens {written}")
        return Marks(tuple(a for a, _ in known), tuple(b for _, b in known), self.inside)
