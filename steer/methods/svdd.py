"""SVDD (Li et al. 2024): at every step draw M candidates of each row and keep one by its value.

Soft (the paper): with probability proportional to `exp(V / beta)`; in the limit of many candidates and exact soft
values that is `p exp(r / beta)`. Argmax (the released code): the highest reward, no longer a sampler of that law: at
M = 4 it already overshoots it. Rows never interact, so diversity between rows is kept and prompts need no population.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from steer.core import Ability, Cost, Process, Prompt, Reward, Sampler, Samples, check, check_whole
from steer.sampling.lookahead import Lookahead, Preview
from steer.sampling.weights import resample

__all__ = ["SVDD"]


@dataclass(frozen=True)
class SVDD(Sampler):
    """Keep one of `num_candidates` at every step.

    Attributes:
        n: outputs for each prompt.
        num_candidates: M. A step costs M network evaluations for each output; the winner's is used for the next step.
        choose: "soft" or "argmax".
        lookahead: the value of a candidate.
    """

    n: int = 1
    num_candidates: int = 4
    choose: str = "soft"
    lookahead: Lookahead = field(default_factory=Preview)
    needs_reward = True
    kl_kind = "none: the law of what is chosen among candidates at every step is not known"

    @property
    def rows(self) -> int:
        return self.n * self.num_candidates

    def __post_init__(self) -> None:
        for name in ("n", "num_candidates"):
            value = getattr(self, name)
            check_whole(name, value)
        check(self.choose in ("soft", "argmax"), "choose", self.choose, "soft, argmax")

    def run(
        self,
        process: Process,
        prompts: Sequence[Prompt],
        *,
        generator: torch.Generator,
        reward: Reward | None = None,
        beta: float = 1.0,
        on_step: Callable[[Any], None] | None = None,
    ) -> Samples:
        check(reward is not None, "reward", None, "a reward: SVDD chooses by it")
        assert reward is not None
        process.require(Ability.BRANCH, "SVDD")
        self.lookahead.check(process)
        began, m = time.perf_counter(), self.num_candidates
        process = self.lookahead.prepared(process)
        state = process.init(prompts, self.n, generator)
        spent = Cost()
        while not process.done(state):
            if m > 1 and process.diverges(state):
                state = process.gather(process.read(state), torch.arange(len(state)).repeat_interleave(m))
            rows = len(state)
            state = process.propose(state, generator)
            if rows > self.n * len(prompts):
                if self.lookahead.reads:
                    state = process.read(state)
                if process.done(state):
                    value, cost = reward(process.decode(state)), Cost(reward_calls=rows)
                else:
                    value, cost = self.lookahead(process, state, reward, beta, generator)
                spent = spent + cost
                value = value.reshape(-1, m)
                if self.choose == "soft":
                    best = resample(value / beta, generator, "multinomial", 1).squeeze(1)
                else:
                    best = value.argmax(1)
                state = process.gather(state, torch.arange(len(value)) * m + best)
            if on_step is not None:
                on_step(state)
        samples = process.decode(state)
        scores = reward(samples)
        cost = samples.cost + spent + Cost(reward_calls=len(samples), seconds=time.perf_counter() - began)
        # What was proposed is not what was drawn, so the proposal's probabilities say nothing here.
        return replace(samples, reward=scores, cost=cost, log_prob=None, base_log_prob=None, kl_estimate=None)
