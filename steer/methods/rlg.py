"""RL guidance (RLG): at inference time, between a base model and a policy tuned from it, and beyond.

    x_w = x_base + w (x_tuned - x_base)

on the network's prediction, or on next-token log-probabilities (decoding-time realignment). If the tuned policy is
`p exp(R / b)`, w stands for `p exp(w R / b)`: 0 is the base, 1 the policy, 3 three times the tilt. For tokens it is
exact at 0 and 1 and close between; for diffusion it is not a sampler of that law, since scores of noised marginals do
not mix: on Gaussians it gives the geometric mean of the standard deviations where the product has the harmonic, and
past w = 1 overshoots. Inside `FKSteering` the guided step is a proposal and the law is the right one: that of the
sampler's own reward, or, with `aim="product"`, of the two models alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.core import Context, Process, TransitionEdit, check

__all__ = ["RLGuidance"]


@dataclass(frozen=True, eq=False)
class RLGuidance(TransitionEdit):
    """Extrapolates from the base towards a tuned policy.

    Attributes:
        tuned: the policy's process: the same vocabulary, or the same noise levels. It follows the
            rows in lockstep, at one network evaluation more a step.
        w: any number. 0 and 1 are the base and the policy, bit for bit.
        aim: what samplers that weigh correct towards: "base", the law `p exp(r / beta)` of their own reward, or
            "product", `p^(1 - w) p_tuned^w exp(r / beta)` over whole paths, which needs no reward: where the policy is
            `p exp(R / b)` that is `p exp(w R / b)`.
    """

    tuned: Process
    w: float = 1.5
    aim: str = "base"

    def __post_init__(self) -> None:
        ok = isinstance(self.w, int | float) and not isinstance(self.w, bool) and math.isfinite(self.w)
        check(ok, "w", self.w, "a finite number (0 is the base, 1 the tuned policy)")
        check(self.aim in ("base", "product"), "aim", self.aim, "base, product")
        check(isinstance(self.tuned, Process), "tuned", self.tuned, "a process of the tuned policy")

    @property
    def power(self) -> tuple[Process, float] | None:
        return (self.tuned, self.w) if self.aim == "product" else None

    @property
    def companions(self) -> tuple[Process, ...]:
        return (self.tuned,)

    def shift(self, x: Tensor, context: Context) -> Tensor:
        if self.w == 0:
            return x
        base, tuned = context.base, context.companion(self.tuned).base.to(x)
        if self.w == 1 and x is base:
            return tuned
        mixed = x + self.w * (tuned - base)
        # What either model excludes stays excluded: 0^(1 - w) has no meaning past w = 1.
        excluded = torch.isneginf(x) | torch.isneginf(base) | torch.isneginf(tuned)
        return torch.where(excluded, -torch.inf, mixed)
