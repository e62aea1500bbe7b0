"""Text as it is drawn: an iterator of pieces, or a transformers streamer fed token by token."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from steer import engine
from steer.core import Samples, check

if TYPE_CHECKING:
    from steer.adapters.text import TextState
    from steer.adapters.transformers import LanguageModel


@dataclass(frozen=True)
class Piece:
    """New text of one row."""

    prompt: int
    row: int
    text: str


class TextStream:
    """Iterate for `Piece`s; `samples` holds the result once the iterator has ended. Closing it stops the work."""

    def __init__(self, model: LanguageModel, plan: engine.Plan) -> None:
        self.samples: Samples | None = None
        self._model, self._plan = model, plan
        self._pieces: queue.Queue[Any] = queue.Queue()
        self._stop = threading.Event()
        self._shown: dict[tuple[int, int], int] = {}

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
            for row, text in enumerate(self.samples.texts):
                self._show(int(self.samples.group[row]), row, text)
        except _Stopped:
            pass
        except BaseException as error:
            self._pieces.put(error)
        self._pieces.put(None)

    def _step(self, first: int, state: TextState) -> None:
        if self._stop.is_set():
            raise _Stopped
        offset = first * (len(state) // len(state.prompts))
        lengths = state.length.tolist()
        for row, tokens in enumerate(state.prefix[:, : state.step].tolist()):
            text = self._model.decode(tokens[: lengths[row]], self._plan.process.decoding.stop)  # type: ignore[attr-defined]
            # A character of several tokens is not a character yet.
            if not text.endswith("\ufffd"):
                self._show(first + int(state.group[row]), offset + row, text)

    def _show(self, prompt: int, row: int, text: str) -> None:
        shown = self._shown.get((prompt, row), 0)
        if len(text) > shown:
            self._pieces.put(Piece(prompt, row, text[shown:]))
            self._shown[prompt, row] = len(text)


class _Stopped(Exception):
    """The reader went away."""


def stream_texts(model: LanguageModel, plan: engine.Plan) -> TextStream:
    """Pieces of every row as they are drawn; samplers that return one of several rows cannot be streamed."""
    from steer.methods.best_of_n import Ancestral

    check(
        isinstance(plan.sampler, Ancestral),
        "stream",
        type(plan.sampler).__name__,
        "independent samples: others choose at the end",
    )
    return TextStream(model, plan)


def feed_streamer(model: LanguageModel, plan: engine.Plan, streamer: Any) -> Samples:
    """Feed a transformers streamer: the prompt, then every token, then `end()`; as that library does, one row only."""
    check(
        len(plan.prompts) == 1 and getattr(plan.sampler, "n", 1) == 1,
        "streamer",
        f"{len(plan.prompts)} prompts",
        "one row",
    )
    streamer.put(torch.tensor([model.encode(plan.prompts[0])]))

    def step(first: int, state: TextState) -> None:
        streamer.put(state.prefix[:, state.step - 1].cpu())

    try:
        return engine.execute(plan, step)
    finally:
        streamer.end()
