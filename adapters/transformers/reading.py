"""Hidden states of texts, read in batches of one length."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from steer.adapters.transformers.body import Body
from steer.adapters.transformers.cache import full_attention
from steer.adapters.transformers.reader import Reader
from steer.core import InputError


class Opening:
    """Tokens that all rows share, read once: `length` of them, 0 where sharing does not pay or cannot be done."""

    def __init__(self, body: Body, ids: Sequence[Sequence[int]], layers: Sequence[int]) -> None:
        self.body, self.layers, self.length = body, layers, 0
        common = 0
        if len(ids) > 1:
            columns = zip(*(row[:-1] for row in ids), strict=False)
            common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        self.cache = body.new_cache()
        if common >= 8 and full_attention(self.cache) and body.allows("chunks"):
            self.states = self._run([ids[0][:common]], self.cache)
            self.length = common

    def read(self, ids: Sequence[Sequence[int]], whole: bool) -> dict[int, Tensor]:
        """States `{layer: [N, T, D]}` of rows of one length, those of the shared tokens only where `whole`."""
        if not self.length:
            return self._run(ids, None)
        cache = self.body.new_cache()
        for source, target in zip(self.cache.layers, cache.layers, strict=True):
            if source.is_initialized:
                target.update(*(x.expand(len(ids), -1, -1, -1) for x in (source.keys, source.values)))
        seen = self._run([row[self.length :] for row in ids], cache)
        if not whole:
            return seen
        return {layer: torch.cat([self.states[layer].expand(len(ids), -1, -1), x], 1) for layer, x in seen.items()}

    def _run(self, ids: Sequence[Sequence[int]], cache: Cache | None) -> dict[int, Tensor]:
        tokens = torch.tensor([list(row) for row in ids], device=self.body.device)
        top = max(self.layers, default=0)
        with self.body.recording(self.layers) as seen:
            handle = self.body.blocks[top].register_forward_hook(_stop)
            try:
                self.body.read(tokens, cache)
            except _Enough:
                pass
            finally:
                handle.remove()
        return seen


class _Enough(Exception):
    """Raised to end a pass once it has given what was wanted."""


def _stop(module: Any, args: Any, output: Any) -> None:
    raise _Enough


def means_of(x: Tensor, first: Sequence[int]) -> Tensor:
    """Mean `[N, D]` in float32 of each row of `x` `[N, T, D]` from position `first` on."""
    if len(set(first)) == 1:
        return x[:, first[0] :].float().mean(1)
    position = torch.arange(x.shape[1], device=x.device)
    weight = (position >= torch.tensor(first, device=x.device).unsqueeze(1)).float()
    return torch.bmm((weight / weight.sum(1, keepdim=True)).unsqueeze(1), x.float()).squeeze(1)


def same_lengths(ids: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(ids):
        groups.setdefault(len(row), []).append(i)
    batches = []
    for length, rows in sorted(groups.items()):
        if length == 0:
            raise InputError("ids", "an empty row", "at least one token")
        step = max(1, max_tokens // length)
        batches += [rows[i : i + step] for i in range(0, len(rows), step)]
    return batches


@torch.inference_mode()
def token_readings(body: Body, ids: Sequence[int], first: int, reader: Reader) -> Tensor:
    """The reader's first reading `[T]` at each token from position `first` on."""
    tokens, reading = torch.tensor([list(ids)], device=body.device), reader.begin(len(ids) - first)
    with body.hooks.running({}, reading.taps):
        body.read(tokens)
    return reading.found[0, :, 0].cpu()
