"""Lookaheads for unfinished rows: estimates of the soft value `V = beta log E[exp(r / beta) | state]`.

Samplers that weigh or choose in mid-generation take one of these. All are approximate except where they say otherwise;
weighted samplers (FK steering, DTS) stay right with any of them, -infinity included, and are the better the closer it
is. Samplers that choose (SVDD, DTS*) inherit what it gets wrong.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer.core import Ability, Context, Cost, Process, Reward, check, check_whole
from steer.sampling.weights import log_mean_exp

__all__ = ["Lookahead", "Preview", "Rollouts", "StateValue"]


class Lookahead(ABC):
    """A rule that values rows before they are finished."""

    reads: bool = True
    """Whether rows should be read first, so that copies of a row share the network's pass."""

    def check(self, process: Process) -> None:  # noqa: B027
        """Raise where `process` cannot be looked ahead this way."""

    def prepared(self, process: Process) -> Process:
        """The process with what this rule needs to see."""
        return process

    @abstractmethod
    def __call__(
        self, process: Process, state: Any, reward: Reward, beta: float, generator: torch.Generator
    ) -> tuple[Tensor, Cost]:
        """Values `[N]` in float64, in units of the reward, and what they cost. `state` stays usable."""


@dataclass(frozen=True)
class Preview(Lookahead):
    """The reward of what the process shows: x0-hat (Tweedie's estimate, biased for curved rewards), the text so far."""

    def check(self, process: Process) -> None:
        process.require(Ability.PREVIEW, "a reward in mid-generation")

    def __call__(
        self, process: Process, state: Any, reward: Reward, beta: float, generator: torch.Generator
    ) -> tuple[Tensor, Cost]:
        return reward(process.preview(state)), Cost(reward_calls=len(state))


@dataclass(frozen=True)
class Rollouts(Lookahead):
    """`m` completions of every row by the process itself, scored and combined: `soft`, the consistent estimate
    `beta log mean exp(r / beta)`, or `mean`.
    """

    m: int = 1
    combine: str = "soft"

    def __post_init__(self) -> None:
        check_whole("m", self.m)
        check(self.combine in ("soft", "mean"), "combine", self.combine, "soft, mean")

    def check(self, process: Process) -> None:
        process.require(Ability.FORK, "rollouts")

    def __call__(
        self, process: Process, state: Any, reward: Reward, beta: float, generator: torch.Generator
    ) -> tuple[Tensor, Cost]:
        rows, _ = process.settle(process.gather(state, torch.arange(len(state)).repeat_interleave(self.m)))
        while not process.done(rows):
            rows = process.propose(rows, generator)
        ends = process.decode(rows)
        scores = reward(ends).reshape(-1, self.m)
        value = scores.mean(1) if self.combine == "mean" else beta * log_mean_exp(scores / beta)
        return value, ends.cost + Cost(reward_calls=len(rows))


@dataclass(frozen=True, eq=False)
class StateValue(Lookahead):
    """A learnt (or exact) value of a state, given what an edit sees of it: `value(context) -> [N]`. Finished rows,
    which have no context, get their reward.
    """

    value: Callable[[Context], Tensor]

    def prepared(self, process: Process) -> Process:
        return process.observed()

    def __call__(
        self, process: Process, state: Any, reward: Reward, beta: float, generator: torch.Generator
    ) -> tuple[Tensor, Cost]:
        values = torch.as_tensor(self.value(process.context(state))).detach().cpu().double()
        finished = process.finished(state).cpu()
        if not finished.any():
            return values, Cost()
        scores = reward(process.preview(state))
        return torch.where(finished, scores, values), Cost(reward_calls=int(finished.sum()))
