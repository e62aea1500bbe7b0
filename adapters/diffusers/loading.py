"""Diffusion models through diffusers: a network with its scheduler, or any stock pipeline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from steer.adapters.diffusers.model import Classifier, DiffusionModel
from steer.adapters.diffusers.network import NetworkSource
from steer.adapters.diffusers.pipeline.denoiser import PipelineSource
from steer.adapters.diffusers.schedules import replaced
from steer.core import InputError, SteerError, UnsupportedError, check
from steer.core.errors import first_line
from steer.embedded import CARD_NAME

__all__ = ["load"]


_DTYPE = "dtype" if tuple(int(n) for n in diffusers.__version__.split(".")[:2]) >= (0, 42) else "torch_dtype"


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
        raise SteerError(f"model: could not load {str(where)!r}: {first_line(error)}") from error
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
        raise SteerError(f"model: could not load {str(folder)!r}: {first_line(error)}") from error
    network = _placed(network, dtype, device).requires_grad_(False)
    classes = [str(c) for c in card.get("classes") or ()]
    source = NetworkSource(
        network,
        replaced(own, scheduler),
        tuple((c, i) for i, c in enumerate(classes)),
        card.get("null_class"),
        int(card.get("pixel_unshuffle") or 1),
    )
    nets: dict[str, Classifier] = {}
    for kind in ("classifier", "judge"):
        if (folder / kind).is_dir():
            from steer.train.fashion.nets import load_net

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
    return DiffusionModel(PipelineSource(pipeline, replaced(pipeline.scheduler, scheduler)), name)


def _of_network(network: Any, scheduler: Any, name: str, classes: Sequence[str] | None) -> DiffusionModel:
    _require(network)
    network = network.eval()
    config, null = network.config, None
    count = getattr(config, "num_class_embeds", None)
    if count is None and getattr(config, "class_embed_type", None) is not None:
        raise UnsupportedError("a network with class_embed_type but without num_class_embeds takes no class names")
    if count is None:
        check(classes is None, "classes", classes, "unset: the network has no classes")
        return DiffusionModel(NetworkSource(network, scheduler), name)
    names = [str(i) for i in range(count)] if classes is None else [str(c) for c in classes]
    check(
        len(set(names)) == len(names) and count - len(names) in (0, 1),
        "classes",
        names,
        f"{count} different names, or {count - 1} and the null class last",
    )
    if len(names) == count - 1:
        null = count - 1
    return DiffusionModel(
        NetworkSource(network, scheduler, tuple((c, i) for i, c in enumerate(names)), null), name, names
    )


def _require(network: Any) -> None:
    """Raise where a bare network does not say what x is, or wants more than x."""
    name = type(network).__name__
    config: Any = getattr(network, "config", None)
    known = config is not None and hasattr(config, "sample_size") and hasattr(config, "in_channels")
    check(known, "model", name, "a network of diffusers whose config has sample_size and in_channels")
    if config.sample_size is None:
        raise UnsupportedError(f"{name} has no sample_size in its config: the size of x is not known")
    if getattr(config, "cross_attention_dim", None) is not None and not isinstance(network, diffusers.UNet2DModel):
        raise UnsupportedError(f"{name} is told what to draw by text: load its pipeline")
    if config.out_channels not in (None, config.in_channels):
        raise UnsupportedError(f"{name} predicts more than the {config.in_channels} channels of x")


def _placed(network: nn.Module, dtype: torch.dtype | None, device: Any) -> nn.Module:
    if dtype is not None or device is not None:
        network = network.to(device=device, dtype=dtype)
    return network.eval()


def _as_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """None for "auto"."""
    if isinstance(dtype, torch.dtype):
        return dtype
    check(
        dtype in ("auto", "float64", "float32", "bfloat16", "float16"),
        "dtype",
        dtype,
        "auto, float64, float32, bfloat16, float16",
    )
    return None if dtype == "auto" else getattr(torch, dtype)


def _label_of(pipeline: Any) -> str:
    return str(pipeline.config.get("_name_or_path") or type(pipeline).__name__)
