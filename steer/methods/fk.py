"""Feynman-Kac steering (Singhal et al. 2025): sequential Monte Carlo towards `p(x) exp(r(x) / beta)`.

Potentials `G_t >= 0` whose product over the weighted steps telescopes to `exp(r(x_0) / beta)` weigh a population as
it is generated; where weights grow uneven, particles are resampled. With `rho_t` the value that a lookahead gives a
state:

    difference   G_t = exp((rho_t - rho_before) / beta)
    max          G_t = exp(max over the weighted steps so far of rho / beta)
    sum          G_t = exp(sum over the weighted steps so far of rho / beta)

and, for max and sum, a last factor `exp(r(x_0) / beta)` over the product of all before it (paper, section 3).
Everything is in log space. Edits of the process act as a *proposal*: every weight also takes `p(step) / q(step)`, so
that guidance of any strength is corrected for. The paper's lambda is 1 / beta.

**What is exact.** For any K, potential, schedule, resampler, threshold and lookahead, `exp(log_z)` is an unbiased
estimate of `E_p[exp(r / beta)]`, and so is `exp(log_z)` times any weighted sum over the population, of the same under
`exp(r / beta)`. Here p is what the process calls its base law (`base_log_prob`), and a proposal must reach everything
that p reaches. Means of *one* population are biased by O(1 / K) (about -1.3 / K of the reward's spread in a toy with K
of 4 to 64): K = 4 is nowhere near the target.

A lookahead may say -infinity of a row whose end is possible, so it never kills: until the last step such a row keeps
the weight of one particle in K (`_raised`), and adds nothing to a sum. Only a reward of -infinity at the end is a
weight of 0.

Letters: `B` prompts, `P` populations (prompts, or prompts times outputs), `K` particles in one, `N = P K` rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steer.core import Ability, Process, Run, Sampler, Samples, UnsupportedError, check
from steer.sampling.lookahead import Lookahead, Preview
from steer.sampling.spread import Spread
from steer.sampling.weights import RESAMPLERS, effective_sample_size, gained, log_mean_exp, resample

__all__ = ["FKSteering", "Generation"]


@dataclass(frozen=True)
class Generation:
    """One weighted step of a run, for pictures: `samples.trace` is a list of them."""

    step: int
    ancestors: Tensor
    """Row `[N]` that each particle came from at this step; its own where nothing was resampled."""
    value: Tensor
    """What the lookahead said of each particle `[N]`, before resampling."""
    ess: Tensor
    """Effective sample size of every population `[P]`, before resampling."""
    resampled: Tensor
    """Which populations were resampled `[P]`."""
    outputs: Any = field(default=None, repr=False)
    """Previews of the particles before resampling, where `keep_previews` was set."""


@dataclass(frozen=True)
class FKSteering(Sampler):
    """Weigh and resample particles on their way.

    Attributes:
        num_particles: K for each output.
        n: outputs for each prompt; None returns the weighted population itself (`log_weight`), an
            integer draws that many from *one* population of `n * num_particles` (at equal cost far
            closer to the target than n populations of K).
        per_output: n populations of K instead, one output from each, as the paper does. An output is
            weighed against its own population alone; only the pool's weights compare populations.
        potential: "difference", "max" or "sum".
        terminal: "exact", the paper's rule, or "running", as in the released code: for max and sum the last factor has
            the running value in place of `r(x_0)`, so that the target is `p exp(max rho / beta)` or
            `p exp(sum rho / beta)`.
        start, stop, every: steps after which particles are weighed: start, start + every, ... up to stop, and the last.
        ess_threshold: resample where the effective sample size is below this share of K; None: at every weighted step
            that noise still follows.
        resampler: "ssp", "systematic", "stratified" or "multinomial".
        tempering: gamma of DAS (Kim et al. 2025): rho is scaled by `min((1 + gamma)^i - 1, 1)`, i the steps taken,
            and by 1 at the end; None is off.
        lookahead: what values unfinished particles: `Preview()`, `Rollouts(m)` or `StateValue(v)`; on the command line
            `preview` or `rollouts:M`.
        select: "weighted" (needs n = None), "draw" (by weight, as distinct as the resampler makes them) or "best" (by
            reward, then weight); by default weighted without n and draw with it.
        correct: weigh edits as a proposal. Off, the edited process is itself the base law: for edits
            whose weight is not known (hidden states, prompts), or by choice.
        floor: the value that a running max or sum and the difference start from, for the released code's convention 0;
            None is the right one: -infinity for max, 0 for the others.
        keep_previews: keep what the reward saw, for pictures.
        over_ranks: one population over the ranks of a job (torchrun), each of which runs the network and the reward on
            its share: at a weighted step values and weights are gathered by one message, and rows move where a copy's
            ancestor lies elsewhere. Every rank returns the whole population, which is that of one process with this
            setting, up to rounding; `Rollouts` are drawn by each rank's own numbers, with the same law.

    Returns from `run`: the samples with `log_z` (`exp(log_z)` is unbiased, see above), `kl`, the population's estimate
    of the target's KL to the base (infinite where no particle is possible), `pool` (the whole weighted population),
    `lineage` (rows of the pool) and `trace`.
    """

    num_particles: int = 8
    n: int | None = None
    per_output: bool = False
    potential: str = "difference"
    terminal: str = "exact"
    start: int = 1
    stop: int | None = None
    every: int = 1
    ess_threshold: float | None = 0.5
    resampler: str = "ssp"
    tempering: float | None = None
    lookahead: Lookahead = field(default_factory=Preview)
    select: str | None = None
    correct: bool = True
    floor: float | None = None
    keep_previews: bool = False
    over_ranks: bool = False

    title = "FK steering"
    needs = frozenset({Ability.BRANCH})
    needs_reward = True
    tilts = True
    population = "num_particles"
    chooses_whole = False
    reads = True
    shows = frozenset({"lineage"})
    own_settings = frozenset({"keep_previews", "over_ranks"})
    kl_kind = "population"

    @property
    def rows(self) -> int:
        return self.num_particles * (self.n or 1)

    @property
    def scores_steps(self) -> bool:
        return isinstance(self.lookahead, Preview) and self.every == 1

    def __post_init__(self) -> None:
        for name in ("num_particles", "n", "start", "stop", "every"):
            value = getattr(self, name)
            optional = name in ("n", "stop") and value is None
            check(optional or (_whole(value) and value >= 1), name, value, "an integer of 1 or more")
        allowed = ("difference", "max", "sum")
        check(self.potential in allowed, "potential", self.potential, ", ".join(allowed))
        check(self.terminal in ("exact", "running"), "terminal", self.terminal, "exact, running")
        ess = self.ess_threshold
        check(ess is None or 0 < ess <= 1, "ess_threshold", ess, "a share of the particles in (0, 1], or None")
        check(self.resampler in RESAMPLERS, "resampler", self.resampler, ", ".join(RESAMPLERS))
        check(self.tempering is None or self.tempering > 0, "tempering", self.tempering, "a number above 0, or None")
        check(self.select in (None, "weighted", "draw", "best"), "select", self.select, "weighted, draw, best")
        check(not (self.over_ranks and self.keep_previews), "keep_previews", True, "False with over_ranks")
        check(not (self.select == "weighted" and self.n), "select", "weighted", "draw or best where n is given")

    def check_process(self, process: Process) -> None:
        super().check_process(process)
        allowed = "False: rows that are drawn token by token stay in one process"
        check(not self.over_ranks or process.noise_by_row, "over_ranks", True, allowed)
        self.lookahead.check(process)

    def prepared(self, process: Process) -> Process:
        return self.lookahead.prepared(process.as_proposal() if self.correct else process)

    def draw(self, run: Run) -> Samples:
        process, prompts = run.process, len(run.prompts)
        populations = prompts * ((self.n or 1) if self.per_output else 1)
        size = self.num_particles * (1 if self.per_output else (self.n or 1))
        rows = populations * size
        spread = Spread(rows, run.generator) if self.over_ranks else None
        state = process.init(run.prompts, rows // prompts, run.generator if spread is None else spread.noise)
        if spread is not None:
            state = process.gather(state, spread.held)
        if self.correct and state.base_log_prob is None:
            raise UnsupportedError(
                "FK steering cannot weigh edits of prompts or hidden states, whose law against the base is not known "
                "while generating: set correct=False to steer the edited process itself"
            )
        particles = _Particles(self, run.beta, populations, size, rows)
        trace: list[Generation] = []
        finished: Samples | None = None
        while not process.done(state):
            state = process.propose(state, run.generator if spread is None else spread.noise)
            if process.done(state):
                finished = process.decode(state)
            if finished is not None or self._weighed(state.step):
                state, generation = self._generation(run, state, particles, finished, spread)
                trace.append(generation)
                run.note(generation)
            run.step(state)
        samples = process.decode(state) if finished is None else finished
        samples = samples if spread is None else spread.join(samples)
        pool = replace(
            samples,
            log_weight=particles.among(prompts),
            reward=particles.value,
            trace=trace,
            log_z=particles.evidence(prompts),
        )
        pool = replace(pool, kl_estimate=_drift(pool, run.beta) if self.correct else None)
        return self._selected(pool, particles, run.generator if spread is None else spread.common)

    def _generation(
        self, run: Run, state: Any, particles: _Particles, finished: Samples | None, spread: Spread | None
    ) -> tuple[Any, Generation]:
        """Weigh rows, `finished` or by the lookahead, and resample where it is due."""
        process = run.process
        if finished is not None:
            value = run.score(finished)
        else:
            state = process.read(state) if self.lookahead.reads else state
            drawn = run.generator if spread is None else spread.own
            value, cost = self.lookahead(process, state, run.reward, run.beta, drawn)
            run.pay(cost)
        shown = None
        if self.keep_previews:
            shown = (process.preview(state) if finished is None else finished).outputs
        ratio = (state.aim_log_prob - state.log_prob).double().cpu() if self.correct else torch.zeros_like(value)
        generator = run.generator
        if spread is not None:
            value, ratio = spread.all(value, ratio)
            generator = spread.common
        particles.weigh(value, ratio, state.step, finished is not None)
        ancestors, ess, resampled = particles.resample(generator, process.diverges(state))
        generation = Generation(state.step, ancestors, value, ess, resampled, shown)
        if bool(resampled.any()):
            state = process.gather(state, ancestors) if spread is None else spread.gather(process, state, ancestors)
        return state, generation

    def _weighed(self, step: int) -> bool:
        return step >= self.start and (step - self.start) % self.every == 0 and step <= (self.stop or step)

    def _selected(self, pool: Samples, particles: _Particles, generator: torch.Generator) -> Samples:
        select = self.select or ("weighted" if self.n is None else "draw")
        if select == "weighted":
            return pool
        size = particles.size
        count = 1 if self.per_output else (self.n or size)
        if select == "draw":
            index = resample(particles.log_weight, generator, self.resampler, count)
        else:
            # By reward, and among equals by weight.
            order = particles.log_weight.sort(dim=1, descending=True, stable=True).indices
            rewards = particles.value.reshape(-1, size).gather(1, order)
            index = order.gather(1, rewards.sort(dim=1, descending=True, stable=True).indices[:, :count])
        rows = (index + torch.arange(len(index)).unsqueeze(1) * size).flatten()
        chosen = pool.select(rows)
        return replace(chosen, log_weight=torch.zeros(len(rows), dtype=torch.float64), pool=pool, lineage=rows)


def _drift(pool: Samples, beta: float) -> Tensor:
    """KL of the target to the base, `E[r / beta + tilt] - log Z`, as the population estimates it, by row `[N]`;
    infinite where Z is 0.
    """
    assert pool.log_z is not None and pool.tilt is not None
    w = pool.weights
    tilt = torch.zeros_like(pool.log_z).index_add(0, pool.group, torch.where(w > 0, w * pool.tilt, 0.0))
    drift = pool.mean_reward() / beta + tilt - pool.log_z
    return torch.where(pool.log_z.isneginf(), torch.inf, drift)[pool.group]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class _Particles:
    """The weights of a run. Every row carries what its potential still needs: `carried` `[N]`, the running value or the
    last one, `total` `[N]`, the log of all factors so far, and `ratio` `[N]`, `log p - log q` when it was last weighed.
    """

    def __init__(self, sampler: FKSteering, beta: float, populations: int, size: int, rows: int) -> None:
        self.sampler, self.beta, self.size = sampler, beta, size
        self.log_weight = torch.zeros(populations, size, dtype=torch.float64)
        self.log_z = torch.zeros(populations, dtype=torch.float64)
        floor = sampler.floor
        if floor is None:
            floor = -torch.inf if sampler.potential == "max" else 0.0
        self.carried = torch.full((rows,), floor / beta, dtype=torch.float64)
        self.total = torch.zeros(rows, dtype=torch.float64)
        self.ratio = torch.zeros(rows, dtype=torch.float64)
        self.value = torch.zeros(rows, dtype=torch.float64)

    def weigh(self, value: Tensor, ratio: Tensor, steps: int, last: bool) -> None:
        """Multiply the weights, after so many steps, by the potential and by the proposal's correction."""
        self.value = value
        gamma = self.sampler.tempering
        scale = 1.0 if gamma is None or last else min((1 + gamma) ** steps - 1, 1.0)
        step = self._factor(value * (scale / self.beta), last)
        self.total = self.total + step
        if self.sampler.correct:
            step, self.ratio = step + gained(ratio, self.ratio), ratio
        self.log_weight = self.log_weight + step.reshape(self.log_weight.shape)

    def _factor(self, rho: Tensor, last: bool) -> Tensor:
        """Log of the potential, from `rho / beta`."""
        potential, before = self.sampler.potential, self.carried
        running = self.sampler.terminal == "running" and potential != "difference"
        if not (last or running):
            rho = torch.where(rho.isneginf(), 0.0, rho) if potential == "sum" else self._raised(rho, before)
        if potential == "difference":
            self.carried = rho
            return rho - (self.total if last else before)
        self.carried = torch.maximum(before, rho) if potential == "max" else before + rho
        if last:
            return (self.carried if running else rho) - self.total
        return self._raised(self.carried, torch.zeros_like(rho))

    def _raised(self, rho: Tensor, known: Tensor) -> Tensor:
        """`rho` with a finite value in place of -infinity, which would be a weight of 0 for good: 1 / K of the mean of
        `exp(rho)` over the population, or, where nothing in it is above -infinity, what was `known` before.
        """
        rows = rho.reshape(-1, self.size)
        floor = (log_mean_exp(rows) - math.log(self.size)).unsqueeze(1).expand_as(rows).flatten()
        known = torch.where(known.isneginf(), 0.0, known)
        return torch.where(rho.isneginf(), torch.where(floor.isneginf(), known, floor), rho)

    def resample(self, generator: torch.Generator, worth: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Ancestors `[N]`, ESS `[P]` and which populations were resampled `[P]`. Without noise to come copies would
        stay copies, so the last weights are left to be read or drawn from.
        """
        ess = effective_sample_size(self.log_weight)
        due = torch.full(ess.shape, worth)
        if self.sampler.ess_threshold is not None:
            due &= ess < self.sampler.ess_threshold * self.size
        own = torch.arange(self.log_weight.numel()).reshape(self.log_weight.shape)
        if not bool(due.any()):
            return own.flatten(), ess, due
        drawn = resample(self.log_weight[due], generator, self.sampler.resampler)
        ancestors = own.clone()
        ancestors[due] = own[due].gather(1, drawn)
        self.log_z = torch.where(due, self.log_z + log_mean_exp(self.log_weight), self.log_z)
        self.log_weight = torch.where(due.unsqueeze(1), 0.0, self.log_weight)
        index = ancestors.flatten()
        for name in ("carried", "total", "ratio", "value"):
            setattr(self, name, getattr(self, name)[index])
        return index, ess, due

    def among(self, prompts: int) -> Tensor:
        """Log-weights `[N]` of particles among all of their prompt's, whose populations count by their own log Z."""
        whole = self.log_z.reshape(prompts, -1)
        shares = whole - log_mean_exp(whole).unsqueeze(1)
        shares = torch.where(whole.isneginf(), whole, shares).reshape(-1, 1)
        return (self.log_weight + shares).flatten()

    def evidence(self, prompts: int) -> Tensor:
        """log Z `[B]`; a prompt's populations are averaged, which keeps `exp(log_z)` unbiased."""
        whole = self.log_z + log_mean_exp(self.log_weight)
        return log_mean_exp(whole.reshape(prompts, -1))
