"""Rows of texts in mid-generation, and what transition edits see of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from steer.adapters.transformers import tracking
from steer.adapters.transformers.body import Body
from steer.adapters.transformers.processing import Processing
from steer.adapters.transformers.tracking import AnyTrack, Track
from steer.core import Context, Cost, Process, Prompt, Samples, UnsupportedError
from steer.core.rows import Rows, beginning


@dataclass(frozen=True)
class TextState(Rows):
    """Rows of texts in mid-generation; `step` counts blocks.

    `prefix` `[N, columns]` is filled up to column `filled`; a token stands where `real`, of the same shape, is True. (A
    row that waits for others at the end of its sentence, or is finished, has columns without one.) Sums stay on the
    device, which is asked once a token whether any row goes on.
    """

    each = ("prefix", "real", "length", "finished", "readings", "ids")
    packed = each[:-1]

    filled: int
    prefix: Tensor = field(repr=False)
    real: Tensor = field(repr=False)
    length: Tensor
    finished: Tensor
    drawn: Tensor
    """Tokens drawn so far, by every row that ever lived."""
    track: AnyTrack = field(repr=False)
    companions: tuple[AnyTrack, ...] = field(repr=False)
    processing: Processing | None = field(default=None, repr=False)
    unread: bool = False
    """Whether the last column is still to be read by the model."""
    ids: Tensor | None = field(default=None, repr=False)
    """Prompt ids `[N, T]`, only kept for processors and criteria that want to see them."""
    readings: Tensor | None = field(default=None, repr=False)
    """What was read where each token was chosen `[N, columns, R]`."""
    waiting: Tensor | None = field(default=None, repr=False)
    """Within a block, rows `[N]` that wait for the others."""
    over: bool | None = None
    """Whether all rows are finished; None while the device was not asked."""
    resting: bool = False
    """Whether all rows are finished or waiting."""

    @property
    def tracks(self) -> tuple[AnyTrack, ...]:
        """The model's own rows and those of every companion."""
        return (self.track, *self.companions)

    def all_finished(self) -> bool:
        """Whether all rows are finished; asks the device once."""
        if self.over is None:
            object.__setattr__(self, "over", bool(self.finished.all()))
        assert self.over is not None
        return self.over

    def take(self, index: Tensor) -> TextState:
        tracks = [tracking.fork(track, index) for track in self.tracks]
        return replace(super().take(index), track=tracks[0], companions=tuple(tracks[1:]), over=None)

    @classmethod
    def join(cls, states: Sequence[TextState]) -> TextState:
        """The rows of several states that were read."""
        rows = super().join(states)
        tracks = [tracking.stack(rows) for rows in zip(*(s.tracks for s in states), strict=True)]
        return replace(
            rows,
            filled=max(s.filled for s in states),
            track=tracks[0],
            companions=tuple(tracks[1:]),
            unread=any(s.unread for s in states),
            drawn=torch.stack([s.drawn for s in states]).sum(),
            over=None,
        )


@dataclass(frozen=True)
class TextContext:
    """What a transition edit sees of a language model's rows."""

    step: int
    prefix: Tensor
    base: Tensor
    left: Tensor
    track: AnyTrack = field(repr=False)
    others: dict[int, AnyTrack] = field(repr=False)
    law: Callable[[Tensor], Tensor] = field(repr=False)
    """From a model's logits `[N, V]` to its log-law under the settings of the run, which hold for companions too."""
    seen: dict[int, Context] = field(default_factory=dict, repr=False)

    @property
    def hidden(self) -> Tensor:
        assert self.track.hidden is not None
        return self.track.hidden

    def lookahead(self, candidates: Tensor) -> Tensor:
        return tracking.look(self.track, candidates)

    def guidance(self, score: Callable[[Samples], Tensor]) -> Tensor:
        raise UnsupportedError("tokens have no gradient: guide text by values (ValueGuidance)")

    def companion(self, process: Process) -> Context:
        if id(process) not in self.seen:
            track = self.others[id(process)]
            base = self.law(track.logits)
            made = TextContext(self.step, self.prefix, base, self.left, track, self.others, self.law)
            self.seen[id(process)] = made
        return self.seen[id(process)]


