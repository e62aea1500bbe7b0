"""Text as it is drawn: an iterator of pieces, a function called with each, or a transformers streamer fed token by
token.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from steer import engine
from steer.core import Samples, check
from steer.methods.best_of_n import Ancestral

if TYPE_CHECKING:
    from steer.adapters.text import TextState
    from steer.adapters.transformers import LanguageModel


@dataclass(frozen=True)
class Piece:
    """New text of one row."""

    prompt: int
    row: int
    text: str


class _Row:
    """Detokenises one row as it grows: each step decodes the last few tokens, never the whole text.

    What a token looks like depends on the one before, so text is the difference of two decodings that begin together.
    Text that could still become a stop string is held back.
    """

    def __init__(self, model: LanguageModel, stop: Sequence[str]) -> None:
        self.model, self.stop = model, stop
        self.hold = max((len(s) for s in stop), default=1) - 1
        self.begin = self.read = self.shown = 0
        self.text = ""

    def feed(self, tokens: Sequence[int]) -> str:
        """What can be shown now that the row consists of `tokens`."""
        before = self.model.decode(tokens[self.begin : self.read])
        whole = self.model.decode(tokens[self.begin :])
        if whole.endswith("\ufffd"):  # a character of several tokens is not a character yet
            return ""
        self.text += whole[len(before) :]
        # Tokens without text (special ones) are no neighbour to be spaced from: the window keeps the last word.
        self.begin = self.read if len(whole) > len(before) else self.begin
        self.read = len(tokens)
        cuts = [at for at in (self.text.find(s, self.shown) for s in self.stop) if at >= 0]
        return self._upto(min(cuts) if cuts else len(self.text) - self.hold)

    def finish(self, text: str) -> str:
        """What is left to show of the finished `text`."""
        self.text = text
        return self._upto(len(text))

    def _upto(self, end: int) -> str:
        end = max(end, self.shown)
        new = self.text[self.shown : end]
        self.shown = end
        return new


class Follower:
    """Calls `emit` with every new `Piece`: `step` is what `engine.execute` calls, `finish` shows what was held back."""

    def __init__(self, model: LanguageModel, plan: engine.Plan, emit: Callable[[Piece], None]) -> None:
        check(isinstance(plan.sampler, Ancestral), "stream", type(plan.sampler).__name__,
              "independent samples: others choose at the end")  # fmt: skip
        self._model, self._emit = model, emit
        self._stop: Sequence[str] = plan.process.decoding.stop  # type: ignore[attr-defined]
        self._rows: dict[int, _Row] = {}

    def step(self, first: int, state: TextState) -> None:
        offset = first * (len(state) // len(state.prompts))
        lengths = state.length.tolist()
        for i, tokens in enumerate(state.prefix[:, : state.filled].tolist()):
            row = self._rows.setdefault(offset + i, _Row(self._model, self._stop))
            if lengths[i] > row.read:
                self._show(first + int(state.group[i]), offset + i, row.feed(tokens[: lengths[i]]))

    def finish(self, samples: Samples) -> None:
        for i, text in enumerate(samples.texts):
            row = self._rows.setdefault(i, _Row(self._model, self._stop))
            self._show(int(samples.group[i]), i, row.finish(text))

    def _show(self, prompt: int, row: int, text: str) -> None:
        if text:
            self._emit(Piece(prompt, row, text))


class TextStream:
    """Iterate for `Piece`s; `samples` holds the result once the iterator has ended. Closing it stops the work."""

    def __init__(self, model: LanguageModel, plan: engine.Plan) -> None:
        self.samples: Samples | None = None
        self._plan = plan
        self._pieces: queue.Queue[Any] = queue.Queue()
        self._stop = threading.Event()
        self._follower = Follower(model, plan, self._pieces.put)

    def __iter__(self) -> Iterator[Piece]:
        worker = threading.Thread(target=self._work, daemon=True)
        worker.start()
        try:
            while (item := self._pieces.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._stop.set()
            worker.join()

    def _work(self) -> None:
        try:
            self.samples = engine.execute(self._plan, self._step)
            self._follower.finish(self.samples)
        except _Stopped:
            pass
        except BaseException as error:
            self._pieces.put(error)
        self._pieces.put(None)

    def _step(self, first: int, state: TextState) -> None:
        if self._stop.is_set():
            raise _Stopped
        self._follower.step(first, state)


class _Stopped(Exception):
    """The reader went away."""


def feed_streamer(model: LanguageModel, plan: engine.Plan, streamer: Any) -> Samples:
    """Feed a transformers streamer: the prompt, then every token, then `end()`; as that library does, one row only."""
    rows = len(plan.prompts) * getattr(plan.sampler, "n", 1)
    check(rows == 1, "streamer", f"{rows} rows", "one row")
    streamer.put(torch.tensor([model.encode(plan.prompts[0])]))

    def step(first: int, state: TextState) -> None:
        streamer.put(state.prefix[:, state.filled - 1].cpu())

    try:
        return engine.execute(plan, step)
    finally:
        streamer.end()
