"""Transition edits applied to rows, each to those that asked for it, and a context that shows a law and no network."""

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

    @property
    def left(self) -> Tensor:
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
    """Rows `[N]` whose prompt, in `group` `[N]`, is one of those that are `wanted`."""
    return torch.tensor([g in wanted for g in group.tolist()], dtype=torch.bool)


def aimed(edits: Mounted, context: Context, group: Tensor, token: Tensor) -> Tensor | None:
    """Log-probability `[N]` of tokens `[N, 1]` under the law that weights aim at, not normalised: `context.base`, and
    where an edit has a `power`, for the rows that asked for it, `p^(1 - w) p_companion^w`. None where none has.
    """
    wide = torch.float32 if token.device.type == "mps" else torch.float64

    def taken(law: Tensor) -> Tensor:
        return law.gather(1, token).to(wide)

    base = taken(context.base)
    aim: Tensor | None = None
    for edit, wanted in edits:
        if not isinstance(edit, TransitionEdit) or edit.power is None:
            continue
        process, w = edit.power
        other = (taken(context.companion(process).base.to(base.device)), w)
        mixed = product((base, 1 - w), other) if aim is None else product((aim, 1.0), (base, -w), other)
        mine = None if wanted is None else among(group, wanted).to(base.device).unsqueeze(1)
        aim = mixed if mine is None else torch.where(mine, mixed, base if aim is None else aim)
    return None if aim is None else aim.squeeze(1)


def product(*powers: tuple[Tensor, float]) -> Tensor:
    """Log of a product of laws to powers, from `(log_law, power)`: `0^0` is 1, and what a law with another power
    excludes stays excluded.
    """
    logs = [(law, power) for law, power in powers if power != 0]
    total = sum((power * law for law, power in logs), torch.zeros_like(powers[0][0]))
    for law, _ in logs:
        total = total.masked_fill(law.isneginf(), -torch.inf)
    return total
