"""The bank of steering rows of a compiled engine."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from steer.adapters.vllm.plugin.blocks import BlockSteering
from steer.adapters.vllm.plugin.compiled import Form, SteeringRow
from steer.core import SteerError


class RowBank:
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

    def ensure(self, needed: Mapping[Hashable, Callable[[], SteeringRow]]) -> dict[Hashable, int]:
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

    def _write(self, slot: int, row: SteeringRow) -> None:
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
