"""One worker for many requests: token by token in one running batch, searches a stretch at a time between its steps."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from steer.adapters.transformers import tracking
from steer.adapters.transformers.reader import Reader
from steer.adapters.transformers.serving.batch import Batch, BatchRow
from steer.adapters.transformers.serving.tickets import OwnPass, Ticket, report
from steer.adapters.transformers.serving.turns import FairShare, Stretches
from steer.core import Cost, HiddenEdit, SteerError
from steer.serving.engine import Load, Started, TokenLogprob

if TYPE_CHECKING:
    from steer.adapters.transformers.model import LanguageModel

__all__ = ["Scheduler"]


log = logging.getLogger("steer.serving")


class Scheduler:
    """Owns the worker thread. `submit` may be called from any thread; all else happens in the worker."""

    def __init__(
        self, model: LanguageModel, *, max_rows: int, cache_tokens: int, searches: int, search_share: float
    ) -> None:
        self.model = model
        self.max_rows, self.cache_tokens, self.searches = max_rows, cache_tokens, searches
        self._arrivals: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._waiting: deque[Ticket] = deque()
        self._shared = Batch(model)
        self._alone: deque[tuple[Batch, Ticket]] = deque()
        self._tickets: list[Ticket] = []
        self._measures: deque[Ticket] = deque()
        self._asked: deque[Ticket] = deque()
        self._running: deque[tuple[Stretches, Ticket]] = deque()
        self._share = FairShare(search_share)
        self._closed = False
        self._worker = threading.Thread(target=self._work, daemon=True, name="steer-worker")
        self._worker.start()

    def submit(self, ticket: Ticket) -> None:
        """Take a request on. Once the scheduler is closed, it fails."""
        self._arrivals.put(ticket)
        if self._closed:
            self._turn_away()

    def wake(self) -> None:
        """Have the worker look around, for instance because a ticket was cancelled."""
        self._arrivals.put(None)

    def close(self) -> None:
        """Stop at the next step; what still runs fails."""
        self._closed = True
        self.wake()
        self._worker.join()

    def load(self) -> Load:
        """What is going on, from outside: a glance, not a count."""
        rows = len(self._shared.rows) + sum(len(batch.rows) for batch, _ in list(self._alone))
        return Load(rows, len(self._running), len(self._waiting) + len(self._asked), self._shared.nbytes)

    # ---- the worker

    def _work(self) -> None:
        with self.model.hooks.installed(range(len(self.model.blocks))):
            while not self._closed:
                self._receive()
                try:
                    self._turn()
                except Exception as error:  # our own mistake; those who wait are told, and others are served
                    log.error("the worker failed", exc_info=error)
                    self._abandon(error)
            self._abandon(SteerError("the server is stopping"))
            self._turn_away()

    def _turn_away(self) -> None:
        """Tell those who come when nobody works any more."""
        with suppress(queue.Empty):
            while True:
                ticket = self._arrivals.get_nowait()
                if ticket is not None:
                    ticket.fail(SteerError("the server is stopping"))

    def _turn(self) -> None:
        self._sweep()
        tokens = bool(self._waiting or self._shared.rows or self._alone)
        jobs = bool(self._measures or self._running or self._asked)
        turn = self._share.pick((tokens, jobs))
        if turn is not None:
            began = time.perf_counter()
            (self._tokens if turn == 0 else self._job)()
            self._share.charge(turn, time.perf_counter() - began)

    def _receive(self) -> None:
        """Take what has arrived; without work, wait for it."""
        idle = not (self._tickets or self._measures or self._asked or self._running)
        while True:
            try:
                ticket = self._arrivals.get(block=idle)
            except queue.Empty:
                return
            idle = False
            if ticket is not None:
                self._tickets.append(ticket)
                (self._asked if ticket.searches else self._waiting).append(ticket)

    def _sweep(self) -> None:
        """Let go of what nobody waits for."""
        self._tickets = [t for t in self._tickets if not t.gone]
        for pile in (self._waiting, self._measures, self._asked):
            if any(t.gone for t in pile):
                kept = [t for t in pile if not t.gone]
                pile.clear()
                pile.extend(kept)
        alive = {id(row) for ticket in self._tickets for row in ticket.rows}
        self._shared.drop(lambda row: id(row) not in alive)
        self._alone = deque((batch, ticket) for batch, ticket in self._alone if not ticket.gone and batch.rows)
        for stretches, ticket in [pair for pair in self._running if pair[1].cancelled]:
            stretches.stop()
            self._running.remove((stretches, ticket))

    def _abandon(self, why: Exception) -> None:
        """Let everybody go, whatever state things are in."""
        for ticket in self._tickets:
            ticket.cancelled = True
            ticket.fail(why)
        for stretches, _ in self._running:
            stretches.stop()
        for pile in (self._tickets, self._waiting, self._measures, self._asked, self._running, self._alone):
            pile.clear()
        self._shared = Batch(self.model)

    # ---- tokens

    def _tokens(self) -> None:
        """Admit what fits, then one token for every row."""
        while self._waiting and self._fits([self._waiting[0]]):
            group = [self._waiting.popleft()]
            while self._waiting and _read_together([*group, self._waiting[0]]):
                if not self._fits([*group, self._waiting[0]]):
                    break
                group.append(self._waiting.popleft())
            self._admit(group)
        if self._shared.rows:
            self._stepped(self._shared)
        for batch, _ in list(self._alone):
            self._stepped(batch)

    def _fits(self, group: Sequence[Ticket]) -> bool:
        owners = [t for t in self._tickets if t.rows and not t.gone]
        rows = len(self._shared.rows) + sum(len(batch.rows) for batch, _ in self._alone)
        columns = max(t.columns for t in (*group, *owners))
        together = rows + sum(t.size for t in group)
        alone = not rows and len(group) == 1
        return alone or (together <= self.max_rows and together * columns <= self.cache_tokens)

    @torch.inference_mode()
    def _admit(self, group: Sequence[Ticket]) -> None:
        """Read the prompts of several requests in one pass, and let their rows in."""
        if isinstance(group[0], OwnPass):
            self._admit_own(group[0])
            return
        ids = [row for ticket in group for row in ticket.prepared.ids]
        first = list(accumulate((len(t.prepared.ids) for t in group), initial=0))
        hidden, new = bool(group[0].prepared.guided), max(t.prepared.sampling.max_tokens for t in group)
        try:
            body, readings = self.model.body, group[0].prepared.readings
            reader = None if readings is None else Reader(readings, body.stream)
            track, cost = tracking.start(body, ids, _mounted(group, first), 1, hidden=hidden, new=new, reader=reader)
            owners = [
                at + choice // t.prepared.task.n
                for t, at in zip(group, first, strict=False)
                for choice in range(t.prepared.choices)
            ]
            for ticket in group:
                ticket.rows = [self._row(ticket, choice) for choice in range(ticket.prepared.choices)]
            if group[0].prepared.shares and isinstance(track, tracking.Track):
                self._shared.join([row for ticket in group for row in ticket.rows], track, owners)
            else:
                assert len(group) == 1
                batch = Batch(self.model, tracking.fork(track, torch.tensor(owners)))
                batch.rows = list(group[0].rows)
                self._alone.append((batch, group[0]))
        except Exception as error:
            self._refuse(group, error)
            return
        for ticket in group:
            mine, all_tokens = sum(map(len, ticket.prepared.ids)), max(1, cost.prompt_tokens)
            ticket.cost = Cost(mine, 0, cost.model_calls, cost.nfe * mine // all_tokens)
            ticket.emit(Started(mine))

    def _admit_own(self, ticket: OwnPass) -> None:
        """Let the rows in of a request that reads its prompts itself."""
        try:
            track, owners = ticket.open(self.model, lambda *new: self._taken(ticket, *new))
            if isinstance(track, tracking.Track):
                self._shared.join(ticket.rows, track, owners)
            else:
                batch = Batch(self.model, tracking.fork(track, torch.tensor(owners)))
                batch.rows = list(ticket.rows)
                self._alone.append((batch, ticket))
        except Exception as error:
            report(ticket, error)
            return
        ticket.emit(Started(ticket.cost.prompt_tokens))

    def _refuse(self, group: Sequence[Ticket], error: Exception) -> None:
        """Tell a request why it cannot be read; of several, find out whose fault it was."""
        if len(group) == 1:
            report(group[0], error)
            return
        for ticket in group:
            ticket.rows = []
            self._admit([ticket])

    def _row(self, ticket: Ticket, choice: int) -> BatchRow:
        prepared, steering = ticket.prepared, ticket.prepared.task.steering
        row = BatchRow(
            self.model,
            prepared.sampling,
            choice,
            prepared.seed,
            edits=prepared.guided,
            measured=steering is not None and steering.kl,
            taken=lambda *new: self._taken(ticket, *new),
        )
        row.readings = prepared.readings
        return row

    def _taken(self, ticket: Ticket, row: BatchRow, text: str, logprobs: Sequence[TokenLogprob]) -> None:
        if ticket.gone:
            return
        ticket.taken(row, text, logprobs)
        if not ticket.over and all(r.ended for r in ticket.rows):
            if ticket.measures:
                self._measures.append(ticket)
            else:
                ticket.finish(len(ticket.rows), ticket.spent)

    def _stepped(self, batch: Batch) -> None:
        try:
            batch.step()
        except Exception as error:
            # Rows of one batch share its fate, and nobody knows how far the step came.
            mine = {id(row) for row in batch.rows}
            for ticket in self._tickets:
                if any(id(row) in mine for row in ticket.rows):
                    report(ticket, error)
            if batch is self._shared:
                self._shared = Batch(self.model)
            batch.rows = []

    # ---- searches and measurements

    def _job(self) -> None:
        if self._measures:
            self._measured(self._measures.popleft())
            return
        while self._asked and len(self._running) < self.searches:
            ticket = self._asked.popleft()
            self._running.append((Stretches(ticket.search), ticket))
        stretches, ticket = self._running.popleft()
        stretches.resume()
        if not stretches.over:
            self._running.append((stretches, ticket))

    def _measured(self, ticket: Ticket) -> None:
        try:
            rewards, kls, cost = ticket.measure()
        except Exception as error:
            report(ticket, error)
            return
        for row, reward, kl in zip(ticket.texts, rewards, kls, strict=True):
            ticket.emit(row.ending(reward, kl))
        ticket.finish(len(ticket.texts), ticket.spent + cost)


_PADDING = 1.25
"""Tokens that one pass over several prompts may have, padding among them, for each of theirs."""


def _read_together(group: Sequence[Ticket]) -> bool:
    """Whether the last of some requests can be read in one pass with those before: their rows share the batch, the pass
    wants the same of each, and padding costs little.
    """
    if any(isinstance(ticket, OwnPass) for ticket in group):
        return False
    first, last = group[0].prepared, group[-1].prepared
    lengths = [len(row) for ticket in group for row in ticket.prepared.ids]
    body = first.process.model.body
    if not (first.shares and last.shares) or bool(first.guided) != bool(last.guided):
        return False
    if first.readings is not last.readings:
        return False
    if len(set(lengths)) > 1 and not (body.allows("pads") and body.alike(max(t.prepared.columns for t in group))):
        return False
    same = tuple(map(id, first.hidden)) == tuple(map(id, last.hidden))
    reads = any(edit.reads for prepared in (first, last) for edit in prepared.hidden)
    return (same or not reads) and max(lengths) * len(lengths) <= _PADDING * sum(lengths)


def _mounted(group: Sequence[Ticket], first: Sequence[int]) -> list[tuple[HiddenEdit, frozenset[int] | None]]:
    """Hidden edits with the prompts that they are for, by number; requests under the same edits share them."""
    wanted: dict[tuple[int, ...], tuple[tuple[HiddenEdit, ...], set[int]]] = {}
    for ticket, at in zip(group, first, strict=False):
        edits = ticket.prepared.hidden
        _, rows = wanted.setdefault(tuple(map(id, edits)), (edits, set()))
        rows.update(range(at, at + len(ticket.prepared.ids)))
    whole = len(wanted) == 1
    return [(edit, None if whole else frozenset(rows)) for edits, rows in wanted.values() for edit in edits]
