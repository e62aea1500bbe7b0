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
from steer.core.scope import Marks

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
    opened: Tensor
    """Whether the part that `marks` mark is open after what each row has read `[N]`."""
    marks: Marks | None = None

    def at(self, position: Tensor, opened: Tensor | None = None) -> Tensor:
        """Weight at each of `position` `[N]` or `[N, T]`, zero outside the scope; `opened` is what holds there."""
        shape = (-1,) + (1,) * (position.dim() - 1)
        inside = (position >= self.start.view(shape)) & (position < self.stop.view(shape))
        if self.marks is not None:
            inside &= (self.opened.view(shape) if opened is None else opened) == self.marks.inside
        return inside * self.weight.view(shape)

    def after(self, tokens: Tensor) -> Tensor:
        """Whether the part is open after each of `tokens` `[N, T]`, read one after another; -1 is no token."""
        assert self.marks is not None
        opens = torch.isin(tokens, torch.tensor(self.marks.opening))
        marks = opens | torch.isin(tokens, torch.tensor(self.marks.closing))
        place = torch.where(marks, torch.arange(tokens.shape[1]), -1).cummax(1).values
        return torch.where(place >= 0, opens.gather(1, place.clamp_min(0)), self.opened.unsqueeze(1))

    def rows(self, index: Tensor) -> Act:
        return replace(self, **{name: getattr(self, name)[index] for name in _OF_ROWS})


_OF_ROWS = ("weight", "start", "stop", "opened")


class HiddenProgram:
    """Hidden edits compiled for the rows of one state."""

    def __init__(self, entries: Sequence[Act]) -> None:
        self.entries = tuple(entries)
        self.marked = any(entry.marks is not None for entry in self.entries)
        """Whether what acts depends on the tokens that are read."""
        self._decode: dict[int, RowEdit] = {}
        self._steps_left = 0.0

    @classmethod
    def compile(
        cls,
        edits: Sequence[tuple[HiddenEdit, frozenset[int] | None]],
        info: ModelInfo,
        ids: Sequence[Sequence[int]],
        weights: Sequence[Tensor | None],
    ) -> HiddenProgram:
        """Entries for prompts `ids`; `weights[i]` is `[B, terms]` for an edit that reads the prompt."""
        entries = []
        for (edit, wanted), weight in zip(edits, weights, strict=True):
            asked = torch.tensor([wanted is None or b in wanted for b in range(len(ids))], dtype=torch.float32)
            start, stop = torch.tensor([edit.scope.bounds(len(row)) for row in ids], dtype=torch.float64).unbind(1)
            marks = edit.scope.marks(info.token_id)
            opened = torch.tensor([marks is not None and bool(marks.last(row)) for row in ids])
            for i, term in enumerate(edit.terms(info)):
                scale = asked if weight is None else torch.where(asked > 0, weight[:, i].float().cpu(), 0.0)
                entries.append(Act(term.layer, term.operator, scale, start, stop, opened, marks))
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
            replace(entry, **{name: joined(i, name) for name in _OF_ROWS}) for i, entry in enumerate(plans[0].entries)
        ]
        return cls(entries)

    def prompt(self, position: Tensor) -> dict[int, RowEdit]:
        """What to do at each layer in a pass over the prompts, or their ends, at `position` `[N, T]`."""
        return _chunk(self.entries, position, [None] * len(self.entries))

    def chunk(self, position: Tensor, tokens: Tensor, real: Tensor | None = None) -> dict[int, RowEdit]:
        """What to do at each layer in a pass over further `tokens` `[N, T]` at `position`, which are read where they
        are `real` `[N, T]`.
        """
        opened = self._after(tokens, real)
        program = _chunk(self.entries, position.cpu(), opened)
        self._read(opened)
        self._steps_left = 0
        return program

    def branches(self, position: Tensor, candidates: Tensor) -> dict[int, RowEdit]:
        """What to do at each layer for `candidates` `[N, K]` of the next token at `position` `[N]`; `take` says which
        was taken.
        """
        if not self.marked:
            return self.decode(position, candidates)
        self._steps_left = 0
        each = [self._after(column, None) for column in candidates.split(1, 1)]
        opened = [None if parts[0] is None else torch.cat(list(parts), 1) for parts in zip(*each, strict=True)]
        return _chunk(self.entries, position.unsqueeze(1).expand_as(candidates).cpu(), opened)

    def take(self, tokens: Tensor, real: Tensor | None = None) -> bool:
        """Read the next token of every row `[N]`; whether a part begins or ends with one of them."""
        if not self.marked:
            return False
        opened = self._after(tokens.unsqueeze(1), None if real is None else real.unsqueeze(1))
        before = [entry.opened for entry in self.entries]
        self._read(opened)
        return any(bool((old != new.opened).any()) for old, new in zip(before, self.entries, strict=True))

    def _after(self, tokens: Tensor, real: Tensor | None) -> list[Tensor | None]:
        """For each entry with marks whether its part is open after each of `tokens` `[N, T]`."""
        if not self.marked:
            return [None] * len(self.entries)
        read = (tokens if real is None else torch.where(real.bool(), tokens, -1)).cpu()
        return [None if entry.marks is None else entry.after(read) for entry in self.entries]

    def _read(self, opened: Sequence[Tensor | None]) -> None:
        if self.marked:
            self.entries = tuple(
                entry if after is None else replace(entry, opened=after[:, -1])
                for entry, after in zip(self.entries, opened, strict=True)
            )

    def decode(self, position: Tensor, tokens: Tensor, real: Tensor | None = None) -> dict[int, RowEdit]:
        """What to do at each layer for one more token of every row `[N]`, at `position` `[N]`. Rebuilt only when a
        scope begins or ends.
        """
        if self.marked and self.take(tokens, real):
            self._steps_left = 0
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


def _chunk(entries: Sequence[Act], position: Tensor, opened: Sequence[Tensor | None]) -> dict[int, RowEdit]:
    program: dict[int, RowEdit] = {}
    for entry, state in zip(entries, opened, strict=True):
        weight = entry.at(position, state)
        if bool((weight != 0).any()):
            _then(program, entry.layer, _weighted(entry.operator, weight))
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
