"""Rewards for images from Hugging Face: CLIP and dual encoders like it, aesthetic heads, image classifiers.

Weights are read from safetensors files alone, on first use; code that comes with a model never runs. Images are
prepared by differentiable tensor operations that follow the model's own `preprocessor_config.json`, so every reward
here has a gradient.

Axis letters: `N` samples, `C` channels, `H` rows, `W` columns, `D` width of the shared embedding.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, linear, normalize

from steer.adapters.rewards.text import (
    ModelReward,
    as_path,
    flat,
    folder_config,
    label_index,
    labels_of,
    loading,
    pretrained,
)
from steer.core import Samples, check
from steer.rewards.image import ImageReward, images_of

__all__ = ["AestheticReward", "ClipReward", "ImageClassifierReward", "PickScore", "Preparation"]


CLIP = "openai/clip-vit-base-patch32"
CLIP_LARGE = "openai/clip-vit-large-patch14"
_RESAMPLING = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(weight|bias)")


@dataclass(frozen=True)
class Preparation:
    """How a model wants its images: resized, cropped to the centre, and shifted and scaled by channel."""

    size: tuple[int, int] | int | None
    """Rows and columns, or the length of the shorter side; None leaves the size alone."""
    crop: tuple[int, int] | None
    mode: str
    rescale: float
    """Factor on pixels in [0, 1]; 1 is the usual one."""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, source: str) -> Preparation:
        """From the image processor's settings in a folder or on the hub."""
        from transformers.image_processing_base import ImageProcessingMixin

        return cls.of(ImageProcessingMixin.get_image_processor_dict(source)[0])

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Preparation:
        """From an image processor's settings; what is left out is CLIP's where there is a centre crop, else ViT's."""
        strange = [name for name in ("crop_pct", "rescale_offset", "include_top", "do_pad") if settings.get(name)]
        check(not strange, "image processor", ", ".join(strange), "resize, centre crop, rescale and normalise alone")
        cropped = bool(settings.get("do_center_crop", False))
        resample = settings.get("resample", 3 if cropped else 2)
        check(resample in _RESAMPLING, "resample", resample, "0 (nearest), 2 (bilinear), 3 (bicubic)")
        size = settings.get("size", 224) if settings.get("do_resize", True) else None
        normal = settings.get("do_normalize", True)
        return cls(
            size=_size(size, square=not cropped),
            crop=_square(settings.get("crop_size", 224)) if cropped else None,
            mode=_RESAMPLING[resample],
            rescale=255 * float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 255.0,
            mean=tuple(settings.get("image_mean", (0.5,) * 3)) if normal else (0.0,) * 3,
            std=tuple(settings.get("image_std", (0.5,) * 3)) if normal else (1.0,) * 3,
        )

    def __call__(self, images: Tensor) -> Tensor:
        """The network's input `[N, 3, h, w]` from images `[N, 1 or 3, H, W]` in [0, 1]."""
        images = images.expand(-1, 3, -1, -1)
        size = self._target(*images.shape[2:])
        if size != tuple(images.shape[2:]):
            smooth = self.mode != "nearest-exact"
            images = interpolate(images, size, mode=self.mode, antialias=smooth).clamp(0, 1)
        if self.crop is not None:
            (height, width), (rows, columns) = self.crop, images.shape[2:]
            enough = height <= rows and width <= columns
            check(enough, "crop_size", self.crop, f"at most the resized image, {rows} x {columns}")
            top, left = (rows - height) // 2, (columns - width) // 2
            images = images[:, :, top : top + height, left : left + width]
        mean, std = (images.new_tensor(x).view(-1, 1, 1) for x in (self.mean, self.std))
        return (images * self.rescale - mean) / std

    def _target(self, rows: int, columns: int) -> tuple[int, int]:
        if not isinstance(self.size, int):
            return self.size or (rows, columns)
        short = min(rows, columns)
        return self.size * rows // short, self.size * columns // short


def _size(size: Any, square: bool) -> tuple[int, int] | int | None:
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        return int(size["shortest_edge"])
    return size if size is None or (isinstance(size, int) and not square) else _square(size)


