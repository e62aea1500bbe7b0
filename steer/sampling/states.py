"""States of the nodes of a forest: kept ready while memory lasts, packed beyond it, and as tensors for a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steer.core import Cost, Process, Prompt

__all__ = ["StateStore"]


class StateStore:
    """States of nodes, in chunks of rows that arrived together. Inner nodes may keep what lets them go on at once
    (caches, predictions) up to a bound; leaves are packed.
    """

    def __init__(self, process: Process, prompts: list[Prompt], max_bytes: int) -> None:
        self.process, self.prompts, self.max_bytes = process, prompts, max_bytes
        self.live: dict[int, tuple[Any, int]] = {}
        """Chunks that can go on at once, oldest use first, and their size in bytes."""
        self.cold: dict[int, tuple[int, dict[str, Tensor]]] = {}
        """Step and packed rows of chunks that were reduced."""
        self.ended: list[dict[str, Tensor]] = []
        self.held = self.count = 0
        self._names: dict[tuple[int, bool], list[Any] | None] = {}

    def add(self, state: Any) -> int:
        size = self.process.nbytes(state)
        self.live[self.count] = (state, size)
        self.held += size
        self.count += 1
        while self.held > self.max_bytes and len(self.live) > 1:
            oldest = next(iter(self.live))
            old, size = self.live.pop(oldest)
            self.cold[oldest] = (old.step, self.process.pack(old))
            self.held -= size
        return self.count - 1

    def add_leaves(self, state: Any) -> int:
        self.ended.append(self.process.pack(state))
        return len(self.ended) - 1

    def rows(self, wanted: list[tuple[int, int]]) -> tuple[Any, Cost]:
        """A state of these rows `(chunk, row)`, in order, and what it cost to make those that were reduced go on."""
        process, parts, order, spent = self.process, [], [], Cost()
        by_chunk: dict[int, list[int]] = {}
        for i, (chunk, _) in enumerate(wanted):
            by_chunk.setdefault(chunk, []).append(i)
        cold: list[tuple[int, Tensor]] = []
        cold_order: list[int] = []
        for chunk, mine in by_chunk.items():
            at = torch.tensor([wanted[i][1] for i in mine])
            if chunk in self.live:
                self.live[chunk] = self.live.pop(chunk)  # now the most recently used
                parts.append(process.gather(self.live[chunk][0], at))
                order += mine
            else:
                cold.append((chunk, at))
                cold_order += mine
        if cold:
            state, spent = self._reread(cold)
            parts.append(state)
            order += cold_order
        state = parts[0] if len(parts) == 1 else process.stack(parts)
        if order != sorted(order):
            state = process.gather(state, torch.tensor(order).argsort())
        return state, spent

    def _reread(self, wanted: list[tuple[int, Tensor]]) -> tuple[Any, Cost]:
        """One state of these rows of reduced chunks, all at the same step, and what it cost."""
        step = self.cold[wanted[0][0]][0]
        packed = [{k: v[at] for k, v in self.cold[chunk][1].items()} for chunk, at in wanted]
        whole = {k: together([rows[k] for rows in packed]) for k in packed[0]}
        return self.process.settle(self.process.read(self.process.unpack(self.prompts, step, whole)))

    def leaves(self, wanted: list[tuple[int, int]]) -> Any:
        """A finished state of these leaves, in order."""
        chunks = sorted({chunk for chunk, _ in wanted})
        offset, total = {}, 0
        for chunk in chunks:
            offset[chunk] = total
            total += len(self.ended[chunk]["group"])
        at = torch.tensor([offset[chunk] + row for chunk, row in wanted])
        whole = {k: together([self.ended[c][k] for c in chunks])[at] for k in self.ended[chunks[0]]}
        return self.process.unpack(self.prompts, self.process.num_steps, whole)

    def packed(self) -> dict[str, Tensor]:
        """Everything, as named tensors."""
        out: dict[str, Tensor] = {}
        for chunk in range(self.count):
            if chunk in self.live:
                state = self.live[chunk][0]
                step, rows = state.step, self.process.pack(state)
            else:
                step, rows = self.cold[chunk]
            out |= {f"chunk.{chunk}.{k}": v for k, v in rows.items()}
            out[f"chunk.{chunk}.step"] = torch.tensor(step)
        for chunk, rows in enumerate(self.ended):
            out |= {f"leaf.{chunk}.{k}": v for k, v in rows.items()}
        return out

    def unpacked(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `packed` gave; nothing can go on at once until it is read again."""
        chunks: dict[int, dict[str, Tensor]] = {}
        leaves: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind in ("chunk", "leaf"):
                number, _, field_ = rest.partition(".")
                (chunks if kind == "chunk" else leaves).setdefault(int(number), {})[field_] = value
        self.cold = {i: (int(rows.pop("step")), rows) for i, rows in chunks.items()}
        self.live, self.held, self.count = {}, 0, len(chunks)
        self.ended = [leaves[i] for i in range(len(leaves))]
        self._names = {}

    def names(self, chunk: int, leaf: bool) -> list[Any] | None:
        """Identities of a chunk's rows."""
        if (chunk, leaf) not in self._names:
            step, rows = (self.process.num_steps, self.ended[chunk]) if leaf else self.cold[chunk]
            self._names[chunk, leaf] = self.process.identify(self.process.unpack(self.prompts, step, rows))
        return self._names[chunk, leaf]


def together(columns: Sequence[Tensor]) -> Tensor:
    """Packed columns `[N, ...]` one below the other. Rows of texts are as wide as the longest of their chunk, and have
    their lengths in another column: narrower ones are padded with 0.
    """
    if columns[0].dim() == 2:
        width = max(column.shape[1] for column in columns)
        columns = [torch.nn.functional.pad(column, (0, width - column.shape[1])) for column in columns]
    return torch.cat(list(columns))
