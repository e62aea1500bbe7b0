"""The law that the next token of every row is drawn from, and what a draw adds to the row's sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from steer.adapters.transformers import tracking
from steer.adapters.transformers.state import TextState
from steer.adapters.transformers.tracking import Track
from steer.core import Context, Process, Samples, TransitionEdit, UnsupportedError
from steer.sampling.laws import divergence

if TYPE_CHECKING:
    from steer.adapters.transformers.process import TextProcess


@dataclass(frozen=True)
class TextContext:
    """What a transition edit sees of a language model's rows."""

    step: int
    prefix: Tensor
    base: Tensor
    track: Track = field(repr=False)
    others: dict[int, Track] = field(repr=False)

    @property
    def hidden(self) -> Tensor:
        assert self.track.hidden is not None
        return self.track.hidden

    def lookahead(self, candidates: Tensor) -> Tensor:
        return tracking.look(self.track, candidates)

    def guidance(self, score: Callable[[Samples], Tensor]) -> Tensor:
        raise UnsupportedError("tokens have no gradient: guide text by values (ValueGuidance)")

    def companion(self, process: Process) -> Context:
        track = self.others[id(process)]
        base = cast("TextProcess", process).decoding.tempered(track.logits)
        return TextContext(self.step, self.prefix, base, track, self.others)


def context_of(process: TextProcess, state: TextState, base: Tensor) -> TextContext:
    """What edits see of rows that were read; `base` is the log-law of their next token before any edit."""
    others = {id(p): t for p, t in zip(process.companions(), state.companions, strict=True)}
    return TextContext(state.filled, state.prefix[:, : state.filled], base, state.track, others)


def laws(process: TextProcess, state: TextState) -> tuple[Tensor, Tensor]:
    """Log-law of the next token before and after transition edits and truncation, both `[N, V]`; the same tensor
    where nothing changes it.
    """
    logits = state.track.logits
    if state.ids is not None:
        ids = torch.cat([state.ids, state.prefix[:, : state.filled]], 1)
        for processor in state.processors:
            logits = processor(ids, logits)
    base = process.decoding.tempered(logits)
    return base, process.decoding.truncated(_guided(process, state, base))


def _guided(process: TextProcess, state: TextState, base: Tensor) -> Tensor:
    """The law after transition edits; `base` itself where there are none."""
    edits, law = process.mounted(TransitionEdit), base
    if not edits:
        return base
    context = context_of(process, state, base)
    touched = torch.zeros(len(state), 1, dtype=torch.bool, device=law.device)
    for edit, wanted in edits:
        mine = torch.ones_like(touched)
        if wanted is not None:
            mine = torch.tensor([[g in wanted] for g in state.group.tolist()], device=law.device)
        law = torch.where(mine, edit.shift(law, context), law)
        touched |= mine
    return torch.where(touched, torch.log_softmax(law, -1), base)  # other rows keep their bits


def counted(
    process: TextProcess, state: TextState, token: Tensor, alive: Tensor, base: Tensor, law: Tensor
) -> TextState:
    """The state with the log-probabilities, KL and tilt of the tokens `[N]` that rows `alive` `[N]` drew from `law`."""

    def taken(log_law: Tensor) -> Tensor:
        value = log_law.gather(1, token.unsqueeze(1)).squeeze(1)
        return torch.where(alive, value, 0.0).to(state.log_prob.dtype)

    base_log_prob, kl = state.base_log_prob, state.kl
    log_prob = state.log_prob + taken(law)
    if base_log_prob is not None and kl is not None:
        if law is base:
            base_log_prob = base_log_prob + (log_prob - state.log_prob)
        else:
            base_log_prob = base_log_prob + taken(base)
            kl = kl + torch.where(alive, divergence(law, base), 0.0).to(kl.dtype)
    tilt = state.tilt
    for edit, _ in process.mounted(TransitionEdit):
        if edit.power is not None:
            other = context_of(process, state, base).companion(edit.power[0]).base
            tilt = tilt + edit.power[1] * (taken(other) - taken(base))
    return replace(state, log_prob=log_prob, base_log_prob=base_log_prob, tilt=tilt, kl=kl)
