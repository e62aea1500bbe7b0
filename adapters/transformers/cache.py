"""The memory of rows in mid-text: how it grows, how rows are copied and joined, and of which a branch can be kept.

Keys and values, convolution and recurrent states, caches of a model's own: whatever it is made of, a row is one index
of each tensor's first dimension. Letters: `N` rows, `T` positions.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from steer.core import UnsupportedError


class GrowingLayer(DynamicLayer):
    """A full-attention cache layer with spare room.

    The library's own layer concatenates, so every step copies every key and value: O(T^2) over a text. This one writes
    into a buffer that grows by halves; `keys` and `values` are views `[N, heads, T, head_dim]` of what is filled.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if old == 0:
            # The prompt's own tensors serve until there is something to append.
            self.keys, self.values = key_states, value_states
            self._room: list[Tensor] | None = None
            return self.keys, self.values
        if self._room is None or self._room[0].shape[-2] < new:
            self._grow(new)
        assert self._room is not None
        self._room[0][..., old:new, :] = key_states
        self._room[1][..., old:new, :] = value_states
        self.keys, self.values = (room[..., :new, :] for room in self._room)
        return self.keys, self.values

    def _grow(self, needed: int) -> None:
        shape = list(self.keys.shape)
        shape[-2] = max(needed + 32, needed + needed // 2)
        room = [self.keys.new_empty(shape), self.values.new_empty([*shape[:-1], self.values.shape[-1]])]
        for buffer, filled in zip(room, (self.keys, self.values), strict=True):
            buffer[..., : filled.shape[-2], :] = filled
        self._room = room

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._room = None

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._room = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._room = None

    def keep_branch(self, width: int, choice: Tensor) -> None:
        """Of the last `width` positions keep only the one numbered `choice` `[N]` of each row."""
        old = self.get_seq_length() - width
        rows = torch.arange(len(choice), device=self.keys.device)
        chosen = [x[rows, :, old + choice.to(x.device)].unsqueeze(-2) for x in (self.keys, self.values)]
        self.keys, self.values = self.keys[..., :old, :], self.values[..., :old, :]
        self.update(*chosen)


def cache_argument(takes: frozenset[str], module: Any) -> str:
    """The name under which a module's `forward` takes its cache. Raises `UnsupportedError` where it has none: the
    library's modules swallow what they do not know, and would read every token as if the text began there.
    """
    for name in ("cache", "past_key_values", "cache_params"):
        if name in takes:
            return name
    raise UnsupportedError(
        f"{type(module).__name__}: its forward takes no cache that steer knows (cache, past_key_values, cache_params), "
        "so that it could not go on with a text"
    )


def new_cache(network: Any, config: Any) -> Cache:
    """An empty cache for a network: growing layers where it attends to everything, the library's own elsewhere, or a
    class of the network's own where the library says that it needs one.
    """
    if not getattr(network, "_supports_default_dynamic_cache", lambda: True)():
        return _own_cache(network)
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    return cache


def _own_cache(network: Any) -> Cache:
    home = type(network).__module__
    for kind in vars(sys.modules[home]).values():
        if isinstance(kind, type) and issubclass(kind, Cache) and kind.__module__ == home:
            return kind()
    raise UnsupportedError(f"{type(network).__name__}: keeps a memory of a kind of its own, which steer cannot copy")


def held_states(network: Any) -> list[tuple[nn.Module, str]]:
    """Where a network keeps states of the text in its own modules, as the library marks it: such a network is
    `_is_stateful`, and an attribute of one of its own modules is called a state.
    """
    if not getattr(network, "_is_stateful", False):
        return []
    own = [m for m in network.modules() if type(m).__module__ == type(network).__module__]
    return [
        (module, name)
        for module in own
        for name, value in vars(module).items()
        if "state" in name and (value is None or isinstance(value, Tensor))
    ]


def full_attention(cache: Cache) -> bool:
    """Whether every layer holds every position, so that positions can be cropped and branches kept."""
    return bool(cache.layers) and all(type(layer) is GrowingLayer for layer in cache.layers)


def crop_last(cache: Cache, count: int) -> None:
    """Forget the last `count` positions."""
    for layer in cache.layers:
        layer.crop(-count)


def copy_rows(cache: Cache, index: Tensor) -> Cache:
    """A new cache whose row i is row `index[i]`; the old one is left as it was."""
    if full_attention(cache):
        other = copy.copy(cache)
        other.layers = [GrowingLayer() for _ in cache.layers]
        for source, target in zip(cache.layers, other.layers, strict=True):
            at = index.to(source.keys.device)
            target.update(source.keys.index_select(0, at), source.values.index_select(0, at))
        return other
    return _mapped([cache], lambda parts, dim: parts[0].index_select(dim, index.to(parts[0].device)))


def join_rows(caches: Sequence[Cache]) -> Cache:
    """The rows of several caches of one network, each after as many positions as the others, as one."""
    return _mapped(caches, torch.cat)


def nbytes(cache: Cache) -> int:
    """Memory of a cache."""
    found = {id(x): x.numel() * x.element_size() for x in _tensors(cache)}
    return sum(found.values())


_SECOND = "indexer_position_ids"
"""What the library keeps with rows second: `[position dimensions, N, T]`."""


def _inside(value: Any) -> dict[str, Any] | None:
    """The named parts of a piece of a cache; None of what has none."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple):
        return {str(i): x for i, x in enumerate(value)}
    holds = isinstance(value, Cache) or (hasattr(value, "reorder_cache") and not isinstance(value, type))
    return vars(value) if holds else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for name, part in (_inside(value) or {}).items():
        if name != "_room":
            yield from _tensors(part)


def _mapped(values: Sequence[Any], change: Callable[[list[Tensor], int], Tensor], name: str = "") -> Any:
    """A copy of the first of several pieces of one structure, with `change(tensors, dimension of the rows)` in place of
    each tensor.
    """
    first = values[0]
    if isinstance(first, Tensor):
        return change(list(values), 1 if name == _SECOND else 0) if first.numel() and first.dim() else first
    inside = [_inside(value) for value in values]
    if inside[0] is None:
        return first
    made = {
        key: None if key == "_room" else _mapped([part[key] for part in inside if part is not None], change, str(key))
        for key in inside[0]
    }
    if isinstance(first, dict):
        return made
    if isinstance(first, list | tuple):
        return type(first)(made.values())
    other = copy.copy(first)
    other.__dict__.update(made)
    return other
