"""The return of an episode as a reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steer.core import RewardError, Samples, check
from steer.rewards.algebra import Composable

__all__ = ["Return"]


@dataclass(frozen=True, repr=False)
class Return(Composable):
    """`sum_t gamma^t r_t` of an episode, as far as it was played."""

    gamma: float = 1.0

    modality: ClassVar = "text"
    alone: ClassVar = True

    def __post_init__(self) -> None:
        check(0 < self.gamma <= 1, "reward return", self.gamma, "gamma above 0, at most 1")

    def score(self, samples: Samples) -> Tensor:
        totals: list[Any] = [getattr(output, "total", None) for output in samples.outputs]
        if not all(callable(total) for total in totals):
            raise RewardError("reward return: these outputs are no episodes; allowed: those of a TurnProcess")
        return torch.tensor([float(total(self.gamma)) for total in totals], dtype=torch.float64)

    def __repr__(self) -> str:
        return "return" if self.gamma == 1 else f"return:gamma={self.gamma:g}"
