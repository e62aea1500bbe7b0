"""Control vectors in GGUF, the format of llama.cpp and repeng."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.core import InputError, check
from steer.files import check_file, check_finite, replacing
from steer.headers import check_gguf

log = logging.getLogger("steer")

_ALLOWED_GGUF = "a control vector in GGUF format"


# ------------------------------------------------------------------------------------------------------------- GGUF


def save_gguf(path: Path | str, directions: Mapping[int, Tensor], model_hint: str) -> None:
    """Write steering directions as a control vector that llama.cpp, repeng and others load.

    `directions[l]` `[D]` is added to the residual stream after block `l`, counted from 0, and goes into the file as
    `direction.l`: all three programs mean the same block by the same number, nothing is shifted. (llama.cpp's loader
    stores `direction.N` in slot N-1 and its graph takes slot il-1 after the feed-forward of layer il, so N = il;
    repeng's N is the index into the list of blocks whose output it changes.) llama.cpp keeps no slot for layer 0 and
    rejects a whole file in which there is one, so a direction after block 0 cannot be saved. `model_hint` is the
    `model_type` of the model's configuration ("llama", "qwen2"), which no program enforces.

    The file: `general.architecture` = "controlvector", `controlvector.model_hint`, `controlvector.layer_count` (how
    many directions), and float32 tensors of one dimension. Raises `InputError`.
    """
    for layer in directions:
        allowed = "blocks from 1 on: a GGUF control vector cannot hold a direction after block 0"
        check(isinstance(layer, int) and layer > 0, "directions", layer, allowed)
    _check_directions(directions)
    import gguf

    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "controlvector")
        writer.add_string("controlvector.model_hint", model_hint)
        writer.add_uint32("controlvector.layer_count", len(directions))
        for layer, direction in sorted(directions.items()):
            writer.add_tensor(f"direction.{layer}", direction.detach().cpu().float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def load_gguf(path: Path | str) -> tuple[dict[int, Tensor], str]:
    """Directions `{block: [D]}` in float32 and the model hint of a GGUF control vector; blocks as in `save_gguf`.

    A `direction.0`, which repeng can write, is taken as it is meant there: after block 0. A file made by llama.cpp's
    own cvector-generator has in `direction.N` what it measured after block N-1, and is meant for block N all the
    same, where llama.cpp adds it. Raises `InputError`.
    """
    file = check_file(path, _ALLOWED_GGUF)
    with file.open("rb") as stream:
        check(stream.read(4) == b"GGUF", "artifact", f"{file} (not GGUF)", _ALLOWED_GGUF)
    try:
        check_gguf(file)
        architecture, hint, tensors = _read_gguf(file)
    except Exception as error:
        # The reader maps the file and indexes into it, so damage surfaces as any kind of error.
        raise InputError("artifact", f"{file} (truncated or damaged)", _ALLOWED_GGUF) from error
    check(architecture == "controlvector", "artifact", f"{file} (architecture {architecture!r})", _ALLOWED_GGUF)
    named = {name: re.fullmatch(r"direction\.(\d+)", name) for name in tensors}
    if others := [name for name, match in named.items() if match is None]:
        log.warning("steer: %s: passed over, as llama.cpp does: %s", file, ", ".join(others))
    directions: dict[int, Tensor] = {}
    for name, match in named.items():
        tensor = tensors[name]
        check(
            match is None or not isinstance(tensor, str),
            "artifact",
            f"{file} ({name}: {tensor})",
            "tensors of F32, F16, BF16 or F64, not quantised ones",
        )
        if match is not None and isinstance(tensor, Tensor):
            # Some programs write a row vector, [1, D].
            directions[int(match[1])] = tensor.flatten() if max(tensor.shape, default=0) == tensor.numel() else tensor
    check(bool(directions), "artifact", f"{file} (no tensor direction.N)", _ALLOWED_GGUF)
    _check_directions(directions)
    return directions, hint


def _read_gguf(file: Path) -> tuple[str, str, dict[str, Tensor | str]]:
    """Architecture, model hint and tensors by name; the type's name in place of a tensor that is quantised."""
    import gguf
    from gguf.quants import dequantize

    def text(key: str) -> str:
        entry = reader.get_field(key)
        return "" if entry is None else str(entry.contents())

    reader = gguf.GGUFReader(file)
    kinds = gguf.GGMLQuantizationType

    def floats(t: Any) -> Tensor | str:
        if t.tensor_type == kinds.BF16:
            return torch.from_numpy(dequantize(t.data, t.tensor_type))
        known = t.tensor_type in (kinds.F32, kinds.F16, kinds.F64)
        return torch.from_numpy(t.data.astype("float32")) if known else str(t.tensor_type.name)

    tensors = {t.name: floats(t) for t in reader.tensors}
    return text("general.architecture"), text("controlvector.model_hint"), tensors


def _check_directions(directions: Mapping[int, Tensor]) -> None:
    check(len(directions) > 0, "directions", {}, "at least one direction")
    width = next(iter(directions.values())).numel()
    for layer, direction in directions.items():
        given = tuple(direction.shape)
        check(given == (width,) and width > 0, f"directions[{layer}]", given, f"shape ({width},), one width for all")
        check_finite(f"directions[{layer}]", direction)
    some = any(bool(direction.any()) for direction in directions.values())
    check(some, "directions", "zeros alone", "a direction that is not 0, without which nothing is steered")
