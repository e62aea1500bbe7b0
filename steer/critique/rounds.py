"""Rounds of a critique loop as they were counted, and friction: what feedback leaves as wrong as it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

__all__ = ["Round", "friction_law", "rounds_of"]


@dataclass(frozen=True)
class Round:
    """What happened in one round, as counts, so that rounds of several batches add up."""

    stands_alone: ClassVar = True

    number: int
    outputs: int
    """Of the run."""
    drawn: int
    """Drafts of this round."""
    accepted: int
    """Outputs of which a draft is accepted by now."""
    unparsed: int = 0
    """Of this round's drafts, without a verdict that could be read."""
    repeated: int = 0
    """Of this round's drafts, equal to an earlier one of their output, after the redraws of `repeats="reject"`."""
    skipped: int = 0
    """Drafts that were not drawn, because the conversation no longer fits the model's context."""
    score: float = 0.0
    """Sum of the critic's scores of this round's drafts."""
    items: int = 0
    """Lines of drafts, where a reward says which are right; otherwise 0, as are the next counts."""
    right: int = 0
    """Lines whose latest draft is right."""
    first_wrong: int = 0
    """Lines whose first draft was wrong."""
    kept_wrong: int = 0
    """Of those, lines whose latest draft is wrong, too."""
    moves: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Right to right, right to wrong, wrong to right, wrong to wrong, of this round's drafts."""

    def __add__(self, other: Round) -> Round:
        names = [f.name for f in fields(self) if f.name not in ("number", "moves")]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        a, b = self.moves, other.moves
        return Round(self.number, **sums, moves=(a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]))

    @property
    def accuracy(self) -> float:
        """Share of lines whose latest draft is right; NaN without a reward."""
        return self.right / self.items if self.items else math.nan

    @property
    def friction(self) -> float:
        """Share of what was wrong at first and still is (phi)."""
        return self.kept_wrong / self.first_wrong if self.first_wrong else math.nan

    def told(self) -> dict[str, float]:
        """The round as a message says it: its number, its drafts and the shares that are known."""
        known = {name: x for name, x in self.shares().items() if not math.isnan(x)}
        return {"number": self.number, "drafts": self.drawn, **known}

    def shares(self) -> dict[str, float]:
        """What a person reads: shares of outputs and of this round's drafts."""
        drawn = self.drawn or math.nan
        return {
            "accepted": self.accepted / self.outputs,
            "unparsed": self.unparsed / drawn,
            "repeated": self.repeated / drawn,
            "score": self.score / drawn,
            "accuracy": self.accuracy,
            "friction": self.friction,
        }


def rounds_of(trace: Sequence[Round]) -> list[Round]:
    """The rounds of a run over several batches of prompts, each once. A batch that ended early counts as it ended."""
    runs: list[list[Round]] = []
    for entry in trace:
        if entry.number == 0:
            runs.append([])
        runs[-1].append(entry)
    found: list[Round] = []
    for j in range(max((len(run) for run in runs), default=0)):
        here = [run[j] if j < len(run) else _ended(run[-1], j) for run in runs]
        found.append(sum(here[1:], here[0]))
    return found


def _ended(last: Round, number: int) -> Round:
    return Round(
        number,
        last.outputs,
        0,
        last.accepted,
        items=last.items,
        right=last.right,
        first_wrong=last.first_wrong,
        kept_wrong=last.kept_wrong,
    )


def friction_law(p0: float, stuck: float, r: float, rounds: int) -> list[float]:
    """Accuracies after 0 to `rounds` rounds where the share `stuck` of wrong answers is never put right, and each of
    the others with probability `r` in every round: `p0 + (1 - p0)(1 - stuck)(1 - (1 - r)^j)`.
    """
    return [p0 + (1 - p0) * (1 - stuck) * (1 - (1 - r) ** j) for j in range(rounds + 1)]
