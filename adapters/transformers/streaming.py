"""Text as it is drawn: an iterator of pieces, a function called with each, or a transformers streamer fed token by
token.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from steer.adapters.language.texts import GrowingText
from steer.adapters.transformers.process import TokenModel
from steer.adapters.transformers.state import TextState
from steer.core import Samples, check
from steer.model import Plan, execute


@dataclass(frozen=True)
class Piece:
    """New text of one row."""

    prompt: int
    row: int
    text: str


class Follower:
    """Calls `emit` with every new `Piece`: `step` is what `engine.execute` calls, `finish` shows what was held back."""

    def __init__(self, model: TokenModel, plan: Plan, emit: Callable[[Piece], None]) -> None:
        check(
            plan.sampler.keeps_all,
            "stream",
            type(plan.sampler).__name__,
            "independent samples: others choose at the end",
        )
        self._emit = emit
        stop: Sequence[str] = plan.process.decoding.stop  # type: ignore[attr-defined]
        self._grow = partial(GrowingText, lambda ids: model.decode(ids), stop)
        self._texts: dict[int, GrowingText] = {}
        self._seen: dict[int, int] = {}
        """Columns that were read, by the first prompt of a batch."""

    def step(self, first: int, state: TextState) -> None:
        offset, seen = first * (len(state) // len(state.prompts)), self._seen.get(first, 0)
        self._seen[first] = state.filled
        lengths = state.length.tolist()
        for i, tokens in enumerate(state.prefix[:, seen : state.filled].tolist()):
            text = self._texts.setdefault(offset + i, self._grow())
            new = "".join([text.feed(token) for token in tokens[: max(0, lengths[i] - seen)]])
            self._show(first + int(state.group[i]), offset + i, new)

    def finish(self, samples: Samples) -> None:
        for i, text in self._texts.items():
            self._show(int(samples.group[i]), i, text.finish())

    def _show(self, prompt: int, row: int, text: str) -> None:
        if text:
            self._emit(Piece(prompt, row, text))


class TextStream:
    """Iterate for `Piece`s; `samples` holds the result once the iterator has ended. Closing it stops the work."""

    def __init__(self, model: TokenModel, plan: Plan) -> None:
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
            self.samples = execute(self._plan, self._step)
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


def feed_streamer(model: TokenModel, plan: Plan, streamer: Any) -> Samples:
    """Feed a transformers streamer: the prompt, then every token, then `end()`; as that library does, one row only."""
    rows = len(plan.prompts) * plan.sampler.rows
    check(rows == 1, "streamer", f"{rows} rows", "one row")
    streamer.put(torch.tensor([model.encode(plan.prompts[0])]))

    def step(first: int, state: TextState) -> None:
        streamer.put(state.prefix[:, state.filled - 1].cpu())

    try:
        return execute(plan, step)
    finally:
        streamer.end()
