"""Hooks on the blocks of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from steer.adapters.language.blocks import residual_stream
from steer.adapters.transformers.hidden import RowEdit
from steer.adapters.transformers.reader import Tap

# ------------------------------------------------------------------------------------------------------------ hooks


NO_TAPS: Mapping[int, Tap] = {}


class Hooks:
    """Changes what the blocks of one model return, only inside `installed`.

    Between passes `running` says what each layer does; a layer without an entry is left as it is. A block's output is
    replaced, never written into. The hook stands around the block's own `forward` on that one object, as device
    placement does it: a registered forward hook would send every call through the slow path of `Module.__call__`,
    which costs about as much as the addition itself. Weights, names in the state dict and hooks of other libraries
    are untouched.
    """

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.blocks = blocks
        self._slots: list[RowEdit | None] = [None] * len(blocks)
        self._taps = NO_TAPS
        self._before: dict[int, Any] = {}

    @contextmanager
    def installed(self, layers: Iterable[int]) -> Iterator[None]:
        """Keep hooks on `layers`; calls nest, the outermost removes them."""
        mine = {layer for layer in layers if layer not in self._before}
        for layer in mine:
            block = self.blocks[layer]
            self._before[layer] = block.__dict__.get("forward")
            block.forward = self._hooked(layer, block.forward)
        try:
            yield
        finally:
            for layer in mine:
                before = self._before.pop(layer)
                if before is None:
                    del self.blocks[layer].forward
                else:
                    self.blocks[layer].forward = before

    @contextmanager
    def running(self, program: Mapping[int, RowEdit], taps: Mapping[int, Tap] = NO_TAPS) -> Iterator[None]:
        """Do exactly this during the passes inside, and show `taps` what comes of it; what ran outside comes back
        after.
        """
        with self.installed((*program, *taps)):
            before = self._slots, self._taps
            self._slots, self._taps = [program.get(layer) for layer in range(len(before[0]))], taps
            try:
                yield
            finally:
                self._slots, self._taps = before

    def _hooked(self, layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def hooked(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            step, taps = self._slots[layer], self._taps
            if step is not None:
                hidden = output[0] if output.__class__ is tuple else output
                # Several residual streams are [S, N, T, D].
                changed = step(hidden) if hidden.dim() == 3 else torch.stack([step(stream) for stream in hidden])
                output = changed if hidden is output else (changed, *output[1:])
            if taps and layer in taps:
                taps[layer](output)
            return output

        return hooked


@contextmanager
def recording(blocks: nn.ModuleList, layers: Sequence[int], stream: int | None = None) -> Iterator[dict[int, Tensor]]:
    """Fills a dictionary with the residual stream `[N, T, D]` after each of `layers`, as edited, in our own hooks:
    the library's `output_hidden_states` does not see what a hook changed. `stream` is which is read of several.
    """
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen[layer] = residual_stream(output, stream)

        return hook

    handles = [blocks[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
