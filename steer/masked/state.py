"""Parts of a masked diffusion chain: the network that an adapter supplies, and rows of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from steer.core import Prompt
from steer.core.rows import Rows


class MaskedDenoiser(Protocol):
    """A network with its conditioning: the part of a masked diffusion model that an adapter supplies."""

    @property
    def mask_id(self) -> int:
        """The token of a masked position."""

    @property
    def vocabulary(self) -> int:
        """V; the mask may be one of the V ids."""

    @property
    def device(self) -> torch.device:
        """Where tokens go."""

    def encode(self, prompts: Sequence[Prompt], length: int) -> Any:
        """What `predict` needs to know of the prompts for texts of `length` tokens. Raises `InputError` for a prompt
        that it cannot take.
        """

    def predict(self, tokens: Tensor, group: Tensor, encoded: Any) -> Tensor:
        """Log-marginals `[N, L, V]` of every position of rows `tokens` `[N, L]` int64, row i after prompt `group[i]`;
        the mask has -infinity. A constant at each position makes no difference (logits), nor does what it says of
        positions that are not masked.
        """

    def show(self, prompt: Prompt) -> Any:
        """The prompt as it appears in results."""

    def decode_text(self, tokens: Sequence[int]) -> str:
        """Text of tokens; masks were left out."""


@dataclass(frozen=True)
class MaskedState(Rows):
    """Rows of texts, some of whose positions are masked; `tokens` is `[N, L]` int64."""

    each = ("tokens", "noise", "base", "fresh", "law", "gap")
    packed = ("tokens", "noise")

    tokens: Tensor
    encoded: Any = field(repr=False)
    noise: Tensor | None = field(default=None, repr=False)
    """Uniform numbers `[N, L]` on the CPU that a sampled preview is made of."""
    base: Tensor | None = field(default=None, repr=False)
    """The network's log-marginals `[N, L, V]`, of the rows in `fresh` where `law` is None."""
    fresh: Tensor | None = field(default=None, repr=False)
    """Rows `[N]` that did not change in the last step, so that `base` still holds for them."""
    law: Tensor | None = field(default=None, repr=False)
    """Log-marginals under the edits and truncated; the same tensor as `base` where nothing changes them."""
    gap: Tensor | None = field(default=None, repr=False)
    """KL of `law` to `base` at every position `[N, L]` float64 on the CPU; None where they are the same."""
