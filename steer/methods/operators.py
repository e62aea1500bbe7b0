"""Operators on hidden rows `[..., D]`: the closed set that every engine applies.

Directions are unit vectors `[D]`. Computation is in float32; the result has the dtype of the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.core import Operator

__all__ = ["Ablate", "Add", "Clamp", "KeepNorm", "LowRank", "Probe", "Rotate", "Where"]


def _in_float32(function: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, direction: Tensor) -> Tensor:
    return function(hidden.float(), direction.to(hidden.device, torch.float32)).to(hidden.dtype)


@dataclass(frozen=True, eq=False)
class Add(Operator):
    """`h + v` (Turner et al. 2023; Rimsky et al. 2024)."""

    vector: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        return hidden + self.vector.to(hidden.device, hidden.dtype)

    @property
    def constant(self) -> Tensor:
        return self.vector


@dataclass(frozen=True, eq=False)
class Ablate(Operator):
    """`h - s (h.d) d`: removes the component along `direction`, all of it at strength 1 (Arditi et al. 2024)."""

    direction: Tensor
    strength: float = 1.0

    def __call__(self, hidden: Tensor) -> Tensor:
        return _in_float32(lambda h, d: h - self.strength * (h @ d).unsqueeze(-1) * d, hidden, self.direction)


@dataclass(frozen=True, eq=False)
class Clamp(Operator):
    """Moves the projection `h.d` into `[low, high]`; with `low == high` it is set to that value."""

    direction: Tensor
    low: float = -math.inf
    high: float = math.inf

    def __call__(self, hidden: Tensor) -> Tensor:
        def clamp(h: Tensor, d: Tensor) -> Tensor:
            along = h @ d
            return h + (along.clamp(self.low, self.high) - along).unsqueeze(-1) * d

        return _in_float32(clamp, hidden, self.direction)


@dataclass(frozen=True, eq=False)
class Rotate(Operator):
    """Turns the part of `h` that lies in the plane of `second` and `direction` by `angle` degrees, from `second`
    towards `direction`; with `absolute`, turns it to that angle from `second`. The norm is kept (Vu & Nguyen 2025).
    """

    direction: Tensor
    second: Tensor
    angle: float
    absolute: bool = False

    def __call__(self, hidden: Tensor) -> Tensor:
        def rotate(h: Tensor, d: Tensor) -> Tensor:
            e = self.second.to(d)
            e = e - (e @ d) * d
            e = e / e.norm()
            x, y = h @ e, h @ d
            turn = math.radians(self.angle)
            angle = torch.full_like(x, turn) if self.absolute else torch.atan2(y, x) + turn
            radius = torch.hypot(x, y)
            return h + (radius * angle.cos() - x).unsqueeze(-1) * e + (radius * angle.sin() - y).unsqueeze(-1) * d

        return _in_float32(rotate, hidden, self.direction)


@dataclass(frozen=True, eq=False)
class LowRank(Operator):
    """`h + s U^T (A h + b)`: a change within `r` directions that depends linearly on the row.

    With rows of U orthonormal, A = W - U and s = 1 it is LoReFT, `h + R^T (W h + b - R h)` with R = U: afterwards the
    coordinates `U h` are `W h + b` (Wu et al. 2024, ReFT, equation 3); A = W is DiReFT.

    Attributes:
        reads: A, `[r, D]`.
        bias: b, `[r]`.
        writes: U, `[r, D]`.
        strength: s; at 0 nothing changes.
    """

    reads: Tensor
    bias: Tensor
    writes: Tensor
    strength: float = 1.0

    def __call__(self, hidden: Tensor) -> Tensor:
        h = hidden.float()
        reads, bias, writes = (x.to(h.device, torch.float32) for x in (self.reads, self.bias, self.writes))
        return (h + self.strength * ((h @ reads.T + bias) @ writes)).to(hidden.dtype)


@dataclass(frozen=True, eq=False)
class KeepNorm(Operator):
    """`operator`, then each row scaled back to the norm that it had."""

    operator: Operator

    def __call__(self, hidden: Tensor) -> Tensor:
        changed = self.operator(hidden).float()
        norm = hidden.float().norm(dim=-1, keepdim=True)
        return (changed * (norm / changed.norm(dim=-1, keepdim=True).clamp_min(1e-12))).to(hidden.dtype)


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear reading of hidden rows: it fires where `h.w + b > 0`."""

    weight: Tensor
    bias: float = 0.0

    def __call__(self, hidden: Tensor) -> Tensor:
        """Whether it fires, `[...]` for `[..., D]`."""
        return hidden.float() @ self.weight.to(hidden.device, torch.float32) + self.bias > 0


@dataclass(frozen=True, eq=False)
class Where(Operator):
    """`operator` at the positions where `probe` fires on the same rows, nothing elsewhere."""

    probe: Probe
    operator: Operator

    def __call__(self, hidden: Tensor) -> Tensor:
        return torch.where(self.probe(hidden).unsqueeze(-1), self.operator(hidden), hidden)
