"""Training of a small image classifier: on shifted copies, and on noise and blur for a denoiser's first guesses."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from steer.core import check
from steer.seeds import mixed
from steer.train.fashion.images import rows_sha256
from steer.train.loop import fit
from steer.train.settings import Count, Finite, Positive, Seed, Share, Whole, settings_class

__all__ = ["ClassifierSettings", "accuracy", "augment", "train_classifier"]


@settings_class
class ClassifierSettings:
    """How a classifier is trained. Raises `InputError` for a value out of range."""

    epochs: Count = 6
    batch_size: Annotated[int, Field(ge=2)] = 128
    learning_rate: Positive = 2e-3
    """Of AdamW at the start; a cosine takes it down to 0."""
    weight_decay: Finite = 0.01
    shift: Whole = 2
    """Images move by up to this many pixels in each direction."""
    noise: Finite = 0.0
    """Gaussian noise of a standard deviation between 0 and this is added, each image its own."""
    blur: Share = 0.0
    """Share of images that are blurred: an early prediction of a denoiser looks like that."""
    seed: Seed = 0


def augment(images: Tensor, settings: ClassifierSettings, generator: torch.Generator) -> Tensor:
    """Images `[N, 1, H, W]` in [0, 1], each shifted, blurred and made noisy at random; the same shape and range."""
    count, _, height, width = images.shape
    reach = settings.shift
    padded = nn.functional.pad(images, (reach, reach, reach, reach))
    down, right = (torch.randint(0, 2 * reach + 1, (count, 1, 1), generator=generator) for _ in range(2))
    rows, columns = down + torch.arange(height).view(1, -1, 1), right + torch.arange(width).view(1, 1, -1)
    images = padded[torch.arange(count).view(-1, 1, 1), 0, rows, columns].unsqueeze(1)
    if settings.blur:
        radius = 1 + int(torch.randint(0, 2, (), generator=generator))
        smooth = nn.functional.avg_pool2d(images, 2 * radius + 1, 1, radius, count_include_pad=False)
        chosen = torch.rand(count, 1, 1, 1, generator=generator) < settings.blur
        images = torch.where(chosen, smooth, images)
    if settings.noise:
        scale = settings.noise * torch.rand(count, 1, 1, 1, generator=generator)
        images = (images + scale * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    return images


def train_classifier(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: ClassifierSettings,
    *,
    work: Path | None = None,
    progress: bool = False,
    what: str = "training a classifier",
) -> list[float]:
    """Fit `net`, which gives log-probabilities, to uint8 `images` `[N, H, W]` with int64 `labels` `[N]`.

    Returns the mean loss of each epoch in nats; `net` is left on the CPU in evaluation mode. The last incomplete batch
    of an epoch is left out. `work` keeps the state after every epoch, from which a run goes on.

    Raises:
        InputError: images and labels do not fit, or `work` holds the state of another run.
    """
    check(images.dtype == torch.uint8 and images.dim() == 3, "images", tuple(images.shape), "uint8 [N, H, W]")
    check(labels.shape == (len(images),), "labels", tuple(labels.shape), f"one for each image, ({len(images)},)")
    size, rows = settings.batch_size, len(images)
    check(rows >= size, "images", f"{rows} images", f"{size} (a batch)")

    @lru_cache(maxsize=1)
    def order(epoch: int) -> Tensor:
        return torch.randperm(rows, generator=_generator(settings.seed, "order", epoch))

    def loss(module: nn.Module, batch: int, epoch: int) -> Tensor:
        chosen = order(epoch)[batch * size : (batch + 1) * size]
        drawn = _generator(settings.seed, "batch", epoch, batch)
        changed = augment(images[chosen].unsqueeze(1).float() / 255, settings, drawn)
        device = next(module.parameters()).device
        # Dropout draws from the global generator: seeded here, a run that goes on draws what it would have drawn.
        with torch.random.fork_rng():
            torch.manual_seed(drawn.initial_seed())
            return nn.functional.nll_loss(module(changed.to(device)), labels[chosen].to(device))

    net.train()
    run = {**asdict(settings), "network": type(net).__name__, "data": rows_sha256(images, labels)}
    history = fit(
        net,
        list(range(rows // size)),
        loss,
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        run=run,
        weight_decay=settings.weight_decay,
        work=work,
        progress=progress,
        what=what,
    )
    net.cpu().eval()
    return history


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Share of uint8 `images` `[N, H, W]` to whose label `net` gives the highest log-probability."""
    hits = 0
    for chosen, wanted in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        hits += int((net(chosen.unsqueeze(1).float() / 255).argmax(-1) == wanted).sum())
    return hits / len(images)


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(mixed(*parts))
