"""Rows of different lengths as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["pack_texts", "pack_tokens", "unpack_texts", "unpack_tokens"]


def pack_tokens(rows: Sequence[Sequence[int]], dtype: torch.dtype = torch.long) -> tuple[Tensor, Tensor]:
    """Rows of whole numbers as `[N, longest]`, padded with 0, and their lengths `[N]`."""
    width = max(map(len, rows), default=0)
    padded = [[*row, *[0] * (width - len(row))] for row in rows]
    length = torch.tensor([len(row) for row in rows], dtype=torch.long)
    return torch.tensor(padded, dtype=dtype).reshape(len(rows), width), length


def unpack_tokens(rows: Tensor, length: Tensor) -> list[list[int]]:
    """What `pack_tokens` was given."""
    return [row[:count] for row, count in zip(rows.tolist(), length.tolist(), strict=True)]


def pack_texts(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Texts as UTF-8: `[N, bytes]` uint8, and their lengths `[N]`."""
    return pack_tokens([list(text.encode()) for text in texts], torch.uint8)


def unpack_texts(rows: Tensor, length: Tensor) -> list[str]:
    """What `pack_texts` was given."""
    return [bytes(row).decode() for row in unpack_tokens(rows, length)]
