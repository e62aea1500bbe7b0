"""Key-value caches that grow without copying what they hold, and of which a branch can be kept."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


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


def new_cache(config: Any) -> Cache:
    """An empty cache for a model: growing layers where it attends to everything, the library's own elsewhere."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    return cache


def full_attention(cache: Cache) -> bool:
    """Whether every layer holds every position, so that positions can be cropped and branches kept."""
    return bool(cache.layers) and all(type(layer) is GrowingLayer for layer in cache.layers)


def crop_last(cache: Cache, count: int) -> None:
    """Forget the last `count` positions."""
    for layer in cache.layers:
        layer.crop(-count)


def copy_rows(cache: Cache, index: Tensor, config: Any) -> Cache:
    """A new cache whose row i is row `index[i]`; the old one is left as it was."""
    other = new_cache(config)
    if full_attention(cache):
        for source, target in zip(cache.layers, other.layers, strict=True):
            at = index.to(source.keys.device)
            target.update(source.keys.index_select(0, at), source.values.index_select(0, at))
        return other
    other = copy.deepcopy(cache)
    other.batch_select_indices(index)
    return other
