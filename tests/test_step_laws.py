"""Laws of single denoising steps against sums of log-densities in extended precision, down to steps that are nearly
deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steer.core import Prompt
from steer.diffusion import DiffusionProcess, Schedule
from steer.methods.fk import FKSteering
from steer.methods.rlg import RLGuidance
from steer.rewards import lift

WIDTH = 48
NOTHING = lift(lambda outputs: torch.zeros(len(outputs)))


@dataclass(frozen=True)
class Constant:
    """A denoiser in float32 that always sees the same image, half of it beyond 1."""

    seed: int

    @property
    def image(self) -> Tensor:
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(self.seed))

    def encode(self, prompts: Sequence[Prompt]) -> None:
        return None

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, WIDTH, generator=generator)

    def predict(self, x: Tensor, step: int, group: Tensor, encoded: None) -> Tensor:
        return self.image.expand(len(x), -1)

    def decode(self, x: Tensor) -> Tensor:
        return x

    preview = decode

    def show(self, prompt: Prompt) -> Prompt:
        return prompt


def schedule(std: float, clip: float | None = None, clip_noise: bool = False) -> Schedule:
    """Three steps with noise `std`, from signal .1 to 1."""
    return Schedule(
        (0.1, 0.4, 0.8, 1.0), (0.99, 0.9, 0.6, 0.5), (0.4, 0.8, 1.0), (0.8, 0.5, 0.3), (std,) * 3, clip, clip_noise
    )


def mean(grid: Schedule, x: Any, image: Any, step: int) -> Any:
    """Mean of the next state, as the schedule's docstring has it, in numpy's extended precision."""
    kept = image if grid.clip is None else np.clip(image, -grid.clip, grid.clip)
    eps = (x - np.longdouble(grid.alpha[step]) * (kept if grid.clip_noise else image)) / np.longdouble(grid.sigma[step])
    return np.longdouble(grid.signal[step]) * kept + np.longdouble(grid.noise[step]) * eps


@pytest.mark.parametrize("w", [1.0, 0.5, 2.0, -0.5])
@pytest.mark.parametrize("std", [0.3, 1e-3, 1e-5, 2e-6])
def test_the_evidence_of_a_product_does_not_drown_in_rounding(std: float, w: float) -> None:
    # Every step of guidance has the product's own mean, so that all particles weigh the same: what is missing is
    # -w (1 - w) / 2 of the squared distance of the two means, in units of std.
    grid = schedule(std)
    base, tuned = (DiffusionProcess(Constant(seed), grid) for seed in (0, 1))
    process = base.edited(RLGuidance(tuned, w, "product"))
    generator = torch.Generator().manual_seed(0)
    samples = FKSteering(4).run(process, [""], generator=generator, reward=NOTHING)
    apart = (Constant(1).image.double() - Constant(0).image.double()).square().sum()
    exact = sum(-0.5 * w * (1 - w) * float(apart) * (grid.leverage(i) / std) ** 2 for i in range(3))
    assert abs(float(samples.log_z[0]) - exact) <= 1e-6 * abs(exact)
    assert float(samples.weights.max()) - 0.25 < (1e-12 if w == 1 else 1e-3)


@pytest.mark.parametrize("w", [1.0, 0.7, 1.5])
@pytest.mark.parametrize(("clip", "clip_noise"), [(None, False), (0.5, False), (0.5, True)])
@pytest.mark.parametrize("std", [0.3, 1e-2, 1e-4])
def test_laws_of_a_step_are_those_of_extended_precision(
    std: float, clip: float | None, clip_noise: bool, w: float
) -> None:
    grid = schedule(std, clip, clip_noise)
    base, tuned = (DiffusionProcess(Constant(seed), grid) for seed in (2, 3))
    process = base.edited(RLGuidance(tuned, w, "product"))
    state = process.init([""], 3, torch.Generator().manual_seed(5))
    z = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(6)).numpy().astype(np.longdouble)
    after = process.propose(state, torch.Generator().manual_seed(6))
    x, a, b = (t.numpy().astype(np.longdouble) for t in (state.x, Constant(2).image, Constant(3).image))
    here = mean(grid, x, a + np.longdouble(w) * (b - a), 0)

    def density(image: Any) -> Any:
        """Log-density of the step that was drawn around the mean for an image, without the constant."""
        return -0.5 * (((here - mean(grid, x, image, 0)) / np.longdouble(std) + z) ** 2).sum(1)

    drawn, other = -0.5 * (z**2).sum(1), density(a)
    for found, exact in (
        (after.base_log_prob - after.log_prob, other - drawn),
        (after.aim_log_prob - after.log_prob, (1 - w) * other + w * density(b) - drawn),
        (after.kl, 0.5 * (((here - mean(grid, x, a, 0)) / std) ** 2).sum(1)),
    ):
        gap = np.abs(found.numpy() - exact.astype(float))
        # Predictions are rounded to float32 once; z meets that in units of std.
        assert (gap <= 1e-6 * np.abs(exact.astype(float)) + 2e-6 / std).all()
