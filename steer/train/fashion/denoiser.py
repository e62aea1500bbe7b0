"""Training of a class-conditional diffusion model of small images; the network is any module, no engine is needed.

With the variance-preserving noise x_t = a_t x_0 + s_t e, where a_t^2 = prod_{i <= t} (1 - beta_i) and
s_t^2 = 1 - a_t^2, the module is trained to predict the velocity v_t = a_t e - s_t x_0 (Salimans & Ho 2022).

Letters: `N` images, `C` channels, `H` and `W` height and width, `T` noise levels.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from steer.core import check, check_whole
from steer.progress import note, ticking
from steer.seeds import mixed
from steer.train.fashion.images import rows_sha256
from steer.train.loop import averaged, cosine, load_state, save_state
from steer.train.settings import Count, Part, Positive, Seed, Share, settings_class

__all__ = ["DenoiserSettings", "linear_alphas", "to_images", "to_latents", "train_denoiser", "velocity_loss"]


@settings_class
class DenoiserSettings:
    """How a denoiser is trained. Raises `InputError` for a value out of range."""

    steps: Count = 3900
    batch_size: Count = 64
    learning_rate: Positive = 1e-3
    """Of AdamW at its highest: linear warm-up over the first tenth, at most 100 steps, then a cosine down to 0."""
    label_dropout: Share = 0.15
    """Share of images whose class is hidden, so that the module also learns the unconditional law."""
    null_class: int = 10
    """The label that stands for a hidden class."""
    ema: Part = 0.999
    """Decay of the moving average of the weights; it is lower over the first steps."""
    noise_levels: Count = 1000
    beta_start: Positive = 1e-4
    beta_end: Positive = 0.02
    seed: Seed = 0

    def __post_init__(self) -> None:
        between = self.beta_start <= self.beta_end < 1
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
    mean = averaged(module, settings.ema)
    run = {**asdict(settings), "every": every, "data": rows_sha256(images, labels)}
    path = None if work is None else work / "denoiser.safetensors"
    saved = load_state(path, run, optimizer)
    first, history = (0, []) if saved is None else (saved.facts["step"], saved.facts["history"])
    if saved is not None:
        module.load_state_dict(saved.parts["module"])
        mean.load_state_dict(saved.parts["average"])
    note(progress and first > 0, f"training the denoiser: going on from step {first + 1} of {settings.steps}")
    warm = max(1, min(100, settings.steps // 10))
    schedule = cosine(optimizer, settings.learning_rate, settings.steps, first, warm)
    module.train()
    seen: list[float] = []
    with ticking(progress, "training the denoiser", settings.steps) as tick:
        tick(first)
        for step in range(first, settings.steps):
            optimizer.zero_grad()
            clean, shown, level, noise = (x.to(device) for x in _drawn(images, labels, settings, step))
            loss = velocity_loss(module, clean, shown, level, noise, alphas)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            mean.update_parameters(module)
            seen.append(float(loss.detach()))
            tick(1, loss=seen[-1])
            if (step + 1) % every == 0 or step + 1 == settings.steps:
                history.append(sum(seen) / len(seen))
                seen.clear()
                if path is not None:
                    parts = {"module": module.state_dict(), "average": mean.state_dict()}
                    save_state(path, run, parts, optimizer, step=step + 1, history=history)
    return dict(mean.module.state_dict()), history


def _drawn(images: Tensor, labels: Tensor, settings: DenoiserSettings, step: int) -> tuple[Tensor, ...]:
    """A step's latents, labels, noise levels and noise."""
    drawn = torch.Generator().manual_seed(mixed(settings.seed, "step", step))
    batch = _batch(len(images), settings, step)
    hidden = torch.rand(len(batch), generator=drawn) < settings.label_dropout
    shown = labels[batch].masked_fill(hidden, settings.null_class)
    # One level from each of N equal ranges: the loss of a batch varies less than with independent levels.
    spread = (torch.arange(len(batch)) + torch.rand(len(batch), generator=drawn)) / len(batch)
    level = (spread * settings.noise_levels).long().clamp(max=settings.noise_levels - 1)
    clean = to_latents(images[batch])
    return clean, shown, level, torch.randn(clean.shape, generator=drawn)


def _batch(rows: int, settings: DenoiserSettings, step: int) -> Tensor:
    """Rows of a step `[batch_size]`: whole batches of a permutation that is new every epoch."""
    epoch, at = divmod(step, rows // settings.batch_size)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(mixed(settings.seed, "epoch", epoch)))
    return order[at * settings.batch_size : (at + 1) * settings.batch_size]
