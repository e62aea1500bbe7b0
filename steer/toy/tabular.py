"""Processes small enough to be solved: the oracle of every method, and a way to try one without weights.

`TabularProcess` is a Markov chain over a few tokens whose laws are enumerated; `GaussianProcess` is a diffusion chain
over a Gaussian or a mixture whose denoiser is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steer.core import Ability, Context, Cost, Mounted, Process, Prompt, Samples, Site, TransitionEdit, check
from steer.core.context import Opaque, among, shifted
from steer.core.rows import accounted
from steer.sampling.weights import product

__all__ = ["TabularProcess", "markov_lm"]


# ---------------------------------------------------------------------------------------------------------- tabular


@dataclass(frozen=True)
class TabularState:
    """Prefixes `x` `[N, step]`."""

    x: Tensor
    group: Tensor
    step: int
    log_prob: Tensor
    base_log_prob: Tensor
    aim_log_prob: Tensor
    kl: Tensor
    cost: Cost
    prompts: list[Any] = field(repr=False)

    def __len__(self) -> int:
        return len(self.group)

    @property
    def tilt(self) -> Tensor:
        """Log of the law that weights aim at over the base law `[N]`; infinite where the base alone excludes a row."""
        return torch.where(self.aim_log_prob == self.base_log_prob, 0.0, self.aim_log_prob - self.base_log_prob)


_ROWS = ("x", "group", "log_prob", "base_log_prob", "aim_log_prob", "kl")


@dataclass(frozen=True)
class TabularContext(Opaque):
    """`Context` of a tabular process; `base` is the unedited log-law `[N, V]`."""

    no_hidden = no_lookahead = "a toy process has no hidden states"

    prefix: Tensor
    step: int
    base: Tensor

    def companion(self, process: Process) -> Context:
        """The same rows under another tabular process."""
        assert isinstance(process, TabularProcess)
        return process.view(self.prefix)


@dataclass(frozen=True)
class TabularProcess(Process):
    """A Markov chain `x_1 .. x_T` over `V` tokens, in float64.

    Attributes:
        initial: law of the first token `[V]`.
        transition: `transition[a, b]` is the probability of b after a `[V, V]`.
        length: T.
    """

    initial: Tensor
    transition: Tensor
    length: int
    edits: Mounted = ()

    sites = frozenset({Site.TRANSITION})

    @property
    def abilities(self) -> frozenset[Ability]:
        return frozenset({Ability.FORK, Ability.BRANCH, Ability.LOG_PROB, Ability.PREVIEW})

    @property
    def num_steps(self) -> int:
        return self.length

    @property
    def vocabulary(self) -> int:
        return len(self.initial)

    def copy(self, edits: Mounted) -> TabularProcess:
        return replace(self, edits=edits)

    def done(self, state: TabularState) -> bool:
        return state.step >= self.length

    def init(self, prompts: Sequence[Prompt], n: int, generator: torch.Generator) -> TabularState:
        check(n >= 1, "n", n, "1 or more")
        check(len(prompts) >= 1, "prompts", prompts, "at least one")
        rows = len(prompts) * n
        zero = torch.zeros(rows, dtype=torch.float64)
        group = torch.arange(len(prompts)).repeat_interleave(n)
        x = torch.zeros(rows, 0, dtype=torch.long)
        return TabularState(x, group, 0, zero, zero, zero, zero, Cost(), list(prompts))

    def view(self, prefix: Tensor) -> TabularContext:
        """What an edit sees of rows `prefix` `[N, step]`."""
        step = prefix.shape[1]
        p = self.transition[prefix[:, -1]] if step else self.initial.expand(len(prefix), -1)
        return TabularContext(prefix, step, p.double().log())

    def context(self, state: TabularState) -> TabularContext:
        return self.view(state.x)

    def gather(self, state: TabularState, index: Tensor) -> TabularState:
        return replace(state, **{name: getattr(state, name)[index] for name in _ROWS})

    def stack(self, states: Sequence[TabularState]) -> TabularState:
        joined: dict[str, Any] = {name: torch.cat([getattr(s, name) for s in states]) for name in _ROWS}
        return replace(states[0], **joined, cost=sum((s.cost for s in states), Cost()))

    def settle(self, state: TabularState) -> tuple[TabularState, Cost]:
        return replace(state, cost=Cost()), state.cost

    def pack(self, state: TabularState) -> dict[str, Tensor]:
        return {name: getattr(state, name) for name in _ROWS}

    def unpack(self, prompts: Sequence[Prompt], step: int, packed: dict[str, Tensor]) -> TabularState:
        return TabularState(**packed, step=step, cost=Cost(), prompts=list(prompts))

    def identify(self, state: TabularState) -> list[Any]:
        return [tuple(row) for row in state.x.tolist()]

    def preview(self, state: TabularState) -> Samples:
        """The prefixes `[N, step]`."""
        return self.decode(state)

    def decode(self, state: TabularState) -> Samples:
        zero = torch.zeros(len(state), dtype=torch.float64)
        return accounted(Samples(state.prompts, state.x, state.group, zero), state)

    def step_laws(self, prefix: Tensor, group: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-law of the next token under the edits and under the base, both `[N, V]`."""
        context = self.view(prefix)
        return torch.log_softmax(shifted(self.edits, context, group), -1), context.base

    def propose(self, state: TabularState, generator: torch.Generator) -> TabularState:
        law, base = self.step_laws(state.x, state.group)
        token = torch.multinomial(law.exp(), 1, generator=generator)
        kl = torch.where(law.isneginf(), torch.zeros_like(law), law.exp() * (law - base)).sum(-1)
        return replace(
            state,
            x=torch.cat([state.x, token], 1),
            step=state.step + 1,
            log_prob=state.log_prob + law.gather(1, token).squeeze(1),
            base_log_prob=state.base_log_prob + base.gather(1, token).squeeze(1),
            aim_log_prob=state.aim_log_prob + self._aim(state, base).gather(1, token).squeeze(1),
            kl=state.kl + kl,
            cost=state.cost + Cost(model_calls=1, nfe=len(state), generated_tokens=len(state)),
        )

    def _aim(self, state: TabularState, base: Tensor) -> Tensor:
        """Log-law of the next step that weights aim at `[N, V]`, not normalised; `base` but under edits with power."""
        law = base
        for edit, wanted in self.edits:
            if not (isinstance(edit, TransitionEdit) and edit.power is not None):
                continue
            tuned, w = edit.power
            other = (self.view(state.x).companion(tuned).base, w)
            mixed = product((base, 1 - w), other) if law is base else product((law, 1.0), (base, -w), other)
            law = mixed if wanted is None else torch.where(among(state.group, wanted).unsqueeze(1), mixed, law)
        return law

    def law(self) -> tuple[Tensor, Tensor]:
        """Every sequence `[V^T, T]` in lexicographic order with its exact log-probability `[V^T]` under the edits."""
        prefix, log_prob = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, dtype=torch.float64)
        for _ in range(self.length):
            step, _ = self.step_laws(prefix)
            tokens = torch.arange(self.vocabulary).repeat(len(prefix)).unsqueeze(1)
            prefix = torch.cat([prefix.repeat_interleave(self.vocabulary, 0), tokens], 1)
            log_prob = (log_prob.unsqueeze(1) + step).flatten()
        return prefix, log_prob

    def target(self, reward: Callable[[Tensor], Tensor], beta: float) -> tuple[Tensor, float]:
        """Log-probabilities of p* `[V^T]` and log Z, with `reward` on sequences `[M, T] -> [M]`."""
        sequences, log_prob = self.law()
        tilted = log_prob + reward(sequences).double() / beta
        log_z = torch.logsumexp(tilted, 0)
        return tilted - log_z, float(log_z)

    def soft_values(self, reward: Callable[[Tensor], Tensor], beta: float) -> list[Tensor]:
        """`beta log E[exp(r / beta) | prefix]` for every prefix: entry t has shape `[V^t]`, lexicographic."""
        return self._backward(reward, lambda v, law: beta * torch.logsumexp(v / beta + law, -1))

    def mean_values(self, reward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """`E[r | prefix]` for every prefix, the value that regression on rollouts learns: entry t is `[V^t]`."""
        return self._backward(reward, lambda v, law: (v * law.exp()).sum(-1))

    def _backward(self, reward: Callable[[Tensor], Tensor], backup: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        sequences, _ = self.law()
        values = [reward(sequences).double()]
        for t in reversed(range(self.length)):
            prefixes = sequences[:: self.vocabulary ** (self.length - t), :t]
            law, _ = self.step_laws(prefixes)
            values.insert(0, backup(values[0].view(-1, self.vocabulary), law))
        return values


def markov_lm() -> TabularProcess:
    """The chain with three tokens and three steps on which every method of this package is checked by enumeration."""
    stay = torch.full((3, 3), 0.25, dtype=torch.float64) + 0.25 * torch.eye(3, dtype=torch.float64)
    return TabularProcess(torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), stay, 3)
