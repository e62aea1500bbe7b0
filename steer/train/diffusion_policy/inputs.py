"""Inputs of a run that tunes a diffusion policy: its settings, a module with its chains, pairs of rows.

Letters: `N` rows; `C`, `H`, `W` of a row.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steer.core import Prompt, check, check_whole
from steer.diffusion import DiffusionProcess

METHODS = ("dpo", "seppo", "pg")
ADVANTAGES = ("leave-one-out", "grpo")


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """How a policy is tuned. Raises `InputError` for a value out of range."""

    method: str
    beta: float
    """dpo, seppo: strength of the pull to the reference, with the number of noise levels folded in; pg: KL coefficient,
    0 is off.
    """
    learning_rate: float
    """Of AdamW without weight decay; constant. The norm of a gradient is cut to 1; for pg, whose gradients are skewed
    where groups are small, to ten times the median of its last updates.
    """
    steps: int
    """Updates; for pg those of every round."""
    rounds: int = 1
    """Of samples, for pg."""
    batch_size: int = 8
    """Pairs of an update; for pg prompts of a round."""
    group_size: int = 8
    """Samples for each prompt."""
    advantage: str = "leave-one-out"
    """pg: what a sample's reward is compared with. "leave-one-out": the mean of the other samples of its group, in
    units that do not depend on the sample, so that the optimum is that of `E[r] - beta KL` at every group size; "grpo":
    mean and standard deviation of the whole group, the sample included.
    """
    clip_range: float = 0.2
    """pg: ratios beyond 1 +- this bring no more (PPO)."""
    share: float = 1.0
    """pg: share of the chain's steps that an update looks at, drawn at random."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is then the result; 0 is off."""
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.method in METHODS, "method", self.method, ", ".join(METHODS))
        check(self.advantage in ADVANTAGES, "advantage", self.advantage, ", ".join(ADVANTAGES))
        zero = self.method == "pg"
        number = isinstance(self.beta, int | float) and not isinstance(self.beta, bool) and math.isfinite(self.beta)
        fits = number and (self.beta >= 0 if zero else self.beta > 0)
        check(fits, "beta", self.beta, "a number of 0 or more" if zero else "a number above 0")
        for name, least in (("steps", 1), ("rounds", 1), ("batch_size", 1), ("group_size", 2), ("seed", 0)):
            check_whole(name, getattr(self, name), least)
        for name, most in (("learning_rate", math.inf), ("clip_range", math.inf), ("share", 1.0)):
            value = getattr(self, name)
            fits = isinstance(value, int | float) and 0 < value <= most and math.isfinite(value)
            check(fits, name, value, "a number above 0" + (f", at most {most:g}" if most < math.inf else ""))
        check(isinstance(self.ema, int | float) and 0 <= self.ema < 1, "ema", self.ema, "0 (off) <= ema < 1")

    @property
    def total(self) -> int:
        """Updates of the whole run."""
        return self.steps * (self.rounds if self.method == "pg" else 1)

    def recipe(self) -> dict[str, Any]:
        """The entries that matter for this method."""
        online = ("rounds", "clip_range", "share", "advantage")
        return {k: v for k, v in asdict(self).items() if self.method == "pg" or k not in online}


@dataclass(frozen=True)
class Tunable:
    """A module and two chains that run it.

    Attributes:
        module: its parameters that require a gradient are what is tuned.
        chain: how samples are drawn; pg tunes its steps.
        levels: a chain whose noise levels dpo and seppo draw from; how many steps it has, and of which kind, does not
            matter. A denoiser with `per_row = True` takes a tensor of levels `[N]` for `step`.
    """

    module: nn.Module
    chain: DiffusionProcess
    levels: DiffusionProcess

    def weights(self) -> dict[str, nn.Parameter]:
        """What is tuned, by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def put(self, weights: dict[str, Tensor]) -> None:
        """Give the tuned parameters these values."""
        for name, parameter in self.weights().items():
            parameter.copy_(weights[name])


@dataclass(frozen=True)
class Pair:
    """Finished rows `[C, H, W]` for one prompt. seppo draws the rejected one itself."""

    prompt: Prompt
    chosen: Tensor = field(repr=False)
    rejected: Tensor | None = field(default=None, repr=False)
