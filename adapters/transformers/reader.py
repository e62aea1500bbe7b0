"""Readings of a pass: hidden states are projected inside of the blocks' hooks, and nothing else is kept of them.

Letters: `N` rows, `T` positions, `K` readings, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steer.adapters.language.blocks import residual_stream
from steer.core.readings import Readings

Tap = Callable[[Tensor], None]
"""Is shown what a block returned, after edits: `[N, T, D]`, or several residual streams of that shape."""


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

    def begin(self, keep: int = 1) -> PassReading:
        """What reads the last `keep` positions of one pass; 0 reads all."""
        return PassReading(self, keep)

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

    def __init__(self, reader: Reader, keep: int) -> None:
        self._reader, self._keep = reader, keep
        self._total: Tensor | None = None
        self.taps: dict[int, Tap] = {layer: self._tap(layer) for layer in reader.readings.layers}

    def _tap(self, layer: int) -> Tap:
        reader, keep = self._reader, self._keep

        def tap(output: Tensor) -> None:
            states = residual_stream(output, reader.stream)
            share = reader.values(layer, states[:, -keep:] if keep else states)
            self._total = share if self._total is None else self._total + share.to(self._total.device)

        return tap

    @property
    def found(self) -> Tensor:
        """The readings `[N, keep, K]`, once the pass is over."""
        assert self._total is not None
        return self._reader.biased(self._total)
