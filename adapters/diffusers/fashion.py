"""The embedded diffusion model: a small class-conditional UNet of diffusers, its training and its loading.

`python -m steer.adapters.diffusers.fashion --data DIR --out DIR` repeats the whole recipe on Fashion-MNIST.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from steer.core import SteerError, check
from steer.files import write_text
from steer.train.fashion.classifier import ClassifierSettings, accuracy, train_classifier
from steer.train.fashion.denoiser import DenoiserSettings, to_images, train_denoiser
from steer.train.fashion.images import FASHION_CLASSES, idx_sha256, read_idx
from steer.train.fashion.nets import JudgeNet, RewardNet, load_net, save_net
from steer.train.settings import Count, settings_class, settle

__all__ = ["FashionSettings", "Velocity", "build_scheduler", "build_unet", "draw_images", "load_unet", "train_fashion"]


_WEIGHTS = "diffusion_pytorch_model.safetensors"
LICENSE = (
    "Weights: Apache-2.0, trained from scratch by the steer project. Training data: Fashion-MNIST, MIT, "
    "copyright 2017 Zalando SE; none of its images are in this folder."
)


class Velocity(nn.Module):
    """A UNet of diffusers as a plain module of (x `[N, C, H, W]`, level `[N]`, labels `[N]`)."""

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, level: Tensor, labels: Tensor) -> Tensor:
        """The velocity `[N, C, H, W]`."""
        return self.unet(x, level, class_labels=labels, return_dict=False)[0]


def build_unet(size: int = 14, channels: int = 4, widths: tuple[int, ...] = (32, 64), classes: int = 11) -> UNet2DModel:
    """A new UNet for latents `[N, channels, size, size]`; `classes` counts the null class. 0.65 M parameters."""
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
        norm_num_groups=8,
        num_class_embeds=classes,
        attention_head_dim=16,
    )


def build_scheduler(settings: DenoiserSettings | None = None) -> DDIMScheduler:
    """The scheduler that fits a denoiser trained with `settings`."""
    chosen = settings or DenoiserSettings()
    return DDIMScheduler(
        num_train_timesteps=chosen.noise_levels,
        beta_start=chosen.beta_start,
        beta_end=chosen.beta_end,
        beta_schedule="linear",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        rescale_betas_zero_snr=False,
    )


def load_unet(folder: Path | str) -> tuple[UNet2DModel, DDIMScheduler]:
    """UNet (float32, frozen) and scheduler of a model folder; reads safetensors only. Raises `SteerError`."""
    weights = Path(folder) / "unet" / _WEIGHTS
    check(weights.is_file(), "model", f"{weights} (no such file)", "a folder written by train_fashion")
    try:
        unet = UNet2DModel.from_config(UNet2DModel.load_config(Path(folder) / "unet"))
        unet.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
        scheduler = DDIMScheduler.from_pretrained(Path(folder) / "scheduler")
    except Exception as error:
        raise SteerError(f"{folder}: not a model that can be loaded: {str(error).splitlines()[0]}") from error
    return unet.eval().requires_grad_(False), scheduler


@torch.no_grad()
def draw_images(
    unet: UNet2DModel,
    scheduler: DDIMScheduler,
    labels: Tensor,
    *,
    steps: int = 25,
    eta: float = 1.0,
    seed: int = 0,
    batch_size: int = 100,
) -> Tensor:
    """Images `[N, 1, H, W]` in [0, 1] of the classes `labels` int64 `[N]`, by `steps` steps of plain DDIM."""
    schedule = DDIMScheduler.from_config(scheduler.config)
    schedule.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    drawn = []
    for chosen in labels.split(batch_size):
        x = torch.randn(len(chosen), *shape, generator=generator)
        for level in schedule.timesteps:
            velocity = unet(x, level, class_labels=chosen, return_dict=False)[0]
            x = schedule.step(velocity, level, x, eta=eta, generator=generator, return_dict=False)[0]
        drawn.append(to_images(x))
    return torch.cat(drawn)


@settings_class
class FashionSettings(DenoiserSettings):
    """How the embedded model is trained."""

    epochs: Count = 6
    """Of the two classifiers."""
    measured: Count = 200
    """Samples for each class on which agreement with the judge is measured."""

    @property
    def denoiser(self) -> DenoiserSettings:
        return DenoiserSettings(**{f.name: getattr(self, f.name) for f in fields(DenoiserSettings)})

    @property
    def readers(self) -> dict[str, tuple[type[nn.Module], ClassifierSettings]]:
        """Networks of the classifiers, and how they are trained."""
        return {
            "classifier": (
                RewardNet,
                ClassifierSettings(epochs=self.epochs, shift=1, noise=0.25, blur=0.2, seed=self.seed),
            ),
            "judge": (JudgeNet, ClassifierSettings(epochs=self.epochs, seed=self.seed + 1)),
        }


def train_fashion(
    data: Path | str,
    out: Path | str,
    settings: FashionSettings | None = None,
    *,
    work: Path | str | None = None,
    progress: bool = False,
    **given: Any,
) -> dict[str, Any]:
    """Train denoiser, reward net and judge on Fashion-MNIST and write the model folder; returns its card.

    About 25 minutes on one CPU core with the defaults. The folder appears under its name when it is complete.

    Args:
        data: folder with Fashion-MNIST's four idx files.
        out: folder to be made; it may be there if it is empty.
        settings: how; fields of `FashionSettings` may also be `given` by name.
        work: folder for checkpoints; a run that was stopped goes on from there and gives the same weights.

    Raises:
        InputError: a setting out of range, data that cannot be read, `out` taken, `work` of another run.
    """
    chosen = settle(FashionSettings, settings, given, "train_fashion")
    folder, state = Path(out), None if work is None else Path(work)
    free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    check(free, "out", str(folder), "a new or an empty folder")
    images, tests = read_idx(data, "train"), read_idx(data, "test")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}~", dir=folder.parent) as temporary:
            made = Path(temporary, "made")
            right = _train_readers(made, images, tests, chosen, state, progress)
            losses = _train_unet(made, images, chosen, state, progress)
            metrics = {"test_accuracy": right, "loss": losses, **_measure(made, chosen.measured, chosen.seed)}
            card = _card(chosen.denoiser, metrics, idx_sha256(data))
            write_text(made / "MODEL_CARD.json", json.dumps(card, indent=2) + "\n")
            if folder.exists():
                folder.rmdir()
            made.rename(folder)
    except OSError as error:
        raise SteerError(f"cannot write {folder}: {error.strerror or error}") from error
    return card


Images = tuple[Tensor, Tensor]
"""Images and labels."""


def _train_readers(
    folder: Path, images: Images, tests: Images, settings: FashionSettings, work: Path | None, progress: bool
) -> dict[str, float]:
    """Write the two classifiers, and say how often each is right."""
    found = {}
    for name, (kind, chosen) in settings.readers.items():
        net, place = _seeded(kind, chosen.seed), None if work is None else work / name
        train_classifier(net, *images, chosen, work=place, progress=progress, what=f"training the {name}")
        found[name] = round(accuracy(net, *tests), 4)
        facts = {"class_names": FASHION_CLASSES, "training": asdict(chosen), "test_accuracy": found[name]}
        save_net(folder / name, net, facts)
    return found


def _train_unet(
    folder: Path, images: Images, settings: FashionSettings, work: Path | None, progress: bool
) -> list[float]:
    """Write the denoiser and its scheduler, and say how the loss went."""
    module = Velocity(_seeded(build_unet, settings.seed))
    average, history = train_denoiser(module, *images, settings.denoiser, work=work, progress=progress)
    module.load_state_dict(average)
    _save_unet(folder / "unet", module.unet)
    build_scheduler(settings.denoiser).save_pretrained(folder / "scheduler")
    return [round(x, 5) for x in history]


def _save_unet(folder: Path, unet: UNet2DModel) -> None:
    """Write what `UNet2DModel.from_pretrained` reads, in half precision."""
    unet.save_config(folder)
    tensors = {name: value.detach().half().contiguous() for name, value in unet.state_dict().items()}
    (folder / _WEIGHTS).write_bytes(to_bytes(tensors, {"format": "pt"}))


def _seeded(build: Any, seed: int) -> Any:
    """What `build()` makes with this seed; the caller's random state is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def _measure(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """How often the two classifiers see in a sample the class that was asked for, from the folder as it is shipped."""
    unet, scheduler = load_unet(folder)
    wanted = torch.arange(len(FASHION_CLASSES)).repeat_interleave(count)
    drawn = draw_images(unet, scheduler, wanted, steps=25, eta=1.0, seed=seed)
    found: dict[str, Any] = {"samples_per_class": count, "sampler": "25 steps of DDIM, eta 1, conditional"}
    seen = {}
    for name in ("judge", "classifier"):
        with torch.no_grad():
            seen[name] = torch.cat([load_net(folder / name)(x).argmax(-1) for x in drawn.split(500)])
        hits = (seen[name] == wanted).view(-1, count).float().mean(1)
        shares = {c: round(float(x), 3) for c, x in zip(FASHION_CLASSES, hits, strict=True)}
        found[f"agreement_with_{name}"] = {"all": round(float(hits.mean()), 4), **shares}
    found["judge_agrees_with_classifier"] = round(float((seen["judge"] == seen["classifier"]).float().mean()), 4)
    return found