def begin(
    prompts: Sequence[Prompt], n: int, columns: int, tracks: Sequence[AnyTrack], cost: Cost, exact: bool
) -> TextState:
    """`n` rows for each prompt before their first token, with room for `columns` of them; `exact` where the law of the
    base is known on the way.
    """
    rows, device = len(prompts) * n, tracks[0].logits.device
    return TextState(
        **{**beginning(prompts, n, exact=exact, device=device), "cost": cost},
        filled=0,
        prefix=torch.full((rows, columns), tracks[0].body.pad_token_id, device=device),
        real=torch.zeros(rows, columns, dtype=torch.bool, device=device),
        length=torch.zeros(rows, dtype=torch.long, device=device),
        finished=torch.zeros(rows, dtype=torch.bool, device=device),
        drawn=torch.zeros((), dtype=torch.long, device=device),
        track=tracks[0],
        companions=tuple(tracks[1:]),
    )


def without_rows(body: Body, prompts: Sequence[Prompt]) -> TextState:
    """A state without rows or caches, to be filled with finished rows."""
    none = torch.zeros(0, device=body.device)
    mask = torch.zeros(0, 0, dtype=torch.long, device=body.device)
    track = Track(body, body.new_cache(), mask, False, none.long(), none, None, None)
    return begin(prompts, 1, 0, [track], Cost(), exact=False)


def tokens_of(state: TextState) -> list[list[int]]:
    """Generated tokens of every row."""
    if bool((state.real[:, : state.filled].sum(1) == state.length).all()) and not bool(
        (state.real[:, 1:] & ~state.real[:, :-1]).any()
    ):  # no row ever waited
        return [row[:n] for row, n in zip(state.prefix.tolist(), state.length.tolist(), strict=True)]
    pairs = zip(state.prefix.tolist(), state.real.tolist(), strict=True)
    return [[token for token, there in zip(*row, strict=True) if there] for row in pairs]


def read_at(state: TextState, names: Sequence[str]) -> dict[str, list[Tensor]] | None:
    """What was read where each token of every row was chosen: by name, a tensor `[T]` for each row."""
    if state.readings is None:
        return None
    kept = zip(state.readings[:, : state.filled].cpu(), state.real[:, : state.filled].cpu(), strict=True)
    rows = [values[there] for values, there in kept]
    return {name: [row[:, k] for row in rows] for k, name in enumerate(names)}


def reread(state: TextState) -> TextState:
    """The state with its tracks, one row for each prompt, grown to its rows and after all their tokens, in one pass."""
    real, group = state.real, state.group
    filled = int(real.any(0).nonzero().max()) + 1 if bool(real.any()) else 0
    # Aligned on the right, so that one pass ends with every row's last token.
    order = real[:, :filled].long().argsort(dim=1, stable=True)
    tokens, there = state.prefix[:, :filled].gather(1, order), real[:, :filled].gather(1, order)
    prefix, real, readings = state.prefix.clone(), real.clone(), state.readings
    prefix[:, :filled], real[:, :filled] = tokens, there
    if readings is not None:
        inner = readings[:, :filled].gather(1, order.unsqueeze(2).expand(-1, -1, readings.shape[2]))
        readings = torch.cat([inner, readings[:, filled:]], 1)
    tracks = [tracking.fork(track, group) for track in state.tracks]
    if filled:
        tracks = [tracking.replay(track, tokens, there) for track in tracks]
    read = int(there.sum())
    cost = state.cost + Cost(prompt_tokens=read, model_calls=1, nfe=read * len(tracks))
    ids = None if state.ids is None else state.ids[group.to(prefix.device)]
    return replace(
        state,
        filled=filled,
        prefix=prefix,
        real=real,
        readings=readings,
        track=tracks[0],
        companions=tuple(tracks[1:]),
        cost=cost,
        ids=ids,
        unread=False,
    )
