"""The exact denoiser of a law that can be written down: what masked diffusion is checked against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from steer.core import Prompt, check


@dataclass(frozen=True, eq=False)
class TableDenoiser:
    """The exact denoiser of a law small enough to be written down, in float64; prompts play no part.

    Attributes:
        table: probability of every text, one axis of size K for each of the L positions. Tokens are 0 to K - 1 and the
            mask is K, so that V = K + 1.
    """

    table: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.table.shape)
        check(len(shape) >= 1 and len(set(shape)) == 1, "table", shape, "axes of one size, one for each position")
        mass = float(self.table.sum())
        good = bool((self.table >= 0).all()) and abs(mass - 1) < 1e-6
        check(good, "table", f"numbers that add up to {mass:g}", "probabilities that add up to 1")

    @property
    def mask_id(self) -> int:
        return self.table.shape[0]

    @property
    def vocabulary(self) -> int:
        return self.table.shape[0] + 1

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @cached_property
    def texts(self) -> Tensor:
        """Every text `[K^L, L]` in lexicographic order, as in `table.flatten()`."""
        return torch.tensor(list(product(range(self.mask_id), repeat=self.table.dim())))

    def encode(self, prompts: Sequence[Prompt], length: int) -> None:
        """Checks the length."""
        check(length == self.table.dim(), "length", length, f"{self.table.dim()}, the positions of the table")

    def predict(self, tokens: Tensor, group: Tensor, encoded: None) -> Tensor:
        """The law of every position given the revealed ones `[N, L, V]`; given nothing where those are impossible."""
        seen = (tokens.unsqueeze(1) == self.texts) | (tokens.unsqueeze(1) == self.mask_id)
        law = self.table.double().flatten()
        weight = seen.all(-1).double() * law
        weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, law)
        which = torch.nn.functional.one_hot(self.texts, self.vocabulary).double()
        return torch.einsum("ns,slv->nlv", weight / weight.sum(1, keepdim=True), which).log()

    def show(self, prompt: Prompt) -> Prompt:
        return prompt

    def decode_text(self, tokens: Sequence[int]) -> str:
        return " ".join(str(token) for token in tokens)
