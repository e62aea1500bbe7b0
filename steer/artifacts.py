"""What training leaves behind: one safetensors file with a card, or a control vector in llama.cpp's GGUF layout.

Nothing here unpickles. A file that cannot be read is refused with one line that names the file and the reason.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from steer.core import InputError, check
from steer.files import replacing

__all__ = ["Artifact", "Card", "FORMAT", "data_hash", "load", "read_card", "save"]


FORMAT = 1
_KEY = "steer"
_ALLOWED = "an artifact saved by steer (safetensors with a card)"
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
    """What training returns, and what a file holds: tensors and a card.

    It is used wherever an edit is: `edits=calm` takes the card's settings, `calm(0.15, layers=range(10, 15))` others;
    `calm * 0.5` and `calm + other` are edits too. `save` writes it; `tensors, card = artifact` takes it apart.
    """

    tensors: dict[str, Tensor]
    card: Card

    def __call__(self, strength: float | None = None, *, model: Any = None, **options: Any) -> Any:
        """The edit at `strength`, with the options of `steer.load_edit`. Raises `InputError`."""
        from steer.edits import edit_of  # edits are made of artifacts; nothing else here knows what one does

        return edit_of(self.tensors, self.card, strength, model=model, **options)

    def save(self, path: Path | str) -> None:
        """Write it to one file; see `save`."""
        save(path, self.tensors, self.card)

    def __mul__(self, factor: Any) -> Any:
        return self() * factor

    __rmul__ = __mul__

    def __neg__(self) -> Any:
        return self() * -1.0

    def __add__(self, other: Any) -> Any:
        return self() + (other() if isinstance(other, Artifact) else other)

    def __sub__(self, other: Any) -> Any:
        return self() + (other() if isinstance(other, Artifact) else other) * -1.0

    def __repr__(self) -> str:
        name, depth = Path(str(self.card.model.get("name", "?"))).name, self.card.model.get("num_layers", "?")
        layers = f", layers {ranges(self.card.layers)} of {depth}" if self.card.layers else ""
        return f"Artifact({self.card.kind} for {name}{layers})"


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
        check_finite(name, tensor)
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
        check_finite(f"{path}: {name}", tensor)
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


def check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
        raise InputError(name, "a tensor with NaN or infinity", "finite numbers")


def check_file(path: Path | str, allowed: str) -> Path:
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
    file = check_file(path, _ALLOWED)
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