def _square(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    check(isinstance(size, dict) and set(size) == {"height", "width"}, "size", size, "height and width, or one number")
    return int(size["height"]), int(size["width"])


def _batches(network: Callable[[Tensor], Tensor], images: Tensor, batch_size: int) -> Tensor:
    """`network` over images in batches, in float64; with a graph where the images carry one."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
        return torch.cat([network(part).double() for part in images.split(batch_size)])


def _placed(images: Tensor, model: Any) -> Tensor:
    weight = next(model.parameters())
    return images.to(weight.device, weight.dtype)


def _embedded(model: Any, preparation: Preparation, images: Tensor) -> Tensor:
    """CLIP's embeddings of images `[N, D]`, of norm 1, in float64."""
    pooled = model.vision_model(pixel_values=preparation(_placed(images, model))).pooler_output
    return normalize(model.visual_projection(pooled).double(), dim=1)


class ClipReward(ImageReward):
    """Cosine between CLIP's embeddings of the image and of `text` (None: of each image's own prompt), in [-1, 1].

    `model` is a model id or folder in transformers' CLIP format; `processor` names another one for tokenizer and image
    processor. `scaled` multiplies by the model's trained `exp(logit_scale)`. Text beyond the model's context is cut.
    """

    def __init__(
        self,
        text: str | None = None,
        model: str | Path = CLIP,
        *,
        processor: str | Path | None = None,
        scaled: bool = False,
        batch_size: int = 16,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check(text is None or bool(text.strip()), "clip text", text, "a text that is not empty, or None for the prompt")
        check(isinstance(batch_size, int) and batch_size > 0, "batch_size", batch_size, "an integer > 0")
        folder_config(str(model))
        self.text, self.model, self.processor, self.scaled = text, model, processor, scaled
        self.batch_size, self.device, self.dtype = batch_size, device, dtype
        self._loaded: tuple[Any, Any, Preparation] | None = None
        self._vectors: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        return _written("clip", self.text, None if self.model == CLIP else self.model)

    def score(self, samples: Samples) -> Tensor:
        images = images_of(samples, self)
        if not len(images):
            return torch.zeros(0, dtype=torch.float64)
        model, tokenizer, preparation = self._load()
        by_prompt = [self.text or self._prompt(prompt) for prompt in samples.prompts]
        texts = torch.stack([self._vector(model, tokenizer, text) for text in by_prompt])

        def embed(part: Tensor) -> Tensor:
            return _embedded(model, preparation, part)

        cosine = (_batches(embed, images, self.batch_size) * texts[samples.group.to(texts.device)]).sum(1)
        return cosine * model.logit_scale.double().exp() if self.scaled else cosine

    def _prompt(self, prompt: Any) -> str:
        text = flat(prompt) if isinstance(prompt, str | list | tuple) else ""
        check(
            bool(text.strip()), f"reward {self}", prompt, 'a prompt that is a text, or a text of its own: clip:"TEXT"'
        )
        return text

    @torch.no_grad()
    def _vector(self, model: Any, tokenizer: Any, text: str) -> Tensor:
        if text not in self._vectors:
            limit = model.config.text_config.max_position_embeddings
            tokens = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt").to(model.device)
            pooled = model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
            self._vectors[text] = normalize(model.text_projection(pooled)[0].double(), dim=0)
        return self._vectors[text]

    def _load(self) -> tuple[Any, Any, Preparation]:
        if self._loaded is None:
            from transformers import AutoTokenizer, CLIPModel

            source = as_path(str(self.model))
            helper = source if self.processor is None else as_path(str(self.processor))
            with loading(self, helper, "CLIP processor"):
                preparation = Preparation.read(helper)
                tokenizer = AutoTokenizer.from_pretrained(helper, trust_remote_code=False)
            model = pretrained(self, CLIPModel, source, "CLIP model", self.device, self.dtype, use_safetensors=True)
            self._loaded = (model, tokenizer, preparation)
        return self._loaded


class PickScore(ClipReward):
    """PickScore v1: what people prefer among images for a prompt, about 18 to 24. Kirstain et al. (2305.01569)."""

    def __init__(self, text: str | None = None, **options: Any) -> None:
        given = {"model": "yuvalkirstain/PickScore_v1", "processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}
        super().__init__(text, **{**given, "scaled": True, **options})

    def __repr__(self) -> str:
        return _written("pickscore", self.text, None)


class AestheticReward(ImageReward):
    """LAION's aesthetic score, about 1 to 10: a head of linear layers on the normalised embedding of a CLIP image.

    `head` is a safetensors file with `layers.I.weight` and `layers.I.bias` (the layers of
    `sac+logos+ava1-l14-linearMSE` from improved-aesthetic-predictor, which has no activations between them) or one
    `weight` and `bias`; a file, `org/name` (its `model.safetensors`) or `org/name/FILE`. The published .pth files
    must be converted first.
    """

    def __init__(
        self,
        head: str | Path,
        model: str | Path = CLIP_LARGE,
        *,
        batch_size: int = 16,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check(isinstance(batch_size, int) and batch_size > 0, "batch_size", batch_size, "an integer > 0")
        path, hub = Path(as_path(str(head))), re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(?:/[\w.+-]+)*", str(head))
        allowed = "a .safetensors file, or org/name or org/name/FILE on the hub"
        usable = path.suffix == ".safetensors" if path.exists() else bool(hub)
        check(usable and path.suffix not in (".pth", ".pt", ".bin"), "aesthetic head", str(head), allowed)
        folder_config(str(model))
        self.head, self.model, self.batch_size, self.device, self.dtype = head, model, batch_size, device, dtype
        self._loaded: tuple[Any, list[tuple[Tensor, Tensor]], Preparation] | None = None

    def __repr__(self) -> str:
        model = "" if self.model == CLIP_LARGE else f',model="{self.model}"'
        return f'aesthetic:head="{self.head}"{model}'

    def score(self, samples: Samples) -> Tensor:
        images = images_of(samples, self)
        if not len(images):
            return torch.zeros(0, dtype=torch.float64)
        model, layers, preparation = self._load()

        def rate(part: Tensor) -> Tensor:
            x = _embedded(model, preparation, part)
            for weight, bias in layers:
                x = linear(x, weight, bias)
            return x[:, 0]

        return _batches(rate, images, self.batch_size)

    def _load(self) -> tuple[Any, list[tuple[Tensor, Tensor]], Preparation]:
        if self._loaded is None:
            from transformers import CLIPModel

            source = as_path(str(self.model))
            with loading(self, source, "CLIP processor"):
                preparation = Preparation.read(source)
            model = pretrained(self, CLIPModel, source, "CLIP model", self.device, self.dtype, use_safetensors=True)
            del model.text_model, model.text_projection
            with loading(self, str(self.head), "head"):
                layers = _head(str(self.head), model.config.projection_dim)
            self._loaded = (model, [(w.to(model.device), b.to(model.device)) for w, b in layers], preparation)
        return self._loaded


def _head(source: str, width: int) -> list[tuple[Tensor, Tensor]]:
    """The head's linear layers in order, in float64."""
    from safetensors.torch import load_file

    path = Path(as_path(source))
    if not path.is_file():
        from huggingface_hub import hf_hub_download

        owner, name, *rest = source.split("/")
        path = Path(hf_hub_download(f"{owner}/{name}", "/".join(rest) or "model.safetensors"))
    found: dict[int, dict[str, Tensor]] = {}
    for key, x in load_file(path).items():
        match = _LAYER.fullmatch(key)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = x.double()
        elif key in ("weight", "bias"):
            found.setdefault(0, {})[key] = x.double()
    layers = [found[i] for i in sorted(found)]
    widths = [width, *(len(layer["weight"]) if "weight" in layer else 0 for layer in layers)]
    fits = bool(layers) and all(
        set(layer) == {"weight", "bias"} and layer["weight"].shape == (b, a) and layer["bias"].shape == (b,)
        for layer, a, b in zip(layers, widths[:-1], widths[1:], strict=True)
    )
    check(fits and widths[-1] == 1, "aesthetic head", source, f"linear layers from {width} numbers to 1")
    return [(layer["weight"], layer["bias"]) for layer in layers]


class ImageClassifierReward(ModelReward):
    """Log-probability of `label`, in nats, under an image classifier that transformers loads; its raw output where it
    has only one. `source` is a model id or a folder.
    """

    modality = "image"

    def __init__(
        self,
        source: str | Path,
        label: str | int | None = None,
        batch_size: int = 16,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(source, label, batch_size=batch_size, device=device, dtype=dtype)

    def __repr__(self) -> str:
        return _written("classifier", None if self.label is None else str(self.label), self.source)

    def score(self, samples: Samples) -> Tensor:
        images = images_of(samples, self)
        if not len(images):
            return torch.zeros(0, dtype=torch.float64)
        model, preparation = self._load()

        def classify(part: Tensor) -> Tensor:
            return model(pixel_values=preparation(_placed(part, model))).logits

        return self._read(_batches(classify, images, self.batch_size), model.config)

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import AutoModelForImageClassification

            source = as_path(str(self.source))
            with loading(self, source, "image classifier"):
                preparation = Preparation.read(source)
            model = pretrained(
                self,
                AutoModelForImageClassification,
                source,
                "image classifier",
                self.device,
                self.dtype,
                use_safetensors=True,
            )
            label_index(labels_of(model.config.to_dict()), self.label)
            self._loaded = (model, preparation)
        return self._loaded


def _written(name: str, text: str | None, model: object) -> str:
    """A reward as `parse_reward` reads it."""
    quoted = None if text is None else text if text.isalnum() else f'"{text}"'
    items = [item for item in (quoted, None if model is None else f'model="{model}"') if item]
    return f"{name}:{','.join(items)}" if items else name
