"""Pools of base samples, drawn once and kept, as a judge sees them: what stands for a target once it is weighted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.core import Process, Samples, UnsupportedError
from steer.files import replacing
from steer.methods.best_of_n import Ancestral
from steer.progress import ticking

__all__ = ["Judged", "as_samples", "judged", "pool_of"]


@dataclass
class Judged:
    """A pool of base samples as a judge sees them."""

    outputs: Tensor
    features: Tensor
    labels: Tensor


def judged(model: Any, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Features `[N, D]` and likeliest classes `[N]` of outputs, by the model's judge. Raises `UnsupportedError`."""
    judge = model.judge
    if judge is None:
        raise UnsupportedError(f"{model.name} brings no judge by whose features populations could be compared")
    with torch.no_grad():
        features = torch.cat([judge.features(x) for x in outputs.split(256)]).double().cpu()
        labels = torch.cat([judge(x).argmax(-1) for x in outputs.split(256)]).cpu()
    return features, labels


def pool_of(model: Any, process: Process, prompt: str, size: int, seed: int, path: Path, progress: bool) -> Judged:
    """Base samples, drawn once and kept in half precision."""
    from safetensors.torch import load_file, save

    # Seeds of pools are far from those of samplers.
    if path.is_file() and len(load_file(path)["outputs"]) == size:
        outputs = load_file(path)["outputs"].float()
    else:
        parts: list[Tensor] = []
        with ticking(progress, "pool of base samples", -(-size // 512)) as tick:
            while sum(map(len, parts)) < size:
                generator = torch.Generator().manual_seed(900_000 + 1000 * seed + len(parts))
                n = min(512, size - sum(map(len, parts)))
                parts.append(Ancestral(n).run(process, [prompt], generator=generator).outputs.half())
                tick(1)
        outputs = torch.cat(parts).float()
        with replacing(path) as temporary:
            temporary.write_bytes(save({"outputs": outputs.half()}))
    return Judged(outputs, *judged(model, outputs))


def as_samples(points: Judged) -> Samples:
    """The pool as samples of one prompt, which a reward can score."""
    zero = torch.zeros(len(points.outputs))
    return Samples([""], points.outputs, zero.long(), zero)
