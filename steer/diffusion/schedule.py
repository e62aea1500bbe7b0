"""Noise levels of a chain, and the Gaussian law of each of its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from steer.core import check

DETERMINISTIC = 1e-6
"""A step with a smaller std than this has no density: its law is a point."""


@dataclass(frozen=True)
class Schedule:
    """Noise levels of a chain and the coefficients of its steps."""

    alpha: tuple[float, ...]
    """Signal at every level, `S + 1`."""
    sigma: tuple[float, ...]
    """Noise at every level, `S + 1`; only the last may be 0."""
    signal: tuple[float, ...]
    noise: tuple[float, ...]
    std: tuple[float, ...]
    clip: float | None = None
    """x0-hat is clipped to this range on either side, after edits."""
    clip_noise: bool = False
    """Whether eps-hat follows from the clipped x0-hat (DDPM) or from the one before (DDIM)."""

    def __post_init__(self) -> None:
        steps = len(self.signal)
        lengths = [len(self.alpha) - 1, len(self.sigma) - 1, len(self.noise), len(self.std)]
        check(steps >= 1 and lengths == [steps] * 4, "schedule", lengths, f"{steps} steps and one level more")
        check(min(self.sigma[:-1]) > 0, "sigma", min(self.sigma[:-1]), "above 0 at every level but the last")

    def __len__(self) -> int:
        return len(self.signal)

    @property
    def stochastic(self) -> bool:
        """Whether any step has noise."""
        return max(self.std) > DETERMINISTIC

    @property
    def last_noise(self) -> int:
        """Number of the last step with noise, -1 without any."""
        return max((i for i, s in enumerate(self.std) if s > DETERMINISTIC), default=-1)

    @classmethod
    def between(
        cls,
        alpha: Sequence[float],
        sigma: Sequence[float],
        eta: float = 1.0,
        clip: float | None = None,
        clip_noise: bool = False,
    ) -> Schedule:
        """DDIM's family over any levels (Song et al. 2021, eq. 16, written for a general alpha and sigma):
        `std = eta sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^2)`, `noise = sqrt(sigma'^2 - std^2)`. With eta = 1
        it is DDPM's posterior on variance-preserving levels and Euler ancestral on variance-exploding ones; with
        eta = 0 the deterministic DDIM or Euler step.
        """
        check(isinstance(eta, int | float) and 0 <= eta <= 1, "eta", eta, "0 (deterministic) to 1")
        noise, std = [], []
        for (a, b), (s, t) in zip(pairwise(alpha), pairwise(sigma), strict=True):
            spread = eta * t * math.sqrt(max(1 - (a * t / (b * s)) ** 2, 0.0))
            std.append(spread)
            noise.append(math.sqrt(max(t * t - spread * spread, 0.0)))
        return cls(tuple(alpha), tuple(sigma), tuple(alpha[1:]), tuple(noise), tuple(std), clip, clip_noise)

    @classmethod
    def flow_sde(cls, sigma: Sequence[float], level: float = 0.7) -> Schedule:
        """The stochastic form of a flow `x = (1 - sigma) x_0 + sigma eps` with the same marginals (Flow-GRPO, Liu et
        al. 2025, eq. 9): noise `level * sqrt(sigma / (1 - sigma))` per unit of time, Euler-Maruyama, and a last step
        without noise.
        """
        check(isinstance(level, int | float) and level >= 0, "level", level, "0 or more")
        alpha = [1 - s for s in sigma]
        signal, noise, std = [], [], []
        last = len(sigma) - 2
        for i, (s, t) in enumerate(pairwise(sigma)):
            step = s - t
            # At sigma = 1 the rate is infinite; the next level's stands in, as in the paper's code.
            rate = 0.0 if i == last else level * math.sqrt(s / (1 - s if s < 1 else 1 - t))
            drift = rate * rate * step / (2 * s)
            # Their x + (1 - s) v, with v = eps - x_0, is eps.
            signal.append(1 - t)
            noise.append(t - drift)
            std.append(rate * math.sqrt(step))
        return cls(tuple(alpha), tuple(sigma), tuple(signal), tuple(noise), tuple(std))

    def noise_hat(self, x: Tensor, x0: Tensor, step: int) -> Tensor:
        """eps-hat that goes with x0-hat."""
        return (x - self.alpha[step] * x0) / self.sigma[step]

    def mean(self, x: Tensor, x0: Tensor, step: int) -> Tensor:
        """Mean of the next state, from x0-hat before clipping."""
        kept = self.clipped(x0)
        eps = self.noise_hat(x, kept if self.clip_noise else x0, step)
        return self.signal[step] * kept + self.noise[step] * eps

    def gap(self, x0: Tensor, other: Tensor, step: int) -> Tensor:
        """How far the mean of the next state is for one x0-hat from where it is for another, `[N, D]` in float64: from
        the difference of the two, since that of their means would lose the digits that a step of little noise needs.
        """
        here, there = x0.double().flatten(1), other.double().flatten(1)
        kept = self.clipped(here) - self.clipped(there)
        eps = kept if self.clip_noise else here - there
        return self.signal[step] * kept - self.noise[step] * self.alpha[step] / self.sigma[step] * eps

    def clipped(self, x0: Tensor) -> Tensor:
        """x0-hat as the step and previews use it."""
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)

    def leverage(self, step: int) -> float:
        """How far the mean of the next state moves for each unit that x0-hat moves."""
        return self.signal[step] - self.noise[step] * self.alpha[step] / self.sigma[step]

    def guided(self, gradient: Tensor, step: int) -> Tensor:
        """The shift of x0-hat that moves the mean of the next state by `std^2` times a gradient with respect to x; in
        a chain without any noise, the shift that adds it to the score function.
        """
        if not self.stochastic:
            return gradient * (self.sigma[step] ** 2 / max(self.alpha[step], 1e-3))
        variance = self.std[step] ** 2
        return gradient * (variance / self.leverage(step)) if variance > 0 else torch.zeros_like(gradient)


class SharedNoise(torch.Generator):
    """A generator of the noise of a population whose rows lie in several processes: each draws that of all `rows` and
    takes that of the rows `held` `[n]`, so that a row's noise does not hang on where it lies.
    """

    held: Tensor
    rows: int

    @classmethod
    def of(cls, seed: int, held: Tensor, rows: int) -> SharedNoise:
        made = cls()
        made.manual_seed(seed)
        made.held, made.rows = held, rows
        return made


def gaussian(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard noise in the shape, type and place of a tensor, whatever device the generator is of."""
    shared = generator if isinstance(generator, SharedNoise) else None
    shape = like.shape if shared is None else (shared.rows, *like.shape[1:])
    z = torch.randn(shape, dtype=like.dtype, generator=generator, device=generator.device)
    return (z if shared is None else z[shared.held]).to(like.device)


