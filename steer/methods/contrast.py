"""Contrast between models while decoding: against a weaker one, or with the difference that tuning made to a small one.

Contrastive decoding (Li et al. 2022, 2210.15097; in the form of O'Brien and Lewis 2023, 2309.09117):

    x_w = x + w (x - x_amateur)    where p(token) >= alpha max p, nothing elsewhere

Proxy tuning (Liu et al. 2024, 2401.08565):

    x_w = x + w (x_expert - x_antiexpert)

with x next-token log-probabilities `[N, V]`, all over one vocabulary. The other models follow the rows in lockstep, at
one network evaluation more a step each. Inside a sampler that weighs, the contrast is a proposal that it corrects for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer.core import Context, Process, TransitionEdit, check

__all__ = ["ContrastiveDecoding", "ProxyTuning"]


def _check_weight(w: Any) -> None:
    good = isinstance(w, int | float) and not isinstance(w, bool) and math.isfinite(w)
    check(good, "w", w, "a finite number (0 is the model itself)")


@dataclass(frozen=True, eq=False)
class ContrastiveDecoding(TransitionEdit):
    """Prefers what the model likes more than a weaker model does, among tokens that it finds plausible.

    Attributes:
        amateur: the weaker model's process, over the same vocabulary.
        w: how strongly; 0 only cuts implausible tokens, 1 is the usual strength.
        alpha: a token is kept where its probability is at least this share of the likeliest token's; 0 keeps all.
    """

    amateur: Process
    w: float = 1.0
    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_weight(self.w)
        good = isinstance(self.alpha, int | float) and 0 <= self.alpha <= 1
        check(good, "alpha", self.alpha, "a share from 0 (every token) to 1 (the likeliest alone)")
        check(isinstance(self.amateur, Process), "amateur", self.amateur, "a process of the weaker model")

    @property
    def companions(self) -> tuple[Process, ...]:
        return (self.amateur,)

    def shift(self, x: Tensor, context: Context) -> Tensor:
        weak = context.companion(self.amateur).base.to(x)
        mixed = x + self.w * (context.base - weak)
        excluded = torch.isneginf(x) | torch.isneginf(weak)
        if self.alpha > 0:
            excluded |= context.base < context.base.amax(-1, keepdim=True) + math.log(self.alpha)
        return torch.where(excluded, -torch.inf, mixed)


@dataclass(frozen=True, eq=False)
class ProxyTuning(TransitionEdit):
    """Moves a model as tuning moved a smaller one of the same vocabulary.

    Attributes:
        expert, antiexpert: processes of the small model after and before tuning.
        w: how far; 1 is the difference as it is.
    """

    expert: Process
    antiexpert: Process
    w: float = 1.0

    def __post_init__(self) -> None:
        _check_weight(self.w)
        for name in ("expert", "antiexpert"):
            check(isinstance(getattr(self, name), Process), name, getattr(self, name), "a process of the small model")

    @property
    def companions(self) -> tuple[Process, ...]:
        return (self.expert, self.antiexpert)

    def shift(self, x: Tensor, context: Context) -> Tensor:
        if self.w == 0:
            return x
        after, before = (context.companion(process).base.to(x) for process in self.companions)
        excluded = torch.isneginf(x) | torch.isneginf(after) | torch.isneginf(before)
        return torch.where(excluded, -torch.inf, x + self.w * (after - before))
