"""Ranks of a job: the processes that torchrun, accelerate or a scheduler started for it, and what they share.

Each rank runs the same program. What is costly is shared out by rows, and what was found is gathered in the order of
the rows, so that every rank goes on with the whole of it. Tensors travel as safetensors, never as pickles. Without
such a start there is one rank, and nothing is imported or sent.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor

from steer.core.errors import check

__all__ = ["ALONE", "Ranks", "ranks"]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many."""

    index: int = 0
    count: int = 1
    device: str = "cpu"
    """Where tensors lie that are sent."""

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.index == 0

    def mine(self, rows: Sequence[T]) -> list[T]:
        """Every `count`-th of the rows, from `index` on."""
        return list(rows[self.index :: self.count])

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.count > 1:
            torch.distributed.barrier()

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, in one message for each type."""
        if self.count == 1:
            return
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for x in tensors:
            kinds.setdefault(x.dtype, []).append(x)
        for held in kinds.values():
            flat = torch.cat([x.detach().flatten().to(self.device) for x in held])
            torch.distributed.all_reduce(flat)
            for x, total in zip(held, flat.split([x.numel() for x in held]), strict=True):
                x.detach().copy_(total.view_as(x))

    def total(self, *figures: float) -> list[float]:
        """Sums of figures over the ranks."""
        found = torch.tensor(figures, dtype=torch.float64, device=self.device)
        self.add([found])
        return [float(x) for x in found]

    def gather(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The tensors of every rank, by rank; names and shapes may differ."""
        if self.count == 1:
            return [dict(tensors)]
        plain = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        sent = torch.frombuffer(bytearray(save(plain)), dtype=torch.uint8)
        lengths = torch.zeros(self.count, dtype=torch.long, device=self.device)
        lengths[self.index] = len(sent)
        self.add([lengths])
        padded = torch.zeros(int(lengths.max()), dtype=torch.uint8, device=self.device)
        padded[: len(sent)] = sent.to(self.device)
        found = [torch.empty_like(padded) for _ in range(self.count)]
        torch.distributed.all_gather(found, padded)
        return [load(x[:n].cpu().numpy().tobytes()) for x, n in zip(found, lengths.tolist(), strict=True)]

    def join(self, mine: Tensor, rows: int) -> Tensor:
        """All `rows` of a tensor `[rows, ...]` in their order, where each rank holds those that `mine` gave it."""
        if self.count == 1:
            return mine
        parts = [part["rows"] for part in self.gather({"rows": mine})]
        like = next(part for part in parts if len(part))
        whole = like.new_empty(rows, *like.shape[1:])
        for index, part in enumerate(parts):
            if len(part):
                whole[index :: self.count] = part
        return whole.to(mine.device)

    def told(self, text: str) -> str:
        """What the first rank says."""
        sent = torch.tensor(list(text.encode()), dtype=torch.uint8)
        return bytes(self.gather({"text": sent})[0]["text"].tolist()).decode()

    def check_same(self, field: str, figure: int, allowed: str) -> None:
        """Raise `InputError` on every rank where the ranks do not have the same figure."""
        if self.count > 1:
            found = torch.zeros(self.count, dtype=torch.long, device=self.device)
            found[self.index] = figure
            self.add([found])
            check(len(set(found.tolist())) == 1, field, f"{found.tolist()} on the ranks", allowed)

    def whole(self, settings: T, name: str = "batch_size") -> T:
        """Settings of all ranks together: `name` counts the rows of one rank, and of the result those of all."""
        if self.count == 1:
            return settings
        made: Any = object.__new__(type(settings))
        made.__dict__.update(vars(settings), **{name: getattr(settings, name) * self.count})
        return made


ALONE = Ranks()


def ranks() -> Ranks:
    """The ranks of this job. The first call sets up what they talk through, and takes the accelerator of this one."""
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 or (torch.distributed.is_available() and _running())
    return _started() if started else ALONE


def _running() -> bool:
    return bool(torch.distributed.is_initialized()) and torch.distributed.get_world_size() > 1


@cache
def _started() -> Ranks:
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Without being told, accelerate takes processes that have no accelerator for one process each.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu)
    world = int(os.environ.get("WORLD_SIZE", state.num_processes))
    check(state.num_processes == world, "WORLD_SIZE", world, f"{state.num_processes}, which is what accelerate sees")
    return Ranks(state.process_index, state.num_processes, str(state.device))
