"""Scores of finished texts while others are still being written."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from steer.core import Reward, Samples
from steer.rewards.algebra import Cached, lift

__all__ = ["Early"]


class Early(Reward):
    """A reward that scores announced texts in a thread of its own, before their scores are asked for.

    For rewards that are `alone`. Texts that wait together are scored in one call. A context manager: leaving it ends
    the thread.
    """

    def __init__(self, inner: Reward) -> None:
        self._scores = Cached(lift(inner))
        self._waiting: list[tuple[Any, str]] = []
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "steer-reward")

    def announce(self, prompt: Any, text: str) -> None:
        """Have a text scored soon. Returns at once."""
        with self._lock:
            self._waiting.append((prompt, text))
        self._thread.submit(self._work)

    def _work(self) -> None:
        with self._lock:
            pairs, self._waiting = self._waiting, []
        if pairs:
            self._scores(_samples(pairs))

    def score(self, samples: Samples) -> Tensor:
        self._thread.submit(self._work).result()
        return self._scores(samples)

    def __enter__(self) -> Early:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __repr__(self) -> str:
        return repr(self._scores)


def _samples(pairs: list[tuple[Any, str]]) -> Samples:
    prompts = {repr(prompt): prompt for prompt, _ in pairs}
    number = {name: b for b, name in enumerate(prompts)}
    return Samples(
        prompts=list(prompts.values()),
        outputs=[text for _, text in pairs],
        group=torch.tensor([number[repr(prompt)] for prompt, _ in pairs]),
        log_weight=torch.zeros(len(pairs), dtype=torch.float64),
    )
