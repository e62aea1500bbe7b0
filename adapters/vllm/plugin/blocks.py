"""Steering inside a block of the network: additions from a bank of rows, closed forms, and readings.

Each armed block owns persistent buffers. They are filled between passes, and a pass reads them by the token's slot, so
a compiled or captured network needs no Python of ours: `h + bank[slot]` for additions, and one closed form for every
other operator. Where nothing is compiled, the same arithmetic runs only on the blocks and rows that need it.

Letters: `T` tokens of a pass, `S` slots, `K` stages, `R` rows that are read, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["SCALARS", "VECTORS", "BlockSteering", "Host", "Live", "closed_form", "read_stream"]


VECTORS = 4
"""Vectors of a closed form: two orthonormal axes, a shift, a probe."""
SCALARS = 10
"""Its numbers: the plane's matrix (4), bounds (2), whether the norm is kept, the probe's bias, weight, whether on."""


def read_stream(output: Any) -> tuple[Tensor, Tensor | None]:
    """A vLLM block's hidden states `[T, D]` and the residual still to be added to them, or None."""
    if isinstance(output, tuple):
        return output[0], output[1] if len(output) > 1 and isinstance(output[1], Tensor) else None
    return output, None


def _replaced(output: Any, hidden: Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def closed_form(stream: Tensor, vectors: Tensor, scalars: Tensor) -> Tensor:
    """Any operator of `steer.methods.operators` on rows `[T, D]`, each with its own `vectors` `[T, 4, D]` and `scalars`
    `[T, 10]`, all in float32. With x and y the projections on the two axes d and e,

        h' = h + v + (a x + b y + clamp(x) - x) d + (c x + f y) e

    scaled back to the norm of h where that is kept, weighted, and left alone where the probe does not fire.
    """
    first, second, shift, probe = vectors.unbind(1)
    a, b, c, f, low, high, keep, bias, weight, on = scalars.unbind(1)
    x, y = (stream * first).sum(-1), (stream * second).sum(-1)
    along = a * x + b * y + (torch.minimum(torch.maximum(x, low), high) - x)
    across = c * x + f * y
    changed = stream + shift + along.unsqueeze(1) * first + across.unsqueeze(1) * second
    ratio = stream.norm(dim=-1) / changed.norm(dim=-1).clamp_min(1e-12)
    changed = torch.where(keep.unsqueeze(1) > 0, changed * ratio.unsqueeze(1), changed)
    weight = weight.unsqueeze(1)
    changed = torch.where(weight == 1, changed, stream + weight * (changed - stream))
    fires = ((stream * probe).sum(-1) + bias > 0) & (on > 0)
    return torch.where(fires.unsqueeze(1), changed, stream)


class BlockSteering(nn.Module):
    """The buffers of one block and what it does with them; `slot` `[T]` and `rows` `[R]` are shared by all blocks.

    Slot 0 changes nothing. `forward` maps the block's output to the steered one.
    """

    bank: Tensor
    slot: Tensor
    vectors: Tensor
    scalars: Tensor
    stage_slot: Tensor
    rows: Tensor
    seen: Tensor

    def __init__(
        self, width: int, slots: int, stages: int, slot: Tensor, stage_slot: Tensor, rows: Tensor | None, like: Tensor
    ) -> None:
        super().__init__()
        self.stages = 0
        self.reads = rows is not None
        self._keep("bank", like.new_zeros(slots, width))
        self._keep("slot", slot)
        self._keep("stage_slot", stage_slot)
        if stages:
            self.allow(stages)
        if rows is not None:
            self._keep("rows", rows)
            self._keep("seen", like.new_zeros(len(rows), width))

    def allow(self, stages: int) -> None:
        """Make room for closed forms."""
        slots, width = self.bank.shape
        self.stages = stages
        self._keep("vectors", self.bank.new_zeros(slots, stages, VECTORS, width, dtype=torch.float32))
        self._keep("scalars", self.bank.new_zeros(slots, stages, SCALARS, dtype=torch.float32))

    def _keep(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def forward(self, output: Any) -> Any:
        """Branch-free, for compiled and captured networks."""
        hidden, residual = read_stream(output)
        tokens = hidden.shape[0]
        if self.stages:
            stream = (hidden if residual is None else hidden + residual).float()
            changed = stream
            at = self.stage_slot[:tokens]
            for k in range(self.stages):
                vectors, scalars = self.vectors[:, k].index_select(0, at), self.scalars[:, k].index_select(0, at)
                changed = closed_form(changed, vectors, scalars)
            moved = hidden + (changed - stream).to(hidden.dtype)
            hidden = torch.where((at != 0).unsqueeze(1), moved, hidden)
        hidden = hidden + self.bank.index_select(0, self.slot[:tokens])
        if self.reads:
            stream = hidden if residual is None else hidden + residual
            # Numbers of an earlier, longer pass may still stand here; nobody looks at what they read.
            self.seen.copy_(stream.index_select(0, self.rows.clamp_max(tokens - 1)))
        return _replaced(output, hidden)


class Host:
    """The host's copy of a buffer on the device. Two steps can be on their way, so that copies take turns."""

    def __init__(self, device: Tensor) -> None:
        self.device = device
        pinned = device.device.type == "cuda"
        self._turns = [torch.zeros(device.shape, dtype=device.dtype, device="cpu", pin_memory=pinned) for _ in range(4)]
        self._turn = 0

    def write(self, values: np.ndarray) -> None:
        """Put `values` into the first places."""
        self._turn = (self._turn + 1) % len(self._turns)
        stage = self._turns[self._turn][: len(values)]
        stage.numpy()[:] = values
        self.device[: len(values)].copy_(stage, non_blocking=True)


class Live:
    """What the next pass has to do, for networks that are neither compiled nor captured."""

    def __init__(self, depth: int) -> None:
        self.added = [False] * depth
        """Blocks whose bank has something for a token of this pass."""
        self.rows: dict[int, Tensor] = {}
        """What is added to the tokens of this pass `[T, D]`, by block, where it is kept for passes to come."""
        self.keeps = False
        self.staged = [0] * depth
        """Stages of each block that do something."""
        self.token: Tensor | None = None
        """Tokens `[R]` that have stages."""
        self.token_slot: Tensor | None = None
        """Their slots."""
        self.reading: Tensor | None = None
        """Tokens whose state is read."""
        self.reads: frozenset[int] = frozenset()
        self.seen: dict[int, Tensor] = {}
        self.taps: dict[int, list[Any]] = {}
        """What reads the rows of requests with readings, by block (see `reading`)."""
        self.measured: dict[int, list[Tensor]] | None = None
        """Where norms are being measured: norms of the tokens in `measuring`, by block."""
        self.measuring: Tensor | None = None


def eager_hook(layer: int, live: Live) -> Callable[[Any, Any, Any], Any]:
    """A forward hook that does only what `live` asks for."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        read = live.reading is not None and layer in live.reads
        taps = live.taps.get(layer)
        if not (live.added[layer] or live.staged[layer] or read or taps or live.measuring is not None):
            return None
        own: BlockSteering = module.steering
        hidden, residual = read_stream(output)
        if read:
            assert live.reading is not None
            live.seen[layer] = _rows_of(hidden, residual, live.reading)
        if live.measuring is not None and live.measured is not None:
            norms = _rows_of(hidden, residual, live.measuring).float().norm(dim=-1).cpu()
            live.measured.setdefault(layer, []).append(norms)
        if live.staged[layer] and live.token is not None and live.token_slot is not None:
            stream = _rows_of(hidden, residual, live.token).float()
            changed = stream
            for k in range(live.staged[layer]):
                changed = closed_form(changed, own.vectors[live.token_slot, k], own.scalars[live.token_slot, k])
            hidden = hidden.index_add(0, live.token, (changed - stream).to(hidden.dtype))
        if live.added[layer]:
            rows = live.rows.get(layer)
            if rows is None or len(rows) != len(hidden):  # a pass can be padded
                rows = own.bank.index_select(0, own.slot[: hidden.shape[0]])
                if live.keeps:
                    live.rows[layer] = rows
            hidden = hidden + rows
        for tap in taps or ():
            tap.take(layer, _rows_of(hidden, residual, tap.rows))
        return _replaced(output, hidden)

    return hook


def _rows_of(hidden: Tensor, residual: Tensor | None, index: Tensor) -> Tensor:
    taken = hidden.index_select(0, index)
    return taken if residual is None else taken + residual.index_select(0, index)


def graph_hook(module: Any, args: Any, output: Any) -> Any:
    """A forward hook of tensor operations only."""
    return module.steering(output)


def measuring_hook(layer: int, live: Live) -> Callable[[Any, Any, Any], None]:
    """A forward hook that only measures norms, while a compiled network runs uncompiled."""

    def hook(module: Any, args: Any, output: Any) -> None:
        if live.measuring is not None and live.measured is not None:
            norms = _rows_of(*read_stream(output), live.measuring).float().norm(dim=-1).cpu()
            live.measured.setdefault(layer, []).append(norms)

    return hook
