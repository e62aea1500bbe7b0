"""Edits that act on a token, compiled into one row: a vector to add at every block, and closed forms.

A row stands in a slot of every block's buffers. Rows are made when a step first needs them; where slots run out, the
row that was not used for longest makes room. `Resolved.rows` says how many a request can need at once.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steer.adapters.vllm.plugin.blocks import SCALARS, VECTORS
from steer.core import HiddenEdit, ModelInfo, Operator, UnsupportedError
from steer.methods.operators import Ablate, Add, Clamp, KeepNorm, Rotate, Where

__all__ = ["NEVER", "Compiled", "Form", "SteeringRow", "Spans", "form", "merged", "stages_of"]


NEVER = 1 << 62
"""A position after every text."""


@dataclass(frozen=True, eq=False)
class Form:
    """One operator as a closed form: `vectors` `[4, D]` and `scalars` `[10]`."""

    vectors: Tensor
    scalars: Tensor


def form(operator: Operator, width: int) -> Form:
    """The closed form of an operator; raises `UnsupportedError` for one that has none."""
    vectors, scalars = torch.zeros(VECTORS, width), torch.zeros(SCALARS)
    scalars[4], scalars[5], scalars[7:] = -math.inf, math.inf, torch.tensor([math.inf, 1.0, 1.0])
    if isinstance(operator, Where):
        vectors[3], scalars[7] = operator.probe.weight, operator.probe.bias
        operator = operator.operator
    if isinstance(operator, KeepNorm):
        scalars[6] = 1
        operator = operator.operator
    if isinstance(operator, Add):
        vectors[2] = operator.vector
    elif isinstance(operator, Ablate):
        vectors[0], scalars[0] = operator.direction, -operator.strength
    elif isinstance(operator, Clamp):
        vectors[0], scalars[4], scalars[5] = operator.direction, operator.low, operator.high
    elif isinstance(operator, Rotate) and not operator.absolute:
        d = operator.direction.float()
        e = operator.second.float() - (operator.second.float() @ d) * d
        turn = math.radians(operator.angle)
        vectors[0], vectors[1] = d, e / e.norm()
        scalars[:4] = torch.tensor([math.cos(turn) - 1, math.sin(turn), -math.sin(turn), math.cos(turn) - 1])
    else:
        raise UnsupportedError(
            f"{type(operator).__name__} has no closed form in vLLM; the transformers adapter runs it"
        )
    return Form(vectors, scalars)


@dataclass(frozen=True, eq=False)
class Compiled:
    """A hidden edit for one model. Additions are kept as `constants` `[M, D]` at blocks `layers` `[M]`."""

    edit: HiddenEdit
    operators: list[tuple[int, Operator]]
    layers: Tensor
    constants: Tensor | None
    """None where any operator is not an addition."""

    @classmethod
    def of(cls, edit: HiddenEdit, model: ModelInfo) -> Compiled:
        terms = edit.terms(model)
        operators = [(term.layer, term.operator) for term in terms]
        layers = torch.tensor([term.layer for term in terms], dtype=torch.long)
        constants = [term.operator.constant for term in terms]
        if any(c is None for c in constants):
            for _, operator in operators:
                form(operator, model.width)  # refused here, before anything runs, where it has none
            return cls(edit, operators, layers, None)
        rows = [c.detach().float().cpu() for c in constants if c is not None]
        return cls(edit, operators, layers, torch.stack(rows) if rows else torch.zeros(0, model.width))


def stages_of(edits: Sequence[Compiled]) -> int:
    """The largest number of stages that these edits, together, put on one block."""
    if all(edit.constants is not None for edit in edits):
        return 0
    return max(len(forms) for forms in _staged(edits, [None] * len(edits), 1, {})[1].values())


@dataclass(eq=False)
class SteeringRow:
    """What happens to a token: `add` `[L, D]` after the `stages` of each block."""

    add: Tensor
    stages: dict[int, list[Form]] = field(default_factory=dict)

    @property
    def added(self) -> np.ndarray:
        """Blocks `[L]` where something is added."""
        return np.asarray((self.add != 0).any(1).cpu().numpy())


def merged(edits: Sequence[Compiled], weights: Sequence[Tensor | None], depth: int, width: int) -> SteeringRow:
    """One row for edits that act together, in order; `weights[i]` `[terms]` of an edit that read the prompt."""
    if all(edit.constants is not None for edit in edits):
        add = torch.zeros(depth, width)
        for edit, weight in zip(edits, weights, strict=True):
            assert edit.constants is not None
            scaled = edit.constants if weight is None else weight.float().cpu().unsqueeze(1) * edit.constants
            add.index_add_(0, edit.layers, scaled)
        return SteeringRow(add)
    trailing, stages = _staged(edits, weights, width, None)
    add = torch.zeros(depth, width)
    for layer, vector in trailing.items():
        add[layer] = vector
    return SteeringRow(add, stages)


def _staged(
    edits: Sequence[Compiled], weights: Sequence[Tensor | None], width: int, counted: Mapping[int, Any] | None
) -> tuple[dict[int, Tensor], dict[int, list[Form]]]:
    """Additions after the last other operator of each block, and the stages before. Additions that come earlier are
    stages of their own. With `counted`, stages are only counted.
    """
    pending: dict[int, Tensor] = {}
    stages: dict[int, list[Form]] = {}
    empty = Form(torch.empty(0), torch.empty(0))
    for edit, weight in zip(edits, weights, strict=True):
        for i, (layer, operator) in enumerate(edit.operators):
            vector = operator.constant
            if vector is not None:
                scale = 1.0 if weight is None else float(weight[i])
                pending[layer] = pending.get(layer, 0.0) + scale * vector.float().cpu()
                continue
            mine = stages.setdefault(layer, [])
            before = pending.pop(layer, None)
            if before is not None:
                mine.append(empty if counted is not None else form(Add(before), width))
            if counted is not None:
                mine.append(empty)
                continue
            made = form(operator, width)
            if weight is not None:
                made.scalars[8] = float(weight[i])
            mine.append(made)
    return pending, stages


Stretch = tuple[int, int | None]
"""Positions `start <= position < stop`; None is the end of the text."""


@dataclass(frozen=True)
class Spans:
    """Where the edits of a request act: the one numbered `edits[i]` at positions `starts[i] <= position < stops[i]`.
    What acts changes at `bounds`; a segment lies between two of them, and the last one has no end.
    """

    edits: tuple[int, ...]
    starts: tuple[int, ...]
    stops: tuple[int, ...]

    @classmethod
    def of(cls, stretches: Iterable[Sequence[Stretch]]) -> Spans:
        """From the stretches of each edit, which do not overlap."""
        each = [(number, stretch) for number, mine in enumerate(stretches) for stretch in mine]
        stops = tuple(NEVER if stop is None else stop for _, (_, stop) in each)
        return cls(tuple(number for number, _ in each), tuple(start for _, (start, _) in each), stops)

    @cached_property
    def bounds(self) -> list[int]:
        """Positions at which what acts changes, from 0 on."""
        return sorted({0, *(bound for bound in (*self.starts, *self.stops) if 0 < bound < NEVER)})

    def segment(self, position: int) -> int:
        return bisect_right(self.bounds, position) - 1

    def end(self, segment: int) -> int:
        return self.bounds[segment + 1] if segment + 1 < len(self.bounds) else NEVER

    def acting(self, segment: int) -> tuple[int, ...]:
        """Numbers of the edits that act in a segment."""
        at, stretches = self.bounds[segment], zip(self.edits, self.starts, self.stops, strict=True)
        return tuple(number for number, start, stop in stretches if start <= at < stop)

    def within(self, start: int, count: int) -> range:
        """Segments that positions `start <= position < start + count` touch."""
        return range(self.segment(start), self.segment(start + count - 1) + 1)
