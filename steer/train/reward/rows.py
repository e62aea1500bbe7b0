"""Rows that a reward is trained on: preferences, ratings or labels."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer.core import check
from steer.data import plain_row

__all__ = ["Rows", "read_rows"]

_LEAST = 10
"""Rows, and values of an attribute, at least."""


@dataclass(frozen=True)
class Rows:
    """What is learnt from. Pairs have two texts a row, others one; `group` says which rows share a prompt."""

    objective: str
    texts: list[tuple[Any, str]]
    targets: Tensor
    """Margins `[B]`, labels `[B]`, or ratings `[B, K]`."""
    weights: Tensor
    names: tuple[str, ...]
    group: list[str]
    words: Tensor
    """Lengths of the texts in words."""


def read_rows(data: Sequence[Any], objective: str) -> Rows:
    rows = [_renamed(plain_row(row, f"data[{i}]")) for i, row in enumerate(data)]
    check(len(rows) >= _LEAST, "data", f"{len(rows)} rows", f"at least {_LEAST} rows")
    for i, row in enumerate(rows):
        check(isinstance(row, Mapping), f"data[{i}]", row, "a row with columns")
    if objective == "auto":
        wanted = {"pairs": "chosen", "ratings": "ratings", "binary": "label"}
        fits = [name for name, column in wanted.items() if all(column in row for row in rows)]
        check(bool(fits), "data", sorted(rows[0]), "chosen and rejected; completion and ratings; completion and label")
        objective = fits[0]
    return {"pairs": _pairs, "ratings": _ratings, "binary": _binary}[objective](rows)


def _renamed(row: Any) -> Any:
    """A row of a vector's pairs, `positive` and `negative`, is a preference."""
    if not isinstance(row, Mapping) or "chosen" in row or not {"positive", "negative"} <= row.keys():
        return row
    rest = {name: value for name, value in row.items() if name not in ("positive", "negative")}
    return {**rest, "chosen": row["positive"], "rejected": row["negative"]}


def _text(row: Mapping[str, Any], name: str, i: int) -> str:
    found = row.get(name)
    check(isinstance(found, str) and bool(found.strip()), f"data[{i}].{name}", found, "a text that is not empty")
    return str(found)


def _number(value: Any, where: str) -> float:
    right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    check(right, where, value, "a finite number")
    return float(value)


def _made(
    objective: str, texts: list[tuple[Any, str]], targets: Tensor, weights: Tensor, names: Any, rows: Any
) -> Rows:
    group = [json.dumps(row.get("prompt", ""), sort_keys=True, default=str) for row in rows]
    words = torch.tensor([float(len(text.split())) for _, text in texts], dtype=torch.float64)
    return Rows(objective, texts, targets, weights, tuple(names), group, words)


def _pairs(rows: list[Any]) -> Rows:
    texts: list[tuple[Any, str]] = []
    margins = []
    for i, row in enumerate(rows):
        better, worse = _text(row, "chosen", i), _text(row, "rejected", i)
        check(better != worse, f"data[{i}]", better, "a chosen text that differs from the rejected one")
        texts += [(row.get("prompt", ""), better), (row.get("prompt", ""), worse)]
        margins.append(_number(row.get("margin", 0.0), f"data[{i}].margin"))
    return _made("pairs", texts, torch.tensor(margins).double(), torch.ones(len(rows)).double(), ["score"], rows)


def _binary(rows: list[Any]) -> Rows:
    texts, labels, weights = [], [], []
    for i, row in enumerate(rows):
        texts.append((row.get("prompt", ""), _text(row, "completion", i)))
        label = row.get("label")
        check(label in (0, 1, True, False), f"data[{i}].label", label, "true or false")
        labels.append(float(label))
        weights.append(_number(row.get("weight", 1.0), f"data[{i}].weight"))
        check(weights[-1] > 0, f"data[{i}].weight", weights[-1], "a number above 0")
    check(len(set(labels)) == 2, "data", f"only label {bool(labels[0])}", "rows of both labels")
    return _made("binary", texts, torch.tensor(labels).double(), torch.tensor(weights).double(), ["score"], rows)


def _ratings(rows: list[Any]) -> Rows:
    for i, row in enumerate(rows):
        check(isinstance(row.get("ratings"), Mapping), f"data[{i}].ratings", row.get("ratings"), "numbers by name")
    names = sorted({name for row in rows for name in row["ratings"]})
    targets = torch.full((len(rows), len(names)), math.nan, dtype=torch.float64)
    texts = []
    for i, row in enumerate(rows):
        texts.append((row.get("prompt", ""), _text(row, "completion", i)))
        for name, value in row["ratings"].items():
            if value is not None:
                targets[i, names.index(name)] = _number(value, f"data[{i}].ratings.{name}")
    for name, column in zip(names, targets.T, strict=True):
        count = int((~column.isnan()).sum())
        check(count >= _LEAST, f"ratings.{name}", f"{count} values", f"at least {_LEAST}")
    return _made("ratings", texts, targets, torch.ones(len(rows)).double(), names, rows)
