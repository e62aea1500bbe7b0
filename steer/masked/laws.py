"""Laws of masked positions: from what a network says to the tokens that are drawn, and how far apart two laws are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer.core.rows import in_batches
from steer.masked.state import MaskedDenoiser
from steer.sampling import laws

BUDGET = 24_000_000
"""Numbers of positions times vocabulary that are worked on at once beyond the marginals themselves."""


@dataclass(frozen=True)
class Laws:
    """The laws of one network under the settings of a `MaskedProcess`."""

    network: MaskedDenoiser
    temperature: float
    top_k: int
    top_p: float
    suppress: tuple[int, ...]
    max_batch: int

    def marginals(self, tokens: Tensor, group: Tensor, encoded: Any) -> Tensor:
        """Base log-marginals `[N, L, V]` of rows `[N, L]`; points where a token was revealed."""

        def predicted(rows: Tensor, prompts: Tensor) -> Tensor:
            return self.network.predict(rows, prompts, encoded)

        x = in_batches(predicted, tokens, group, self.max_batch)
        x = laws.temper(self._excluded(x), self.temperature)
        return carried(x, tokens, tokens == self.network.mask_id)

    def normalised(self, x: Tensor) -> Tensor:
        """Log-marginals of edited ones."""
        return torch.log_softmax(self._excluded(x), -1)

    def _excluded(self, x: Tensor) -> Tensor:
        """Without the mask and what is suppressed: a revealed mask would never be one."""
        never = [i for i in (self.network.mask_id, *self.suppress) if i < x.shape[-1]]
        return x.index_fill(-1, torch.tensor(never, dtype=torch.long, device=x.device), -torch.inf)

    def truncated(self, law: Tensor, masked: Tensor) -> Tensor:
        """Log-marginals `[N, L, V]` with their masked positions truncated."""
        if not self.truncates:
            return law
        cut = law.clone()
        for i, j in places(masked, law.shape[-1]):
            cut[i, j] = self.cut(law[i, j])
        return cut

    @property
    def truncates(self) -> bool:
        return 0 < self.top_k < self.network.vocabulary or self.top_p < 1

    def cut(self, law: Tensor) -> Tensor:
        """Truncated log-laws `[P, V]` of positions."""
        return laws.truncate(law, self.top_k, self.top_p)

    def restricted(self, law: Tensor, other: Tensor, masked: Tensor) -> Tensor:
        """Log-marginals `[N, L, V]`, at masked positions on the tokens that another law does not exclude."""
        kept = law.clone()
        for i, j in places(masked, law.shape[-1]):
            kept[i, j] = laws.restrict(law[i, j], other[i, j])
        return kept

    def drawn(self, law: Tensor, at: Tensor) -> Tensor:
        """Tokens `[P, m]` of log-laws `[P, V]` at uniform numbers `[P, m]`."""
        return law.argmax(-1, keepdim=True).expand(at.shape) if self.temperature == 0 else laws.draw(law, at)

    def completed(self, tokens: Tensor, base: Tensor | None, at: Tensor | None) -> Tensor:
        """Rows `[N, L]` with their masked positions drawn from `base`, truncated, at uniform numbers `[N, m, L]`:
        `[N, m, L]`; the likeliest tokens, m = 1, without numbers.
        """
        rows = tokens.unsqueeze(1).repeat(1, 1 if at is None else at.shape[1], 1)
        if base is None:
            return rows
        for i, j in places(tokens == self.network.mask_id, base.shape[-1]):
            law = base[i, j]
            if at is None:
                rows[i, 0, j] = law.argmax(-1)
            else:
                rows[i, :, j] = self.drawn(self.cut(law), at[i.cpu(), :, j.cpu()])
        return rows


def places(masked: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and positions `[P]` of what is masked, a part at a time."""
    for part in masked.nonzero().split(max(1, BUDGET // vocabulary)):
        if len(part):
            yield part[:, 0], part[:, 1]


def carried(x: Tensor, tokens: Tensor, masked: Tensor) -> Tensor:
    """Log-marginals `[N, L, V]` that are points where a token was revealed; changes `x`."""
    i, j = (~masked).nonzero(as_tuple=True)
    x[i, j] = -torch.inf
    x[i, j, tokens[i, j]] = 0.0
    return x


def divergence(law: Tensor, base: Tensor, masked: Tensor) -> Tensor:
    """KL of `law` to `base` at every masked position `[N, L]`, 0 elsewhere; float64 on the CPU."""
    gap = torch.zeros(masked.shape, dtype=torch.float64)
    for i, j in places(masked, law.shape[-1]):
        gap[i.cpu(), j.cpu()] = laws.divergence(law[i, j], base[i, j]).cpu().double()
    return gap
