"""Masked diffusion language models as a `Process`: text that starts as masks and is revealed in any order.

A chain of `T` steps starts from `L` masked positions. With `k` steps left each position that is still masked is
revealed with probability `1 / k`, which is the exact posterior of the linear masking schedule (MDLM, Sahoo et al.
2024), and a revealed token is drawn from the network's marginal for its position and stays. Tokens that are revealed
in one step are drawn independently of each other, so the law of this *chain* approaches the model's own only as `T`
grows: with two positions and an exact denoiser it is `(1 - 1/T) joint + 1/T product of marginals`. The chain's law is
what is sampled and what is steered.

The quantity at the TRANSITION site is the log-marginals `[N, L, V]`, after temperature and before truncation. They are
points at positions that were revealed, where edits change nothing.

Which positions are revealed never depends on edits. Its probability is therefore the same under the edited and the
base law, and is left out of both: `log_prob` and `base_log_prob` are of the tokens, given where they were revealed.

Letters: `N` rows, `L` positions, `V` vocabulary, `T` steps, `m` draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer.core import Cost, Process, Reward, UnsupportedError, check, check_whole
from steer.masked.process import MaskedProcess
from steer.sampling.lookahead import Lookahead
from steer.sampling.weights import log_mean_exp

__all__ = ["MarginalDraws"]


@dataclass(frozen=True)
class MarginalDraws(Lookahead):
    """The reward of `m` completions of every row from the network's marginals, at no further pass of the network.

    Tokens of a completion are independent of each other given the row, so this is the soft value only of rows that
    would be revealed in one step; FK steering stays right with it, as with any value.

    Attributes:
        m: completions of an unfinished row; finished ones are scored once.
        combine: "soft", `beta log mean exp(r / beta)`; "mean"; or "released", `log mean exp(r)` without beta, as the
            code of the FK paper (Singhal et al. 2025) has it, whose rewards are log-probabilities.
    """

    m: int = 4
    combine: str = "soft"

    def __post_init__(self) -> None:
        check_whole("m", self.m)
        allowed = ("soft", "mean", "released")
        check(self.combine in allowed, "combine", self.combine, ", ".join(allowed))

    def check(self, process: Process) -> None:
        if not isinstance(process, MaskedProcess):
            raise UnsupportedError(
                f"draws from marginals need a masked diffusion process; {type(process).__name__} has none: "
                "use Preview() or Rollouts(m)"
            )

    def __call__(
        self, process: Process, state: Any, reward: Reward, beta: float, generator: torch.Generator
    ) -> tuple[Tensor, Cost]:
        self.check(process)
        assert isinstance(process, MaskedProcess)
        drawn = process.completions(state, self.m, generator)
        count = torch.where(process.finished(state).cpu(), 1, self.m)
        row = torch.arange(len(state)).repeat_interleave(count)
        first = count.cumsum(0) - count
        which = torch.arange(len(row)) - first[row]
        shown = process.samples(drawn[row.to(drawn.device), which.to(drawn.device)], state.group[row], state.prompts)
        scores = reward(shown)
        # A finished row's one score stands for all of its completions.
        table = scores[first.unsqueeze(1) + torch.arange(self.m) % count.unsqueeze(1)]
        return self._combined(table, beta), Cost(reward_calls=len(row))

    def _combined(self, table: Tensor, beta: float) -> Tensor:
        if self.combine == "mean":
            return table.mean(1)
        scale = beta if self.combine == "soft" else 1.0
        return scale * log_mean_exp(table / scale)
