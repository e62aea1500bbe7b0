"""Cards of folders, as `steer show` prints them: of a policy or of a model."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from steer.artifacts import Card, read_card
from steer.core import InputError, check
from steer.data import read_table
from steer.embedded import CARD_NAME, EMBEDDED

__all__ = ["describe", "draw_training", "folder_of"]


_POLICY, _PIPELINE = "steer.json", "model_index.json"
_ALLOWED = f"a folder with {_POLICY} (a policy), {CARD_NAME} or {_PIPELINE} (a model)"


def folder_of(path: Path) -> Path:
    """The folder of an embedded model that goes by this name, or the path itself."""
    named = next((entry for entry in EMBEDDED if entry.name == str(path) and entry.fetched), None)
    return named.folder if named is not None and not path.exists() else path


def describe(folder: Path) -> str:
    """Short text for people. Raises `InputError` for a folder without a card."""
    if (folder / _POLICY).is_file():
        entries = _read(folder / _POLICY)
        known = {f.name: entries[f.name] for f in fields(Card) if f.name in entries}
        check({"kind", "model"} <= set(known) and isinstance(known["model"], dict), "folder", str(folder), _ALLOWED)
        return Card(**known).describe()
    if (folder / CARD_NAME).is_file():
        return _model(_read(folder / CARD_NAME))
    check((folder / _PIPELINE).is_file(), "folder", str(folder), _ALLOWED)
    index = _read(folder / _PIPELINE)
    parts = [name for name in index if not name.startswith("_")]
    return f"{index.get('_class_name', 'a pipeline')} of diffusers\nparts: {', '.join(parts)}"


def draw_training(path: Path, plot: Path) -> str:
    """Draw the curves of a card's metrics, or of a log that `--log` wrote; says which. Raises `InputError`."""
    from steer.pictures.rounds import draw_history
    from steer.pictures.style import image_format

    image_format(plot)
    check(plot.absolute().parent.is_dir(), "plot", str(plot), "a file in a folder that exists")
    curves, unit = (_logged(path), "step") if path.suffix == ".jsonl" else (_kept(path), "entry of the card")
    if not curves:
        raise InputError("plot", str(path), "a card or a log with at least two figures of one kind")
    draw_history(curves, plot, f"Training of {path.stem}", unit)
    return f"wrote {plot}: {', '.join(curves)}"


Curves = dict[str, list[tuple[float, float]]]


def _kept(path: Path) -> Curves:
    """Lists of numbers among a card's metrics."""
    metrics = _read(path / _POLICY).get("metrics", {}) if path.is_dir() else read_card(path).metrics
    found = {name: value for name, value in metrics.items() if isinstance(value, list) and len(value) > 1}
    return {
        name: [(float(i), float(y)) for i, y in enumerate(value, 1)]
        for name, value in found.items()
        if all(isinstance(y, int | float) for y in value)
    }


def _logged(path: Path) -> Curves:
    found: Curves = {}
    rows = [row for _, row in read_table("log", path, "lines of JSON, as --log writes them")]
    phases = {str(row.get("phase")) for row in rows}
    for row in rows:
        for name in row.keys() - {"phase", "step", "seconds"}:
            if isinstance(row[name], int | float) and isinstance(row.get("step"), int):
                label = name if len(phases) == 1 else f"{row['phase']}: {name}"
                found.setdefault(label, []).append((float(row["step"]), float(row[name])))
    return {name: points for name, points in sorted(found.items()) if len(points) > 1}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("folder", f"{path} ({error})", "a card in JSON") from error
    check(isinstance(found, dict), "folder", str(path), "a card in JSON")
    return found


def _model(card: dict[str, Any]) -> str:
    lines = [f"{card.get('name', '?')}, a {card.get('kind', '?')} model", str(card.get("description", ""))]
    lines += [f"classes: {', '.join(map(str, card['classes']))}"] if card.get("classes") else []
    lines += [f"{name}: {_facts(card[name])}" for name in ("training", "data", "metrics") if card.get(name)]
    lines += [f"{name}: {card[name]}" for name in ("source", "license") if card.get(name)]
    return "\n".join(line for line in lines if line)


def _facts(value: Any) -> str:
    """The short entries: numbers and words, not lists and hashes; of a table its total."""
    if not isinstance(value, dict):
        return str(value)
    found = []
    for name, entry in value.items():
        if isinstance(entry, dict) and "all" in entry:
            entry = entry["all"]
        elif isinstance(entry, dict) and len(entry) <= 3:
            entry = "(" + _facts(entry) + ")"
        if isinstance(entry, str | int | float):
            found.append(f"{name} {entry}")
    return "; ".join(found)
