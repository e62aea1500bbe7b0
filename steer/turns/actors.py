"""Actors without a network, and critics of actions: legality and advantage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer.chain import ChainContext, ChainState, TokenChain
from steer.core import Mounted, Samples, SteerError, check
from steer.critique.critics import Critic, Verdicts, pairs_of
from steer.turns.episode import Turn

__all__ = ["AdvantageCritic", "LegalCritic", "UniformActor"]


@dataclass(frozen=True)
class UniformActor(TokenChain):
    """One of the legal actions of a turn, each as likely. Raises `SteerError` where the environment lists none."""

    edits: Mounted = ()

    length = 1

    def view(self, prefix: Tensor, prompts: Sequence[Any] | None = None) -> ChainContext:
        counts = [len(actions_of(turn)) for turn in prompts or ()]
        law = torch.full((len(counts), max(counts)), -torch.inf, dtype=torch.float64)
        for row, count in zip(law, counts, strict=True):
            row[:count] = -torch.tensor(float(count), dtype=torch.float64).log()
        return ChainContext(prefix, prefix.shape[1], law, tuple(prompts or ()))

    def decode(self, state: ChainState) -> Samples:
        shown = super().decode(state)
        rows = zip(state.x.tolist(), state.group.tolist(), strict=True)
        outputs = [actions_of(state.prompts[b])[x[0]] if x else "" for x, b in rows]
        return Samples(**{**shown.__dict__, "outputs": outputs})


def actions_of(turn: Any) -> list[str]:
    """Legal actions of a turn. Raises `SteerError`."""
    found = turn.actions if isinstance(turn, Turn) else None
    if not found:
        raise SteerError("the environment lists no legal actions, so that a model must act: actor=model.process(...)")
    return found


@dataclass(frozen=True, repr=False)
class LegalCritic(Critic):
    """Accepts an action that is legal as it stands, without space around it, whatever its case."""

    @property
    def name(self) -> str:
        return "legal"

    def judge(self, samples: Samples) -> Verdicts:
        rows = [(str(y).strip().lower(), actions_of(turn)) for turn, y in pairs_of(samples)]
        legal = torch.tensor([action in [a.lower() for a in allowed] for action, allowed in rows])
        text = ["" if ok else f"Allowed: {', '.join(rows[i][1])}." for i, ok in enumerate(legal.tolist())]
        return Verdicts(legal, legal.double(), text)


@dataclass(frozen=True, repr=False)
class AdvantageCritic(Critic):
    """Accepts an action whose advantage `Q(turn, action) - V(turn)` is `margin` or more, and says what it is (ReAd,
    Zhang et al. 2024): `TurnProcess(..., draw=Critique(AdvantageCritic(q, v), revise=False, rounds=2))`.

    Args:
        q: value of an action in a turn, `q(turn, action)`.
        v: value of the turn; None is the best of its legal actions.
    """

    q: Callable[[Turn, str], float]
    v: Callable[[Turn], float] | None = None
    margin: float = 0.0

    def __post_init__(self) -> None:
        check(callable(self.q), "q", self.q, "a function q(turn, action)")

    @property
    def name(self) -> str:
        return "advantage"

    def judge(self, samples: Samples) -> Verdicts:
        rows = [(self.q(turn, str(y)), self._base(turn)) for turn, y in pairs_of(samples)]
        gain = torch.tensor([q - v for q, v in rows], dtype=torch.float64)
        accept = gain >= self.margin - 1e-12
        text = [
            "" if ok else f"Its advantage is {x:.3g}." for ok, x in zip(accept.tolist(), gain.tolist(), strict=True)
        ]
        return Verdicts(accept, gain, text)

    def _base(self, turn: Turn) -> float:
        return self.v(turn) if self.v is not None else max(self.q(turn, a) for a in actions_of(turn))
