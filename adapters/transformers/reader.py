"""Readings of a pass: hidden states are projected inside of the blocks' hooks, and nothing else is kept of them.

Letters: `N` rows, `T` positions, `K` readings, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steer.adapters.language.blocks import residual_stream
from steer.core.readings import Readings

Tap = Callable[[Any], None]
"""Is shown what a block returns, after edits (see `residual_stream`)."""


class Reader:
    """Readings compiled for one network: at each layer a matrix `[D, K]`, on the device where the states are."""

    def __init__(self, readings: Readings, stream: int | None = None) -> None:
        self.readings, self.stream = readings, stream
        self._bias = torch.tensor([item.bias for item in readings.items])
        width = len(next(iter(readings.items[0].weights.values())))
        nothing = torch.zeros(width)
        self._matrices = {
            layer: torch.stack([item.weights.get(layer, nothing).float().cpu() for item in readings.items], 1)
            for layer in readings.layers
        }

    def __len__(self) -> int:
        return len(self.readings.items)

    def begin(self, keep: int = 1, rows: Tensor | None = None) -> PassReading:
        """What reads the last `keep` positions of one pass, 0 for all, of some of its rows, None for all."""
        return PassReading(self, keep, rows)

    def values(self, layer: int, states: Tensor) -> Tensor:
        """This layer's share `[..., K]` of the readings of states `[..., D]`, in float32."""
        matrix = self._matrices[layer]
        if matrix.device != states.device:
            matrix = self._matrices[layer] = matrix.to(states.device)
        return states.float() @ matrix

    def biased(self, total: Tensor) -> Tensor:
        """The readings, from the sum over layers."""
        if self._bias.device != total.device:
            self._bias = self._bias.to(total.device)
        return total + self._bias


class PassReading:
    """The sum over layers of one pass."""

    def __init__(self, reader: Reader, keep: int, rows: Tensor | None = None) -> None:
        self._reader, self._keep, self._rows = reader, keep, rows
        self._total: Tensor | None = None
        self.taps: dict[int, Tap] = {layer: self._tap(layer) for layer in reader.readings.layers}

    def _tap(self, layer: int) -> Tap:
        reader, keep, rows = self._reader, self._keep, self._rows

        def tap(output: Any) -> None:
            states = residual_stream(output, reader.stream)
            states = states if rows is None else states[rows.to(states.device)]
            share = reader.values(layer, states[:, -keep:] if keep else states)
            self._total = share if self._total is None else self._total + share.to(self._total.device)

        return tap

    @property
    def found(self) -> Tensor:
        """The readings `[N, keep, K]`, once the pass is over."""
        assert self._total is not None
        return self._reader.biased(self._total)


class RowReaders:
    """Readers of rows that ask for different readings; None for rows that ask for none."""

    def __init__(self, readers: Sequence[Reader | None], device: torch.device) -> None:
        self.count = len(readers)
        places: dict[int, list[int]] = {}
        for row, reader in enumerate(readers):
            if reader is not None:
                places.setdefault(id(reader.readings), []).append(row)
        self._groups = [
            (reader, rows, None if len(rows) == self.count else torch.tensor(rows, device=device))
            for rows in places.values()
            if (reader := readers[rows[0]]) is not None
        ]

    def begin(self) -> list[tuple[list[int], PassReading]]:
        """What reads each group of rows in one pass of one position."""
        return [(rows, reader.begin(1, at)) for reader, rows, at in self._groups]

    @staticmethod
    def taps(begun: Sequence[tuple[list[int], PassReading]]) -> dict[int, Tap]:
        """What all of them want to see."""
        found: dict[int, list[Tap]] = {}
        for _, reading in begun:
            for layer, tap in reading.taps.items():
                found.setdefault(layer, []).append(tap)
        return {layer: taps[0] if len(taps) == 1 else _all(taps) for layer, taps in found.items()}

    def found(self, begun: Sequence[tuple[list[int], PassReading]]) -> list[list[float] | None]:
        """The readings of every row, once the pass is over."""
        values: list[list[float] | None] = [None] * self.count
        for rows, reading in begun:
            for row, mine in zip(rows, reading.found[:, 0].tolist(), strict=True):
                values[row] = mine
        return values


def _all(taps: Sequence[Tap]) -> Tap:
    def tap(output: Any) -> None:
        for one in taps:
            one(output)

    return tap
