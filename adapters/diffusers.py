"""Diffusion models through diffusers: a network with its scheduler, or any stock pipeline."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from steer.core import InputError, Prompt, SteerError, UnsupportedError, check
from steer.diffusion import Denoiser, DiffusionProcess, Schedule
from steer.engine import Model

try:
    import diffusers
except ImportError as error:
    raise SteerError("diffusion models need diffusers: pip install diffusers") from error

from steer.adapters._schedules import Grid, replaced, schedule_of

__all__ = ["Classifier", "DiffusionModel", "NetworkDenoiser", "load"]

CARD_NAME = "MODEL_CARD.json"
_DTYPE = "dtype" if tuple(int(n) for n in diffusers.__version__.split(".")[:2]) >= (0, 42) else "torch_dtype"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


# ---------------------------------------------------------------------------------------------------------- networks


@dataclass(frozen=True)
class Labels:
    """Encoded prompts of a class-conditional network: its label of every prompt `[B]`, on the CPU."""

    index: Tensor
    plain: bool
    """Whether every prompt is the null class, so that guidance has nothing to guide to."""


@dataclass(frozen=True, eq=False)
class NetworkDenoiser:
    """A network of diffusers, called as `UNet2DModel` is, read through its scheduler's levels.

    Rows are `[N, C, H, W]` in float32, or float64 where the network is.

    Attributes:
        network: called as `network(x, timestep)`, with `class_labels` `[N]` where it has classes.
        grid: levels and conversions.
        shape: of one row, `(C, H, W)`.
        labels: label of each class by its name, () for a network without classes: such a network takes any prompt and
            heeds none.
        null: label that stands for no class; it is what the prompt "" means, and what guidance starts from.
        guidance_scale: classifier-free guidance `null + scale (class - null)` on the network's output (Ho & Salimans
            2022), both from one call with twice the rows; 1 is none.
        unshuffle: pixels of an image in each direction that lie in the channels of a row; 1 where rows are images.
    """

    network: nn.Module
    grid: Grid
    shape: tuple[int, ...]
    labels: tuple[tuple[str, int], ...] = ()
    null: int | None = None
    guidance_scale: float = 1.0
    unshuffle: int = 1

    def __post_init__(self) -> None:
        scale = self.guidance_scale
        ok = isinstance(scale, int | float) and not isinstance(scale, bool) and abs(scale) < float("inf")
        check(ok, "guidance_scale", scale, "a finite number (1 is no guidance)")
        guided = bool(self.labels) and self.null is not None
        check(
            scale == 1 or guided, "guidance_scale", scale, "1: guidance needs a network with classes and a null class"
        )

    @cached_property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the network."""
        return next(self.network.parameters()).dtype

    @cached_property
    def _timesteps(self) -> list[Tensor]:
        return list(self.grid.timesteps.to(self.device))

    def encode(self, prompts: Sequence[Prompt]) -> Labels | None:
        """The label of every prompt. Raises `InputError` for a class that is not known."""
        if not self.labels:
            return None
        index = [self._label(prompt) for prompt in prompts]
        return Labels(torch.tensor(index), all(i == self.null for i in index))

    def _label(self, prompt: Any) -> int:
        known, text = dict(self.labels), "" if prompt is None else prompt
        if text == "" and self.null is not None:
            return self.null
        if isinstance(text, str) and text in known:
            return known[text]
        folded = {name.casefold(): label for name, label in known.items()}
        lower = text.casefold() if isinstance(text, str) else ""
        if lower not in folded:
            close = difflib.get_close_matches(lower, folded, n=1)
            nothing = ', or "" for any of them' if self.null is not None else ""
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError("prompt", prompt, f"a class ({', '.join(known)}){nothing}{hint}")
        return folded[lower]

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        dtype = torch.promote_types(self.dtype, torch.float32)
        x = torch.randn(n, *self.shape, generator=generator, device=generator.device, dtype=dtype).to(self.device)
        return x if self.grid.start == 1 else x * self.grid.start

    def predict(self, x: Tensor, step: int, group: Tensor, encoded: Labels | None) -> Tensor:
        grid, time = self.grid, self._timesteps[step]
        seen = x if grid.scale[step] == 1 else x * grid.scale[step]
        seen = seen.to(self.dtype)
        if encoded is None:
            output = self._call(seen, time)
        else:
            labels = encoded.index[group].to(self.device)
            output = self._guided(seen, time, labels, encoded.plain)
        return torch.add(x * grid.keep[step], output.to(x.dtype), alpha=grid.take[step])

    def _guided(self, seen: Tensor, time: Tensor, labels: Tensor, plain: bool) -> Tensor:
        scale = self.guidance_scale
        if scale == 1 or plain:
            return self._call(seen, time, class_labels=labels)
        nothing = torch.full_like(labels, int(self.null or 0))
        if scale == 0:
            return self._call(seen, time, class_labels=nothing)
        both = self._call(torch.cat([seen, seen]), time, class_labels=torch.cat([nothing, labels]))
        base, wanted = both.chunk(2)
        return torch.add(base, wanted - base, alpha=scale)

    def _call(self, *arguments: Any, **named: Any) -> Tensor:
        return self.network(*arguments, **named, return_dict=False)[0]

    def decode(self, x: Tensor) -> Tensor:
        """Images `[N, C, H, W]`, clamped to [0, 1]."""
        images = self._images(x)
        return images.clamp(0, 1)

    def preview(self, x0: Tensor) -> Tensor:
        """As `decode`, but the gradient passes through the clamp: a pixel that rests below black can still be
        lifted.
        """
        images = self._images(x0)
        return images + (images.clamp(0, 1) - images).detach()

    def _images(self, x: Tensor) -> Tensor:
        return (nn.functional.pixel_shuffle(x, self.unshuffle) if self.unshuffle > 1 else x) / 2 + 0.5

    def show(self, prompt: Prompt) -> Any:
        return prompt


