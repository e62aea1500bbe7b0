"""Seeds and batches that depend on the run's seed and the number of the update alone."""

from __future__ import annotations

import hashlib

import torch


def mixed(*parts: object) -> int:
    """A seed that is as good as unrelated for every different list of parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def whole_batch(seed: int, number: int, rows: int, size: int) -> list[int]:
    """Rows of batch `number`: whole batches of a permutation of all `rows` that is new in every pass over them."""
    size = min(size, rows)
    passes, at = divmod(number, rows // size)
    drawn = torch.Generator().manual_seed(mixed(seed, "pass", passes))
    return torch.randperm(rows, generator=drawn)[at * size : (at + 1) * size].tolist()
