"""Friction: what feedback leaves as wrong as it was, in a table of the rounds of a critique loop.

It is only called friction where the critic is right, such as one that knows the answers (Jiang et al. 2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from steer.critique.rounds import Round, rounds_of
from steer.measure.tables import aligned, number

__all__ = ["friction_table", "plateau"]


def plateau(rounds: Sequence[Round]) -> bool:
    """Whether the accuracies of the last three rounds lie within one standard error of each other."""
    last = rounds[-3:]
    if len(last) < 3 or not last[-1].items:
        return False
    p = last[-1].accuracy
    spread = max(r.accuracy for r in last) - min(r.accuracy for r in last)
    return spread <= math.sqrt(p * (1 - p) / last[-1].items)


def friction_table(trace: Sequence[Round]) -> str:
    """The rounds of a run as a table; the last line says whether accuracy has come to rest."""
    rounds = rounds_of(trace)
    names = ["accepted", "accuracy", "friction", "repeated", "unparsed", "score"]
    rows = [["round", "drafts", *names]]
    for r in rounds:
        shares = r.shares()
        rows.append([str(r.number), str(r.drawn), *(number(shares[name]) for name in names)])
    rest = "accuracy rests: the last three rounds lie within one standard error"
    return aligned(rows) + (f"\n{rest}" if plateau(rounds) else "")
