"""A resolved request on its way from the front end to the worker."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

from torch import Tensor

from steer.adapters.vllm.plugin.compiled import Compiled, Spans, SteeringRow, Stretch, merged
from steer.core.scope import Marks
from steer.serving.wire import EditRequest


@dataclass(frozen=True)
class Inside:
    """What the adapter itself asks of the engine, in place of a client's dictionary. It never comes over the wire."""

    edits: tuple[EditRequest, ...] = ()
    beta: float = 1.0
    prompt_length: int | None = None
    """Where the request continues a text: the length of the prompt that scopes count from."""
    ends: int | None = None
    """Where the request draws but a part of a text: the most tokens that prompt and text may have together."""
    weights: tuple[tuple[float, ...] | None, ...] = ()
    """Weights that the edits decided on when they read the prompt, in the order of the hidden edits."""
    measure: bool = False
    """Whether the norms of its tokens are measured."""
    tag: str | None = None
    """Under which the worker keeps what its edits decide, to be asked for it."""
    read: tuple[str, str] | None = None
    """Digest of what is read where its tokens are chosen, and the tag under which the worker keeps it."""


@dataclass(frozen=True)
class ResolvedEdit:
    """One edit of a request: an artifact by its digest, its settings, and the positions `start <= position < stop`."""

    artifact: str
    options: dict[str, Any]
    key: str = ""
    """What edits that do the same have in common."""
    start: int = 0
    stop: int | None = None
    weights: tuple[float, ...] | None = None
    """What it decided when it read the prompt, where that is known."""
    marks: Marks | None = None
    """Tokens between which it acts; those that the request brings are counted in `turns`."""
    turns: tuple[int, ...] = ()
    """With marks, the positions at which it begins and ceases to act, in turn."""

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """Where it acts, as far as that is known."""
        return ((self.start, self.stop),) if self.marks is None else stretches_of(self.turns)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> ResolvedEdit:
        """From plain data."""
        marks = plain.get("marks")
        if marks is None:
            return cls(**plain)
        known = Marks(tuple(marks["opening"]), tuple(marks["closing"]), marks["inside"])
        return cls(**{**plain, "marks": known})


def stretches_of(turns: Sequence[int]) -> tuple[Stretch, ...]:
    """From where something begins and ends in turn."""
    ends: list[int | None] = [*turns[1::2]]
    return tuple(zip(turns[::2], ends if len(turns) % 2 == 0 else [*ends, None], strict=True))


def turns_of(marks: Marks, ids: Sequence[int], start: int) -> tuple[int, ...]:
    """Positions from `start` on at which what goes by `marks` begins and ceases to act, in turn, in a text `ids`."""
    turns = [start] if bool(marks.last(ids[: start + 1])) is marks.inside else []
    for position in range(start + 1, len(ids)):
        turned(turns, marks, position, ids[position])
    return tuple(turns)


def turned(turns: list[int], marks: Marks, position: int, token: int) -> bool:
    """Note in `turns` that `token` was read at `position`, where that begins or ends something; whether it does."""
    opened = marks.last((token,))
    if opened is None or (opened is marks.inside) is (len(turns) % 2 == 1):
        return False
    turns.append(position)
    return True


