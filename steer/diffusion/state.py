"""Parts of a diffusion chain: the network that an adapter supplies, and rows at one noise level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from steer.core import Prompt
from steer.core.rows import Rows


class Denoiser(Protocol):
    """A network with its conditioning: the part of a diffusion model that an adapter supplies. One whose `predict`
    keeps no graph says `differentiable = False`; one that has something to set up for a run has a `session()`, one
    whose `encode` is dear a `validate(prompts)` that only checks.
    """

    def encode(self, prompts: Sequence[Prompt]) -> Any:
        """What `predict` needs to know of the prompts. Raises `InputError` for one that it cannot take."""

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` rows of x at the noisiest level `[n, ...]`."""

    def predict(self, x: Tensor, step: int, group: Tensor, encoded: Any) -> Tensor:
        """x0-hat `[N, ...]` of rows `x` at noise level `step`, row i for prompt `group[i]`."""

    def decode(self, x: Tensor) -> Tensor:
        """Finished rows as outputs (images `[N, C, H, W]` in [0, 1])."""

    def preview(self, x0: Tensor) -> Tensor:
        """x0-hat as outputs; may be cheaper than `decode`."""

    def show(self, prompt: Prompt) -> Any:
        """The prompt as it appears in results."""


@dataclass(frozen=True)
class DiffusionState(Rows):
    """Rows at one noise level."""

    each = ("x", "x0", "moved", "parent")
    packed = ("x",)

    x: Tensor
    encoded: Any = field(repr=False)
    x0: Tensor | None = field(default=None, repr=False)
    """The network's x0-hat of `x`, once it was read."""
    moved: Tensor | None = field(default=None, repr=False)
    """x0-hat under the edits; the same tensor where there are none."""
    parent: Tensor | None = field(default=None, repr=False)
    """x0-hat of the state that this one was drawn from."""
