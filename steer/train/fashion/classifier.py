"""Train a small image classifier: shifted copies, noise and blur where it must read a denoiser's first guesses."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from steer.core import check
from steer.train.fashion.images import rows_sha256
from steer.train.loop import fit

__all__ = ["ClassifierSettings", "accuracy", "augment", "train_classifier"]


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings:
    """How a classifier is trained. Raises `InputError` for a value out of range."""

    epochs: int = 6
    batch_size: int = 128
    learning_rate: float = 2e-3
    """Of AdamW at the start; a cosine takes it down to 0."""
    weight_decay: float = 0.01
    shift: int = 2
    """Images move by up to this many pixels in each direction."""
    noise: float = 0.0
    """Gaussian noise of a standard deviation between 0 and this is added, each image its own."""
    blur: float = 0.0
    """Share of images that are blurred: an early prediction of a denoiser looks like that."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 2), ("shift", 0)):
            value = getattr(self, name)
            check(isinstance(value, int) and value >= least, name, value, f"an integer of {least} or more")
        check(0 < self.learning_rate < float("inf"), "learning_rate", self.learning_rate, "a number above 0")
        check(0 <= self.weight_decay < float("inf"), "weight_decay", self.weight_decay, "a number of 0 or more")
        check(0 <= self.noise < float("inf"), "noise", self.noise, "a number of 0 or more")
        check(0 <= self.blur <= 1, "blur", self.blur, "0 to 1")


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
        net, list(range(rows // size)), loss, epochs=settings.epochs, learning_rate=settings.learning_rate,
        settings=run, seed=settings.seed, weight_decay=settings.weight_decay, work=work, progress=progress, what=what,
    )  # fmt: skip
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
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
