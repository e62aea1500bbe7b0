"""Processes small enough to be solved: the oracle of every method, and a way to try one without weights.

`TabularProcess` is a Markov chain over a few tokens whose laws are enumerated; `GaussianProcess` is a diffusion chain
over a Gaussian or a mixture whose denoiser is exact.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steer.core import (
    Ability,
    Context,
    Cost,
    Edit,
    Process,
    Prompt,
    Samples,
    Site,
    TransitionEdit,
    UnsupportedError,
    check,
)

__all__ = ["GaussianProcess", "TabularProcess", "markov_lm"]

Mounted = tuple[tuple[Edit, frozenset[int] | None], ...]


@dataclass(frozen=True)
class ToyState:
    """`x` is the prefix `[N, step]` (tabular) or the latent `[N, 1]` (Gaussian)."""

    x: Tensor
    group: Tensor
    step: int
    log_prob: Tensor
    base_log_prob: Tensor
    kl: Tensor
    cost: Cost
    prompts: list[Any] = field(repr=False)

    def __len__(self) -> int:
        return len(self.group)


@dataclass(frozen=True)
class ToyContext:
    """`Context` of a toy process."""

    prefix: Tensor
    step: int
    base: Tensor

    @property
    def hidden(self) -> Tensor:
        raise UnsupportedError("a toy process has no hidden states")

    def lookahead(self, candidates: Tensor) -> Tensor:
        raise UnsupportedError("a toy process has no hidden states")

    def companion(self, process: Process) -> Context:
        """The same rows under another process of the same kind."""
        assert isinstance(process, _Toy)
        return process.context(self.prefix, self.step)


class _Toy(Process):
    sites = frozenset({Site.TRANSITION})
    abilities = frozenset({Ability.FORK, Ability.LOG_PROB, Ability.PREVIEW})

    def copy(self, edits: Mounted) -> Any:
        return replace(self, edits=edits)  # type: ignore[type-var]

    def done(self, state: ToyState) -> bool:
        return state.step >= self.num_steps

    @abstractmethod
    def context(self, prefix: Tensor, step: int) -> ToyContext:
        """What an edit sees of rows `prefix`; `base` is the unedited quantity."""

    def _start(self, prompts: Sequence[Prompt], n: int) -> dict[str, Any]:
        check(n >= 1, "n", n, "1 or more")
        check(len(prompts) >= 1, "prompts", prompts, "at least one")
        rows = len(prompts) * n
        zero = torch.zeros(rows, dtype=torch.float64)
        group = torch.arange(len(prompts)).repeat_interleave(n)
        return {
            "group": group, "step": 0, "log_prob": zero, "base_log_prob": zero, "kl": zero,
            "cost": Cost(), "prompts": list(prompts),
        }  # fmt: skip

    def _shifted(self, context: ToyContext, group: Tensor | None) -> Tensor:
        """The quantity at TRANSITION after every edit, each applied to the rows that asked for it."""
        x = context.base
        for edit, wanted in self.edits:
            assert isinstance(edit, TransitionEdit)
            changed = edit.shift(x, context)
            if wanted is not None and group is not None:
                mask = torch.tensor([int(g) in wanted for g in group])
                changed = torch.where(mask.unsqueeze(-1), changed, x)
            x = changed
        return x

    def gather(self, state: ToyState, index: Tensor) -> ToyState:
        rows = ("x", "group", "log_prob", "base_log_prob", "kl")
        return replace(state, **{name: getattr(state, name)[index] for name in rows})

    def _samples(self, state: ToyState, outputs: Tensor) -> Samples:
        return Samples(
            prompts=state.prompts,
            outputs=outputs,
            group=state.group,
            log_weight=torch.zeros(len(state), dtype=torch.float64),
            log_prob=state.log_prob,
            base_log_prob=state.base_log_prob,
            kl_estimate=state.kl,
            cost=state.cost,
        )

    def decode(self, state: ToyState) -> Samples:
        return self._samples(state, state.x)


# ---------------------------------------------------------------------------------------------------------- tabular


@dataclass(frozen=True)
class TabularProcess(_Toy):
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

    @property
    def num_steps(self) -> int:
        return self.length

    @property
    def vocabulary(self) -> int:
        return len(self.initial)

    def init(self, prompts: Sequence[Prompt], n: int, generator: torch.Generator) -> ToyState:
        fields = self._start(prompts, n)
        return ToyState(x=torch.zeros(len(fields["group"]), 0, dtype=torch.long), **fields)

    def context(self, prefix: Tensor, step: int) -> ToyContext:
        p = self.transition[prefix[:, -1]] if step else self.initial.expand(len(prefix), -1)
        return ToyContext(prefix=prefix, step=step, base=p.double().log())

    def step_laws(self, prefix: Tensor, group: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-law of the next token under the edits and under the base, both `[N, V]`."""
        context = self.context(prefix, prefix.shape[1])
        return torch.log_softmax(self._shifted(context, group), -1), context.base

    def propose(self, state: ToyState, generator: torch.Generator) -> ToyState:
        law, base = self.step_laws(state.x, state.group)
        token = torch.multinomial(law.exp(), 1, generator=generator)
        kl = torch.where(law.isneginf(), torch.zeros_like(law), law.exp() * (law - base)).sum(-1)
        return replace(
            state,
            x=torch.cat([state.x, token], 1),
            step=state.step + 1,
            log_prob=state.log_prob + law.gather(1, token).squeeze(1),
            base_log_prob=state.base_log_prob + base.gather(1, token).squeeze(1),
            kl=state.kl + kl,
            cost=state.cost + Cost(model_calls=1, generated_tokens=len(state)),
        )

    def preview(self, state: ToyState) -> Samples:
        """The prefixes `[N, step]`."""
        return self._samples(state, state.x)

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


