"""Export of a steering vector to llama.cpp's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from steer.artifacts import load
from steer.core import SteerError, check
from steer.edits import parse_layers
from steer.embedded import resolve
from steer.gguf import save_gguf

__all__ = ["export_vector"]


def export_vector(file: Path, out: Path, layers: str | None = None, hint: str | None = None) -> str:
    """Write the directions of the vector in `file`; says what was written. Raises `InputError`."""
    tensors, card = load(file)
    check(card.kind == "vector", "artifact", f"{file} (a {card.kind})", "a steering vector")
    directions = {int(k.split(".")[1]): v for k, v in tensors.items() if k.startswith("direction.")}
    check(bool(directions), "artifact", f"{file} (without directions)", "a steering vector")
    chosen = parse_layers(layers or card.settings.get("layers", "all"), sorted(directions))
    # The file format has no place for block 0; asked for by name it is refused, among all it is left out.
    kept = [layer for layer in chosen if layer > 0 or layers not in (None, "all")]
    save_gguf(out, {layer: directions[layer] for layer in kept}, hint or _architecture(card.model))
    return f"wrote {out}: layers {', '.join(map(str, kept))}"


def _architecture(model: dict[str, Any]) -> str:
    """The model's type, from its card or its folder; "unknown" where neither tells."""
    if model.get("model_type"):
        return str(model["model_type"])
    try:
        config = Path(resolve(str(model.get("name", "")))) / "config.json"
        return str(json.loads(config.read_text())["model_type"])
    except (SteerError, OSError, ValueError, KeyError):
        return "unknown"
