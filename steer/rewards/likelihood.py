"""Rewards that score text under the base model: fluency and perplexity. They hold no model until they are bound."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from steer.core import Samples, SteerError, UnsupportedError
from steer.rewards.algebra import Composable
from steer.rewards.text import texts_of

__all__ = ["EMPTY_LOG_PROB", "Fluency", "Perplexity", "Scorer"]


EMPTY_LOG_PROB = -10.0
"""`fluency` of an output without tokens, in nats: low, so that saying nothing does not win."""


@runtime_checkable
class Scorer(Protocol):
    """A language model that can score text."""

    def log_likelihood(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Summed log-probability of every output given its prompt `[N]`, in nats, and its number of tokens `[N]`."""


F = TypeVar("F", bound="Fluency")


@dataclass(frozen=True, repr=False)
class Fluency(Composable):
    """Mean log-probability a token, in nats, of the output under the base model given its prompt.

    An output without tokens scores `EMPTY_LOG_PROB`. Needs a model: `generate` binds it.
    """

    modality: ClassVar = "text"
    model: Scorer | None = field(default=None, compare=False)

    def bind(self: F, model: Any) -> F:
        if model is self.model:
            return self
        if not isinstance(model, Scorer):
            raise UnsupportedError(
                f"reward {self} needs a language model that can score text; {type(model).__name__} cannot"
            )
        return replace(self, model=model)

    def score(self, samples: Samples) -> Tensor:
        texts_of(samples, self)
        if self.model is None:
            raise SteerError(f"reward {self}: needs a language model; generate() binds one, or call .bind(model)")
        total, count = self.model.log_likelihood(samples)
        total, count = total.detach().cpu().double(), count.detach().cpu()
        return torch.where(count > 0, total / count.clamp(min=1), EMPTY_LOG_PROB)

    def __repr__(self) -> str:
        return "fluency"


class Perplexity(Fluency):
    """`exp(-fluency)`: lower is more fluent, so use `-perplexity` (or better `fluency`, which has no long tail)."""

    def score(self, samples: Samples) -> Tensor:
        return super().score(samples).neg().clamp(max=700).exp()

    def __repr__(self) -> str:
        return "perplexity"
