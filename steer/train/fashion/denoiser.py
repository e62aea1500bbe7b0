"""Train a class-conditional diffusion model of small images; the network is any module, no engine is needed.

With the variance-preserving noise x_t = a_t x_0 + s_t e, where a_t^2 = prod_{i <= t} (1 - beta_i) and
s_t^2 = 1 - a_t^2, the module is trained to predict the velocity v_t = a_t e - s_t x_0 (Salimans & Ho 2022).

Letters: `N` images, `C` channels, `H` and `W` height and width, `T` noise levels.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steer.core import InputError, check, check_whole
from steer.files import replacing
from steer.progress import ticking
from steer.train.fashion.images import rows_sha256

__all__ = ["DenoiserSettings", "linear_alphas", "to_images", "to_latents", "train_denoiser", "velocity_loss"]


@dataclass(frozen=True, kw_only=True)
class DenoiserSettings:
    """How a denoiser is trained. Raises `InputError` for a value out of range."""

    steps: int = 3900
    batch_size: int = 64
    learning_rate: float = 1e-3
    """Of AdamW at its highest: linear warm-up over the first tenth, at most 100 steps, then a cosine down to 0."""
    label_dropout: float = 0.15
    """Share of images whose class is hidden, so that the module also learns the unconditional law."""
    null_class: int = 10
    """The label that stands for a hidden class."""
    ema: float = 0.999
    """Decay of the moving average of the weights; it is lower over the first steps."""
    noise_levels: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "noise_levels"):
            value = getattr(self, name)
            check_whole(name, value)
        check(0 < self.learning_rate < float("inf"), "learning_rate", self.learning_rate, "a number above 0")
        check(0 <= self.label_dropout <= 1, "label_dropout", self.label_dropout, "0 to 1")
        check(0 <= self.ema < 1, "ema", self.ema, "0 <= ema < 1")
        between = 0 < self.beta_start <= self.beta_end < 1
        check(between, "beta_start", (self.beta_start, self.beta_end), "0 < beta_start <= beta_end < 1")


def linear_alphas(levels: int = 1000, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """a_t^2 `[T]`, the share of variance that is signal at each noise level, for betas on a line; float32."""
    return torch.cumprod(1 - torch.linspace(start, end, levels, dtype=torch.float64), 0).float()


def to_latents(images: Tensor) -> Tensor:
    """uint8 images `[N, H, W]` as float32 in [-1, 1] with every 2x2 block in the channels, `[N, 4, H/2, W/2]`."""
    return rearrange(images, "n (h a) (w b) -> n (a b) h w", a=2, b=2).float() / 127.5 - 1


def to_images(latents: Tensor) -> Tensor:
    """The images `[N, 1, H, W]` in [0, 1] of latents `[N, 4, H/2, W/2]`; exact, differentiable inside the range."""
    return rearrange(latents, "n (a b) h w -> n 1 (h a) (w b)", a=2, b=2).add(1).mul(0.5).clamp(0, 1)


def velocity_loss(
    module: nn.Module, clean: Tensor, labels: Tensor, level: Tensor, noise: Tensor, alphas: Tensor
) -> Tensor:
    """Mean squared error of the velocity that `module(x, level, labels)` predicts.

    Shapes: `clean` and `noise` `[N, C, H, W]`, `labels` and `level` int64 `[N]`, `alphas` a_t^2 `[T]`.
    """
    signal = alphas[level].sqrt().view(-1, 1, 1, 1)
    rest = (1 - alphas[level]).sqrt().view(-1, 1, 1, 1)
    predicted = module(signal * clean + rest * noise, level, labels)
    return (predicted - (signal * noise - rest * clean)).square().mean()


def train_denoiser(
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: DenoiserSettings,
    *,
    work: Path | None = None,
    every: int = 300,
    progress: bool = False,
) -> tuple[dict[str, Tensor], list[float]]:
    """Train `module`, called as `module(x, level, labels)`, on uint8 `images` `[N, H, W]` with int64 `labels` `[N]`.

    Returns the moving average of its state, and the mean loss of every `every` steps. Images are never mirrored: the
    shoes of Fashion-MNIST all point one way. All randomness depends on the seed and the step only, and the state is
    written to `work` every `every` steps, atomically: a run that was stopped and started again gives the weights of the
    uninterrupted one, bit for bit.

    Raises:
        InputError: images and labels do not fit, or `work` holds the state of another run.
    """
    check(images.dtype == torch.uint8 and images.dim() == 3, "images", tuple(images.shape), "uint8 [N, H, W]")
    check(labels.shape == (len(images),), "labels", tuple(labels.shape), f"one for each image, ({len(images)},)")
    check(len(images) >= settings.batch_size, "images", f"{len(images)} images", f"{settings.batch_size} (a batch)")
    check_whole("every", every)
    device = next(module.parameters()).device
    alphas = linear_alphas(settings.noise_levels, settings.beta_start, settings.beta_end).to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=settings.learning_rate)
    average = {k: v.detach().clone() for k, v in module.state_dict().items()}
    run = {**asdict(settings), "every": every, "data": rows_sha256(images, labels)}
    first, history = _resume(work, module, average, optimizer, run)
    module.train()
    total, count = 0.0, 0
    with ticking(progress, "training the denoiser", settings.steps) as tick:
        tick(first)
        for step in range(first, settings.steps):
            drawn = torch.Generator().manual_seed(_mixed(settings.seed, "step", step))
            batch = _batch(len(images), settings, step)
            hidden = torch.rand(len(batch), generator=drawn) < settings.label_dropout
            shown = labels[batch].masked_fill(hidden, settings.null_class)
            # One level from each of N equal ranges: the loss of a batch varies less than with independent levels.
            spread = (torch.arange(len(batch)) + torch.rand(len(batch), generator=drawn)) / len(batch)
            level = (spread * settings.noise_levels).long().clamp(max=settings.noise_levels - 1)
            clean = to_latents(images[batch])
            noise = torch.randn(clean.shape, generator=drawn)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _rate(step, settings.steps)
            optimizer.zero_grad()
            clean, noise = clean.to(device), noise.to(device)
            loss = velocity_loss(module, clean, shown.to(device), level.to(device), noise, alphas)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            _follow(average, module, min(settings.ema, (1 + step) / (10 + step)))
            total, count = total + float(loss.detach()), count + 1
            tick(1)
            if (step + 1) % every == 0 or step + 1 == settings.steps:
                history.append(total / count)
                total, count = 0.0, 0
                if work is not None:
                    _checkpoint(work, module, average, optimizer, run, step + 1, history)
    return average, history


def _mixed(*parts: object) -> int:
    """A seed that is as good as unrelated for every different list of parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def _batch(rows: int, settings: DenoiserSettings, step: int) -> Tensor:
    """Rows of a step `[batch_size]`: whole batches of a permutation that is new every epoch."""
    epoch, at = divmod(step, rows // settings.batch_size)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(_mixed(settings.seed, "epoch", epoch)))
    return order[at * settings.batch_size : (at + 1) * settings.batch_size]


def _rate(step: int, steps: int) -> float:
    warm = max(1, min(100, steps // 10))
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def _follow(average: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)


def _checkpoint(
    work: Path,
    module: nn.Module,
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    run: dict[str, Any],
    step: int,
    history: list[float],
) -> None:
    tensors = {f"module.{k}": v for k, v in module.state_dict().items()} | {f"ema.{k}": v for k, v in average.items()}
    for index, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in entry.items()}
    facts = {"settings": json.dumps(run, sort_keys=True), "step": str(step), "history": json.dumps(history)}
    with replacing(work / "denoiser.safetensors") as temporary:
        save_file({k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}, temporary, facts)


def _resume(
    work: Path | None,
    module: nn.Module,
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    run: dict[str, Any],
) -> tuple[int, list[float]]:
    """Put back what `_checkpoint` left, and say at which step to go on."""
    path = None if work is None else work / "denoiser.safetensors"
    if path is None or not path.is_file():
        return 0, []
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    if facts["settings"] != json.dumps(run, sort_keys=True):
        raise InputError("work", str(work), "an empty folder, or the state of a run with these very settings")
    tensors = load_file(path)
    module.load_state_dict({k.removeprefix("module."): v for k, v in tensors.items() if k.startswith("module.")})
    for name, value in average.items():
        value.copy_(tensors[f"ema.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(facts["step"]), json.loads(facts["history"])
