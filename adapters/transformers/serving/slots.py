"""Rows of one model that join and leave a running batch, each at its own position, under its own hidden edits.

Every row has a slot of one rectangular cache and starts at its column 0, so that a row that joins moves nobody and a
row that leaves costs one copy. Letters: `N` rows, `T` columns, `H` heads, `D` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from steer.adapters.transformers import tracking
from steer.adapters.transformers.body import Body
from steer.adapters.transformers.hidden import HiddenProgram, RowEdit, adding
from steer.adapters.transformers.reader import Reader, RowReaders
from steer.adapters.transformers.rectangle import Track


class _Layout:
    """Where the next token of every row goes: shared by all layers."""

    rows: Tensor
    columns: Tensor
    width = 0


class SlotLayer(DynamicLayer):
    """One layer's keys and values, `[slots, H, T, head_dim]`. What was never written is 0: attention gives masked
    columns no weight, and no weight times 0 is 0 whatever another row once left there.
    """

    def __init__(self, layout: _Layout) -> None:
        super().__init__()
        self.layout = layout
        self.rooms: list[Tensor] = []

    def get_seq_length(self) -> int:
        return self.layout.width - 1

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows, columns, width = self.layout.rows, self.layout.columns, self.layout.width
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            at = rows.to(room.device), columns.to(room.device)
            room[at[0], :, at[1]] = states[:, :, 0]
        keys, values = (room[: len(rows), :, :width] for room in self.rooms)
        return keys, values

    def reserve(self, like: Sequence[Tensor], slots: int, columns: int) -> None:
        """Room for so many rows and columns; what is there stays. `like`: keys and values `[*, H, *, head_dim]`."""
        old = self.rooms
        if old:
            slots, columns = max(slots, old[0].shape[0]), max(columns, old[0].shape[2])
        self.rooms = [x.new_zeros(slots, x.shape[1], columns, x.shape[3]) for x in like]
        for room, before in zip(self.rooms, old, strict=bool(old)):
            room[: before.shape[0], :, : before.shape[2]] = before

    def place(self, slot: int, states: Sequence[Tensor]) -> None:
        """Put keys and values `[H, T, head_dim]` into a slot; the rest of the slot is cleared."""
        for room, x in zip(self.rooms, states, strict=True):
            room[slot, :, : x.shape[1]] = x
            room[slot, :, x.shape[1] :] = 0


class SlotRows:
    """The network's view of a batch: `logits` `[N, V]` from which every row's next token is drawn, `hidden` `[N, D]`
    where some row asked for it, and `readings` of every row at the same position, None of those that have none.
    """

    def __init__(self, body: Body) -> None:
        self.body = body
        self.width = 0
        """Columns of the rectangle at least."""
        self.logits: Tensor | None = None
        self.hidden: Tensor | None = None
        self.readings: list[list[float] | None] = []
        self._readers: list[Reader | None] = []
        self._reading: RowReaders | None = None
        self._layout = _Layout()
        self._layers = [SlotLayer(self._layout) for _ in body.new_cache().layers]
        self._lengths: list[int] = []
        self._watching: list[bool] = []
        self._plans: list[_RowPlan | None] = []
        self._program: dict[int, RowEdit] | None = None

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def nbytes(self) -> int:
        """Memory of the cache."""
        return sum(room.numel() * room.element_size() for layer in self._layers for room in layer.rooms)

    def join(self, track: Track, owners: Sequence[int]) -> None:
        """Rows of a prompt pass join; row i goes on from row `owners[i]` of the pass. Copies."""
        filled = track.mask.sum(1).tolist()
        first = len(self)
        self._reserve(track, first + len(owners), max(filled) + 1)
        for layer, source in zip(self._layers, track.cache.layers, strict=True):
            for slot, row in enumerate(owners, first):
                skip = source.keys.shape[2] - filled[row]
                layer.place(slot, (source.keys[row, :, skip:], source.values[row, :, skip:]))
        at = torch.tensor(list(owners), device=track.logits.device)
        self.logits = _joined(self.logits, track.logits[at], first)
        watched = track.hidden is not None
        if watched or self.hidden is not None:
            width = self.body.info.width
            mine = track.hidden[at] if track.hidden is not None else track.logits.new_zeros(len(owners), width)
            self.hidden = _joined(self.hidden, mine, first)
        read = [] if track.readings is None else track.readings.tolist()
        for row in owners:
            self._readers.append(track.reader)
            self.readings.append(read[row] if read else None)
            self._lengths.append(filled[row])
            self._watching.append(watched)
            self._plans.append(_RowPlan(track.plan.rows(torch.tensor([row]))) if track.plan else None)
        self._program = self._reading = None

    def keep(self, staying: Sequence[int]) -> list[int]:
        """Drop the other rows. Returns which old row each row now is: rows from the end fill the gaps."""
        count = len(staying)
        if count == len(self):
            return list(range(count))
        inside = {i for i in staying if i < count}
        movers = [i for i in staying if i >= count]
        order = [i if i in inside else movers.pop() for i in range(count)]
        for layer in self._layers:
            for slot, row in enumerate(order):
                if slot != row:
                    for room in layer.rooms:
                        room[slot] = room[row]
        for name in ("_lengths", "_watching", "_plans", "_readers", "readings"):
            old = getattr(self, name)
            setattr(self, name, [old[i] for i in order])
        self._program = self._reading = None
        if not order:
            self.logits = self.hidden = None
            for layer in self._layers:
                layer.rooms = []
            return order
        assert self.logits is not None
        at = torch.tensor(order, device=self.logits.device)
        self.logits = self.logits[at]
        self.hidden = None if self.hidden is None else self.hidden[at]
        return order

    def advance(self, tokens: Tensor) -> None:
        """Every row takes its token `[N]`."""
        device = self.body.device
        width = max(self.width, max(self._lengths) + 1)
        if width > self._layers[0].rooms[0].shape[2]:
            for layer in self._layers:
                layer.reserve(layer.rooms, len(self), width + width // 2)
        position = torch.tensor(self._lengths, device=device)
        self._layout.rows = torch.arange(len(self), device=device)
        self._layout.columns, self._layout.width = position, width
        mask = (torch.arange(width, device=device) <= position.unsqueeze(1)).long()
        if self._reading is None:
            self._reading = RowReaders(self._readers, device)
        begun = self._reading.begin()
        logits, hidden = self.body.forward(
            tokens.unsqueeze(1),
            mask if min(self._lengths) + 1 < width else None,
            position.unsqueeze(1),
            Cache(layers=self._layers),
            self._steps(tokens),
            hidden=any(self._watching),
            taps=RowReaders.taps(begun),
        )
        self.readings = self._reading.found(begun)
        self.logits, self.hidden = logits[:, -1], None if hidden is None else hidden[:, -1]
        self._lengths = [length + 1 for length in self._lengths]

    def _reserve(self, track: Track, rows: int, columns: int) -> None:
        have = self._layers[0].rooms[0].shape if self._layers[0].rooms else (0, 0, 0, 0)
        if rows <= have[0] and columns <= have[2]:
            return
        rows = rows if rows <= have[0] else max(rows, have[0] * 2)
        columns = columns if columns <= have[2] else columns + columns // 2
        for layer, source in zip(self._layers, track.cache.layers, strict=True):
            layer.reserve((source.keys, source.values), rows, columns)

    def _steps(self, tokens: Tensor) -> dict[int, RowEdit]:
        """What each layer does to the rows' next `tokens` `[N]`; made anew when rows change or a scope begins or
        ends.
        """
        due = [
            plan is not None and plan.due(length, tokens, i)
            for i, (plan, length) in enumerate(zip(self._plans, self._lengths, strict=True))
        ]
        if self._program is None or any(due):
            self._program = _merged(self._plans, len(self))
        return self._program


def _joined(old: Tensor | None, new: Tensor, rows: int) -> Tensor:
    if old is None:
        old = new.new_zeros(rows, *new.shape[1:])
    return torch.cat([old, new])


class _RowPlan:
    """The hidden edits of one row at its position: what is added at each layer, or what is done there."""

    def __init__(self, plan: HiddenProgram) -> None:
        self.plan = plan
        self.additive = all(entry.operator.constant is not None for entry in plan.entries)
        self.added: dict[int, Tensor] = {}
        self.program: dict[int, RowEdit] = {}
        self._until = -1.0

    def due(self, position: int, tokens: Tensor, row: int) -> bool:
        """Whether something changes at this position, where the row numbered `row` reads its one of `tokens` `[N]`; if
        so, look it up again.
        """
        marked = self.plan.marked and self.plan.take(tokens[row : row + 1])
        if position < self._until and not marked:
            return False
        at = torch.tensor([position], dtype=torch.float64)
        self._until = position + self.plan._until_change(at)
        if self.additive:
            self.added = self._sums(at)
        else:
            self.program = self.plan._merged(at)
        return True

    def _sums(self, position: Tensor) -> dict[int, Tensor]:
        sums: dict[int, Tensor] = {}
        for entry in self.plan.entries:
            weight = entry.at(position)
            if float(weight) != 0:
                vector = entry.operator.constant
                assert vector is not None
                added = weight.to(vector) * vector
                sums[entry.layer] = sums[entry.layer] + added if entry.layer in sums else added
        return sums


def _merged(plans: Sequence[_RowPlan | None], rows: int) -> dict[int, RowEdit]:
    """One step for each layer that changes any row."""
    added: dict[int, dict[int, Tensor]] = {}
    programs: dict[int, list[tuple[int, RowEdit]]] = {}
    for row, plan in enumerate(plans):
        if plan is None:
            continue
        for layer, vector in plan.added.items():
            added.setdefault(layer, {})[row] = vector
        for layer, step in plan.program.items():
            programs.setdefault(layer, []).append((row, step))
    return {
        layer: _layer_step(added.get(layer, {}), programs.get(layer, []), rows)
        for layer in sorted(set(added) | set(programs))
    }


def _layer_step(added: dict[int, Tensor], programs: list[tuple[int, RowEdit]], rows: int) -> RowEdit:
    add: RowEdit = torch.clone
    if added:
        nothing = torch.zeros_like(next(iter(added.values())))
        add = adding(torch.stack([added.get(row, nothing) for row in range(rows)]).unsqueeze(1))

    def apply(hidden: Tensor) -> Tensor:
        out = add(hidden)
        for row, step in programs:
            out[row : row + 1] = step(hidden[row : row + 1])
        return out

    return apply


class TrackRows:
    """The same view of rows that cannot share a cache with others: models whose layers do not attend to everything,
    edits that look ahead. Nobody joins.
    """

    def __init__(self, track: tracking.AnyTrack) -> None:
        self.track = track

    @property
    def logits(self) -> Tensor:
        return self.track.logits

    @property
    def hidden(self) -> Tensor | None:
        return self.track.hidden

    @property
    def readings(self) -> list[list[float] | None]:
        found = self.track.readings
        return [None] * len(self.track.logits) if found is None else found.tolist()

    @property
    def nbytes(self) -> int:
        return tracking.nbytes(self.track)

    def keep(self, staying: Sequence[int]) -> list[int]:
        if len(staying) < len(self.track.logits):
            self.track = tracking.fork(self.track, torch.tensor(list(staying), dtype=torch.long))
        return list(staying)

    def advance(self, tokens: Tensor) -> None:
        self.track, _ = tracking.advance(self.track, tokens)
