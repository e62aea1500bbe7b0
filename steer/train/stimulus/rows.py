"""Rows that a stimulus is trained on: inputs, with references or hints where there are any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from steer.core import InputError, check
from steer.methods.extract import excerpt, reference_hint
from steer.train.stimulus.settings import StimulusSettings

__all__ = ["Row", "Split", "read_rows", "split"]

_LEAST = 20


@dataclass(frozen=True)
class Row:
    """One input."""

    key: str
    """Its id, or the input itself: what tells whether two rows are one."""
    input: str
    reference: str | None
    hint: tuple[str, ...]
    """The phrases that SFT aims at: the row's own, or those of its reference; empty without either."""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The whole row, for rewards that read it, with the reference under its plain name."""


@dataclass(frozen=True)
class Split:
    """Rows that are learnt from, and the others."""

    learnt: list[Row]
    held: list[Row]
    doubles: int
    """Rows that were left out, since one with their id or input came before."""


def read_rows(data: Sequence[Any], settings: StimulusSettings, field: str = "data") -> list[Row]:
    """A text is a row of an input alone. Raises `InputError` for a row without input, or whose reference or hint is no
    text.
    """
    found = []
    for i, given in enumerate(data):
        row = {settings.input: given} if isinstance(given, str) else given
        check(isinstance(row, Mapping), f"{field}[{i}]", row, f"a row with the column {settings.input}")
        text = row.get(settings.input)
        where = f"{field}[{i}].{settings.input}"
        check(isinstance(text, str) and bool(text.strip()), where, text, "a text that is not empty")
        reference, hint = (_optional(row, name, f"{field}[{i}].{name}") for name in (settings.reference, settings.hint))
        phrases: list[str] = []
        if hint is not None:
            phrases = [part.strip() for part in hint.split(";") if part.strip()][: settings.most]
        elif reference is not None:
            phrases = reference_hint(excerpt(str(text), settings.words), reference, settings.most)
        columns = {**row, "reference": reference}
        found.append(Row(str(row.get("id", text)), str(text), reference, tuple(phrases), columns))
    return found


def _optional(row: Mapping[str, Any], name: str, where: str) -> str | None:
    value = row.get(name)
    check(value is None or (isinstance(value, str) and bool(value.strip())), where, value, "a text that is not empty")
    return value


def split(rows: list[Row], test: list[Row] | None, settings: StimulusSettings) -> Split:
    """A share of the rows is held out, by id; with `test` rows those are. Raises `InputError` where an id or an input
    is in both, or where there are too few rows.
    """
    once, doubles = _once(rows)
    check(len(once) >= _LEAST, "data", f"{len(once)} different rows", f"at least {_LEAST}")
    if test is not None:
        held, _ = _once(test)
        known = {row.key for row in once} | {row.input for row in once}
        for i, row in enumerate(held):
            if row.key in known or row.input in known:
                raise InputError(f"test[{i}]", row.key, "an id and an input that data does not have")
        return Split(once, held, doubles)
    order = torch.randperm(len(once), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    count = max(1, round(settings.held_out * len(once))) if settings.held_out > 0 else 0
    out = set(order[:count])
    learnt = [row for i, row in enumerate(once) if i not in out]
    return Split(learnt, [once[i] for i in order[:count]], doubles)


def _once(rows: list[Row]) -> tuple[list[Row], int]:
    seen: set[str] = set()
    found = []
    for row in rows:
        if row.key in seen or row.input in seen:
            continue
        seen |= {row.key, row.input}
        found.append(row)
    return found, len(rows) - len(found)
