"""Scores of given texts: how likely a model finds them, token by token summed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Scores"]


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of `N` texts, each after its prompt, at temperature 1, in nats."""

    log_prob: Tensor
    """Summed over a text's tokens `[N]`, float64."""
    tokens: Tensor
    """How many tokens each text has `[N]`, float64."""
    greedy: Tensor
    """Whether every token is the likeliest at its place `[N]`, bool."""

    @property
    def mean(self) -> Tensor:
        """Log-probability a token `[N]`; 0 for a text without tokens."""
        return self.log_prob / self.tokens.clamp_min(1)
