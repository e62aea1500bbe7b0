"""Hidden states of many texts, which the ranks of a job read by turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steer.ranks import ranks

__all__ = ["hidden_states"]


def hidden_states(
    model: Any,
    ids: Sequence[Sequence[int]],
    layers: Sequence[int] | None = None,
    *,
    pool: str = "last",
    since: Sequence[int] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> dict[int, Tensor]:
    """`model.hidden_states`, `{layer: [N, D]}`, on every rank, of which each has read a share of the texts."""
    shared = ranks()
    if shared.count == 1:
        return model.hidden_states(ids, layers, pool=pool, since=since, on_batch=on_batch)
    wanted = list(range(model.info.num_layers)) if layers is None else list(layers)
    mine, starts = shared.mine(ids), None if since is None else shared.mine(since)
    seen = {layer: torch.empty(0, model.info.width) for layer in wanted}
    if mine:
        seen = model.hidden_states(
            mine,
            wanted,
            pool=pool,
            since=starts,
            on_batch=None if on_batch is None else lambda count: on_batch(count * shared.count),
        )
    return {layer: shared.join(x, len(ids)) for layer, x in seen.items()}
