"""SVDD (Li et al. 2024): at every step draw M candidates of each row and keep one by its value.

Soft (the paper): with probability proportional to `exp(V / beta)`; in the limit of many candidates and exact soft
values that is `p exp(r / beta)`. Argmax (the released code): the highest reward, no longer a sampler of that law: at
M = 4 it already overshoots it. Rows never interact, so diversity between rows is kept and prompts need no population.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from steer.core import Ability, Process, Run, Sampler, Samples, check, check_whole
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

    title = "SVDD"
    needs = frozenset({Ability.BRANCH})
    needs_reward = True
    population = "num_candidates"
    chooses_whole = False
    reads = True
    shows = frozenset({"previews"})
    kl_kind = "none: the law of what is chosen among candidates at every step is not known"

    @property
    def rows(self) -> int:
        return self.n * self.num_candidates

    def __post_init__(self) -> None:
        for name in ("n", "num_candidates"):
            value = getattr(self, name)
            check_whole(name, value)
        check(self.choose in ("soft", "argmax"), "choose", self.choose, "soft, argmax")

    @property
    def tilts(self) -> bool:
        return self.choose == "soft"

    def check_process(self, process: Process) -> None:
        super().check_process(process)
        self.lookahead.check(process)

    def prepared(self, process: Process) -> Process:
        return self.lookahead.prepared(process)

    def draw(self, run: Run) -> Samples:
        process, m = run.process, self.num_candidates
        state = process.init(run.prompts, self.n, run.generator)
        while not process.done(state):
            several = m > 1 and process.diverges(state)
            if several:
                state = process.gather(process.read(state), torch.arange(len(state)).repeat_interleave(m))
            state = process.propose(state, run.generator)
            if several:
                state = self._kept(run, state)
            run.step(state)
        samples = process.decode(state)
        # What was proposed is not what was drawn, so the proposal's probabilities say nothing here.
        return replace(samples, reward=run.score(samples), log_prob=None, base_log_prob=None, kl_estimate=None)

    def _kept(self, run: Run, state: Any) -> Any:
        """One of every `num_candidates` rows, by its value."""
        process, m = run.process, self.num_candidates
        if self.lookahead.reads:
            state = process.read(state)
        if process.done(state):
            value = run.score(process.decode(state))
        else:
            value, cost = self.lookahead(process, state, run.reward, run.beta, run.generator)
            run.pay(cost)
        value = value.reshape(-1, m)
        if self.choose == "soft":
            best = resample(value / run.beta, run.generator, "multinomial", 1).squeeze(1)
        else:
            best = value.argmax(1)
        return process.gather(state, torch.arange(len(value)) * m + best)
