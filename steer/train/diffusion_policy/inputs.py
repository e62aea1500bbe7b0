"""Inputs of a run that tunes a diffusion policy: its settings, a module with its chains, pairs of rows.

Letters: `N` rows; `C`, `H`, `W` of a row.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from steer.core import Prompt, check
from steer.diffusion import DiffusionProcess
from steer.train.settings import UNSET, Count, Finite, Part, Positive, Real, Seed, Share, Whole, settings_class


@dataclass(frozen=True)
class Objective:
    """One way to tune: the columns of its rows beside the prompt, its defaults, and the settings of its own."""

    columns: tuple[str, ...]
    beta: float
    rate: float
    """Learning rate where all weights are tuned; ten times as much for LoRA."""
    steps: int
    own: tuple[str, ...] = ()


OBJECTIVES = {
    "dpo": Objective(("chosen", "rejected"), 5000.0, 1e-5, 200),
    "seppo": Objective(("chosen",), 5000.0, 1e-5, 200),
    "pg": Objective((), 1.0, 3e-5, 2, ("rounds", "advantage", "clip_range", "share")),
}


@settings_class
class DiffusionPolicySettings:
    """How a policy is tuned."""

    method: Literal["dpo", "seppo", "pg"]
    """Diffusion-DPO, SePPO, or a policy gradient on the stochastic chain, clipped as in PPO."""
    beta: Finite = UNSET
    """dpo, seppo: strength of the pull to the reference, with the number of noise levels folded in (default 5000); pg:
    KL coefficient in reward for each nat (default 1), 0 is off.
    """
    learning_rate: Positive = UNSET
    """Of AdamW without weight decay; constant; default by method. The norm of a gradient is cut to 1; for pg, whose
    gradients are skewed where groups are small, to ten times the median of its last updates.
    """
    steps: Count = UNSET
    """Updates (default 200); for pg those on every round of samples (default 2)."""
    rounds: Count = 20
    """Of samples, for pg."""
    batch_size: Count = 8
    """Pairs of an update; for pg prompts of a round."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Samples for each prompt."""
    num_steps: Count = 25
    """Of the chain that samples are drawn by, as are `eta`, `guidance_scale` and `kind`; see `DiffusionModel.process`.
    dpo and seppo tune all noise levels, pg the steps of this chain.
    """
    eta: Share = 1.0
    guidance_scale: Real | None = None
    kind: str | None = None
    advantage: Literal["leave-one-out", "grpo", "batch-std"] = "leave-one-out"
    """pg: what a sample is compared with. "leave-one-out": the mean of the other samples of its group, in units that do
    not depend on the sample, so that the optimum is that of `E[r] - beta KL` at every group size; "grpo": mean and
    standard deviation of the whole group, the sample included; "batch-std": the group's mean and the standard deviation
    of all samples of the round (Lite PPO).
    """
    clip_range: Positive = 0.2
    """pg: ratios beyond 1 +- this bring no more (PPO)."""
    share: Annotated[Share, Field(gt=0)] = 1.0
    """pg: share of the chain's steps that an update looks at, drawn at random."""
    ema: Part = 0.0
    """Decay of a moving average of the weights, which is then the result; 0 is off."""
    lora_rank: Whole = 0
    """0 tunes all weights."""
    lora_alpha: Count | None = None
    """Default: twice the rank."""
    lora_targets: str = "all"
    """ "all" (linear layers and convolutions), "all-linear", "attention", or names of modules joined by commas."""
    measured: Whole = 64
    """Samples on which the reward is measured before and after; 0 is none."""
    max_batch: Count = 64
    """Rows put through the network at once."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        objective = self.objective
        rate = objective.rate * (10 if self.lora_rank else 1)
        defaults = {"beta": objective.beta, "learning_rate": rate, "steps": objective.steps}
        for name, value in {**defaults, "lora_alpha": 2 * self.lora_rank or None}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check(self.method == "pg" or self.beta != 0, "beta", self.beta, "a number above 0")

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.method]

    @property
    def total(self) -> int:
        """Updates of the whole run."""
        return self.steps * (self.rounds if self.method == "pg" else 1)

    @property
    def chain(self) -> dict[str, Any]:
        """The chain that samples are drawn by, as `DiffusionModel.process` takes it."""
        drawing = {name: getattr(self, name) for name in ("eta", "guidance_scale", "kind")}
        return {"steps": self.num_steps, **drawing, "max_batch": self.max_batch}

    def recipe(self) -> dict[str, Any]:
        """The entries that matter for this method."""
        out = {name for o in OBJECTIVES.values() for name in o.own} - {*self.objective.own}
        out |= {"measured", "max_batch", *(() if self.lora_rank else ("lora_alpha", "lora_targets"))}
        return {name: value for name, value in asdict(self).items() if name not in out}


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
