"""What training leaves behind: one safetensors file with a card, or a control vector in llama.cpp's GGUF layout.

Nothing here unpickles. A file that cannot be read is refused with one line that names the file and the reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from steer.core import InputError, SteerError, check

__all__ = ["Artifact", "Card", "FORMAT", "data_hash", "load", "load_gguf", "read_card", "save", "save_gguf"]

FORMAT = 1
_KEY = "steer"
_ALLOWED = "an artifact saved by steer (safetensors with a card)"
_ALLOWED_GGUF = "a control vector in GGUF format"
_PICKLES = {b"\x80": "a pickle", b"PK\x03\x04": "a zip archive (torch.save)"}


def _version() -> str:
    try:
        return metadata.version("steer-engine")
    except metadata.PackageNotFoundError:
        return "0"


@dataclass(frozen=True)
class Card:
    """What an artifact is, which model it fits, how it was made and how well it does."""

    kind: str
    """What it is: "vector", "controller", "value", ..."""
    model: dict[str, Any]
    """`name`, `fingerprint`, `num_layers`, `width`."""
    layers: list[int] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    """Defaults with which to use it."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """How it was made: method, hyper-parameters, seed."""
    data: dict[str, Any] = field(default_factory=dict)
    """What it was made from: `sha256`, `rows`."""
    metrics: dict[str, Any] = field(default_factory=dict)
    version: str = field(default_factory=_version)
    format: int = FORMAT

    def describe(self) -> str:
        """Short text for people."""
        lines = [f"{self.kind} for {self.model.get('name', '?')}, made by steer {self.version}"]
        if self.layers:
            lines.append(f"layers: {ranges(self.layers)} of {self.model.get('num_layers', '?')}")
        for name in ("settings", "recipe", "data", "metrics"):
            if entries := getattr(self, name):
                lines.append(f"{name}: {', '.join(f'{k} {_short(v)}' for k, v in entries.items())}")
        return "\n".join(lines)


class Artifact(NamedTuple):
    """What training returns: `save(path, *artifact)` writes it."""

    tensors: dict[str, Tensor]
    card: Card


def ranges(numbers: Iterable[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def _short(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else text[:12] + "..."


# ------------------------------------------------------------------------------------------------------ safetensors


def save(path: Path | str, tensors: Mapping[str, Tensor], card: Card) -> None:
    """Write `tensors` and `card` to `path`; a file that is there is replaced in one step.

    Raises `InputError` for NaN or infinity in a tensor and for a card that is not JSON.
    """
    for name, tensor in tensors.items():
        _check_finite(name, tensor)
    try:
        text = json.dumps(asdict(card), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError("card", str(error), "strings, finite numbers, lists and dictionaries of them") from error
    copies = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    with replacing(path) as temporary:
        temporary.write_bytes(to_bytes(copies, {_KEY: text}))


def load(path: Path | str) -> tuple[dict[str, Tensor], Card]:
    """The tensors (on the CPU) and the card of an artifact. Raises `InputError`."""
    with _opened(path) as file:
        card = _card(path, file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        _check_finite(f"{path}: {name}", tensor)
    return tensors, card


def read_card(path: Path | str) -> Card:
    """The card alone; reads the header of the file. Raises `InputError`."""
    with _opened(path) as file:
        return _card(path, file.metadata())


def data_hash(rows: Iterable[Any]) -> str:
    """sha256 of JSON rows: independent of the order of keys in a row, dependent on the order of rows."""
    digest = hashlib.sha256()
    for i, row in enumerate(rows):
        try:
            text = json.dumps(row, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        except (TypeError, ValueError) as error:
            raise InputError(f"rows[{i}]", row, "JSON data") from error
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
        raise InputError(name, "a tensor with NaN or infinity", "finite numbers")


def _check_file(path: Path | str, allowed: str) -> Path:
    """`path`, where it is a file that could be what is wanted."""
    file = Path(path)
    check(not file.is_dir(), "artifact", f"{file} (a folder)", allowed)
    check(file.is_file(), "artifact", f"{file} (no such file)", allowed)
    try:
        with file.open("rb") as stream:
            head = stream.read(9)
    except OSError as error:
        raise InputError("artifact", f"{file} ({error.strerror or error})", allowed) from error
    for magic, what in _PICKLES.items():
        # The length of a safetensors header may begin with the same bytes; then JSON follows at the ninth.
        pickled = head.startswith(magic) and head[8:] != b"{"
        check(not pickled, "artifact", f"{file} ({what}, which may run code)", allowed)
    return file


@contextmanager
def _opened(path: Path | str) -> Iterator[Any]:
    file = _check_file(path, _ALLOWED)
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InputError("artifact", f"{file} (truncated or not safetensors: {error})", _ALLOWED) from error


def _card(path: Path | str, header: dict[str, str] | None) -> Card:
    text = (header or {}).get(_KEY)
    if text is None:
        raise InputError("artifact", f"{path} (safetensors without a card)", _ALLOWED)
    try:
        entries = json.loads(text)
        version = entries["format"]
        newer = version > FORMAT
    except (ValueError, TypeError, KeyError) as error:
        raise InputError("artifact", f"{path} (its card cannot be read)", _ALLOWED) from error
    check(not newer, "artifact", f"{path} (format {version})", f"format {FORMAT} or older; update steer")
    _check_entries(path, entries)
    return Card(**{f.name: entries[f.name] for f in fields(Card) if f.name in entries})


def _check_entries(path: Path | str, entries: dict[str, Any]) -> None:
    types = {"kind": str, "version": str, "format": int, "layers": list}
    for entry in fields(Card):
        expected = types.get(entry.name, dict)
        given = entries.get(entry.name)
        fits = isinstance(given, expected) or (entry.name not in entries and entry.name not in ("kind", "model"))
        check(fits, "artifact", f"{path} (its card has {entry.name} = {given!r})", f"{entry.name}: {expected.__name__}")


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place, all at once, when the block ends well."""
    final = Path(path)
    check(not final.is_dir(), "path", str(path), "a file, not a folder")
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, final)
    except OSError as error:
        raise SteerError(f"cannot write {final}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


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
    file = _check_file(path, _ALLOWED_GGUF)
    with file.open("rb") as stream:
        check(stream.read(4) == b"GGUF", "artifact", f"{file} (not GGUF)", _ALLOWED_GGUF)
    try:
        architecture, hint, tensors = _read_gguf(file)
    except Exception as error:
        # The reader maps the file and indexes into it, so damage surfaces as any kind of error.
        raise InputError("artifact", f"{file} (truncated or damaged)", _ALLOWED_GGUF) from error
    check(architecture == "controlvector", "artifact", f"{file} (architecture {architecture!r})", _ALLOWED_GGUF)
    directions: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"direction\.(\d+)", name)
        if match is None or tensor is None:
            raise InputError("artifact", f"{file} (tensor {name})", "float tensors named direction.N")
        directions[int(match[1])] = tensor
    _check_directions(directions)
    return directions, hint


def _read_gguf(file: Path) -> tuple[str, str, dict[str, Tensor | None]]:
    """Architecture, model hint and tensors by name; None in place of a tensor that is quantised."""
    import gguf

    def text(key: str) -> str:
        entry = reader.get_field(key)
        return "" if entry is None else str(entry.contents())

    reader = gguf.GGUFReader(file)
    floats = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F64)
    tensors = {
        t.name: torch.from_numpy(t.data.astype("float32")) if t.tensor_type in floats else None for t in reader.tensors
    }
    return text("general.architecture"), text("controlvector.model_hint"), tensors


def _check_directions(directions: Mapping[int, Tensor]) -> None:
    check(len(directions) > 0, "directions", {}, "at least one direction")
    width = next(iter(directions.values())).numel()
    for layer, direction in directions.items():
        given = tuple(direction.shape)
        check(given == (width,) and width > 0, f"directions[{layer}]", given, f"shape ({width},), one width for all")
        _check_finite(f"directions[{layer}]", direction)
