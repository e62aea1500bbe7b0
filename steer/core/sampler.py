"""The sampler: the loop that draws from a process, what it declares of itself, and the run that it draws in."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from steer.core.edit import Prompt
from steer.core.errors import RewardError, check
from steer.core.process import Ability, Process
from steer.core.samples import Cost, Reward, Samples


@dataclass
class Run:
    """One run of a sampler: what was asked for, checked, and what has been spent beside the process's own account."""

    process: Process
    prompts: list[Prompt]
    generator: torch.Generator
    given: Reward | None
    beta: float
    on_step: Callable[[Any], None] | None = None
    on_trace: Callable[[Any], None] | None = None
    spent: Cost = field(default_factory=Cost)

    @property
    def reward(self) -> Reward:
        """The reward of a sampler that needs one."""
        assert self.given is not None
        return self.given

    def score(self, samples: Samples) -> Tensor:
        """Rewards `[N]`, entered in the account."""
        scores = self.reward(samples)
        self.pay(Cost(reward_calls=len(samples)))
        return scores

    def pay(self, cost: Cost) -> None:
        """Enter a cost in the account."""
        self.spent = self.spent + cost

    def step(self, state: Any) -> None:
        """Give a state to `on_step`, where there is one."""
        if self.on_step is not None:
            self.on_step(state)

    def note(self, entry: Any) -> None:
        """Give an entry of the samples' `trace` to `on_trace`, where there is one, as soon as it is there."""
        if self.on_trace is not None:
            self.on_trace(entry)


class Sampler(ABC):
    """Hyper-parameters of one way to draw, a frozen dataclass; owns the loop over a process.

    A new one declares what it is and implements `draw`; a line in `steer.methods.samplers` gives it a name. Everything
    else (Python, command line, server, races) reads the declarations.
    """

    title: ClassVar[str]
    """What it is called in sentences."""
    needs: ClassVar[frozenset[Ability]] = frozenset()
    """What the process has to be able to do. One with `Ability.BRANCH` copies rows and wants the copies to part."""
    needs_reward: ClassVar[bool] = False
    """Whether it draws by a reward, rather than having one score what it drew."""
    population: ClassVar[str] = "n"
    """The setting that says among how many candidates it chooses for each output; "n" where it returns one of them."""
    shares: ClassVar[bool] = False
    """Whether all outputs for a prompt come from one set of candidates (a tree), and not each from its own."""
    keeps_all: ClassVar[bool] = False
    """Whether every row that it starts is an output, so that they can be shown as they come."""
    reads: ClassVar[bool] = False
    """Whether its samples keep the readings of their tokens, and texts may end by them."""
    shows: ClassVar[frozenset[str]] = frozenset()
    """Pictures that can be drawn of a run: "previews" of unfinished rows, "lineage" (which takes the setting
    `keep_previews`), "tree".
    """
    own_settings: ClassVar[frozenset[str]] = frozenset()
    """Settings that whoever runs it decides: a server takes none of them from a request."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings by the name of the paper that has them; `preset=NAME` beside a sampler's name takes them."""
    kl_kind: ClassVar[str | None] = None
    """What the KL of its samples is (see `Samples.kl_kind`); None: what the process says."""

    @property
    def rows(self) -> int:
        """Rows that it keeps going for each prompt."""
        return 1

    @property
    def passes(self) -> int:
        """Times at most that each of its rows is drawn anew, from its prompt to its end."""
        return 1

    @property
    def chooses_whole(self) -> bool:
        """Whether it looks at finished outputs alone, so that steps may be as long as outputs."""
        return True

    @property
    def scores_steps(self) -> bool:
        """Whether every unfinished row is given to the reward after every step."""
        return False

    @property
    def tilts(self) -> bool:
        """Whether it weighs by `exp(r / beta)`, which a reward of +infinity makes no law of."""
        return False

    @classmethod
    def sized(cls, candidates: int, n: int = 1, **settings: Any) -> Self:
        """One that gives `n` outputs for each prompt, each from this many candidates, or all from them where it
        `shares`; a single output where it is `n` that counts the candidates.
        """
        own = {"n": n} if cls.population != "n" else {}
        return cls(**{cls.population: candidates, **own, **settings})

    def bind(self, model: Any) -> Sampler:
        """The sampler for use with `model`, of which what it holds may take hold (see `Reward.bind`)."""
        return self

    def updates(self, process: Process) -> int:
        """About how many times a run calls `on_step`, for progress bars."""
        return process.num_steps

    def check_process(self, process: Process) -> None:
        """Raise `UnsupportedError` or `InputError` where the process is not one to draw from."""
        for ability in sorted(self.needs, key=lambda ability: ability.value):
            process.require(ability, self.title)

    def prepared(self, process: Process) -> Process:
        """The process as `draw` wants it."""
        return process

    def begin(
        self,
        process: Process,
        prompts: Sequence[Prompt],
        *,
        generator: torch.Generator,
        reward: Reward | None = None,
        beta: float = 1.0,
        on_step: Callable[[Any], None] | None = None,
        on_trace: Callable[[Any], None] | None = None,
    ) -> Run:
        """A run that was checked, before its first step. Raises `InputError` and `UnsupportedError`."""
        check(reward is not None or not self.needs_reward, "reward", None, f"a reward: {self.title} goes by it")
        self.check_process(process)
        if self.needs_reward:
            process.check_search(self.title)
        given = _Tilting(reward) if self.tilts and reward is not None else reward
        return Run(self.prepared(process), list(prompts), generator, given, beta, on_step, on_trace)

    def run(
        self,
        process: Process,
        prompts: Sequence[Prompt],
        *,
        generator: torch.Generator,
        reward: Reward | None = None,
        beta: float = 1.0,
        on_step: Callable[[Any], None] | None = None,
        on_trace: Callable[[Any], None] | None = None,
    ) -> Samples:
        """Draw for every prompt. `on_step` sees each state (progress, streaming), `on_trace` what `Samples.trace` will
        hold: each weighted step of FK, a forest after each of its batches. Neither may change what it sees.
        """
        began = time.perf_counter()
        run = self.begin(
            process, prompts, generator=generator, reward=reward, beta=beta, on_step=on_step, on_trace=on_trace
        )
        samples = self.draw(run)
        cost = replace(samples.cost + run.spent, seconds=time.perf_counter() - began)
        return replace(samples, cost=cost, pool=None if samples.pool is None else replace(samples.pool, cost=cost))

    @abstractmethod
    def draw(self, run: Run) -> Samples:
        """The outputs for all prompts, with the cost of the process; rewards are had from `run.score`."""


@dataclass(frozen=True)
class _Tilting(Reward):
    """A reward for samplers that weigh by its exponential."""

    inner: Reward

    def score(self, samples: Samples) -> Tensor:
        scores = self.inner(samples)
        if bool(scores.isposinf().any()):
            bad = int(scores.isposinf().nonzero()[0])
            raise RewardError(f"reward {self.inner}: returned infinity for sample {bad}; allowed: numbers, -infinity")
        return scores
