"""Processes small enough to be solved: the oracle of every method, and a way to try one without weights.

`TabularProcess` is a Markov chain over a few tokens whose laws are enumerated; `GaussianProcess` is a diffusion chain
over a Gaussian or a mixture whose denoiser is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer.chain import ChainContext, ChainState, TokenChain
from steer.core import Mounted
from steer.core.context import shifted

__all__ = ["TabularProcess", "markov_lm"]


# ---------------------------------------------------------------------------------------------------------- tabular


TabularState = ChainState


@dataclass(frozen=True)
class TabularProcess(TokenChain):
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
    def vocabulary(self) -> int:
        return len(self.initial)

    def view(self, prefix: Tensor, prompts: Sequence[Any] | None = None) -> ChainContext:
        step = prefix.shape[1]
        p = self.transition[prefix[:, -1]] if step else self.initial.expand(len(prefix), -1)
        return ChainContext(prefix, step, p.double().log())

    def step_laws(self, prefix: Tensor, group: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-law of the next token under the edits and under the base, both `[N, V]`."""
        context = self.view(prefix)
        return torch.log_softmax(shifted(self.edits, context, group), -1), context.base

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
