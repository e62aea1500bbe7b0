"""Data of tuned diffusion policies as it is given: prompts for a reward, or rows of prompts and images.

Letters: `C`, `H`, `W` of a row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steer.adapters.diffusers.network import NetworkDenoiser
from steer.artifacts import data_hash
from steer.core import InputError, Prompt, check
from steer.train.diffusion_policy.inputs import Pair, Tunable

PAIRS = "pairs.jsonl"


def read_data(base: Tunable, data: Any, method: str, rewarded: bool) -> tuple[list[Prompt], list[Pair], str, int]:
    """Prompts, pairs, the hash of the data, and how many rows there were. Raises `InputError`."""
    folder = Path(data) if isinstance(data, str | Path) and not rewarded else None
    listed: Any = _listed(folder) if folder is not None else data
    check(isinstance(listed, Sequence) and not isinstance(listed, str), "data", listed, "a list of rows or prompts")
    check(len(listed) > 0, "data", listed, "at least one row")
    if rewarded:
        prompts = [row["prompt"] if isinstance(row, Mapping) and "prompt" in row else row for row in listed]
        for i, prompt in enumerate(prompts):
            _check_encodes(base, prompt, f"data[{i}]")
        return prompts, [], data_hash(prompts), len(prompts)
    columns = ("chosen", "rejected") if method == "dpo" else ("chosen",)
    pairs = [_pair(base, row, columns, folder, f"data[{i}]") for i, row in enumerate(listed)]
    return [pair.prompt for pair in pairs], pairs, data_hash([_hashed(pair) for pair in pairs]), len(pairs)


def _listed(folder: Path) -> list[Any]:
    path = folder / PAIRS
    check(path.is_file(), "data", f"{path} (no such file)", f"a folder with {PAIRS}, or a list of rows")
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError("data", f"{path} ({error})", "a JSON object on every line") from error


def _pair(base: Tunable, row: Any, columns: Sequence[str], folder: Path | None, field: str) -> Pair:
    denoiser = base.levels.denoiser
    assert isinstance(denoiser, NetworkDenoiser)
    allowed = f"a row with {', '.join(('prompt', *columns))}; prompts alone need a reward"
    check(isinstance(row, Mapping), field, row, allowed)
    for column in ("prompt", *columns):
        check(column in row, f"{field}.{column}", "nothing", allowed)
    _check_encodes(base, row["prompt"], f"{field}.prompt")
    return Pair(row["prompt"], *(_as_row(row[column], denoiser, folder, f"{field}.{column}") for column in columns))


def _hashed(pair: Pair) -> list[Any]:
    rows = [pair.chosen] if pair.rejected is None else [pair.chosen, pair.rejected]
    return [pair.prompt, *(hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in rows)]


def _check_encodes(base: Tunable, prompt: Any, field: str) -> None:
    try:
        base.chain.denoiser.encode([prompt])
    except InputError as error:
        raise InputError(field, error.given, error.allowed) from error


def _as_row(image: Any, denoiser: NetworkDenoiser, folder: Path | None, field: str) -> Tensor:
    """An image as the network sees finished rows `[C, H, W]`."""
    u = denoiser.unshuffle
    channels, height, width = denoiser.shape
    wanted = (channels // (u * u), height * u, width * u)
    allowed = f"an image, as a tensor {wanted} in [0, 1] or the path of a file"
    if isinstance(image, str | Path):
        image = _pixels((folder or Path()) / image, wanted[0], field)
    check(isinstance(image, Tensor), field, type(image).__name__, allowed)
    fits = tuple(image.shape) == wanted and image.is_floating_point()
    check(fits, field, f"a tensor {tuple(image.shape)} of {image.dtype}", allowed)
    inside = bool(image.isfinite().all()) and float(image.min()) >= 0 and float(image.max()) <= 1
    check(inside, field, "values outside [0, 1]", allowed)
    dtype = torch.promote_types(denoiser.dtype, torch.float32)
    return nn.functional.pixel_unshuffle(image.detach().cpu().to(dtype)[None] * 2 - 1, u)[0].contiguous()


def _pixels(path: Path, channels: int, field: str) -> Tensor:
    import numpy as np
    from PIL import Image

    check(path.is_file(), field, f"{path} (no such file)", "an image file")
    try:
        with Image.open(path) as image:
            array = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32)
    except (OSError, ValueError) as error:
        raise InputError(field, f"{path} (cannot be read)", "an image file") from error
    return torch.from_numpy(array / 255).reshape(*array.shape[:2], -1).permute(2, 0, 1)
