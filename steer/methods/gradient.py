"""Guidance by the gradient of a reward, for diffusion: the mean of every step moves by `std^2 grad r(x0_hat(x)) / beta`
(DPS, Chung et al. 2023; classifier guidance of x0-hat).

Alone it is not a sampler of `p exp(r / beta)`: Tweedie's plug-in lacks the posterior's spread and overshoots (20% of
the mean in a Gaussian example). Inside `FKSteering` it is a proposal that weights correct: with the difference
potential that is TDS (Wu et al. 2023), with `tempering` in both DAS (Kim et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from steer.core import Context, Reward, Samples, TransitionEdit, check

__all__ = ["GradientGuidance"]


@dataclass(frozen=True, eq=False)
class GradientGuidance(TransitionEdit):
    """Pushes x0-hat up the gradient of a differentiable reward.

    Attributes:
        reward: scored on decoded x0-hat; its `score` must keep the graph.
        beta: KL coefficient; None takes that of the run.
        strength: a further factor; 0 is no guidance.
        tempering: gamma of DAS: the push is scaled by `min((1 + gamma)^i - 1, 1)` after i steps; None is off.
    """

    reward: Reward
    beta: float | None = None
    strength: float = 1.0
    tempering: float | None = None

    gradient = True

    def __post_init__(self) -> None:
        check(isinstance(self.reward, Reward), "reward", self.reward, "a Reward")
        check(self.beta is None or 0 < self.beta < float("inf"), "beta", self.beta, "a number above 0")
        check(abs(self.strength) < float("inf"), "strength", self.strength, "a finite number")
        check(self.tempering is None or self.tempering > 0, "tempering", self.tempering, "a number above 0, or None")

    def with_beta(self, beta: float) -> GradientGuidance:
        return self if self.beta is not None else replace(self, beta=beta)

    def shift(self, x: Tensor, context: Context) -> Tensor:
        scale = self.strength / (1.0 if self.beta is None else self.beta)
        if self.tempering is not None:
            scale *= min((1 + self.tempering) ** context.step - 1, 1.0)

        def score(shown: Samples) -> Tensor:
            return scale * self.reward.score(shown)

        return x + context.guidance(score) if scale else x
