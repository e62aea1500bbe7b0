"""Rows of a process that puts whole rows through a network: what each carries, and how rows begin, copy and join."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from steer.core.edit import Prompt
from steer.core.errors import check, check_whole
from steer.core.samples import Cost, Samples


class _Tilted(Protocol):
    @property
    def base_log_prob(self) -> Tensor | None: ...

    @property
    def tilt(self) -> Tensor: ...


class Aimed:
    """Rows that keep `tilt` beside `base_log_prob`, which then has to be finite wherever the tilt is not 0."""

    @property
    def aim_log_prob(self: _Tilted) -> Tensor | None:
        """Log-probability under the law that weights aim at `[N]`."""
        return None if self.base_log_prob is None else self.base_log_prob + self.tilt


@dataclass(frozen=True, kw_only=True)
class Rows(Aimed):
    """Rows at one step. A class names its tensors that have one row for each row, by where they lie."""

    on_device: ClassVar[tuple[str, ...]]
    """Beside the network, what was generated so far first."""
    on_cpu: ClassVar[tuple[str, ...]]
    predicted: ClassVar[tuple[str, str]]
    """What the network says of the rows, beside it, and the same under the edits: one tensor where they change nothing.
    """
    packed: ClassVar[tuple[str, ...]]
    """What cannot be computed again."""

    group: Tensor
    step: int
    log_prob: Tensor
    base_log_prob: Tensor
    kl: Tensor
    cost: Cost
    prompts: list[Prompt] = field(repr=False)
    encoded: Any = field(repr=False)

    def __len__(self) -> int:
        return len(self.group)

    def taken(self, index: Tensor) -> Self:
        """Copies of the rows numbered in `index`."""
        there, here = index.to(getattr(self, self.on_device[0]).device), index.cpu()
        network, edited = self.predicted
        columns = {name: _taken(getattr(self, name), there) for name in (*self.on_device, network)}
        columns |= {name: _taken(getattr(self, name), here) for name in self.on_cpu}
        same = getattr(self, edited) is getattr(self, network)
        columns[edited] = columns[network] if same else _taken(getattr(self, edited), there)
        return replace(self, **columns)

    @classmethod
    def joined(cls, states: Sequence[Self]) -> Self:
        """All rows of several states, in order; what one of them lacks is dropped."""
        network, edited = cls.predicted
        columns = {name: _joined(states, name) for name in (*cls.on_device, network, *cls.on_cpu)}
        same = all(getattr(s, edited) is getattr(s, network) for s in states)
        columns[edited] = columns[network] if same else _joined(states, edited)
        return replace(states[0], cost=sum((s.cost for s in states), Cost()), **columns)

    def pack(self) -> dict[str, Tensor]:
        """Tensors on the CPU that `unpacked` makes the rows of again."""
        return {name: x.cpu() for name in self.packed if (x := getattr(self, name)) is not None}

    @classmethod
    def unpacked(
        cls, packed: dict[str, Tensor], device: torch.device, step: int, prompts: Sequence[Prompt], encoded: Any
    ) -> Self:
        """The rows at `step` that `pack` made tensors of, with their account at zero."""
        first = cls.on_device[0]
        columns: dict[str, Any] = {**packed, first: packed[first].to(device)}
        return cls(**columns, step=step, cost=Cost(), prompts=list(prompts), encoded=encoded)


def _taken(x: Any, index: Tensor) -> Any:
    return None if x is None else x[index]


def _joined(states: Sequence[Rows], name: str) -> Any:
    columns = [getattr(s, name) for s in states]
    return None if any(c is None for c in columns) else torch.cat(columns)


def beginning(prompts: Sequence[Prompt], n: int) -> dict[str, Any]:
    """What `n` rows for each of the prompts carry before the first step, without what the prompts are encoded to."""
    check_whole("n", n)
    check(len(prompts) >= 1, "prompts", prompts, "at least one")
    group = torch.arange(len(prompts)).repeat_interleave(n)
    zero = torch.zeros(len(group), dtype=torch.float64)
    none_yet = dict.fromkeys(("log_prob", "base_log_prob", "kl"), zero)
    return {"group": group, "step": 0, **none_yet, "cost": Cost(), "prompts": list(prompts)}


def check_step(states: Sequence[Rows]) -> None:
    """Raise unless all states are at the same step."""
    check(len({s.step for s in states}) == 1, "states", [s.step for s in states], "rows at one step")


def accounted(samples: Samples, state: Any) -> Samples:
    """Samples with the account of the rows that they show."""
    return replace(
        samples,
        log_prob=state.log_prob,
        base_log_prob=state.base_log_prob,
        tilt=state.tilt,
        kl_estimate=state.kl,
        cost=state.cost,
    )


def in_batches(predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, group: Tensor, most: int) -> Tensor:
    """`predict` of rows `x` for the prompts `group`, `most` at once; 0 is no limit."""
    if not most or len(x) <= most:
        return predict(x, group)
    parts = zip(x.split(most), group.split(most), strict=True)
    return torch.cat([predict(rows, prompts) for rows, prompts in parts])
