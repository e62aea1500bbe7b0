"""Networks of diffusers as they are tuned: which one a model has, its mark, a copy of it, the chains that run it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from steer.adapters.diffusers.model import DiffusionModel
from steer.adapters.diffusers.network import NetworkDenoiser, NetworkSource
from steer.adapters.diffusers.policy.lora import Lora
from steer.core import UnsupportedError, check
from steer.train.diffusion_policy.inputs import Tunable

_LEVELS = 200
"""Noise levels that dpo and seppo draw from, evenly spread over those that the network knows."""


def fingerprint(network: nn.Module) -> str:
    """Hash of a network's kind, of the names and shapes of its weights, and of a sample of each; 16 hexadecimal digits.

    In bf16, so that one checkpoint loaded in two precisions is one model.
    """
    digest = hashlib.sha256(type(network).__name__.encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        if value.device.type != "meta":
            flat = value.detach().flatten()
            digest.update(flat[:: max(1, flat.numel() // 16)].to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class _PerRow(NetworkDenoiser):
    """A denoiser that also takes a level for each row: `step` `[N]`."""

    per_row = True

    def predict(self, x: Tensor, step: Any, group: Tensor, encoded: Any) -> Tensor:
        if not isinstance(step, Tensor):
            return super().predict(x, step, group, encoded)
        grid, wide = self.grid, (-1, *[1] * (x.dim() - 1))

        def of(table: Sequence[float]) -> Tensor:
            return torch.tensor(table, dtype=x.dtype)[step].to(x.device).view(wide)

        seen, time = (x * of(grid.scale)).to(self.dtype), grid.timesteps[step].to(x.device)
        if encoded is None:
            output = self._call(seen, time)
        else:
            output = self._guided(seen, time, encoded.index[group].to(x.device), encoded.plain)
        return x * of(grid.keep) + output.to(x.dtype) * of(grid.take)


def network_of(model: Any) -> Any:
    """The network of a model that can be tuned. Raises `InputError` and `UnsupportedError` for others."""
    check(isinstance(model, DiffusionModel), "model", type(model).__name__, "a diffusion model, from steer.load")
    if not isinstance(model.source, NetworkSource):
        raise UnsupportedError(
            "train policy: a pipeline runs its network without gradients; load the network itself, with its scheduler"
        )
    return model.source.network


def tunable(model: DiffusionModel, chain: dict[str, Any]) -> Tunable:
    """The model's network, as it runs in samples and at many noise levels. Raises for settings out of range."""
    network = network_of(model)
    assert isinstance(model.source, NetworkSource)
    config = model.source.scheduler.config
    known = int(config.num_train_timesteps) - int(config.get("steps_offset") or 0)
    drawn = model.process(**chain)
    levels = model.process(steps=_LEVELS if known >= 2 * _LEVELS else known, max_batch=0)
    inner = levels.network
    assert isinstance(inner, NetworkDenoiser)
    rowwise = _PerRow(**{f.name: getattr(inner, f.name) for f in fields(NetworkDenoiser)})
    return Tunable(network, drawn, replace(levels, network=rowwise))


def copied(model: DiffusionModel, lora: Lora | None, seed: int) -> DiffusionModel:
    """The model with a copy of its network that can be tuned, in float32 at least."""
    network = copy.deepcopy(network_of(model))
    if network.dtype in (torch.float16, torch.bfloat16):
        network = network.float()
    network.requires_grad_(lora is None)
    if lora is not None:
        network = lora.attached(network, seed)
    assert isinstance(model.source, NetworkSource)
    return replace(model, source=replace(model.source, network=network.eval()))
