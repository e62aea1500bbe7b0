"""Readings inside vLLM: states are projected in the blocks' hooks, at the rows of the tokens that are sampled from.

A request names what is read by the digest of its matrices, which every worker was sent before, and a tag under which
its worker keeps the numbers by position until the front end asks for them. A position that runs again, after preemption
or since a gate has read the prompt, is read again. Nothing waits for the device.

Letters: `T` tokens of a pass, `R` rows of it that are read, `K` readings, `D` width.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from steer.adapters.vllm.plugin.requests import SteeredRequest
from steer.core import SteerError, UnsupportedError
from steer.core.readings import Readings

__all__ = ["Group", "Readers", "check_engine", "packed", "values_of"]

_TAGS, _MATRICES = 16384, 256
"""Texts whose numbers are kept, and sets of readings, at most."""


def packed(readings: Readings) -> tuple[str, bytes]:
    """The matrices `[D, K]` of each layer and the biases `[K]` as bytes, and their digest."""
    nothing = torch.zeros_like(next(iter(readings.items[0].weights.values())), dtype=torch.float32)
    tensors = {
        str(layer): torch.stack([item.weights.get(layer, nothing).float() for item in readings.items], 1).contiguous()
        for layer in sorted(readings.layers)
    }
    data = to_bytes({**tensors, "bias": torch.tensor([item.bias for item in readings.items])})
    return hashlib.sha256(data).hexdigest()[:32], data


def check_engine(settings: Any) -> None:
    """Raise `UnsupportedError` for engines whose passes are not read."""
    for wrong, what in (
        (settings.graphs, "a compiled or captured network: start the engine with enforce_eager"),
        (settings.parallel != (1, 1), "several ranks"),
        (settings.speculative, "speculative decoding"),
    ):
        if wrong:
            raise UnsupportedError(f"readings do not go with {what}")


def values_of(parts: Sequence[Any], names: Sequence[str], first: int, count: int) -> Tensor:
    """The numbers `[count, K]` of the tokens of a text whose first one was chosen at position `first`, from what the
    workers told of its tag. Raises `SteerError` where some were not kept.
    """
    told = next((part for part in parts if part is not None), None)
    by_position = {} if told is None else dict(zip(*told, strict=True))
    if any(first + i not in by_position for i in range(count)):
        raise SteerError("readings: the engine has not kept all of them; ask for fewer texts at once")
    rows = [by_position[first + i] for i in range(count)]
    return torch.tensor(rows).reshape(count, len(names))


@dataclass(eq=False)
class Group:
    """Rows of one pass that are read alike."""

    matrices: dict[int, Tensor]
    bias: Tensor
    rows: Tensor
    """Which of the pass's tokens `[R]`."""
    tags: tuple[str, ...]
    positions: np.ndarray
    total: Tensor | None = None

    def take(self, layer: int, states: Tensor) -> None:
        """Add a layer's share, of states `[R, D]`."""
        share = states.float() @ self.matrices[layer]
        self.total = share if self.total is None else self.total + share


class Readers:
    """What one worker reads. `watch` says what the next pass is to read, `settle` keeps what it read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._known: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._kept: OrderedDict[str, list[tuple[int, Tensor, int]]] = OrderedDict()
        self._rows: dict[str, tuple[tuple[int, ...], Tensor]] = {}
        self.groups: list[Group] = []

    def learn(self, digest: str, data: bytes) -> None:
        """Keep the matrices of a set of readings; the least recently used one makes room."""
        self._known[digest] = {name: x.to(self.device) for name, x in from_bytes(data).items()}
        self._known.move_to_end(digest)
        while len(self._known) > _MATRICES:
            self._rows.pop(self._known.popitem(last=False)[0], None)

    def watch(self, asked: Sequence[tuple[int, SteeredRequest]], ends: np.ndarray, last: np.ndarray) -> None:
        """Read requests by their number in a pass: `ends` is where each one's tokens end in its text, `last` which of
        the pass's tokens is its last. One whose prompt does not end in this pass has nothing to read yet.
        """
        found: dict[str, list[tuple[int, SteeredRequest]]] = {}
        for i, request in asked:
            digest = request.read[0] if request.read is not None else ""
            if ends[i] >= request.length and digest in self._known:
                found.setdefault(digest, []).append((i, request))
        self.groups = [self._group(digest, members, ends, last) for digest, members in found.items()]

    def _group(
        self, digest: str, members: Sequence[tuple[int, SteeredRequest]], ends: np.ndarray, last: np.ndarray
    ) -> Group:
        known = self._known[digest]
        numbers = [i for i, _ in members]
        rows = tuple(last[numbers].tolist())
        held = self._rows.get(digest)
        if held is None or held[0] != rows:  # texts that grow by one token stay where they are
            held = self._rows[digest] = rows, torch.tensor(rows, device=self.device)
            self._known.move_to_end(digest)
        matrices = {int(name): x for name, x in known.items() if name != "bias"}
        tags = tuple(request.read[1] for _, request in members if request.read is not None)
        return Group(matrices, known["bias"], held[1], tags, ends[numbers] - 1)

    @property
    def taps(self) -> dict[int, list[Group]]:
        """What is read after each block."""
        taps: dict[int, list[Group]] = {}
        for group in self.groups:
            for layer in group.matrices:
                taps.setdefault(layer, []).append(group)
        return taps

    def settle(self) -> None:
        """Keep what the last pass has read."""
        groups, self.groups = self.groups, []
        for group in groups:
            if group.total is None:
                continue
            values = group.total + group.bias
            for row, (tag, position) in enumerate(zip(group.tags, group.positions.tolist(), strict=True)):
                self._kept.setdefault(tag, []).append((position, values, row))
        while len(self._kept) > _TAGS:
            self._kept.popitem(last=False)

    def tell(self, tags: Sequence[str]) -> list[tuple[list[int], list[list[float]]] | None]:
        """Positions and numbers of tagged requests; each can be asked for once."""
        self.settle()
        told: list[tuple[list[int], list[list[float]]] | None] = []
        for tag in tags:
            kept = self._kept.pop(tag, None)
            if kept is None:
                told.append(None)
                continue
            positions, values = [p for p, _, _ in kept], torch.stack([x[row] for _, x, row in kept])
            told.append((positions, values.tolist()))
        return told