def account(z: Tensor | None, gap: Tensor | None, std: float, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-density of the noise that was drawn, the same under the base, and the KL of the step, each `[N]`, *summed*
    over dimensions. `gap` `[N, D]` is the mean's distance from the base's. A step without noise has no density: it is
    free unless an edit moved it, and then infinitely far.
    """
    zero = torch.zeros(rows, dtype=torch.float64)
    if z is None or std <= DETERMINISTIC:
        if gap is None:
            return zero, zero, zero
        kl = torch.where((gap == 0).all(1), 0.0, torch.inf).double().cpu()
        return zero, -kl, kl
    flat = z.double().flatten(1)
    log_prob = (-0.5 * flat.square().sum(1) - flat.shape[1] * math.log(std * math.sqrt(2 * math.pi))).cpu()
    if gap is None:
        return log_prob, log_prob, zero
    pushed = gap / std
    kl = 0.5 * pushed.square().sum(1)
    # -(z + pushed)^2 / 2 against -z^2 / 2
    return log_prob, log_prob - ((flat * pushed).sum(1) + kl).cpu(), kl.cpu()


def log_product(z: Tensor, gap: Tensor, tuned: Tensor, w: float, std: float) -> Tensor:
    """`log p^(1 - w) p_tuned^w - log q` of a drawn step `[N]`, not normalised: q is the law that was drawn from, whose
    mean is `gap` `[N, D]` away from that of p; that of p_tuned is `tuned` `[N, D]` away from it.

    With both in units of std, and `rest = gap - w tuned` what q misses of the product's mean, it is
    `-(z rest + rest^2 / 2) - w (1 - w) tuned^2 / 2`. The three log-densities themselves are huge where std is small,
    and so is the rounding of their sum.
    """
    rest, tuned = (gap - w * tuned) / std, tuned / std
    missed = (z.double().flatten(1) * rest).sum(1) + 0.5 * rest.square().sum(1)
    return -(missed + 0.5 * w * (1 - w) * tuned.square().sum(1)).cpu()
