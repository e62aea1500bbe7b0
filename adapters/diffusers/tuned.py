"""A network that was tuned from another: a module, a folder, or a LoRA merged into a copy."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from steer.core import InputError, SteerError, check
from steer.core.errors import first_line

_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


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
        raise SteerError(f"tuned: could not load {str(path)!r}: {first_line(error)}") from error
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
