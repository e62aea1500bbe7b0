"""Compiles the edits that act on a token into one row: a vector to add at every block, and closed forms.

A row stands in a slot of every block's buffers. Rows are made when a step first needs them; where slots run out, the
row that was not used for longest makes room. `rows_of` says how many rows a request can need at once.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steer.adapters._vllm_ops import SCALARS, VECTORS, BlockSteering
from steer.core import HiddenEdit, ModelInfo, Operator, SteerError, UnsupportedError
from steer.methods.operators import Ablate, Add, Clamp, KeepNorm, Rotate, Where

__all__ = ["NEVER", "Compiled", "Form", "Row", "Slots", "Spans", "form", "merged", "rows_of", "stages_of"]

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
            return cls(edit, operators, layers, None)
        rows = [c.detach().float().cpu() for c in constants if c is not None]
        return cls(edit, operators, layers, torch.stack(rows) if rows else torch.zeros(0, model.width))


def stages_of(edits: Sequence[Compiled]) -> int:
    """The largest number of stages that these edits, together, put on one block."""
    if all(edit.constants is not None for edit in edits):
        return 0
    return max(len(forms) for forms in _staged(edits, [None] * len(edits), 1, {})[1].values())


@dataclass(eq=False)
class Row:
    """What happens to a token: `add` `[L, D]` after the `stages` of each block."""

    add: Tensor
    stages: dict[int, list[Form]] = field(default_factory=dict)

    @property
    def added(self) -> np.ndarray:
        """Blocks `[L]` where something is added."""
        return np.asarray((self.add != 0).any(1).cpu().numpy())


def merged(edits: Sequence[Compiled], weights: Sequence[Tensor | None], depth: int, width: int) -> Row:
    """One row for edits that act together, in order; `weights[i]` `[terms]` of an edit that read the prompt."""
    if all(edit.constants is not None for edit in edits):
        add = torch.zeros(depth, width)
        for edit, weight in zip(edits, weights, strict=True):
            assert edit.constants is not None
            scaled = edit.constants if weight is None else weight.float().cpu().unsqueeze(1) * edit.constants
            add.index_add_(0, edit.layers, scaled)
        return Row(add)
    trailing, stages = _staged(edits, weights, width, None)
    add = torch.zeros(depth, width)
    for layer, vector in trailing.items():
        add[layer] = vector
    return Row(add, stages)


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


@dataclass(frozen=True)
class Spans:
    """Where the edits of a request act: edit i at positions `starts[i] <= position < stops[i]`. What acts changes at
    `bounds`; a segment lies between two of them, and the last one has no end.
    """

    starts: tuple[int, ...]
    stops: tuple[int, ...]

    @classmethod
    def of(cls, hidden: Sequence[Mapping[str, Any]]) -> Spans:
        """Those of resolved edits."""
        stops = (NEVER if entry["stop"] is None else int(entry["stop"]) for entry in hidden)
        return cls(tuple(int(entry["start"]) for entry in hidden), tuple(stops))

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
        at = self.bounds[segment]
        return tuple(i for i in range(len(self.starts)) if self.starts[i] <= at < self.stops[i])

    def within(self, start: int, count: int) -> range:
        """Segments that positions `start <= position < start + count` touch."""
        return range(self.segment(start), self.segment(start + count - 1) + 1)


def rows_of(hidden: Sequence[Mapping[str, Any]]) -> int:
    """The most rows that a step can need for a request with these resolved edits: the different combinations of edits
    that act somewhere along the text. A step that reads a prompt, or reads a text again after preemption, can touch
    every segment of it; equal combinations share a row.
    """
    spans = Spans.of(hidden)
    acting = (spans.acting(segment) for segment in range(len(spans.bounds)))
    return len({tuple(hidden[i]["key"] for i in edits) for edits in acting if edits})


class Slots:
    """Rows in the buffers of the blocks that this rank has."""

    def __init__(
        self, blocks: Mapping[int, BlockSteering], depth: int, stages: int, capacity: int, grows: bool
    ) -> None:
        self.blocks, self.depth, self.stages, self.grows = blocks, depth, stages, grows
        self.capacity = capacity
        """Slots besides slot 0."""
        self._slot: OrderedDict[Hashable, int] = OrderedDict()
        self._free = list(range(capacity, 0, -1))
        self.added = np.zeros((capacity + 1, depth), dtype=bool)
        self.staged = np.zeros((capacity + 1, depth), dtype=np.int64)

    def ensure(self, needed: Mapping[Hashable, Callable[[], Row]]) -> dict[Hashable, int]:
        """The slot of every row that a step needs, rows that are not there being made. Raises `SteerError` where a
        compiled network has fewer slots.
        """
        for key in needed:
            if key in self._slot:
                self._slot.move_to_end(key)
        for key, make in needed.items():
            if key not in self._slot:
                slot = self._vacate(needed)
                self._write(slot, make())
                self._slot[key] = slot
        return {key: self._slot[key] for key in needed}

    def forget(self, keys: Iterable[Hashable]) -> None:
        """Free the slots of rows that nobody will ask for again."""
        for key in keys:
            slot = self._slot.pop(key, None)
            if slot is not None:
                self._free.append(slot)

    @property
    def used(self) -> int:
        """Slots that hold a row."""
        return len(self._slot)

    def _vacate(self, needed: Mapping[Hashable, Any]) -> int:
        if self._free:
            return self._free.pop()
        oldest = next(iter(self._slot))
        if oldest not in needed:
            return self._slot.pop(oldest)
        if not self.grows:
            raise SteerError(f"more than {self.capacity} steered rows in one step: raise additional_config steer.slots")
        self._grow()
        return self._free.pop()

    def _grow(self) -> None:
        more = max(self.capacity, 8)
        for block in self.blocks.values():
            for name in ("bank", "vectors", "scalars"):
                old = getattr(block, name, None)
                if old is not None:
                    setattr(block, name, torch.cat([old, old.new_zeros(more, *old.shape[1:])]))
        self._free = list(range(self.capacity + more, self.capacity, -1))
        self.capacity += more
        self.added = np.concatenate([self.added, np.zeros((more, self.depth), dtype=bool)])
        self.staged = np.concatenate([self.staged, np.zeros((more, self.depth), dtype=np.int64)])

    def _write(self, slot: int, row: Row) -> None:
        self.added[slot], self.staged[slot] = row.added, 0
        for layer, block in self.blocks.items():
            block.bank[slot] = row.add[layer]
            forms = row.stages.get(layer, [])
            if forms and not block.stages:
                block.allow(self.stages)
            if block.stages:
                self._write_stages(slot, layer, block, forms)

    def _write_stages(self, slot: int, layer: int, block: BlockSteering, forms: Sequence[Form]) -> None:
        self.staged[slot, layer] = len(forms)
        block.scalars[slot] = 0
        for k, one in enumerate(forms):
            block.vectors[slot, k] = one.vectors.to(block.vectors)
            block.scalars[slot, k] = one.scalars.to(block.scalars)