def _card(settings: DenoiserSettings, metrics: dict[str, Any], hashes: dict[str, str]) -> dict[str, Any]:
    return {
        "name": "fashion-ddpm",
        "kind": "diffusion",
        "license": LICENSE,
        "description": "Class-conditional diffusion of 28x28 grey images of clothes, with two classifiers of them: "
        "`classifier` to steer by, `judge` to measure with.",
        "classes": FASHION_CLASSES,
        "null_class": settings.null_class,
        "image_size": 28,
        "image_channels": 1,
        "pixel_unshuffle": 2,
        "training": {"optimizer": "AdamW, cosine, gradient norm at most 1", "mirrored": False, **asdict(settings)},
        "data": {"name": "Fashion-MNIST, 60000 training images", "license": "MIT", "sha256": hashes},
        "metrics": metrics,
        "made_with": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }


def main(arguments: list[str] | None = None) -> int:
    """`--data DIR --out DIR [--steps N] [--work DIR] [--seed N]`; the exit code is 2 for bad input."""
    about = "Train the embedded diffusion model on Fashion-MNIST: about 25 minutes on one CPU core."
    parser = argparse.ArgumentParser(prog="python -m steer.adapters.diffusers.fashion", description=about)
    parser.add_argument("--data", type=Path, required=True, help="folder with Fashion-MNIST's four idx files")
    parser.add_argument("--out", type=Path, required=True, help="folder to be made")
    parser.add_argument("--steps", type=int, default=3900, help="training steps of the denoiser")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same weights")
    parser.add_argument("--work", type=Path, help="folder for checkpoints, from which a stopped run goes on")
    given = parser.parse_args(arguments)
    try:
        card = train_fashion(
            given.data, given.out, steps=given.steps, seed=given.seed, work=given.work, progress=sys.stderr.isatty()
        )
    except SteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(card["metrics"], indent=2))
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