# --------------------------------------------------------------------------------------------------------- gaussian


@dataclass(frozen=True)
class GaussianProcess(_Toy):
    """DDIM over a mixture of Gaussians with the exact denoiser; the law of this *chain*, not of the data, is the base.

    Linear betas .001 to .07 over 100 steps, `num_steps` equally spaced of them, the last step to abar = 1
    (deterministic), `x_T ~ N(0, 1)`.
    """

    weights: tuple[float, ...] = (1.0,)
    means: tuple[float, ...] = (0.0,)
    variances: tuple[float, ...] = (1.0,)
    steps: int = 50
    eta: float = 1.0
    edits: Mounted = ()

    @property
    def num_steps(self) -> int:
        return self.steps

    @property
    def alphas_bar(self) -> Tensor:
        """Cumulative alphas from the noisiest step to 1, `[steps + 1]`."""
        table = torch.cumprod(1 - torch.linspace(0.001, 0.07, 100, dtype=torch.float64), 0)
        index = torch.linspace(99, 0, self.steps, dtype=torch.float64).round().long()
        return torch.cat([table[index], torch.ones(1, dtype=torch.float64)])

    def init(self, prompts: Sequence[Prompt], n: int, generator: torch.Generator) -> ToyState:
        fields = self._start(prompts, n)
        x = torch.randn(len(fields["group"]), 1, dtype=torch.float64, generator=generator)
        return ToyState(x=x, **fields)

    def x0_hat(self, x: Tensor, step: int) -> Tensor:
        """`E[x_0 | x_t]` of the data law, `[N, 1]`."""
        a = self.alphas_bar[step]
        m, v, w = (torch.tensor(t, dtype=torch.float64) for t in (self.means, self.variances, self.weights))
        d = a * v + 1 - a
        log_posterior = w.log() - 0.5 * d.log() - 0.5 * (x - a.sqrt() * m) ** 2 / d
        component = m + a.sqrt() * v / d * (x - a.sqrt() * m)
        return (torch.softmax(log_posterior, -1) * component).sum(-1, keepdim=True)

    def context(self, prefix: Tensor, step: int) -> ToyContext:
        return ToyContext(prefix=prefix, step=step, base=self.x0_hat(prefix, step))

    def _transition(self, x: Tensor, x0: Tensor, step: int) -> tuple[Tensor, float]:
        a, b = (float(v) for v in self.alphas_bar[step : step + 2])
        std = self.eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
        noise = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
        return math.sqrt(b) * x0 + math.sqrt(max(1 - b - std**2, 0.0)) * noise, std

    def propose(self, state: ToyState, generator: torch.Generator) -> ToyState:
        context = self.context(state.x, state.step)
        mean, std = self._transition(state.x, self._shifted(context, state.group), state.step)
        base_mean, _ = self._transition(state.x, context.base, state.step)
        z = torch.randn(state.x.shape, dtype=torch.float64, generator=generator)
        x = mean + std * z
        moved = (mean - base_mean).squeeze(-1)
        if std > 1e-6:
            kl = moved**2 / (2 * std**2)
            log_prob = (-0.5 * z**2 - math.log(std) - 0.5 * math.log(2 * math.pi)).squeeze(-1)
            under_base = log_prob + (0.5 * z**2 - 0.5 * ((x - base_mean) / std) ** 2).squeeze(-1)
            base_log_prob = torch.where(moved == 0, log_prob, under_base)
        else:  # a deterministic step has no density: it is free unless an edit moved it, and then infinitely far
            kl = torch.where(moved == 0, 0.0, torch.inf).double()
            log_prob, base_log_prob = torch.zeros_like(kl), -kl
        return replace(
            state,
            x=x,
            step=state.step + 1,
            log_prob=state.log_prob + log_prob,
            base_log_prob=state.base_log_prob + base_log_prob,
            kl=state.kl + kl,
            cost=state.cost + Cost(model_calls=1, generated_tokens=0),
        )

    def preview(self, state: ToyState) -> Samples:
        """x0-hat `[N, 1]`."""
        return self._samples(state, state.x if self.done(state) else self.x0_hat(state.x, state.step))

    def chain_moments(self) -> tuple[float, float]:
        """Exact mean and variance of the chain's output, for one Gaussian component (affine updates)."""
        check(len(self.means) == 1, "means", self.means, "one component for exact moments")
        mean, variance = 0.0, 1.0
        for g, c, q in self._affine():
            mean, variance = g * mean + c, g * g * variance + q
        return mean, variance

    def _affine(self) -> list[tuple[float, float, float]]:
        """`x' = g x + c + sqrt(q) z` of every step."""
        rows = []
        for i in range(self.steps):
            zero, one = (torch.tensor([[v]], dtype=torch.float64) for v in (0.0, 1.0))
            (at_zero, std), (at_one, _) = (self._transition(x, self.x0_hat(x, i), i) for x in (zero, one))
            rows.append((float(at_one - at_zero), float(at_zero), std**2))
        return rows

    def soft_values(self, a: float, b: float, beta: float) -> list[tuple[float, float, float]]:
        """Exact soft values for `r = -a/2 (x - b)^2` and one component: entry t holds (A, B, C) of
        `V_t / beta = -A/2 x^2 + B x + C`; entry 0 belongs to x_T, the last to the output.
        """
        check(len(self.means) == 1, "means", self.means, "one component for exact soft values")
        values = [(a / beta, a * b / beta, -a * b * b / (2 * beta))]
        for g, c, q in reversed(self._affine()):
            big, lin, const = values[0]
            d = 1 + big * q
            const = const - 0.5 * math.log(d) + (-0.5 * big * c * c + lin * c + 0.5 * lin * lin * q) / d
            values.insert(0, (big * g * g / d, (lin * g - big * g * c) / d, const))
        return values
