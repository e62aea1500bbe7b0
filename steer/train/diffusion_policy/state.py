"""State of a run that tunes a diffusion policy: how it goes on, is written and is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steer.train.diffusion_policy.inputs import DiffusionPolicySettings
from steer.train.loop import averaged, load_state, save_state


class State:
    """Where a run stands: weights, optimizer, average, earlier states, and what was seen."""

    def __init__(
        self,
        weights: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        settings: DiffusionPolicySettings,
        run: dict[str, Any],
        work: Path | None,
    ) -> None:
        self.weights, self.optimizer, self.settings, self.run = weights, optimizer, settings, run
        self.path = None if work is None else work / "policy.safetensors"
        self.step = 0
        self.history: dict[str, list[float]] = {}
        self.tuned = nn.ParameterList(weights.values())
        self.mean = averaged(self.tuned, settings.ema) if settings.ema else None
        self.buffer: list[dict[str, Tensor]] = []

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the weights."""
        return {name: p.detach().clone() for name, p in self.weights.items()}

    @property
    def average(self) -> dict[str, Tensor]:
        """The moving average of the weights; nothing where there is none."""
        if self.mean is None:
            return {}
        return dict(zip(self.weights, (p.detach() for p in self.mean.module.parameters()), strict=True))

    def advance(self, seen: dict[str, float]) -> None:
        """Count an update, and let the average follow."""
        for name, value in seen.items():
            self.history.setdefault(name, []).append(value)
        if self.mean is not None:
            self.mean.update_parameters(self.tuned)
        self.step += 1

    def save(self) -> None:
        """Write all of it, where there is a folder."""
        if self.path is None:
            return
        earlier = {f"{i}.{name}": x for i, kept in enumerate(self.buffer) for name, x in kept.items()}
        parts: dict[str, Any] = {
            "weights": self.weights,
            "buffer": earlier,
            "average": self.mean.state_dict() if self.mean else {},
        }
        save_state(self.path, self.run, parts, self.optimizer, step=self.step, history=self.history)

    @torch.no_grad()
    def resume(self) -> None:
        """Go on from what was written, if anything was. Raises `InputError` for the state of another run."""
        saved = load_state(self.path, self.run, self.optimizer)
        if saved is None:
            return
        for name, parameter in self.weights.items():
            parameter.copy_(saved.parts["weights"][name])
        if self.mean is not None:
            self.mean.load_state_dict(saved.parts["average"])
        kept: dict[int, dict[str, Tensor]] = {}
        for key, value in saved.parts.get("buffer", {}).items():
            number, _, name = key.partition(".")
            kept.setdefault(int(number), {})[name] = value.to(self.weights[name].device)
        self.buffer = [kept[i] for i in sorted(kept)]
        self.step, self.history = saved.facts["step"], saved.facts["history"]
