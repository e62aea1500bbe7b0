"""State of a run that tunes a diffusion policy: how it goes on, is written and is read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steer.core import InputError
from steer.files import replacing
from steer.train.diffusion_policy.inputs import PolicySettings


class State:
    """Where a run stands: weights, optimizer, average, earlier states, and what was seen."""

    def __init__(
        self,
        weights: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        settings: PolicySettings,
        run: dict[str, Any],
        work: Path | None,
    ) -> None:
        self.weights, self.optimizer, self.settings = weights, optimizer, settings
        self.facts = json.dumps(run, sort_keys=True)
        self.path = None if work is None else work / "policy.safetensors"
        self.step = 0
        self.history: dict[str, list[float]] = {}
        self.average = self.snapshot() if settings.ema else {}
        self.buffer: list[dict[str, Tensor]] = []

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the weights."""
        return {name: p.detach().clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def advance(self, seen: dict[str, float]) -> None:
        """Count an update, and let the average follow."""
        for name, value in seen.items():
            self.history.setdefault(name, []).append(value)
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        for name, mean in self.average.items():
            mean.lerp_(self.weights[name], 1 - decay)
        self.step += 1

    def save(self) -> None:
        """Write all of it, where there is a folder."""
        if self.path is None:
            return
        facts = {"settings": self.facts, "step": str(self.step), "history": json.dumps(self.history)}
        tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in self._tensors().items()}
        with replacing(self.path) as temporary:
            save_file(tensors, temporary, facts)

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {f"weights.{k}": v for k, v in self.weights.items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for i, earlier in enumerate(self.buffer):
            tensors |= {f"buffer.{i}.{k}": v for k, v in earlier.items()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in entry.items()}
        return tensors

    def resume(self) -> None:
        """Go on from what was written, if anything was. Raises `InputError` for the state of another run."""
        if self.path is None or not self.path.is_file():
            return
        with safe_open(self.path, "pt") as file:
            facts = file.metadata()
        if facts.get("settings") != self.facts:
            allowed = "an empty folder, or the state of a run with these very settings"
            raise InputError("work", str(self.path.parent), allowed)
        self._take(load_file(self.path))
        self.step, self.history = int(facts["step"]), json.loads(facts["history"])

    @torch.no_grad()
    def _take(self, tensors: dict[str, Tensor]) -> None:
        entries = _by_head(tensors)
        for name, parameter in self.weights.items():
            parameter.copy_(entries["weights"][name])
        for name, mean in self.average.items():
            mean.copy_(entries["average"][name])
        state = {int(index): entry for index, entry in _by_head(entries.get("optimizer", {})).items()}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        kept = _by_head(entries.get("buffer", {}))
        self.buffer = [
            {name: kept[str(i)][name].to(like.device) for name, like in self.weights.items()} for i in range(len(kept))
        ]


def _by_head(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by what stands before the first dot of their names, and by the rest of it."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        head, _, rest = key.partition(".")
        found.setdefault(head, {})[rest] = value
    return found
