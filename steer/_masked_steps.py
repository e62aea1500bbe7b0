"""What one step of a masked diffusion chain reveals, and what that adds to the account of its rows."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers from 0 to 1, on the CPU."""
    double = generator.device.type != "mps"
    kind = torch.float64 if double else torch.float32
    return torch.rand(shape, dtype=kind, generator=generator, device=generator.device).cpu()


def revealed(order: str, base: Tensor, masked: Tensor, at: Tensor, left: int) -> Tensor:
    """Positions that a step reveals `[N, L]`, at uniform numbers of that shape, with `left` steps to go, this one
    included.
    """
    if order == "random":
        return masked & (at < 1 / left).to(masked.device)
    confidence = torch.where(masked, base.amax(-1), -torch.inf)
    rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(1)
    count = -(-masked.sum(1, keepdim=True) // left)
    return masked & (rank < count)


def diverged(order: str, total: Tensor, gap: Tensor | None, shown: Tensor, left: int) -> Tensor:
    """KL `[N]` with that of a step added: of the positions `shown`, or, where those are random, of as many as are
    expected. `gap` `[N, L]` is that of every position, None where all are 0.
    """
    if gap is None:
        return total
    share = gap / left if order == "random" else torch.where(shown.cpu(), gap, 0.0)
    return total + share.sum(1)


def gained(total: Tensor, rows: Tensor, law: Tensor, token: Tensor) -> Tensor:
    """Log-probabilities `[N]` with those of tokens `[P]`, under log-laws `[P, V]`, added to their rows."""
    return total.index_add(0, rows.cpu(), law.gather(1, token.unsqueeze(1)).squeeze(1).cpu().double())
