"""Transition edits on rows: which rows each was mounted for, and what those find that look for more than a law."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from steer.core.errors import UnsupportedError
from steer.core.process import Context, Mounted, TransitionEdit
from steer.core.samples import Samples


class Opaque:
    """A context that shows rows and the law of their next step, and nothing inside a network."""

    no_hidden: ClassVar[str]
    no_lookahead: ClassVar[str]

    @property
    def hidden(self) -> Tensor:
        raise UnsupportedError(self.no_hidden)

    def lookahead(self, candidates: Tensor) -> Tensor:
        raise UnsupportedError(self.no_lookahead)

    def guidance(self, score: Callable[[Samples], Tensor]) -> Tensor:
        raise UnsupportedError("tokens have no gradient")


def shifted(edits: Mounted, context: Context, group: Tensor | None) -> Tensor:
    """`context.base` after every edit, each applied to the rows whose prompt, in `group` `[N]`, asked for it; all
    edits to all rows where that is None.
    """
    x = context.base
    for edit, wanted in edits:
        assert isinstance(edit, TransitionEdit)
        changed = edit.shift(x, context)
        if wanted is not None and group is not None:
            mine = among(group, wanted).to(x.device)
            changed = torch.where(mine.reshape(-1, *[1] * (x.dim() - 1)), changed, x)
        x = changed
    return x


def touched(edits: Mounted, group: Tensor) -> Tensor:
    """Rows `[N]` whose prompt asked for any of the edits."""
    if any(wanted is None for _, wanted in edits):
        return torch.ones(len(group), dtype=torch.bool)
    return among(group, frozenset().union(*(wanted for _, wanted in edits if wanted is not None)))


def among(group: Tensor, wanted: frozenset[int]) -> Tensor:
    """Rows `[N]` whose prompt is one of those that are `wanted`."""
    return torch.tensor([g in wanted for g in group.tolist()], dtype=torch.bool)
