"""A population whose rows lie in several processes, the ranks of a job, each of which runs the network on its own rows.

What is decided about the population (weights, who is copied) every rank decides alike, from figures that are gathered
and from one generator; a row's noise does not hang on where it lies. So the population is that of one process, whatever
the number of ranks.

Letters: `N` rows in all, `M` of them here.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from steer.core import Cost, Process, Samples
from steer.diffusion.schedule import SharedNoise
from steer.ranks import ranks
from steer.seeds import mixed

__all__ = ["Spread"]


class Spread:
    """Who holds which of `rows` rows, and the generators of a run: `noise` for what is drawn for each row, `common` for
    what is decided about all of them, `own` for what this rank draws by itself.
    """

    def __init__(self, rows: int, generator: torch.Generator) -> None:
        self._ranks = ranks()
        count = self._ranks.count
        self._ends = [rows * (i + 1) // count for i in range(count)]
        first = rows * self._ranks.index // count
        self.held = torch.arange(first, self._ends[self._ranks.index])
        # Ranks that were given no seed have drawn different ones: the first one's counts.
        seed = int(self._ranks.told(str(int(torch.randint(2**62, (), generator=generator)))))
        self.noise = SharedNoise.of(seed, self.held, rows)
        self.common = torch.Generator().manual_seed(mixed(seed, "common"))
        self.own = torch.Generator().manual_seed(mixed(seed, "rank", self._ranks.index))

    def all(self, *mine: Tensor) -> list[Tensor]:
        """Figures of all rows, each `[N, ...]`, by one message."""
        parts = self._ranks.gather({str(i): x for i, x in enumerate(mine)})
        return [torch.cat([part[str(i)].to(x.device) for part in parts]) for i, x in enumerate(mine)]

    def gather(self, process: Process, state: Any, ancestors: Tensor) -> Any:
        """The rows of this rank once every row is a copy of the one that `ancestors` `[N]` names."""
        wanted = ancestors[self.held]
        home = torch.bucketize(ancestors, torch.tensor(self._ends), right=True)
        if bool((home == torch.bucketize(torch.arange(len(ancestors)), torch.tensor(self._ends), right=True)).all()):
            return process.gather(state, wanted - int(self.held[0]) if len(self.held) else wanted)
        columns = {name: x for name in state.columns() if (x := getattr(state, name)) is not None}
        once = {id(x): x for x in columns.values()}  # fields that are one tensor stay one
        moved = dict(zip(once, self.all(*once.values()), strict=True))
        taken = {key: x[wanted.to(x.device)] for key, x in moved.items()}
        return replace(state, **{name: taken[id(x)] for name, x in columns.items()})

    def join(self, samples: Samples) -> Samples:
        """All rows of what each rank has finished, with what they cost together."""
        mine = {
            f.name: x
            for f in fields(samples)
            if isinstance(x := getattr(samples, f.name), Tensor) and x.dim() and len(x) == len(self.held)
        }
        whole = dict(zip(mine, self.all(*mine.values()), strict=True))
        names = [f.name for f in fields(Cost) if f.name != "seconds"]
        total = self._ranks.total(*(getattr(samples.cost, name) for name in names))
        cost = replace(samples.cost, **{name: int(x) for name, x in zip(names, total, strict=True)})
        named: dict[str, Any] = {**whole, "cost": cost}
        return replace(samples, **named)
