"""Laws of masked positions: from what a network says to the tokens that are drawn, and how far apart two laws are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer.core.rows import in_batches
from steer.masked.state import MaskedDenoiser

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
        x = x if x.dtype == torch.float64 else x.float()
        x = torch.log_softmax(self._excluded(x) / (self.temperature or 1.0), -1)
        return carried(x, tokens, tokens == self.network.mask_id)

    def normalised(self, x: Tensor) -> Tensor:
        """Log-marginals of edited ones."""
        return torch.log_softmax(self._excluded(x), -1)

    def _excluded(self, x: Tensor) -> Tensor:
        """Without the mask and what is suppressed: a revealed mask would never be one."""
        never = [i for i in (self.network.mask_id, *self.suppress) if i < x.shape[-1]]
        return x.index_fill(-1, torch.tensor(never, dtype=torch.long, device=x.device), -torch.inf)

    @property
    def _truncates(self) -> bool:
        return 0 < self.top_k < self.network.vocabulary or self.top_p < 1

    def truncated(self, law: Tensor, masked: Tensor) -> Tensor:
        """Log-marginals `[N, L, V]` with their masked positions truncated."""
        if not self._truncates:
            return law
        cut = law.clone()
        for i, j in places(masked, law.shape[-1]):
            cut[i, j] = self._cut(law[i, j])
        return cut

    def _cut(self, law: Tensor) -> Tensor:
        """`[P, V]`, cut by top-k and top-p, normalised again."""
        if not self._truncates:
            return law
        keep = torch.ones_like(law, dtype=torch.bool)
        if 0 < self.top_k < law.shape[-1]:
            keep = law >= law.topk(self.top_k, -1).values[:, -1:]
        if self.top_p < 1:
            ordered, ids = torch.where(keep, law, -torch.inf).log_softmax(-1).sort(-1, descending=True)
            mass = ordered.exp()
            keep &= torch.zeros_like(keep).scatter(-1, ids, mass.cumsum(-1) - mass < self.top_p)
        return torch.where(keep, law, -torch.inf).log_softmax(-1)

    def drawn(self, law: Tensor, at: Tensor) -> Tensor:
        """Tokens `[P, m]` of log-laws `[P, V]` at uniform numbers `[P, m]`, by inverting the CDF."""
        if self.temperature == 0:
            return law.argmax(-1, keepdim=True).expand(at.shape)
        cdf = law.exp().cumsum(-1)
        whole = cdf[:, -1:].contiguous()
        point = at.to(cdf.dtype).to(cdf.device) * whole
        token = torch.searchsorted(cdf, point, right=True)
        # Rounding can put a point at the very end, where tokens may have no mass.
        return torch.minimum(token, torch.searchsorted(cdf, whole))

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
                rows[i, :, j] = self.drawn(self._cut(law), at[i.cpu(), :, j.cpu()])
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
        p, q = law[i, j], base[i, j]
        gap[i.cpu(), j.cpu()] = torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1).cpu().double()
    return gap
