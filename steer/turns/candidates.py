"""Several actions drawn, one taken by its value: value-augmented acting at the level of turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from steer.core import Run, Sampler, Samples, check, check_whole
from steer.core.samples import Cost
from steer.sampling.rollouts import rollouts
from steer.sampling.weights import resample
from steer.turns.episode import Turn

__all__ = ["Candidates"]


@dataclass(frozen=True)
class Candidates(Sampler):
    """`k` actions for each turn, of which one is taken: in proportion to `exp(q / beta)`, or the best where `beta` is
    None. For `TurnProcess(..., draw=Candidates(4, q))`: the environment answers the one that was taken, so that values
    choose actions and not luck, as they would in SVDD over turns (ArCHer's critic at inference, Zhou et al. 2024).

    One-step values of the actor's own policy improve it once; they do not lead to the best policy.
    """

    k: int
    q: Callable[[Turn, str], float]
    beta: float | None = None

    title = "candidates"
    population = "k"
    kl_kind = "none: the law of what is chosen among candidates is not known"

    def __post_init__(self) -> None:
        check_whole("k", self.k)
        check(callable(self.q), "q", self.q, "a function q(turn, action)")
        check(self.beta is None or self.beta > 0, "beta", self.beta, "a number above 0, or None for the best")

    @property
    def rows(self) -> int:
        return self.k

    def draw(self, run: Run) -> Samples:
        pool = rollouts(replace(run, given=None), self.k)
        values = [self.q(run.prompts[b], str(y)) for b, y in zip(pool.group.tolist(), pool.outputs, strict=True)]
        value = torch.tensor(values, dtype=torch.float64).reshape(-1, self.k)
        run.pay(Cost(critic_calls=len(values)))
        if self.beta is None:
            best = value.argmax(1)
        else:
            best = resample(value / self.beta, run.generator, "multinomial", 1).squeeze(1)
        index = torch.arange(len(value)) * self.k + best
        return replace(
            pool.select(index), pool=pool, lineage=index, log_prob=None, base_log_prob=None, tilt=None, kl_estimate=None
        )
