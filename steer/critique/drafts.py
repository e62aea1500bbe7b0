"""Drafts: every text that a run of `Critique` has drawn, and whose it is.

A chain is a draft and its successors; chain number c belongs to output c // `per_output`, and to prompt c //
`per_prompt`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from steer.critique.rounds import Round

__all__ = ["Draft", "Drafts"]


@dataclass(frozen=True)
class Draft:
    """One row of the pool."""

    chain: int
    parent: int
    """The draft that it replaces, by number; -1: none."""
    round: int
    output: Any
    accept: bool
    score: float
    text: str
    """What the critic says of it."""
    right: bool | None


@dataclass
class Drafts:
    """The drafts so far, in the order in which they were drawn."""

    prompts: int
    per_prompt: int
    per_output: int
    drawn: list[Draft] = field(default_factory=list)
    latest: dict[int, int] = field(default_factory=dict)
    """By chain, its latest draft."""

    @property
    def chains(self) -> range:
        return range(self.prompts * self.per_prompt)

    def prompt(self, chain: int) -> int:
        """Number of the prompt of a chain."""
        return chain // self.per_prompt

    def output(self, chain: int) -> int:
        """Number of the output of a chain."""
        return chain // self.per_output

    def enter(self, draft: Draft) -> None:
        self.latest[draft.chain] = len(self.drawn)
        self.drawn.append(draft)

    def line_at(self, chain: int) -> list[int]:
        """Drafts of a chain by number, the first one first."""
        found, at = [], self.latest[chain]
        while at >= 0:
            found.append(at)
            at = self.drawn[at].parent
        return found[::-1]

    def line(self, chain: int) -> list[Draft]:
        """Drafts of a chain, the first one first."""
        return [self.drawn[i] for i in self.line_at(chain)]

    def by_output(self) -> dict[int, list[int]]:
        """Drafts by number, of every output."""
        found: dict[int, list[int]] = {}
        for i, draft in enumerate(self.drawn):
            found.setdefault(self.output(draft.chain), []).append(i)
        return found

    def repeats(self, chains: Sequence[int], outputs: Sequence[Any]) -> list[int]:
        """Places in `outputs`, one for each of `chains`, of what an output has had before, or has twice among them."""
        seen: dict[int, set[Any]] = {}
        for draft in self.drawn:
            seen.setdefault(self.output(draft.chain), set()).add(_key(draft.output))
        found = []
        for i, chain in enumerate(chains):
            mine = seen.setdefault(self.output(chain), set())
            key = _key(outputs[i])
            if key in mine:
                found.append(i)
            mine.add(key)
        return found

    def unfinished(self, ends: str, keep: str) -> list[int]:
        """Chains that get another draft; see `Critique` for `ends` and `keep`."""
        if ends == "never":
            return list(self.chains)
        done = {d.chain for d in self.drawn if d.accept}
        if keep in ("last", "accepted"):
            outputs = {self.output(c) for c in done}
            return [c for c in self.chains if self.output(c) not in outputs]
        return [c for c in self.chains if c not in done]

    def counted(
        self, number: int, drawn: int, before: dict[int, bool | None], *, unparsed: int, repeated: int, skipped: int
    ) -> Round:
        """What round `number`, of which are the last `drawn` drafts, has changed. `before` has what was right of each
        chain that was there.
        """
        new = self.drawn[len(self.drawn) - drawn :]
        moves: Counter[tuple[bool, bool]] = Counter()
        for draft in new:
            old = before.get(draft.chain)
            if old is not None and draft.right is not None:
                moves[old, draft.right] += 1
        firsts = [self.drawn[self.line_at(c)[0]].right for c in self.chains]
        now = [self.drawn[self.latest[c]].right for c in self.chains]
        return Round(
            number,
            outputs=len(self.chains) // self.per_output,
            drawn=len(new),
            accepted=len({self.output(d.chain) for d in self.drawn if d.accept}),
            unparsed=unparsed,
            repeated=repeated,
            skipped=skipped,
            score=sum(d.score for d in new),
            items=0 if None in now else len(now),
            right=sum(x is True for x in now),
            first_wrong=sum(x is False for x in firsts),
            kept_wrong=sum(x is False and y is False for x, y in zip(firsts, now, strict=True)),
            moves=(moves[True, True], moves[True, False], moves[False, True], moves[False, False]),
        )


def _key(output: Any) -> Any:
    """What makes two drafts the same."""
    return tuple(output.flatten().tolist()) if isinstance(output, Tensor) else str(output).strip()
