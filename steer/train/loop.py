"""The one training loop: a small module, batches in a seeded order, checkpoints from which a run goes on exactly."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steer.core import InputError
from steer.progress import ticking

__all__ = ["fit"]


def fit(
    module: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any, int], Tensor],
    *,
    epochs: int,
    learning_rate: float,
    settings: dict[str, Any],
    seed: int = 0,
    weight_decay: float = 0.0,
    work: Path | None = None,
    progress: bool = False,
    what: str = "training",
) -> list[float]:
    """Train `module` with AdamW and a cosine schedule; returns the mean loss of each epoch.

    The order of `batches` depends on the seed and the epoch only, so a run that was stopped and started again gives the
    result of the uninterrupted one. State is written to `work` after every epoch, atomically; `settings` identify the
    run, and state left there by another run is refused. `accelerate launch` splits the batches over processes.

    Raises:
        InputError: `work` holds the state of a run with other settings.
    """
    from accelerate import Accelerator

    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=weight_decay)
    first, history = _resume(work, module, optimizer, settings)
    wrapped, optimizer = accelerator.prepare(module, optimizer)
    share = range(accelerator.process_index, len(batches), accelerator.num_processes)
    steps = max(1, epochs * len(share))
    with ticking(progress and accelerator.is_main_process, what, steps) as tick:
        tick(first * len(share))
        for epoch in range(first, epochs):
            order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed * 7919 + epoch)).tolist()
            total = 0.0
            for done, at in enumerate(share):
                rate = (
                    0.5
                    * learning_rate
                    * (1 + float(torch.cos(torch.tensor((epoch * len(share) + done) / steps * 3.141592653589793))))
                )
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.zero_grad()
                value = loss(wrapped, batches[order[at]], epoch)
                accelerator.backward(value)
                accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                optimizer.step()
                total += float(value.detach())
                tick(1)
            history.append(total / max(1, len(share)))
            if work is not None and accelerator.is_main_process:
                _checkpoint(work, module, optimizer, settings, epoch + 1, history)
    return history


def _names(optimizer: Any) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v).clone() for i, entry in state.items() for k, v in entry.items()}


def _checkpoint(
    work: Path, module: nn.Module, optimizer: Any, settings: dict[str, Any], epoch: int, history: list[float]
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    tensors = {f"module.{k}": v.contiguous() for k, v in module.state_dict().items()}
    tensors |= {f"optimizer.{k}": v.contiguous() for k, v in _names(optimizer).items()}
    facts = {"settings": json.dumps(settings, sort_keys=True), "epoch": str(epoch), "history": json.dumps(history)}
    temporary = work / "state.tmp"
    save_file(tensors, temporary, metadata=facts)
    os.replace(temporary, work / "state.safetensors")


def _resume(
    work: Path | None, module: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> tuple[int, list[float]]:
    path = None if work is None else work / "state.safetensors"
    if path is None or not path.is_file():
        return 0, []
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        facts = file.metadata()
    if facts["settings"] != json.dumps(settings, sort_keys=True):
        raise InputError("work", str(work), "an empty folder, or the state of a run with these very settings")
    tensors = load_file(path)
    module.load_state_dict({k.removeprefix("module."): v for k, v in tensors.items() if k.startswith("module.")})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    whole = optimizer.state_dict()
    optimizer.load_state_dict({**whole, "state": state})
    return int(facts["epoch"]), json.loads(facts["history"])