class Classifier(nn.Module):
    """A classifier that a model brings: log-probabilities `[N, len(classes)]` of images `[N, C, H, W]` in [0, 1]."""

    def __init__(self, net: nn.Module, classes: Sequence[str]) -> None:
        super().__init__()
        self.net, self.classes = net, list(classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def features(self, images: Tensor) -> Tensor:
        """What its last layer sees of images `[N, D]`, where the network shows it."""
        shown: Any = self.net
        check(hasattr(shown, "features"), "classifier", type(shown).__name__, "a network with features")
        return shown.features(images)


@dataclass(frozen=True, eq=False)
class NetworkSource:
    """A network and its scheduler, from which denoisers are made."""

    network: nn.Module
    scheduler: Any
    labels: tuple[tuple[str, int], ...] = ()
    null: int | None = None
    unshuffle: int = 1

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def make(
        self, steps: int, eta: float, guidance_scale: float | None, scheduler: Any, kind: str | None, batch: int,
        options: dict[str, Any],
    ) -> tuple[Denoiser, Schedule]:  # fmt: skip
        """A denoiser and its schedule. Raises `InputError`."""
        for name in options:
            raise InputError("setting", name, "steps, eta, guidance_scale, scheduler, kind, shown, max_batch")
        grid = schedule_of(replaced(self.scheduler, scheduler), steps, eta, kind)
        config: Any = self.network.config
        size = config.sample_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        denoiser = NetworkDenoiser(
            self.network, grid, (config.in_channels, *sides), self.labels, self.null,
            1.0 if guidance_scale is None else guidance_scale, self.unshuffle,
        )  # fmt: skip
        return denoiser, grid.schedule

    def tuned(self, what: Any) -> NetworkSource:
        """The source with another network in place of this one."""
        return replace(self, network=tuned_network(self.network, what))


def tuned_network(network: nn.Module, what: Any) -> nn.Module:
    """The network tuned from `network`: a module as it is, a folder of a whole network, or a LoRA (a folder or a file),
    which is merged into a copy of `network`. Frozen, on the same device, in the same dtype. Raises `SteerError`.
    """
    if isinstance(what, nn.Module):
        return what.eval()
    check(
        isinstance(what, str | Path) and Path(what).exists(), "tuned", what, "a module, or a folder or file that exists"
    )
    path = Path(what)
    try:
        lora = path if path.is_file() else next((path / n for n in _ADAPTER_WEIGHTS if (path / n).is_file()), None)
        if lora is not None:
            made = _merged(copy.deepcopy(network), path, lora)
        else:
            inner = next((path / n for n in ("unet", "transformer") if (path / n / "config.json").is_file()), path)
            check((inner / "config.json").is_file(), "tuned", str(path), "a network's folder, or a LoRA in safetensors")
            made = type(network).from_pretrained(inner, use_safetensors=True)  # type: ignore[attr-defined]
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if isinstance(error, InputError):
            raise
        raise SteerError(f"tuned: could not load {str(path)!r}: {_first(error)}") from error
    like = next(network.parameters())
    made = made.to(like.device)
    # diffusers warns of a cast even where there is nothing to cast.
    made = made if next(made.parameters()).dtype == like.dtype else made.to(like.dtype)
    return made.eval().requires_grad_(False)


def _merged(network: Any, path: Path, weights: Path) -> Any:
    """`network` with a LoRA folded into its weights."""
    if (weights.parent / "adapter_config.json").is_file() and weights.name == _ADAPTER_WEIGHTS[0]:
        from peft import PeftModel

        return PeftModel.from_pretrained(network, str(weights.parent)).merge_and_unload()
    with safe_open(weights, "pt") as file:
        owners = {key.split(".")[0] for key in file.keys()}  # noqa: SIM118
    prefix = next((name for name in ("unet", "transformer") if name in owners), None)
    network.load_lora_adapter(str(weights.parent), weight_name=weights.name, prefix=prefix, use_safetensors=True)
    if not getattr(network, "peft_config", None):
        raise ValueError(f"no LoRA for a {type(network).__name__} in it")
    network.fuse_lora()
    network.unload_lora()
    return network


# ------------------------------------------------------------------------------------------------------------- model


class Source(Protocol):
    """What a `DiffusionModel` is made of."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def make(
        self, steps: int, eta: float, guidance_scale: float | None, scheduler: Any, kind: str | None, batch: int,
        options: dict[str, Any],
    ) -> tuple[Denoiser, Schedule]: ...  # fmt: skip

    def tuned(self, what: Any) -> Any: ...


@dataclass(frozen=True, eq=False)
class DiffusionModel(Model):
    """A diffusion model ready to be steered. Networks and pipelines are never changed.

    Attributes:
        source: a network with its scheduler, or a pipeline.
        classes: what a class-conditional model can be asked for, by name.
        classifier: the model's own classifier of its images, for rewards such as `class:boot`.
        judge: another one that no reward uses, by whose features populations are compared.
    """

    source: Source
    name: str
    classes: list[str] | None = None
    classifier: Classifier | None = field(default=None, repr=False)
    judge: Classifier | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        return self.source.device

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def process(
        self,
        *,
        steps: int = 25,
        eta: float = 1.0,
        guidance_scale: float | None = None,
        scheduler: Any = None,
        kind: str | None = None,
        shown: str = "current",
        max_batch: int = 64,
        **options: Any,
    ) -> DiffusionProcess:
        """The model as a `Process`.

        Args:
            steps: network evaluations of a row.
            eta: 1 for as much noise as the levels allow, which samplers that fork rows want; 0 is deterministic.
            guidance_scale: of classifier-free guidance; None is 1 for a network, the pipeline's own for a pipeline.
            scheduler: None is the model's own; a scheduler of diffusers; or "ddim", "ddpm", "euler",
                "euler-ancestral", "flow-euler", made from the configuration of its own.
            kind: of noise on a flow, "flow-sde", "eta" or "renoise"; see `schedule_of`.
            shown: "current" or "previous": whose x0-hat previews show.
            max_batch: rows put through the network at once; 0 is no limit.
            options: of a pipeline: `negative_prompt`, `preview_decoder`, and what its call takes.

        Raises:
            InputError: a setting is out of range.
            UnsupportedError: the scheduler or the pipeline cannot be run a step at a time.
        """
        ok = isinstance(max_batch, int) and not isinstance(max_batch, bool) and max_batch >= 0
        check(ok, "max_batch", max_batch, "an integer of 0 (no limit) or more")
        denoiser, schedule = self.source.make(steps, eta, guidance_scale, scheduler, kind, max_batch, options)
        return DiffusionProcess(denoiser, schedule, shown=shown, max_batch=max_batch)

    def tuned(self, what: Any, name: str | None = None) -> DiffusionModel:
        """A second model with a network that was tuned from this one's, such as RL guidance takes: a module, a folder,
        or a LoRA in safetensors, which is merged into a copy. Raises `SteerError`.
        """
        called = name or (type(what).__name__ if isinstance(what, nn.Module) else str(what))
        return DiffusionModel(self.source.tuned(what), called, self.classes, self.classifier, self.judge)


# -------------------------------------------------------------------------------------------------------------- load


def load(
    where: str | Path | Any,
    *,
    name: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    scheduler: Any = None,
    classes: Sequence[str] | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> DiffusionModel:
    """A diffusion model from a folder that `steer` ships, a pipeline's folder or Hugging Face id, a pipeline in memory,
    or a network with `scheduler`.

    Args:
        where: the folder, the id, the pipeline or the network.
        name: what results call it.
        dtype: of the weights in use; "auto" is float32.
        device: where the model is put; None leaves it.
        scheduler: of diffusers; needed with a bare network, in place of a pipeline's own otherwise.
        classes: names of the labels of a class-conditional network, in order; one label more is the null class.
        trust_remote_code: whether code that comes with a pipeline may run.
        options: go to `DiffusionPipeline.from_pretrained`. Only safetensors are read.

    Raises:
        InputError: an argument is out of range.
        SteerError: nothing can be loaded.
    """
    wanted = _as_dtype(dtype)
    if isinstance(where, diffusers.DiffusionPipeline):
        return _of_pipeline(where, name or _label_of(where), wanted, device, scheduler, classes)
    if isinstance(where, nn.Module):
        check(scheduler is not None, "scheduler", None, "the network's scheduler, when a network is given")
        moved = _placed(where, wanted, device)
        return _of_network(moved, replaced(None, scheduler), name or type(where).__name__, classes)
    check(isinstance(where, str | Path), "model", where, "a folder, a Hugging Face id, a pipeline or a network")
    called, folder = name or str(where), Path(where)
    if (folder / CARD_NAME).is_file():
        check(not options and classes is None, "options", sorted(options), "none for a folder that describes itself")
        return _shipped(folder, called, wanted, device, scheduler)
    if wanted is not None:
        options[_DTYPE] = wanted
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            str(where), use_safetensors=True, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, ImportError, TypeError) as error:
        raise SteerError(f"model: could not load {str(where)!r}: {_first(error)}") from error
    return _of_pipeline(pipeline, called, wanted, device, scheduler, classes)


def _shipped(folder: Path, name: str, dtype: torch.dtype | None, device: Any, scheduler: Any) -> DiffusionModel:
    """A folder in the layout that `steer` ships: a card, `unet/`, `scheduler/`, and maybe `classifier/`."""
    try:
        card = json.loads((folder / CARD_NAME).read_text(encoding="utf-8"))
        check(isinstance(card, dict) and card.get("kind") == "diffusion", "model", str(folder), "a diffusion model")
        network = diffusers.UNet2DModel.from_pretrained(
            folder / "unet", use_safetensors=True, low_cpu_mem_usage=False, **{_DTYPE: dtype or torch.float32}
        )
        own = diffusers.DDIMScheduler.load_config(folder / "scheduler")
        own = getattr(diffusers, own["_class_name"]).from_config(own)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise SteerError(f"model: could not load {str(folder)!r}: {_first(error)}") from error
    network = _placed(network, dtype, device).requires_grad_(False)
    classes = [str(c) for c in card.get("classes") or ()]
    source = NetworkSource(
        network, replaced(own, scheduler), tuple((c, i) for i, c in enumerate(classes)), card.get("null_class"),
        int(card.get("pixel_unshuffle") or 1),
    )  # fmt: skip
    nets: dict[str, Classifier] = {}
    for kind in ("classifier", "judge"):
        if (folder / kind).is_dir():
            from steer.rewards.convnet import load_net

            nets[kind] = Classifier(load_net(folder / kind), classes).eval().to(source.device)
    return DiffusionModel(source, name, classes or None, **nets)


def _of_pipeline(
    pipeline: Any, name: str, dtype: torch.dtype | None, device: Any, scheduler: Any, classes: Sequence[str] | None
) -> DiffusionModel:
    if device is not None:
        pipeline.to(device)
    if dtype is not None:
        pipeline.to(dtype)
    if set(pipeline.components) == {"unet", "scheduler"}:
        return _of_network(pipeline.unet, replaced(pipeline.scheduler, scheduler), name, classes)
    check(classes is None, "classes", classes, "unset: a pipeline has none")
    from steer.adapters.pipelines import PipelineSource

    return DiffusionModel(PipelineSource(pipeline, replaced(pipeline.scheduler, scheduler)), name)


def _of_network(network: Any, scheduler: Any, name: str, classes: Sequence[str] | None) -> DiffusionModel:
    config: Any = getattr(network, "config", None)
    known = config is not None and hasattr(config, "sample_size") and hasattr(config, "in_channels")
    check(known, "model", type(network).__name__, "a network of diffusers whose config has sample_size and in_channels")
    if config.sample_size is None:
        raise UnsupportedError(f"{type(network).__name__} has no sample_size in its config: the size of x is not known")
    if getattr(config, "cross_attention_dim", None) is not None and not isinstance(network, diffusers.UNet2DModel):
        raise UnsupportedError(f"{type(network).__name__} is told what to draw by text: load its pipeline")
    if config.out_channels not in (None, config.in_channels):
        raise UnsupportedError(f"{type(network).__name__} predicts more than the {config.in_channels} channels of x")
    network = network.eval()
    count, null = getattr(config, "num_class_embeds", None), None
    if count is None and getattr(config, "class_embed_type", None) is not None:
        raise UnsupportedError("a network with class_embed_type but without num_class_embeds takes no class names")
    if count is None:
        check(classes is None, "classes", classes, "unset: the network has no classes")
        return DiffusionModel(NetworkSource(network, scheduler), name)
    names = [str(i) for i in range(count)] if classes is None else [str(c) for c in classes]
    check(len(set(names)) == len(names) and count - len(names) in (0, 1), "classes", names,
          f"{count} different names, or {count - 1} and the null class last")  # fmt: skip
    if len(names) == count - 1:
        null = count - 1
    return DiffusionModel(
        NetworkSource(network, scheduler, tuple((c, i) for i, c in enumerate(names)), null), name, names
    )


def _placed(network: nn.Module, dtype: torch.dtype | None, device: Any) -> nn.Module:
    if dtype is not None or device is not None:
        network = network.to(device=device, dtype=dtype)
    return network.eval()


def _as_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """None for "auto"."""
    if isinstance(dtype, torch.dtype):
        return dtype
    check(dtype in ("auto", "float64", "float32", "bfloat16", "float16"), "dtype", dtype,
          "auto, float64, float32, bfloat16, float16")  # fmt: skip
    return None if dtype == "auto" else getattr(torch, dtype)


def _label_of(pipeline: Any) -> str:
    return str(pipeline.config.get("_name_or_path") or type(pipeline).__name__)


def _first(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
