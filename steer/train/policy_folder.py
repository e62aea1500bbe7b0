"""Folders of tuned policies: how they are claimed, written in one step and read back. No engine is needed for it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from steer.artifacts import FORMAT, Card
from steer.core import InputError, check
from steer.files import replacing
from steer.train.loop import check_run

__all__ = ["CARD", "POLICY", "check_target", "claim", "read_policy_card", "thinned"]


CARD = "steer.json"
POLICY = "a policy: a folder with steer.json, as train policy writes it"


def read_policy_card(folder: Path | str) -> Card:
    """The card of a policy. Raises `InputError`."""
    path = Path(folder) / CARD
    check(path.is_file(), "policy", f"{folder} (no {CARD} in it)", POLICY)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        card = Card(**{f.name: entries[f.name] for f in fields(Card) if f.name in entries})
        fits = card.kind == "policy" and isinstance(card.model["fingerprint"], str)
        newer = card.format > FORMAT
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError("policy", f"{path} (cannot be read)", POLICY) from error
    check(not newer, "policy", f"{path} (format {card.format})", f"format {FORMAT} or older; update steer")
    check(fits, "policy", f"{path} (the card of a {card.kind})", POLICY)
    return card


def check_target(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        try:
            read_policy_card(out)
        except InputError as error:
            raise InputError(
                "out", f"{out} (a folder with other things in it)", "a new folder, or a policy's"
            ) from error
    check(out.is_dir() or not out.exists(), "out", f"{out} (a file)", "a folder, new or a policy's")


def claim(work: Path | None, run: dict[str, Any]) -> None:
    """Write down whose run `work` holds; refuse that of another."""
    if work is None:
        return
    path, text = work / "settings.json", json.dumps(run, sort_keys=True)
    if path.is_file():
        check_run(work, json.loads(path.read_text(encoding="utf-8")), run)
        return
    others = work.exists() and (not work.is_dir() or any(entry.suffix != ".tmp" for entry in work.iterdir()))
    check(not others, "work", f"{work} (with other things in it)", "an empty folder, or a run's state")
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def thinned(values: list[float], most: int = 100) -> list[float]:
    """At most `most` means over stretches of equal length, as far as it divides."""
    step = max(1, -(-len(values) // most))
    return [round(sum(part) / len(part), 5) for part in (values[i : i + step] for i in range(0, len(values), step))]
