"""Text of one row as its tokens come: characters of several tokens, and strings that end it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

_UNREADABLE = "\ufffd"
_PATIENCE = 8
"""Tokens that may wait for the rest of a character before they are shown as they are."""


class GrowingText:
    """Decodes the last few tokens at each step, never the whole text.

    What a token looks like depends on the one before, so new text is the difference of two decodings that begin
    together. Text that could become one of the strings in `stop` is held back; none of them is ever shown.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._longest = max((len(s) for s in stop), default=0)
        self._tokens: list[int] = []
        self._begin = self._read = self._shown = 0
        self.text = ""
        self.stopped = False
        """Whether a stop string came; `text` ends before it."""

    def feed(self, token: int) -> str:
        """What can be shown now that `token` has come."""
        self._tokens.append(token)
        return "" if self.stopped else self._take(waits=True)

    def finish(self) -> str:
        """What is left to show of a text that has ended."""
        waiting = not self.stopped and self._read < len(self._tokens)
        piece = self._take(waits=False) if waiting else ""
        return piece + self._upto(len(self.text))

    def _take(self, waits: bool) -> str:
        before = self._decode(self._tokens[self._begin : self._read])
        whole = self._decode(self._tokens[self._begin :])
        if waits and whole.endswith(_UNREADABLE) and len(self._tokens) - self._read < _PATIENCE:
            return ""
        searched = max(0, len(self.text) - self._longest + 1)
        self.text += whole[len(before) :]
        # Tokens without text (special ones) are no neighbour to be spaced from: the window keeps the last word.
        self._begin = self._read if len(whole) > len(before) else self._begin
        self._read = len(self._tokens)
        cuts = [at for at in (self.text.find(s, searched) for s in self._stop) if at >= 0]
        if cuts:
            self.text, self.stopped = self.text[: min(cuts)], True
        return self._upto(len(self.text) - (0 if self.stopped else self._held()))

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(self.text) - self._shown), 0, -1):
            if any(s.startswith(self.text[-length:]) for s in self._stop):
                return length
        return 0

    def _upto(self, end: int) -> str:
        new = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return new


def pieces_of(tokens: Sequence[int], decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> list[str]:
    """What each of `tokens` adds to the text; joined they are the text."""
    growing = GrowingText(decode, stop)
    pieces = [growing.feed(token) for token in tokens]
    return [*pieces[:-1], pieces[-1] + growing.finish()] if pieces else []


def token_text(tokenizer: Any, token: int) -> tuple[str, tuple[int, ...]]:
    """A token's text, and its bytes, which are those of its own alphabet where it holds part of a character."""
    text = tokenizer.decode([token])
    if "\ufffd" not in text:
        return text, tuple(text.encode())
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece.startswith("<0x") and piece.endswith(">"):
        return text, (int(piece[3:-1], 16),)
    alphabet = _byte_alphabet()
    if all(character in alphabet for character in piece):
        return text, tuple(alphabet[character] for character in piece)
    return text, tuple(text.encode())


@lru_cache(1)
def _byte_alphabet() -> dict[str, int]:
    """The printable character by which byte-level tokenizers write each byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
