"""The training loop of small modules, and the checkpoints of all trainers, from which a run goes on exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from steer.core import InputError
from steer.files import replacing
from steer.progress import note, ticking
from steer.ranks import ranks

__all__ = [
    "OtherRunError",
    "Saved",
    "average_gradients",
    "averaged",
    "check_run",
    "cosine",
    "descend",
    "fit",
    "load_state",
    "save_state",
]


def fit(
    module: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any, int], Tensor | None],
    *,
    epochs: int,
    learning_rate: float,
    run: dict[str, Any],
    weight_decay: float = 0.0,
    work: Path | None = None,
    progress: bool = False,
    what: str = "training",
) -> list[float]:
    """Train `module` with AdamW and a cosine schedule; returns the mean loss of each epoch.

    The order of `batches` depends on the entry "seed" of `run` and the epoch only, so a run that was stopped and
    started again gives the result of the uninterrupted one. State is written to `work` after every epoch, atomically;
    `run` identifies it, and state left there by another run is refused.

    On several ranks every step is of one batch, and losses and gradients are averaged over the ranks. A `loss` that
    takes its own share of the rows alone gives what they add to the loss of the batch, times the number of ranks, and
    None where it has no row in it. So the result is that of one process with the same batches, up to rounding,
    whatever the number of ranks; the first alone writes, and state that one number of ranks has left another takes up.

    Raises:
        InputError: `work` holds the state of a run with other settings, or not all ranks see it.
    """
    shared = ranks()
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=weight_decay)
    path = None if work is None else work / "state.safetensors"
    saved = load_state(path, run, optimizer)
    if saved is not None:
        module.load_state_dict(saved.parts["module"])
    first, history = (0, []) if saved is None else (saved.facts["epoch"], saved.facts["history"])
    shared.check_same("work", first, "a folder that all ranks see")
    note(progress and first > 0, f"{what}: going on from epoch {first + 1} of {epochs}")
    steps = max(1, epochs * len(batches))
    schedule = cosine(optimizer, learning_rate, steps, first * len(batches))
    with ticking(progress and shared.first, what, steps) as tick:
        tick(first * len(batches))
        for epoch in range(first, epochs):
            drawn = torch.Generator().manual_seed(run.get("seed", 0) * 7919 + epoch)
            total = 0.0
            for at in torch.randperm(len(batches), generator=drawn).tolist():
                total += (last := descend(module, optimizer, loss(module, batches[at], epoch)))
                schedule.step()
                tick(1, loss=last)
            history.append(shared.total(total)[0] / shared.count / max(1, len(batches)))
            if path is not None and shared.first:
                save_state(path, run, {"module": module.state_dict()}, optimizer, epoch=epoch + 1, history=history)
    return history


def descend(module: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor | None, most: float = 1.0) -> float:
    """A step of the optimizer, whose gradient is the mean over the ranks, cut to the norm `most`; returns the loss of
    this rank, None counting as 0.
    """
    optimizer.zero_grad(set_to_none=True)
    if loss is not None:
        loss.backward()
    parameters = [p for p in module.parameters() if p.requires_grad]
    average_gradients(parameters)
    nn.utils.clip_grad_norm_(parameters, most)
    optimizer.step()
    return 0.0 if loss is None else float(loss.detach())


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every parameter the mean of its gradients over the ranks; one without a gradient has had no part in the
    loss.
    """
    shared = ranks()
    if shared.count > 1:
        for parameter in (held := list(parameters)):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad /= shared.count
        shared.add([p.grad for p in held if p.grad is not None])


def cosine(optimizer: torch.optim.Optimizer, rate: float, steps: int, done: int, warm: int = 1) -> LambdaLR:
    """From `rate` down to 0 over `steps` steps, of which `done` are over; linearly up to it over the first `warm`."""
    for group in optimizer.param_groups:
        group["initial_lr"] = rate

    def share(step: int) -> float:
        return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))

    return LambdaLR(optimizer, share, last_epoch=done - 1)


def averaged(module: nn.Module, ema: float) -> AveragedModel:
    """A moving average of the parameters of `module`, with a decay of `ema` that is lower over the first steps; its
    `update_parameters` follows a step.
    """

    def follow(mean: Tensor, value: Tensor, count: Tensor | int) -> Tensor:
        return mean.lerp(value, 1 - min(ema, float(count) / (9 + float(count))))

    made = AveragedModel(module, avg_fn=follow)
    made.update_parameters(module)  # the first is copied
    return made


# -------------------------------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds beside the optimizer's state: tensors by the part that they are of, and plain facts."""

    parts: dict[str, dict[str, Tensor]]
    facts: dict[str, Any]


def save_state(
    path: Path,
    run: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    **facts: Any,
) -> None:
    """Write tensors by part, the optimizer's state and facts that JSON can hold, in one step; `run` says whose it is.
    The name of a part has no dot.
    """
    held = {f"{part}.{name}": x for part, tensors in parts.items() for name, x in tensors.items()}
    for index, entry in optimizer.state_dict()["state"].items():
        held |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in entry.items()}
    plain = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in held.items()}
    metadata = {"settings": json.dumps(run, sort_keys=True), **{k: json.dumps(v) for k, v in facts.items()}}
    with replacing(path) as temporary:
        save_file(plain, temporary, metadata)


def load_state(path: Path | None, run: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Saved | None:
    """What `save_state` wrote, if anything was, with the optimizer's state put back. Raises `InputError` for the state
    of another run.
    """
    if path is None or not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    check_run(path.parent, json.loads(metadata.pop("settings")), run)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(path).items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts.pop("optimizer", {}).items():
        index, _, rest = name.partition(".")
        state.setdefault(int(index), {})[rest] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return Saved(parts, {name: json.loads(value) for name, value in metadata.items()})


class OtherRunError(InputError):
    """A folder of work holds the state of another run."""


def check_run(work: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `OtherRunError` where `work` holds the state of another run, with what differs."""
    now = json.loads(json.dumps(now))
    differ = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if differ:
        told = "; ".join(f"{name} was {before.get(name)!r:.40}, is {now.get(name)!r:.40}" for name in differ[:3])
        allowed = f"an empty folder, or the state of a run with these very settings ({told})"
        raise OtherRunError("work", str(work), allowed)
