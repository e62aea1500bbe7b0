"""Agreement of two measures over settings: whether what is optimised ranks them as what is wanted does.

A reward can rise while what it stands for falls ("The Alignment Ceiling", Lambert and Calandra 2023, 2311.00168).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from steer.core import check

__all__ = ["kendall", "mismatch"]


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau, from -1 to 1: the share of pairs of settings that both measures rank alike, less the share that
    they rank apart; ties count as neither. Raises `InputError` for fewer than two settings.
    """
    return 1 - 2 * mismatch(a, b)


def mismatch(a: Sequence[float], b: Sequence[float]) -> float:
    """The share of pairs of settings that two measures rank apart, in [0, 1]; ties count half."""
    check(len(a) == len(b) >= 2, "settings", f"{len(a)} and {len(b)}", "two or more, as many of each measure")
    pairs = list(combinations(range(len(a)), 2))
    signs = [(a[i] - a[j]) * (b[i] - b[j]) for i, j in pairs]
    return sum(0.5 if s == 0 else float(s < 0) for s in signs) / len(pairs)
