"""Rewards for images that need no download.

Axis letters: `N` samples, `C` channels (1 or 3), `H` rows, `W` columns. Images are `[N, C, H, W]`, 0 black, 1 white.
All but the JPEG size can be differentiated: `reward.score(samples)` keeps the graph to `samples.outputs`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from steer.core import InputError, Samples, SteerError, UnsupportedError, check
from steer.rewards.algebra import Composable
from steer.rewards.text import quoted

__all__ = [
    "Brightness",
    "Classifier",
    "Compressibility",
    "Contrast",
    "ImageClass",
    "Incompressibility",
    "Sharpness",
    "Symmetry",
    "images_of",
]


def images_of(samples: Samples, reward: object) -> Tensor:
    """The outputs as images `[N, C, H, W]` in [0, 1]; `InputError` naming `reward` where they are something else.

    Previews reach a little beyond [0, 1]. Such a pixel counts as the nearest value inside, as it would be shown, but
    its gradient passes: a background that rests just below 0 can still be lifted.
    """
    outputs, allowed = samples.outputs, "outputs that are images, a float tensor [N, 1 or 3, H, W] in [0, 1]"
    if not isinstance(outputs, Tensor):
        shown = next((x for x in outputs), None) if isinstance(outputs, list) else outputs
        raise InputError(f"reward {reward}", shown, allowed)
    right = outputs.dim() == 4 and outputs.shape[1] in (1, 3) and 0 not in outputs.shape[2:]
    given = f"a tensor {tuple(outputs.shape)} of {outputs.dtype}"
    check(right and outputs.is_floating_point(), f"reward {reward}", given, allowed)
    images = outputs if outputs.dtype == torch.float64 else outputs.float()
    return images + (images.clamp(0, 1) - images).detach()


class ImageReward(Composable):
    """A reward of images `[N, C, H, W]` in [0, 1]."""

    modality = "image"


class Brightness(ImageReward):
    """Mean pixel, scaled to [-1, 1]: black -1, white 1."""

    def score(self, samples: Samples) -> Tensor:
        return 2 * images_of(samples, self).flatten(1).mean(1) - 1

    def __repr__(self) -> str:
        return "brightness"


class Contrast(ImageReward):
    """Standard deviation of an image's pixels within a channel (root mean square over channels), in [0, 0.5]."""

    def score(self, samples: Samples) -> Tensor:
        images = images_of(samples, self)
        if not len(images):
            return images.new_zeros(0)
        variance = images.var((2, 3), correction=0).mean(1)
        flat = variance <= 0  # where the root has no derivative
        return torch.where(flat, 0.0, torch.where(flat, 1.0, variance).sqrt())

    def __repr__(self) -> str:
        return "contrast"


@dataclass(frozen=True, repr=False)
class Symmetry(ImageReward):
    """Minus the mean absolute difference to the mirror image, in [-1, 0]; 0 is symmetric.

    `horizontal` swaps left and right, `vertical` top and bottom.
    """

    mirror: str = "horizontal"

    def __post_init__(self) -> None:
        check(self.mirror in ("horizontal", "vertical"), "symmetry", self.mirror, "horizontal, vertical")

    def score(self, samples: Samples) -> Tensor:
        images = images_of(samples, self)
        return -(images - images.flip(3 if self.mirror == "horizontal" else 2)).abs().flatten(1).mean(1)

    def __repr__(self) -> str:
        return "symmetry" if self.mirror == "horizontal" else "symmetry:vertical"


class Sharpness(ImageReward):
    """Mean absolute difference of neighbouring pixels, over pairs in a row plus over pairs in a column, in [0, 2]."""

    def score(self, samples: Samples) -> Tensor:
        images = images_of(samples, self)
        pairs = [images.diff(dim=dim).abs().flatten(1) for dim in (2, 3)]
        return sum((p.mean(1) for p in pairs if p.shape[1]), images.new_zeros(len(images)))

    def __repr__(self) -> str:
        return "sharpness"


class Incompressibility(ImageReward):
    """Size of the image as a JPEG of quality 95, in kilobytes (1,000 bytes).

    Not differentiable: `UnsupportedError` where the outputs require a gradient. Black et al., "Training diffusion
    models with reinforcement learning" (2305.13301).
    """

    def score(self, samples: Samples) -> Tensor:
        images = images_of(samples, self)
        if images.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError(f"reward {self}: the size of a JPEG has no gradient; use a sampler that needs none")
        from steer.images import to_pil

        return torch.tensor([_jpeg_bytes(image) / 1000 for image in to_pil(images)], dtype=torch.float64)

    def __repr__(self) -> str:
        return "incompressibility"


class Compressibility(Incompressibility):
    """Minus the size of the image as a JPEG of quality 95, in kilobytes: see `Incompressibility`."""

    def score(self, samples: Samples) -> Tensor:
        return -super().score(samples)

    def __repr__(self) -> str:
        return "compressibility"


def _jpeg_bytes(image: Any) -> int:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=95)
    return file.tell()


@runtime_checkable
class Classifier(Protocol):
    """What `class:LABEL` asks of a model's `classifier`."""

    classes: list[str]

    def __call__(self, images: Tensor) -> Tensor:
        """Log-probabilities `[N, len(classes)]` of images `[N, C, H, W]` in [0, 1], in nats."""


@dataclass(frozen=True, repr=False)
class ImageClass(ImageReward):
    """Log-probability, in nats, that the image belongs to one of `labels`, under the classifier that the model brings.

    Labels are names of `model.classifier.classes`, upper or lower case alike. Needs a model: `generate` binds it.
    """

    labels: tuple[str, ...]
    classifier: Classifier | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        given = (self.labels,) if isinstance(self.labels, str) else tuple(self.labels)
        allowed = "at least one label, none of them empty or twice"
        check(bool(given) and all(given) and len(set(given)) == len(given), "class", given, allowed)
        object.__setattr__(self, "labels", given)
        if self.classifier is not None:
            self._index(self.classifier)

    def bind(self, model: Any) -> ImageClass:
        classifier = getattr(model, "classifier", None)
        if classifier is self.classifier and classifier is not None:
            return self
        if not isinstance(classifier, Classifier):
            raise UnsupportedError(
                f"reward {self} needs a model with a classifier of images; {type(model).__name__} brings none"
            )
        return replace(self, classifier=classifier)

    def _index(self, classifier: Classifier) -> list[int]:
        names = [str(name) for name in classifier.classes]
        index = []
        for label in self.labels:
            exact = [i for i, name in enumerate(names) if name == label]
            same = exact or [i for i, name in enumerate(names) if name.lower() == label.lower()]
            check(len(same) == 1 and same[0] not in index, "class", label, f"each once: {', '.join(names)}")
            index.append(same[0])
        return index

    def score(self, samples: Samples) -> Tensor:
        images = images_of(samples, self)
        if self.classifier is None:
            raise SteerError(f"reward {self}: needs a model with a classifier; generate() binds one, or call .bind()")
        log_probs = self.classifier(images)
        expected = (len(images), len(self.classifier.classes))
        check(tuple(log_probs.shape) == expected, "classifier log-probabilities", tuple(log_probs.shape), f"{expected}")
        return log_probs[:, self._index(self.classifier)].logsumexp(1)

    def __repr__(self) -> str:
        return "class:" + ",".join(label if label.isalnum() else quoted(label) for label in self.labels)
