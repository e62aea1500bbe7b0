"""Features of sparse autoencoders as steering vectors: SAELens' and Gemma Scope's layouts, without either library.

A feature's direction is its row of the decoder, `W_dec[feature]` of `[features, width]`. SAELens keeps `cfg.json` with
`sae_weights.safetensors`; Gemma Scope keeps `params.npz` in a folder whose path names the layer, as in
`layer_20/width_16k/average_l0_71/params.npz`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from steer.artifacts import Card
from steer.core import InputError, ModelInfo, check
from steer.core.errors import first_line
from steer.edits import Artifact

__all__ = ["Feature", "import_sae", "read_feature"]

_ALLOWED = (
    "a folder of SAELens (cfg.json, sae_weights.safetensors) or of Gemma Scope (params.npz), or one of these files"
)
_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|mid|post)|(?:.*\.)?layers\.(\d+)")


@dataclass(frozen=True)
class Feature:
    """One feature's direction `[D]` in the residual stream after block `layer`."""

    direction: Tensor
    layer: int
    features: int
    """How many the autoencoder has."""
    layout: str


def import_sae(source: Path | str, feature: int, model: ModelInfo, *, layer: int | None = None) -> Artifact:
    """A feature as a steering vector of one layer, in units of that layer's residual norm.

    Args:
        source: a folder or file, see `read_feature`.
        feature: its number, from 0.
        model: what the vector belongs to; its width and depth are checked.
        layer: the block after which it acts, where the files do not say.

    Raises `InputError`.
    """
    found = read_feature(source, feature, layer)
    width = len(found.direction)
    check(width == model.width, "sae", f"width {width}", f"width {model.width}, that of {model.name}")
    check(0 <= found.layer < model.num_layers, "layer", found.layer, f"0 to {model.num_layers - 1}")
    card = Card(
        kind="vector",
        model=model.entry(),
        layers=[found.layer],
        settings={"layers": str(found.layer), "strength": 1.0, "scope": "all", "unit": "norm"},
        recipe={"method": "sae", "layout": found.layout, "feature": feature, "features": found.features},
    )
    direction = found.direction / found.direction.norm()
    return Artifact({f"direction.{found.layer}": direction}, card)


def read_feature(source: Path | str, feature: int, layer: int | None = None) -> Feature:
    """A decoder row of SAELens' or Gemma Scope's files; nothing is unpickled. Raises `InputError`."""
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    arrays, weights = folder / "params.npz", folder / "sae_weights.safetensors"
    check(path.exists() and (arrays.is_file() or weights.is_file()), "sae", str(source), _ALLOWED)
    if weights.is_file() and path.suffix != ".npz":
        config = _config(folder / "cfg.json")
        row, count = _saelens_row(weights, feature)
        told, layout = _hooked(config), "saelens"
    else:
        row, count = _gemma_row(arrays, feature)
        named = re.findall(r"layer_(\d+)", str(arrays.resolve()))
        told, layout = (int(named[-1]) if named else None), "gemma-scope"
    where = told if layer is None else layer
    check(where is not None, "layer", None, "a number: these files do not say after which block the feature acts")
    check(
        bool(torch.isfinite(row).all()) and float(row.norm()) > 0,
        f"feature {feature}",
        "no direction",
        "finite numbers",
    )
    assert where is not None
    return Feature(row, where, count, layout)


def _saelens_row(weights: Path, feature: int) -> tuple[Tensor, int]:
    try:
        with safe_open(weights, "pt") as file:
            names = list(file.keys())
            check("W_dec" in names, "sae", f"tensors {', '.join(names[:5])}", "a decoder W_dec [features, width]")
            part = file.get_slice("W_dec")
            count = int(part.get_shape()[0])
            _check_feature(feature, count)
            return part[feature : feature + 1][0].float(), count
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("sae", f"{weights} ({first_line(error)})", _ALLOWED) from error


def _gemma_row(arrays: Path, feature: int) -> tuple[Tensor, int]:
    try:
        with np.load(arrays, allow_pickle=False) as found:
            check("W_dec" in found.files, "sae", f"arrays {', '.join(found.files[:5])}", "a decoder W_dec")
            decoder = found["W_dec"]
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("sae", f"{arrays} ({first_line(error)})", _ALLOWED) from error
    check(decoder.ndim == 2, "sae", f"W_dec of shape {decoder.shape}", "a decoder W_dec [features, width]")
    _check_feature(feature, len(decoder))
    return torch.from_numpy(decoder[feature].astype(np.float32)), len(decoder)


def _check_feature(feature: int, count: int) -> None:
    check(0 <= feature < count, "feature", feature, f"0 to {count - 1}")


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("sae", f"{path} ({first_line(error)})", "cfg.json as SAELens writes it") from error
    check(isinstance(found, dict), "sae", str(path), "cfg.json as SAELens writes it")
    return dict(found)


def _hooked(config: dict[str, Any]) -> int | None:
    """The block after which a SAELens autoencoder reads the residual stream. Raises `InputError` for one that reads
    something else.
    """
    metadata = config.get("metadata")
    hook = config.get("hook_name") or (metadata.get("hook_name") if isinstance(metadata, dict) else None)
    if hook is None:
        return None
    found = _HOOK.fullmatch(str(hook))
    allowed = "an autoencoder of the residual stream, blocks.N.hook_resid_post or hook_resid_pre"
    check(found is not None and found[2] != "mid", "sae", f"hook_name {hook}", allowed)
    assert found is not None
    layer = int(found[1] if found[1] is not None else found[3]) - (found[2] == "pre")
    check(layer >= 0, "sae", f"hook_name {hook}", "one after a block: vectors act after blocks")
    return layer
