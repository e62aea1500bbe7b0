"""Rewards of texts that name boxes in a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from steer.core import check
from steer.rewards.verifiable import Verifiable, code_of, library

__all__ = ["Boxes", "box_scores", "generalised_iou"]


@dataclass(frozen=True, repr=False)
class Boxes(Verifiable):
    """Vision-R1's reward of a text that names boxes: precision + recall + layout, of boxes matched to the row's
    `boxes`.

    Boxes are `[x0, y0, x1, y1]`; the text is a JSON list of them, or of objects with `box` and `label`, as gold may be.
    A matched pair counts by its generalised IoU, as 0 below `low` and as 1 above `high`. `over` "matched" divides by
    the matched pairs, so that boxes too many cost nothing, as released; "all" by all predictions.
    """

    column: ClassVar = "boxes"
    low: float = 0.5
    high: float = 0.75
    over: str = "matched"

    def __post_init__(self) -> None:
        check(0 <= self.low <= self.high <= 1, "reward vision_boxes", (self.low, self.high), "0 <= low <= high <= 1")
        check(self.over in ("matched", "all"), "reward vision_boxes", self.over, "matched, all")

    def check_known(self, known: Any, where: str) -> None:
        check(_boxes(known) is not None, where, known, "a list of [x0, y0, x1, y1], or of {box, label}")

    def verify(self, text: str, known: Any) -> float:
        gold = _boxes(known) or []
        found = _boxes(code_of(text))
        if found is None:
            return 0.0
        if not gold or not found:
            return 3.0 * (not gold and not found)
        return sum(box_scores(found, gold, self.low, self.high, self.over == "all")) + 1.0

    def __repr__(self) -> str:
        return "vision_boxes"


Box = tuple[tuple[float, ...], str]


def _boxes(x: Any) -> list[Box] | None:
    try:
        listed = json.loads(x) if isinstance(x, str) else x
        pairs = [(b["box"], str(b.get("label", ""))) if isinstance(b, Mapping) else (b, "") for b in listed]
        made = [(tuple(float(v) for v in box), label) for box, label in pairs]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return made if all(len(box) == 4 and all(map(math.isfinite, box)) for box, _ in made) else None


def generalised_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, less the share of their hull that neither covers."""

    def area(x: Sequence[float]) -> float:
        return max(0.0, x[2] - x[0]) * max(0.0, x[3] - x[1])

    inner = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    hull = area((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))
    union = area(a) + area(b) - inner
    return (inner / union if union else 0.0) - ((hull - union) / hull if hull else 0.0)


def box_scores(
    found: Sequence[Box], gold: Sequence[Box], low: float, high: float, over_all: bool
) -> tuple[float, float]:
    """Precision and recall after the best assignment by L1 distance, label and generalised IoU."""
    linear_sum_assignment = library("scipy.optimize").linear_sum_assignment

    cost = [
        [sum(abs(p - q) for p, q in zip(a, b, strict=True)) - (la == lb) - generalised_iou(a, b) for b, lb in gold]
        for a, la in found
    ]
    rows, columns = linear_sum_assignment(cost)
    overlaps = [generalised_iou(found[i][0], gold[j][0]) for i, j in zip(rows, columns, strict=True)]
    precision = sum(_stepped(x, low, high) for x in overlaps) / (len(found) if over_all else len(overlaps))
    recall = sum(x >= low for x in overlaps) / len(gold)
    return precision, _stepped(recall, 0.5, 0.75)


def _stepped(x: float, low: float, high: float) -> float:
    return 0.0 if x < low else 1.0 if x > high else x