@dataclass(frozen=True)
class Resolved:
    """A request as the front end resolved it: what the scheduler and the workers go by.

    It travels in the request's sampling parameters as plain data (`pack`), since vLLM sends those between processes.
    """

    hidden: tuple[ResolvedEdit, ...] = ()
    values: tuple[ResolvedEdit, ...] = ()
    tuned: tuple[tuple[int, float], ...] = ()
    """Tuned models by number, with their weights."""
    beta: float = 1.0
    prompt: int = 0
    """Length of the prompt that scopes count from."""
    length: int = 0
    """Tokens of the request before it draws any."""
    ends: int = 0
    """The most tokens that prompt and text may have together, from which value heads know how many may follow."""
    reads: bool = False
    """Whether an edit has yet to read the prompt."""
    rewind: int | None = None
    """Position from which the prompt runs again once it was read."""
    private: bool = False
    """Whether its blocks of the cache are its own: for a while they hold what was there before it was steered."""
    measure: bool = False
    tag: str | None = None
    read: tuple[str, str] | None = None

    def pack(self) -> dict[str, Any]:
        """Plain data."""
        return {"resolved": True, **asdict(self)}

    @classmethod
    def of(cls, params: Any) -> Resolved | None:
        """From a request's sampling parameters; None for requests that are not steered."""
        extra = getattr(params, "extra_args", None)
        given = extra.get("steer") if extra else None
        if not isinstance(given, dict) or given.get("resolved") is not True:
            return None
        plain = {name: value for name, value in given.items() if name != "resolved"}
        for name in ("hidden", "values"):
            plain[name] = tuple(ResolvedEdit.of(edit) for edit in given.get(name, ()))
        return cls(**plain)

    @property
    def digests(self) -> set[str]:
        """Artifacts that it needs."""
        return {edit.artifact for edit in (*self.hidden, *self.values)}

    @property
    def rows(self) -> int:
        """The most rows that a step can need for it: the different combinations of edits that act somewhere along the
        text. A step that reads a prompt, or reads a text again after preemption, can touch every segment of it; equal
        combinations share a row. Of parts that tokens mark, any may be open anywhere.
        """
        spans = Spans.of([(edit.start, edit.stop)] for edit in self.hidden)
        acting = [spans.acting(segment) for segment in range(len(spans.bounds))]
        parts = sorted({(edit.marks.opening, edit.marks.closing) for edit in self.hidden if edit.marks is not None})
        found = set()
        for opened in product((False, True), repeat=len(parts)):
            holds = dict(zip(parts, opened, strict=True))
            on = [e.marks is None or holds[e.marks.opening, e.marks.closing] is e.marks.inside for e in self.hidden]
            found |= {tuple(self.hidden[i].key for i in numbers if on[i]) for numbers in acting}
        return len(found - {()})

    def block_key(self, request_id: str, start: int, end: int) -> str | None:
        """What tells a block of the cache `start <= position < end` from the same tokens under other edits: every edit
        that acts inside, with the positions where it begins and ends. None where none does; blocks before are in the
        chain. One that goes by marks counts as acting: the same tokens give it the same turns.
        """
        acting = []
        for edit in self.hidden:
            stop = math.inf if edit.stop is None else edit.stop
            if edit.start < end and stop > start and stop > edit.start:
                low, high = max(edit.start - start, 0), min(stop, end) - start
                acting.append(f"{edit.key}:{low}-{high}")
        if not acting:
            return None
        return " ".join([*acting, request_id] if self.private else acting)


@dataclass(eq=False)
class SteeredRequest:
    """A steered request in this worker. It is kept while the request lives, through preemptions."""

    id: str
    prompt: int
    edits: list[Compiled]
    keys: list[str]
    spans: Spans
    weights: list[Tensor | None]
    reading: bool
    first: int | None
    """Position from which it runs again once it has read its prompt."""
    measure: bool
    tag: str | None
    params: Any = field(repr=False)
    length: int = 0
    """Tokens before it draws any."""
    read: tuple[str, str] | None = None
    asked: tuple[ResolvedEdit, ...] = ()

    def __post_init__(self) -> None:
        self.seen = self.length
        """Tokens whose marks are counted."""
        self._turns = {i: list(edit.turns) for i, edit in enumerate(self.asked) if edit.marks is not None}

    def come_back(self, known: SteeredRequest) -> None:
        """Go on with what is known of the same request."""
        self.weights, self.reading = known.weights, known.reading
        self.spans, self.seen, self._turns = known.spans, known.seen, known._turns

    @property
    def marked(self) -> bool:
        """Whether where its edits act depends on the tokens that it reads."""
        return bool(self._turns)

    def take(self, start: int, tokens: Sequence[int]) -> bool:
        """Read tokens of a pass, the first one at position `start`; whether something begins or ends with one."""
        changed = False
        for position, token in enumerate(tokens, start):
            if position >= self.seen:
                for i, turns in self._turns.items():
                    marks = self.asked[i].marks
                    assert marks is not None
                    changed |= turned(turns, marks, position, token)
        self.seen = max(self.seen, start + len(tokens))
        if changed:
            self.spans = Spans.of(
                stretches_of(self._turns[i]) if i in self._turns else edit.stretches
                for i, edit in enumerate(self.asked)
            )
        return changed

    def key(self, segment: int) -> tuple[str | None, tuple[str, ...]] | None:
        """What the segment's row is known by, None where nothing acts; rows of requests that read are their own."""
        acting = self.spans.acting(segment)
        if not acting:
            return None
        own = self.id if any(self.weights[i] is not None for i in acting) else None
        return own, tuple(self.keys[i] for i in acting)

    def own_keys(self) -> set[Hashable]:
        """Of the rows that no other request can use."""
        if not any(weight is not None for weight in self.weights):
            return set()
        keys = (self.key(segment) for segment in range(len(self.spans.bounds)))
        return {key for key in keys if key is not None and key[0] == self.id}

    def row(self, segment: int, depth: int, width: int) -> SteeringRow:
        acting = self.spans.acting(segment)
        return merged([self.edits[i] for i in acting], [self.weights[i] for i in acting], depth, width)
