"""A Gaussian mixture diffused exactly: a continuous process whose laws are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from steer.core import Mounted, Prompt, check
from steer.diffusion import Schedule
from steer.diffusion.process import Diffusion

# --------------------------------------------------------------------------------------------------------- gaussian


@dataclass(frozen=True)
class _Mixture:
    """The exact denoiser of a mixture of Gaussians, in float64."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    variances: tuple[float, ...]
    schedule: Schedule

    def encode(self, prompts: Sequence[Prompt]) -> None:
        return None

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, 1, dtype=torch.float64, generator=generator)

    def predict(self, x: Tensor, step: int, group: Tensor, encoded: None) -> Tensor:
        """`E[x_0 | x_t]` of the data law, `[N, 1]`."""
        a, b = self.schedule.alpha[step], self.schedule.sigma[step] ** 2
        m, v, w = (torch.tensor(t, dtype=torch.float64) for t in (self.means, self.variances, self.weights))
        d = a * a * v + b
        log_posterior = w.log() - 0.5 * d.log() - 0.5 * (x - a * m) ** 2 / d
        component = m + a * v / d * (x - a * m)
        return (torch.softmax(log_posterior, -1) * component).sum(-1, keepdim=True)

    def decode(self, x: Tensor) -> Tensor:
        return x

    preview = decode

    def show(self, prompt: Prompt) -> Prompt:
        return prompt


@dataclass(frozen=True)
class GaussianProcess(Diffusion):
    """A chain over a mixture of Gaussians with the exact denoiser; the law of this *chain*, not of the data, is the
    base. `x_T ~ N(0, 1)`.

    Attributes:
        path: "vp", linear betas .001 to .07 over 100 steps, `steps` equally spaced of them, the last step to abar = 1
            (deterministic); or "flow", `x = (1 - t) x_0 + t eps` in equal steps from t = 1 to 0.
        eta: of `Schedule.between`.
    """

    weights: tuple[float, ...] = (1.0,)
    means: tuple[float, ...] = (0.0,)
    variances: tuple[float, ...] = (1.0,)
    steps: int = 50
    eta: float = 1.0
    path: str = "vp"
    edits: Mounted = ()
    proposal: bool = False
    shown: str = "current"

    def __post_init__(self) -> None:
        check(self.path in ("vp", "flow"), "path", self.path, "vp, flow")

    @cached_property
    def schedule(self) -> Schedule:
        if self.path == "flow":
            sigma = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
            alpha = 1 - sigma
        else:
            alpha, sigma = self.alphas_bar.sqrt(), (1 - self.alphas_bar).sqrt()
        return Schedule.between(alpha.tolist(), sigma.tolist(), self.eta)

    @cached_property
    def denoiser(self) -> _Mixture:
        return _Mixture(self.weights, self.means, self.variances, self.schedule)

    @property
    def alphas_bar(self) -> Tensor:
        """Cumulative alphas of the "vp" path from the noisiest step to 1, `[steps + 1]`."""
        table = torch.cumprod(1 - torch.linspace(0.001, 0.07, 100, dtype=torch.float64), 0)
        index = torch.linspace(99, 0, self.steps, dtype=torch.float64).round().long()
        return torch.cat([table[index], torch.ones(1, dtype=torch.float64)])

    def predict(self, x: Tensor, step: int, group: Tensor, encoded: Any) -> Tensor:
        return self.denoiser.predict(x, step, group, None)

    def x0_hat(self, x: Tensor, step: int) -> Tensor:
        """`E[x_0 | x_t]` of the data law, `[N, 1]`."""
        return self.denoiser.predict(x, step, torch.zeros(len(x), dtype=torch.long), None)

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
            at_zero, at_one = (float(self.schedule.mean(x, self.x0_hat(x, i), i)) for x in (zero, one))
            rows.append((at_one - at_zero, at_zero, self.schedule.std[i] ** 2))
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
