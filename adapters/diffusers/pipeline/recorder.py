"""A scheduler that makes no step: it keeps what a pipeline would have stepped with."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor


class Recording:
    """What is put in front of a scheduler's class. In a rehearsal the timesteps are set as the pipeline asks; after
    it, there is one timestep, or none, and a step keeps its inputs.
    """

    at: int | None
    """Number of the step; None has no step, which leaves decoding."""
    rehearsing: bool
    every: Tensor
    """All timesteps, as the rehearsal found them."""
    seen: list[Tensor]
    settled: Callable[[], None]

    timesteps: Tensor
    _step_index: int | None

    @property
    def init_noise_sigma(self) -> Any:
        """1 where x is given: the pipeline multiplies it."""
        if not self.rehearsing:
            return 1.0
        parent = getattr(super(), "init_noise_sigma", None)
        return self.__dict__.get("init_noise_sigma", 1.0) if parent is None else parent

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Ignored: which timestep is next is set from outside."""


def recorder_of(scheduler: Any) -> Any:
    """A copy of `scheduler` that records. It is still an instance of its class, and its methods have their signatures,
    which pipelines look at.
    """
    base = type(scheduler)

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.rehearsing:
            base.set_timesteps(self, *args, **kwargs)
            self.every = self.timesteps
            self.settled()
        elif self.at is None:
            self.timesteps = self.every[:0]
        else:
            self.timesteps = self.every[self.at : self.at + 1]
            self._step_index = self.at

    @functools.wraps(base.step)
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(model_output)
        return (sample, sample)

    made = copy.deepcopy(scheduler)
    made.__class__ = type(
        f"Recording{base.__name__}", (Recording, base), {"set_timesteps": set_timesteps, "step": step}
    )
    made.at, made.rehearsing, made.seen = None, False, []
    return made
