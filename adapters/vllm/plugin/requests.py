"""A resolved request on its way from the front end to the worker."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from steer.adapters.vllm.plugin.compiled import Compiled, Row, Spans, merged
from steer.serving.wire import EditRequest


@dataclass(frozen=True)
class Inside:
    """What the adapter itself asks of the engine, in place of a client's dictionary. It never comes over the wire."""

    edits: tuple[EditRequest, ...] = ()
    beta: float = 1.0
    prompt_length: int | None = None
    """Where the request continues a text: the length of the prompt that scopes count from."""
    weights: tuple[tuple[float, ...] | None, ...] = ()
    """Weights that the edits decided on when they read the prompt, in the order of the hidden edits."""
    measure: bool = False
    """Whether the norms of its tokens are measured."""
    tag: str | None = None
    """Under which the worker keeps what its edits decide, to be asked for it."""


def digests(resolved: Mapping[str, Any]) -> set[str]:
    """Artifacts that a resolved request needs."""
    return {entry["artifact"] for entry in (*resolved["hidden"], *resolved["values"])}


def resolved_of(params: Any) -> dict[str, Any] | None:
    """What the front end resolved, from a request's sampling parameters; None for requests that are not steered."""
    extra = getattr(params, "extra_args", None)
    given = extra.get("steer") if extra else None
    return given if isinstance(given, dict) and given.get("resolved") is True else None


def block_key(resolved: Mapping[str, Any], request_id: str, start: int, end: int) -> str | None:
    """What tells a block of the cache `start <= position < end` from the same tokens under other edits: every edit that
    acts inside, with the positions where it begins and ends. None where none does; blocks before are in the chain.
    """
    acting = []
    for entry in resolved["hidden"]:
        stop = math.inf if entry["stop"] is None else entry["stop"]
        if entry["start"] < end and stop > start and stop > entry["start"]:
            low, high = max(entry["start"] - start, 0), min(stop, end) - start
            acting.append(f"{entry['key']}:{low}-{high}")
    if not acting:
        return None
    # A prompt that is read before it is steered holds, for a while, blocks that are not steered yet.
    return " ".join([*acting, request_id] if resolved["private"] else acting)


@dataclass(eq=False)
class Request:
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

    def row(self, segment: int, depth: int, width: int) -> Row:
        acting = self.spans.acting(segment)
        return merged([self.edits[i] for i in acting], [self.weights[i] for i in acting], depth, width)
