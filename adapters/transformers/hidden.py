"""Mounted hidden edits, compiled into what the hooks do, and the hooks themselves.

Before decoding everything constant is merged: a decode step costs one addition per steered layer, however many
vectors are mounted. Positions are absolute, per row and without padding; the phase is never guessed from a chunk.
Letters: `N` rows, `T` positions of one forward pass, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steer.core import HiddenEdit, ModelInfo, Operator

RowEdit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Act:
    """One operator at one layer, with the rows and positions where it acts."""

    layer: int
    operator: Operator
    weight: Tensor
    """`[N]`; zero for rows that did not ask for it."""
    start: Tensor
    stop: Tensor

    def at(self, position: Tensor) -> Tensor:
        """Weight at each of `position` `[N]` or `[N, T]`, zero outside the scope."""
        shape = (-1,) + (1,) * (position.dim() - 1)
        inside = (position >= self.start.view(shape)) & (position < self.stop.view(shape))
        return inside * self.weight.view(shape)

    def rows(self, index: Tensor) -> Act:
        return replace(self, weight=self.weight[index], start=self.start[index], stop=self.stop[index])


class HiddenProgram:
    """Hidden edits compiled for the rows of one state."""

    def __init__(self, entries: Sequence[Act]) -> None:
        self.entries = tuple(entries)
        self._decode: dict[int, RowEdit] = {}
        self._steps_left = 0.0

    @classmethod
    def compile(
        cls,
        edits: Sequence[tuple[HiddenEdit, frozenset[int] | None]],
        info: ModelInfo,
        lengths: Sequence[int],
        weights: Sequence[Tensor | None],
    ) -> HiddenProgram:
        """Entries for prompts of these `lengths`; `weights[i]` is `[B, terms]` for an edit that reads the prompt."""
        entries = []
        for (edit, wanted), weight in zip(edits, weights, strict=True):
            asked = torch.tensor([wanted is None or b in wanted for b in range(len(lengths))], dtype=torch.float32)
            start, stop = torch.tensor([edit.scope.bounds(n) for n in lengths], dtype=torch.float64).unbind(1)
            for i, term in enumerate(edit.terms(info)):
                scale = asked if weight is None else torch.where(asked > 0, weight[:, i].float().cpu(), 0.0)
                entries.append(Act(term.layer, term.operator, scale, start, stop))
        return cls(entries)

    def __bool__(self) -> bool:
        return bool(self.entries)

    @property
    def layers(self) -> set[int]:
        return {entry.layer for entry in self.entries}

    def first_position(self) -> Tensor:
        """First position of each row `[N]` at which anything acts; infinite where nothing does."""
        never = torch.tensor(float("inf"), dtype=torch.float64)
        starts = [torch.where((e.weight != 0) & (e.stop > e.start), e.start, never) for e in self.entries]
        return torch.stack(starts).amin(0)

    def rows(self, index: Tensor) -> HiddenProgram:
        """The plan of other rows: row i is row `index[i]` of this one."""
        return HiddenProgram([entry.rows(index.cpu()) for entry in self.entries])

    @classmethod
    def stack(cls, plans: Sequence[HiddenProgram]) -> HiddenProgram:
        """One plan for the rows of several plans of the same edits."""

        def joined(i: int, name: str) -> Any:
            return torch.cat([getattr(plan.entries[i], name) for plan in plans])

        entries = [
            replace(entry, **{name: joined(i, name) for name in ("weight", "start", "stop")})
            for i, entry in enumerate(plans[0].entries)
        ]
        return cls(entries)

    def chunk(self, position: Tensor) -> dict[int, RowEdit]:
        """What to do at each layer in a pass over `position` `[N, T]`."""
        program: dict[int, RowEdit] = {}
        for entry in self.entries:
            weight = entry.at(position)
            if bool((weight != 0).any()):
                _then(program, entry.layer, _weighted(entry.operator, weight))
        return program

    def decode(self, position: Tensor) -> dict[int, RowEdit]:
        """What to do at each layer for one more token of every row, at `position` `[N]`. Rebuilt only when a scope
        begins or ends.
        """
        if self._steps_left <= 0:
            position = position.double().cpu()
            self._decode = self._merged(position)
            self._steps_left = self._until_change(position)
        self._steps_left -= 1
        return self._decode

    def _until_change(self, position: Tensor) -> float:
        ahead = torch.stack([bound - position for e in self.entries for bound in (e.start, e.stop)])
        ahead = ahead[ahead > 0]
        return float(ahead.min()) if len(ahead) else float("inf")

    def _merged(self, position: Tensor) -> dict[int, RowEdit]:
        program: dict[int, RowEdit] = {}
        for layer in sorted(self.layers):
            constant: Tensor | None = None
            for entry in self.entries:
                if entry.layer != layer:
                    continue
                weight = entry.at(position)
                if not bool((weight != 0).any()):
                    continue
                vector = entry.operator.constant
                if vector is None:
                    if constant is not None:
                        _then(program, layer, adding(constant))
                        constant = None
                    _then(program, layer, _weighted(entry.operator, weight.unsqueeze(1)))
                else:
                    same = bool((weight == weight[0]).all())
                    scale = weight[:1].view(1, 1, 1) if same else weight.view(-1, 1, 1)
                    added = scale.to(vector) * vector
                    constant = added if constant is None else constant + added
            if constant is not None:
                _then(program, layer, adding(constant))
        return program


def _then(program: dict[int, RowEdit], layer: int, step: RowEdit) -> None:
    before = program.get(layer)
    program[layer] = step if before is None else lambda hidden: step(before(hidden))


def adding(constant: Tensor) -> RowEdit:
    """Adds `[1 or N, 1, D]`, which goes in the first pass to where the hidden state is, and stays: a block's own
    weights may be elsewhere between passes (offloading), what it returns is always in one place.
    """
    placed = False

    def apply(hidden: Tensor) -> Tensor:
        nonlocal constant, placed
        if not placed:  # once: to ask a tensor where it is costs a fifth of the addition
            constant, placed = constant.to(hidden), True
        return hidden + constant

    return apply


def _moved(value: Any, device: torch.device) -> Any:
    """An operator of shipped kinds, or a part of one, with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value) if f.init})
    return value


def _weighted(operator: Operator, weight: Tensor) -> RowEdit:
    """`h + w (operator(h) - h)` with `w` `[N, T]`; rows and positions of weight 0 keep their bits."""
    whole = bool((weight == 1).all())
    placed: torch.device | None = None

    def apply(hidden: Tensor) -> Tensor:
        nonlocal operator, weight, placed
        if placed != hidden.device:
            placed = hidden.device
            operator, weight = _moved(operator, placed), weight.to(placed)
        vector, w = operator.constant, weight.to(hidden.dtype).unsqueeze(-1)
        if vector is not None:
            added = vector.to(hidden.dtype)
            return hidden + (added if whole else w * added)
        changed = operator(hidden)
        if whole:
            return changed
        return torch.where(w == 0, hidden, torch.where(w == 1, changed, hidden + w * (changed - hidden)))

    return apply
