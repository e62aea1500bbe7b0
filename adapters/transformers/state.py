"""Rows of texts in mid-generation, and how they are begun, chosen, joined and packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer.adapters.transformers import tracking
from steer.adapters.transformers.cache import new_cache
from steer.adapters.transformers.tracking import Track
from steer.core import Cost, Prompt
from steer.core.rows import Aimed

if TYPE_CHECKING:
    from steer.adapters.transformers.model import LanguageModel


@dataclass(frozen=True)
class TextState(Aimed):
    """Rows of texts in mid-generation.

    `prefix` `[N, columns]` is filled up to column `filled`; a token stands where `real`, of the same shape, is True. (A
    row that waits for others at the end of its sentence, or is finished, has columns without one.)
    """

    group: Tensor
    step: int
    """Blocks drawn so far."""
    filled: int
    log_prob: Tensor
    base_log_prob: Tensor | None
    tilt: Tensor
    kl: Tensor | None
    cost: Cost
    prompts: list[Prompt] = field(repr=False)
    prefix: Tensor = field(repr=False)
    real: Tensor = field(repr=False)
    length: Tensor
    finished: Tensor
    drawn: Tensor
    """Tokens drawn so far, by every row that ever lived."""
    track: Track = field(repr=False)
    companions: tuple[Track, ...] = field(repr=False)
    processors: tuple[Any, ...] = field(repr=False)
    unread: bool
    """Whether the last column is still to be read by the model."""
    ids: Tensor | None = field(repr=False)
    """Prompt ids `[N, T]`, only kept for processors and criteria that want to see them."""

    def __len__(self) -> int:
        return len(self.group)

    @property
    def tracks(self) -> tuple[Track, ...]:
        """The model's own rows and those of every companion."""
        return (self.track, *self.companions)


_ROWS = ("group", "log_prob", "base_log_prob", "tilt", "kl", "prefix", "real", "length", "finished")
"""Fields that are packed: one row for each row of the state."""


def begun(
    prompts: Sequence[Prompt], n: int, columns: int, tracks: Sequence[Track], cost: Cost, exact: bool
) -> TextState:
    """`n` rows for each prompt before their first token, with room for `columns` of them; `exact` where the law of the
    base is known on the way.
    """
    rows, device = len(prompts) * n, tracks[0].logits.device
    # Sums stay on the device until the end: a step waits for it once, to know whether any row goes on.
    zero = torch.zeros(rows, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    return TextState(
        group=torch.arange(len(prompts)).repeat_interleave(n),
        step=0,
        filled=0,
        log_prob=zero,
        base_log_prob=zero if exact else None,
        tilt=zero,
        kl=zero if exact else None,
        cost=cost,
        prompts=list(prompts),
        prefix=torch.full((rows, columns), tracks[0].model.pad_token_id, device=device),
        real=torch.zeros(rows, columns, dtype=torch.bool, device=device),
        length=torch.zeros(rows, dtype=torch.long, device=device),
        finished=torch.zeros(rows, dtype=torch.bool, device=device),
        drawn=torch.zeros((), dtype=torch.long, device=device),
        track=tracks[0],
        companions=tuple(tracks[1:]),
        processors=(),
        unread=False,
        ids=None,
    )


def without_rows(model: LanguageModel, prompts: Sequence[Prompt]) -> TextState:
    """A state without rows or caches, to be filled with finished rows."""
    none = torch.zeros(0, device=model.device)
    mask = torch.zeros(0, 0, dtype=torch.long, device=model.device)
    track = Track(model, new_cache(model.config), mask, False, none.long(), none, None, None)
    return begun(prompts, 0, 0, [track], Cost(), exact=False)


def tokens_of(state: TextState) -> list[list[int]]:
    """Generated tokens of every row."""
    if bool((state.real[:, : state.filled].sum(1) == state.length).all()) and not bool(
        (state.real[:, 1:] & ~state.real[:, :-1]).any()
    ):  # no row ever waited
        return [row[:n] for row, n in zip(state.prefix.tolist(), state.length.tolist(), strict=True)]
    pairs = zip(state.prefix.tolist(), state.real.tolist(), strict=True)
    return [[token for token, there in zip(*row, strict=True) if there] for row in pairs]


def gathered(state: TextState, index: Tensor) -> TextState:
    """A new state whose row i is row `index[i]`."""
    at = index.to(state.prefix.device)
    return replace(
        state,
        group=state.group[index.cpu()],
        log_prob=state.log_prob[at],
        base_log_prob=None if state.base_log_prob is None else state.base_log_prob[at],
        tilt=state.tilt[at],
        kl=None if state.kl is None else state.kl[at],
        prefix=state.prefix[at],
        real=state.real[at],
        length=state.length[at],
        finished=state.finished[at],
        track=tracking.fork(state.track, index),
        companions=tuple(tracking.fork(c, index) for c in state.companions),
        ids=None if state.ids is None else state.ids[at],
    )


def stacked(states: Sequence[TextState]) -> TextState:
    """The rows of several states that were read, at one step, as one."""

    def joined(name: str) -> Any:
        columns = [getattr(s, name) for s in states]
        return None if any(c is None for c in columns) else torch.cat(columns)

    tracks = [tracking.stack(rows) for rows in zip(*(s.tracks for s in states), strict=True)]
    return replace(
        states[0], filled=max(s.filled for s in states), track=tracks[0], companions=tuple(tracks[1:]),
        unread=any(s.unread for s in states), cost=sum((s.cost for s in states), Cost()),
        drawn=torch.stack([s.drawn for s in states]).sum(),
        **{name: joined(name) for name in (*_ROWS, "ids")},
    )  # fmt: skip


def packed_rows(state: TextState) -> dict[str, Tensor]:
    """The state's rows on the CPU, without its caches."""
    rows = {name: getattr(state, name) for name in _ROWS}
    return {name: x.cpu() for name, x in rows.items() if x is not None}


def with_rows(start: TextState, step: int, packed: dict[str, Tensor]) -> TextState:
    """`start` with the rows that `packed_rows` made, at `step`; its tracks are still those of `start`."""
    device = start.prefix.device
    rows: dict[str, Any] = dict.fromkeys(("base_log_prob", "kl"))
    for name in _ROWS:
        if name in packed:
            rows[name] = packed[name] if name == "group" else packed[name].to(device)
    return replace(start, **rows, step=step)


def reread(state: TextState) -> TextState:
    """The state with its tracks, one row for each prompt, grown to its rows and after all their tokens, in one pass."""
    real, group = state.real, state.group
    filled = int(real.any(0).nonzero().max()) + 1 if bool(real.any()) else 0
    # Aligned on the right, so that one pass ends with every row's last token.
    order = real[:, :filled].long().argsort(dim=1, stable=True)
    tokens, there = state.prefix[:, :filled].gather(1, order), real[:, :filled].gather(1, order)
    prefix, real = state.prefix.clone(), real.clone()
    prefix[:, :filled], real[:, :filled] = tokens, there
    tracks = [tracking.fork(track, group) for track in state.tracks]
    if filled:
        tracks = [tracking.replay(track, tokens, there) for track in tracks]
    read = int(there.sum())
    cost = state.cost + Cost(prompt_tokens=read, model_calls=1, nfe=read * len(tracks))
    ids = None if state.ids is None else state.ids[group.to(prefix.device)]
    return replace(
        state, filled=filled, prefix=prefix, real=real, track=tracks[0], companions=tuple(tracks[1:]), cost=cost,
        ids=ids, unread=False,
    )  # fmt: skip
