"""Artifacts of training: one safetensors file with a card, or a control vector in llama.cpp's GGUF layout.

Nothing here unpickles. A file that cannot be read is refused with one line that names the file and the reason.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from steer.core import InputError, check
from steer.core.edit import ranges
from steer.files import check_file, check_finite, replacing
from steer.headers import check_safetensors

__all__ = ["Card", "FORMAT", "data_hash", "encode", "load", "read_card", "read_folder_card", "save"]


FORMAT = 1
_KEY = "steer"
_ALLOWED = "an artifact saved by steer (safetensors with a card)"


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


def _short(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else text[:12] + "..."


# ------------------------------------------------------------------------------------------------------ safetensors


def save(path: Path | str, tensors: Mapping[str, Tensor], card: Card) -> None:
    """Write `tensors` and `card` to `path`; a file that is there is replaced in one step.

    Raises `InputError` for NaN or infinity in a tensor and for a card that is not JSON.
    """
    data = encode(tensors, card)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def encode(tensors: Mapping[str, Tensor], card: Card) -> bytes:
    """What `save` writes: the same bytes for the same tensors and card. Raises `InputError`."""
    for name, tensor in tensors.items():
        check_finite(name, tensor)
    try:
        text = json.dumps(asdict(card), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError("card", str(error), "strings, finite numbers, lists and dictionaries of them") from error
    copies = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    return to_bytes(copies, {_KEY: text})


def load(path: Path | str) -> tuple[dict[str, Tensor], Card]:
    """The tensors (on the CPU) and the card of an artifact. Raises `InputError`."""
    with _opened(path) as file:
        card = _card(path, file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        check_finite(f"{path}: {name}", tensor)
    return tensors, card


def read_card(path: Path | str) -> Card:
    """The card alone; reads the header of the file. Raises `InputError`."""
    with _opened(path) as file:
        return _card(path, file.metadata())


def read_folder_card(folder: Path | str) -> Card:
    """The card of a folder of networks, its steer.json. Raises `InputError`."""
    path = Path(folder) / "steer.json"
    allowed = "a folder that steer wrote, with steer.json"
    check(path.is_file(), "artifact", f"{folder} (no steer.json in it)", allowed)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("artifact", f"{path} (cannot be read)", allowed) from error
    return _card(path, {_KEY: text})


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


@contextmanager
def _opened(path: Path | str) -> Iterator[Any]:
    file = check_file(path, _ALLOWED)
    try:
        check_safetensors(file)
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("artifact", f"{file} (truncated or not safetensors: {error})", _ALLOWED) from error


def _card(path: Path | str, header: dict[str, str] | None) -> Card:
    text = (header or {}).get(_KEY)
    if text is None:
        raise InputError("artifact", f"{path} (safetensors without a card)", _ALLOWED)
    try:
        entries = json.loads(text, parse_constant=_no_number)
        version = entries["format"]
        newer = version > FORMAT
        _check_data(entries)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError("artifact", f"{path} (its card cannot be read)", _ALLOWED) from error
    check(not newer, "artifact", f"{path} (format {version})", f"format {FORMAT} or older; update steer")
    _check_entries(path, entries)
    return Card(**{f.name: entries[f.name] for f in fields(Card) if f.name in entries})


# ------------------------------------------------------------------------------------------------------------- cards


MAX_STRENGTH = 1e6
"""Of any edit, either way: 1 is the size of what is steered, and beyond this sums overflow in float32."""


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _check_data(data: Any, depth: int = 0) -> None:
    """Raise `ValueError` for what could not be written as JSON in UTF-8 again: texts with half a character, numbers
    that are none, nesting without end.
    """
    if isinstance(data, str):
        data.encode()
    elif isinstance(data, float):
        _need(math.isfinite(data))
    elif isinstance(data, int):
        _need(abs(data) < 2**63)
    elif isinstance(data, dict | list):
        _need(depth < 16)
        for item in (*data, *data.values()) if isinstance(data, dict) else data:
            _check_data(item, depth + 1)


def _need(condition: bool) -> None:
    if not condition:
        raise ValueError


def _text(x: Any) -> bool:
    return isinstance(x, str)


def _whole(x: Any) -> bool:
    return type(x) is int and 0 <= x < 100_000


def _wholes(x: Any) -> bool:
    return isinstance(x, list) and all(map(_whole, x))


def _layers(x: Any) -> bool:
    return _text(x) or _whole(x) or _wholes(x)


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= MAX_STRENGTH


def _flag(x: Any) -> bool:
    return isinstance(x, bool)


def _table(x: Any) -> bool:
    return isinstance(x, dict)


_Types = dict[str, tuple[Callable[[Any], bool], str]]
_ENTRIES: _Types = {
    "kind": (_text, "a text"),
    "model": (_table, "entries by name"),
    "layers": (_wholes, "a list of layers"),
    "version": (_text, "a text"),
    "format": (_whole, "a number"),
    **dict.fromkeys(("settings", "recipe", "data", "metrics"), (_table, "entries by name")),
}
_MODEL: _Types = {
    **dict.fromkeys(("name", "fingerprint", "model_type"), (_text, "a text")),
    **dict.fromkeys(("num_layers", "width"), (_whole, "a whole number")),
}
_SETTINGS: _Types = {
    "layers": (_layers, "layers"),
    "keep_norm": (_flag, "true or false"),
    "gate_layer": (_whole, "a layer"),
    "top_k": (_whole, "a whole number"),
    **dict.fromkeys(("scope", "operator", "unit", "tail", "gate", "tokens"), (_text, "a text")),
    **dict.fromkeys(
        ("strength", "threshold", "beta", "low", "high"), (_number, f"a number of at most {MAX_STRENGTH:g}")
    ),
}
"""What the settings that steer itself writes are; others are for people."""


def _check_entries(path: Path | str, entries: dict[str, Any]) -> None:
    for name in ("kind", "model"):
        check(name in entries, "artifact", f"{path} (its card has no {name})", f"{name}: {_ENTRIES[name][1]}")
    _check_types(path, "", entries, _ENTRIES)
    _check_types(path, "model.", entries["model"], _MODEL)
    _check_types(path, "settings.", entries.get("settings", {}), _SETTINGS)


def _check_types(path: Path | str, where: str, given: dict[str, Any], types: _Types) -> None:
    for name, (fits, allowed) in types.items():
        value = given.get(name)
        absent = name not in given or (where and value is None)
        shown = repr(value)[:80]
        check(absent or fits(value), "artifact", f"{path} (its card has {where}{name} = {shown})", f"{name}: {allowed}")
