"""Rows of a process in mid-generation: what each carries, and how rows begin, copy, join, add up and are packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from steer.core.edit import Prompt
from steer.core.errors import check, check_whole
from steer.core.samples import Cost, Samples

SUMS = ("log_prob", "base_log_prob", "aim_log_prob", "kl")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows at one step. A class names its own fields that have one entry for each row."""

    each: ClassVar[tuple[str, ...]] = ()
    """Tensors, lists or tuples with one entry for each row; None where there are none yet."""
    packed: ClassVar[tuple[str, ...]] = ()
    """Tensors among them that cannot be computed again."""

    group: Tensor
    """Prompt of every row `[N]`, on the CPU."""
    step: int
    log_prob: Tensor
    """Under the law that was drawn from `[N]`."""
    base_log_prob: Tensor | None
    """Under the base law `[N]`; None where only a second pass can tell, as for the next two."""
    aim_log_prob: Tensor | None
    """Under the law that weights aim at `[N]`, which is the base unless an edit has a `power`."""
    kl: Tensor | None
    """Sum over steps of the exact divergence of the step's law from the base law `[N]`."""
    cost: Cost
    prompts: list[Prompt] = field(repr=False)

    def __len__(self) -> int:
        return len(self.group)

    @property
    def tilt(self) -> Tensor:
        """Log of the law that weights aim at over the base law `[N]`; infinite where the base alone excludes a row."""
        base, aim = self.base_log_prob, self.aim_log_prob
        if base is None or aim is None or aim is base:
            return torch.zeros_like(self.log_prob)
        return torch.where(aim == base, 0.0, aim - base)

    def add(
        self, log_prob: Tensor, base: Tensor | None = None, aim: Tensor | None = None, kl: Tensor | None = None
    ) -> Self:
        """The rows with what a step adds to their sums `[N]`. Without `base` the step's law was the base law, without
        `aim` it is what weights aim at; what is not known stays so.
        """
        base = log_prob if base is None else base
        sums: dict[str, Any] = {"log_prob": self.log_prob + log_prob}
        if self.base_log_prob is not None and self.aim_log_prob is not None:
            sums["base_log_prob"] = sums["aim_log_prob"] = self.base_log_prob + base
            if aim is not None or self.aim_log_prob is not self.base_log_prob:
                sums["aim_log_prob"] = self.aim_log_prob + (base if aim is None else aim)
        if self.kl is not None and kl is not None:
            sums["kl"] = self.kl + kl
        return replace(self, **sums)

    def take(self, index: Tensor) -> Self:
        """Copies of the rows numbered in `index` `[M]`. Fields that were one object stay one."""
        at = {index.device: index}
        done: dict[int, Any] = {}

        def taken(x: Any) -> Any:
            if isinstance(x, Tensor):
                if x.device not in at:
                    at[x.device] = index.to(x.device)
                return x[at[x.device]]
            return None if x is None else type(x)(x[i] for i in index.tolist())

        for x in self._columns():
            if id(x) not in done:
                done[id(x)] = taken(x)
        return replace(self, **{name: done[id(getattr(self, name))] for name in self.columns()})

    @classmethod
    def join(cls, states: Sequence[Self]) -> Self:
        """All rows of several states at one step, in order; what one of them lacks is dropped."""
        check(len({s.step for s in states}) == 1, "states", [s.step for s in states], "rows at one step")
        done: dict[tuple[int, ...], Any] = {}
        for parts in zip(*(s._columns() for s in states), strict=True):
            key = tuple(map(id, parts))
            if key not in done:
                done[key] = _joined(parts)
        joined = {name: done[tuple(id(getattr(s, name)) for s in states)] for name in cls.columns()}
        return replace(states[0], cost=sum((s.cost for s in states), Cost()), **joined)

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        """Names of the fields with one entry for each row."""
        return ("group", *SUMS, *cls.each)

    def _columns(self) -> list[Any]:
        return [getattr(self, name) for name in self.columns()]

    def pack(self) -> dict[str, Tensor]:
        """Tensors on the CPU that the rows can be made of again."""
        names = ("group", *SUMS, *self.packed)
        return {name: x.cpu() for name in names if (x := getattr(self, name)) is not None}

    @classmethod
    def unpacked(cls, packed: dict[str, Tensor], device: torch.device | None = None) -> dict[str, Any]:
        """The fields that `pack` made tensors of, those but `group` on the device."""
        fields = {name: packed.get(name) for name in (*SUMS, *cls.packed)}
        if fields["aim_log_prob"] is None:
            fields["aim_log_prob"] = fields["base_log_prob"]
        moved = {name: None if x is None else x.to(device or x.device) for name, x in fields.items()}
        return {**moved, "group": packed["group"]}

    @classmethod
    def unpack(cls, packed: dict[str, Tensor], step: int, prompts: Sequence[Prompt], **fields: Any) -> Self:
        """The rows at `step` that `pack` made tensors of, with their account at zero; `fields` are the others, and
        those that are elsewhere than on the CPU.
        """
        return cls(**{**cls.unpacked(packed), "step": step, "cost": Cost(), "prompts": list(prompts), **fields})


def _joined(parts: Sequence[Any]) -> Any:
    if any(x is None for x in parts):
        return None
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    return type(parts[0])(entry for part in parts for entry in part)


def beginning(
    prompts: Sequence[Prompt], n: int, *, exact: bool = True, device: torch.device | None = None
) -> dict[str, Any]:
    """What `n` rows for each of the prompts carry before the first step: the fields of `Rows`, with sums on `device`.
    `exact` says that the law of the base is known on the way.
    """
    check_whole("n", n)
    check(len(prompts) >= 1, "prompts", prompts, "at least one")
    group = torch.arange(len(prompts)).repeat_interleave(n)
    kind = torch.float32 if device is not None and device.type == "mps" else torch.float64
    zero = torch.zeros(len(group), dtype=kind, device=device)
    known = dict.fromkeys(SUMS[1:], zero if exact else None)
    return {"group": group, "step": 0, "log_prob": zero, **known, "cost": Cost(), "prompts": list(prompts)}


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
