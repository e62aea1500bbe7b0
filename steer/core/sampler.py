"""The sampler: the loop that draws from a process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from steer.core.edit import Prompt
from steer.core.process import Process
from steer.core.samples import Reward, Samples


class Sampler(ABC):
    """Hyper-parameters of one way to draw; owns the loop over a process."""

    needs_reward: ClassVar[bool] = False
    """Whether it draws by a reward, rather than having one score what it drew."""

    kl_kind: ClassVar[str | None] = None
    """What the KL of its samples is (see `Samples.kl_kind`); None: what the process says."""

    @property
    def rows(self) -> int:
        """Rows that it keeps going for each prompt."""
        return 1

    def updates(self, process: Process) -> int:
        """About how many times a run calls `on_step`, for progress bars."""
        return process.num_steps

    @abstractmethod
    def run(
        self,
        process: Process,
        prompts: Sequence[Prompt],
        *,
        generator: torch.Generator,
        reward: Reward | None = None,
        beta: float = 1.0,
        on_step: Callable[[Any], None] | None = None,
    ) -> Samples:
        """Draw for every prompt. `on_step` sees each state (progress, streaming); it must not change it."""
