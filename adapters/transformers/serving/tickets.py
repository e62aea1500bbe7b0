"""A request on its way through the worker: its rows, what is said of them, and what is measured at the end."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from steer.adapters.transformers import tracking
from steer.adapters.transformers.scoring import divergence
from steer.adapters.transformers.serving.batch import BatchRow, Taken
from steer.adapters.transformers.serving.preparing import Prepared
from steer.core import Cost, Samples, SteerError
from steer.critique.rounds import Round
from steer.model import execute
from steer.serving.engine import Delta, Finished, Progress, Started, TokenLogprob
from steer.serving.requests import Emit, choice_events, scored

if TYPE_CHECKING:
    from steer.adapters.transformers.model import LanguageModel

__all__ = ["OwnPass", "Ticket", "report"]

log = logging.getLogger("steer.serving")


class Ticket:
    """One request on its way. `emit` gets its events and is called last with `Finished` or an exception."""

    def __init__(self, prepared: Prepared | None, emit: Emit) -> None:
        self._prepared, self.emit = prepared, emit
        self.cancelled = False
        self.over = False
        self.rows: list[BatchRow] = []
        self.cost = Cost()
        self.began = time.perf_counter()
        self._held: dict[int, tuple[list[str], list[TokenLogprob]]] = {}

    @property
    def prepared(self) -> Prepared:
        """The request."""
        assert self._prepared is not None
        return self._prepared

    @property
    def gone(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.cancelled or self.over

    @property
    def searches(self) -> bool:
        """Whether it is work of its own, done between the steps of the batch."""
        return self.prepared.plan is not None

    def search(self, pause: Callable[[], None]) -> None:
        """Do that work, calling `pause` as often as may be. It raises nothing."""
        _search(self, pause)

    @property
    def size(self) -> int:
        """Rows that it takes in the batch."""
        return self.prepared.choices

    @property
    def columns(self) -> int:
        """Positions that its longest row has at most."""
        return self.prepared.columns

    @property
    def texts(self) -> list[BatchRow]:
        """The rows whose texts were asked for."""
        return self.rows

    @property
    def spent(self) -> Cost:
        """What reading and writing took so far."""
        drawn = sum(len(row.tokens) for row in self.rows)
        steps = max((len(row.tokens) for row in self.rows), default=0)
        return self.cost + Cost(generated_tokens=drawn, nfe=drawn, model_calls=steps)

    def measure(self) -> tuple[list[float | None], list[float | None], Cost]:
        """Reward and drift of each row's finished text, and what that took."""
        return _measure(self)

    @property
    def measures(self) -> bool:
        """Whether something is to be computed about its texts once they are written."""
        steering = self.prepared.task.steering
        return steering is not None and (
            self.prepared.reward is not None or (steering.kl and bool(self.prepared.hidden))
        )

    def taken(self, row: BatchRow, text: str, logprobs: Sequence[TokenLogprob]) -> None:
        """New text of one of its rows, which may be the last."""
        if row.error is not None:
            self.fail(row.error)
            return
        texts, named = self._held.setdefault(row.choice, ([], []))
        texts.append(text)
        named += logprobs
        shown = "".join(texts)
        if row.ended or (self.prepared.task.stream and shown):
            self.emit(Delta(row.choice, shown, tuple(named)))
            self._held[row.choice] = ([], [])
        if row.ended and not self.measures:
            self.emit(row.ending(None, row.kl if row.measured else None))

    def finish(self, candidates: int, cost: Cost) -> None:
        """Everything has been said but what it took."""
        if not self.over:
            self.over = True
            self.emit(Finished(candidates, replace(cost, seconds=time.perf_counter() - self.began)))

    def fail(self, error: Exception) -> None:
        """Nothing more will come."""
        if not self.over:
            self.over = True
            self.emit(error)


class OwnPass(Ticket, ABC):
    """A request that reads its prompts itself."""

    @abstractmethod
    def open(self, model: LanguageModel, taken: Taken) -> tuple[tracking.AnyTrack, list[int]]:
        """Read the prompts and fill `rows`. Returns the pass, and the row of it that each of `rows` goes on from."""


def report(ticket: Ticket, error: Exception) -> None:
    if not isinstance(error, SteerError):
        log.error("a request failed", exc_info=error)
    ticket.fail(error)


def _measure(ticket: Ticket) -> tuple[list[float | None], list[float | None], Cost]:
    """Rewards and drifts of a request's finished texts."""
    prepared, rows = ticket.prepared, ticket.rows
    steering = prepared.task.steering
    assert steering is not None
    group = torch.tensor([row.choice // prepared.task.n for row in rows])
    tokens = [row.tokens for row in rows]
    rewards: list[float | None] = [None] * len(rows)
    kls: list[float | None] = [row.kl for row in rows] if steering.kl else [None] * len(rows)
    cost = Cost()
    if prepared.reward is not None:
        rewards = [*scored(prepared, prepared.process.model, prepared.reward, [row.text for row in rows], tokens)]
        cost = Cost(reward_calls=len(rows))
    if steering.kl and prepared.hidden:
        log_prob = torch.tensor([row.log_prob for row in rows], dtype=torch.float64)
        kls = [float(x) for x in _drift(prepared, group, tokens, log_prob)]
        cost = cost + Cost(model_calls=2, nfe=2 * sum(map(len, tokens)))
    return rewards, kls, cost


def _drift(prepared: Prepared, group: torch.Tensor, tokens: list[list[int]], log_prob: torch.Tensor) -> torch.Tensor:
    process: Any = prepared.process
    if prepared.penalises:  # what was drawn from is known by the drawn tokens alone
        return log_prob - process.log_likelihood(prepared.prompts, group, tokens)
    edited = process.copy(tuple((edit, None) for edit in (*prepared.hidden, *prepared.guided)))
    return divergence(edited, prepared.prompts, group, tokens, log_prob)


def _search(ticket: Ticket, pause: Callable[[], None]) -> None:
    """Run a sampler to its end, pausing before every token."""
    prepared = ticket.prepared
    assert prepared.plan is not None
    process: Any = prepared.plan.process
    plan = replace(prepared.plan, process=replace(process, turn=pause))
    ticket.emit(Started(sum(map(len, prepared.ids))))
    steps, told, last = 0, time.perf_counter(), None

    def step(first: int, state: Any) -> None:
        nonlocal steps, told, last
        steps, last = steps + 1, state
        now = time.perf_counter()
        if prepared.task.stream and (steps == 1 or now - told > 0.25):
            told = now
            ticket.emit(Progress(steps, int(state.drawn)))

    def note(first: int, entry: Any) -> None:
        if prepared.task.stream and isinstance(entry, Round):
            ticket.emit(Progress(steps, 0 if last is None else int(last.drawn), entry.told()))

    try:
        samples = execute(plan, step, note)
        _emit_samples(ticket, samples)
    except Exception as error:
        report(ticket, error)


def _emit_samples(ticket: Ticket, samples: Samples) -> None:
    """The choices of a search, prompt by prompt."""
    prepared, steering = ticket.prepared, ticket.prepared.steering
    for event in choice_events(prepared, prepared.process.model, samples, samples.kl if steering.kl else None):
        ticket.emit(event)
    drawn = len(samples) if steering.candidates is None else steering.candidates
    ticket.finish(drawn, samples.cost)
