"""Rows of one network in one rectangle of positions: prompt pass, next tokens, forks and lookahead, under a plan of
hidden edits. Padding is on the left, or in the middle where the network's layout allows gaps.

Letters: `B` prompts, `N` rows, `T` positions, `K` candidates, `D` width, `V` vocabulary, `R` readings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from steer.adapters.transformers.body import Body
from steer.adapters.transformers.cache import copy_rows, crop_last, full_attention, join_rows
from steer.adapters.transformers.hidden import HiddenProgram, RowEdit
from steer.adapters.transformers.reader import Reader
from steer.core import Cost, HiddenEdit

Mounted = Sequence[tuple[HiddenEdit, frozenset[int] | None]]


class Pass(NamedTuple):
    """What a pass gave: logits `[N, T, V]`, and where they were asked for hidden states and readings `[N, T, R]`."""

    logits: Tensor
    hidden: Tensor | None
    readings: Tensor | None

    def at(self, rows: Tensor, choice: Tensor) -> dict[str, Any]:
        """Its position `choice` `[N]` of each of `rows` `[N]`, as the fields of a track."""
        return {name: None if x is None else x[rows, choice] for name, x in self._asdict().items()}

    def last(self) -> dict[str, Any]:
        """Its last position, as the fields of a track."""
        return {name: None if x is None else x[:, -1] for name, x in self._asdict().items()}


@dataclass
class Track:
    """Rows of one model in mid-text. `logits` and `hidden` belong to the last token of each row."""

    body: Body
    cache: Cache
    mask: Tensor
    """1 where a cached position is real, `[N, T]`."""
    padded: bool
    """Whether any position is padding; without padding no mask is passed, which the attention kernels like."""
    position: Tensor
    """Position of the next token of each row, without padding `[N]`."""
    logits: Tensor
    hidden: Tensor | None
    plan: HiddenProgram | None
    reader: Reader | None = None
    readings: Tensor | None = None
    """What the reader makes of the last token of each row `[N, R]`."""
    branch: tuple[Tensor, Pass] | None = field(default=None, repr=False)
    """Candidates `[N, K]` and the pass over them, while they hang from the cache."""


def left_padded(ids: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask `[B, T]`."""
    width = max(len(row) for row in ids)
    tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
    return tokens, mask


def _forward(
    body: Body,
    tokens: Tensor,
    seen: Tensor | None,
    position: Tensor,
    cache: Cache,
    program: dict[int, RowEdit],
    *,
    keep: int = 1,
    hidden: bool = False,
    reader: Reader | None = None,
) -> Pass:
    """A pass over tokens that attend to what `seen` says, None for everything; it reads what it keeps logits of."""
    position = position if position.dim() == 2 else position.unsqueeze(1)
    if reader is None:
        return Pass(*body.forward(tokens, seen, position, cache, program, keep=keep, hidden=hidden), None)
    reading = reader.begin(keep)
    found = body.forward(tokens, seen, position, cache, program, keep=keep, hidden=hidden, taps=reading.taps)
    return Pass(*found, reading.found.to(found[0].device))


def start(
    body: Body, ids: Sequence[Sequence[int]], edits: Mounted, hidden: bool, reader: Reader | None = None
) -> tuple[Track, Cost]:
    """The prompt pass: every prompt is read once."""
    tokens, mask = left_padded(ids, body.pad_token_id, body.device)
    position = (mask.cumsum(1) - 1).clamp_min(0)
    padded = bool((mask == 0).any())
    lengths = [len(row) for row in ids]
    cost = Cost(prompt_tokens=sum(lengths), model_calls=1, nfe=sum(lengths))
    cache = body.new_cache()
    seen = mask if padded else None
    reads = sorted({layer for edit, _ in edits for layer in edit.reads})
    if not reads:
        plan = HiddenProgram.compile(edits, body.info, ids, [None] * len(edits)) if edits else None
        program = plan.prompt(position.cpu()) if plan else {}
        found = _forward(body, tokens, seen, position, cache, program, hidden=hidden, reader=reader)
    else:
        with body.recording(reads) as states:
            found = _forward(body, tokens, seen, position, cache, {}, hidden=hidden, reader=reader)
        at_end = {layer: x[:, -1].float() for layer, x in states.items()}
        weights = [
            edit.weights({layer: at_end[layer] for layer in edit.reads}) if edit.reads else None for edit, _ in edits
        ]
        plan = HiddenProgram.compile(edits, body.info, ids, weights)
        found, cache, more = _read_again(body, tokens, seen, position, cache, plan, found, reader)
        cost = cost + more
    return Track(body, cache, mask, padded, position[:, -1] + 1, **found.last(), plan=plan or None, reader=reader), cost


def _read_again(
    body: Body,
    tokens: Tensor,
    seen: Tensor | None,
    position: Tensor,
    cache: Cache,
    plan: HiddenProgram,
    found: Pass,
    reader: Reader | None,
) -> tuple[Pass, Cache, Cost]:
    """Now that the prompt has been read and its edits are known, redo what they change of it: nothing, the last
    position alone, or the whole prompt.
    """
    first = plan.first_position()
    end = position[:, -1].cpu()
    acts = first <= end
    if not bool(acts.any()):
        return found, cache, Cost()
    old = [(layer.keys, layer.values) for layer in cache.layers] if full_attention(cache) else []
    if old and bool((first >= end).all()):
        crop_last(cache, 1)
        tokens, position = tokens[:, -1:], position[:, -1:]
    else:
        cache = body.new_cache()
    program = plan.prompt(position.cpu())
    again = _forward(body, tokens, seen, position, cache, program, hidden=found.hidden is not None, reader=reader)
    # Rows on which nothing acts keep every bit of the first pass.
    idle = (~acts).nonzero().squeeze(1).to(found.logits.device)
    if len(idle):
        for new, before in zip(again, found, strict=True):
            if new is not None and before is not None:
                new[idle, -1] = before[idle, -1]
        for layer, (keys, values) in zip(cache.layers, old, strict=bool(old)):
            at = idle.to(keys.device)
            layer.keys[at], layer.values[at] = keys[at], values[at]
    return again, cache, Cost(model_calls=1)


def fork(track: Track, index: Tensor) -> Track:
    """New rows; row i is row `index[i]`. The old track stays usable. The prompt's cache is indexed once, here."""
    at = index.to(track.mask.device)
    return replace(
        track,
        cache=copy_rows(track.cache, at),
        mask=track.mask[at],
        position=track.position[at],
        logits=track.logits[at],
        hidden=None if track.hidden is None else track.hidden[at],
        readings=None if track.readings is None else track.readings[at],
        plan=track.plan.rows(index) if track.plan else None,
        branch=None if track.branch is None else (track.branch[0][at], _rows(track.branch[1], at)),
    )


def _rows(found: Pass, at: Tensor) -> Pass:
    return Pass(*(None if x is None else x[at] for x in found))  # type: ignore[arg-type]


def advance(track: Track, tokens: Tensor, real: Tensor | None = None) -> tuple[Track, int]:
    """Every row takes its token `[N]`; returns the track (the same cache, moved on) and the model calls spent. Rows
    that are not `real` `[N]` wait: their position stays, and what the cache gets is masked.
    """
    if real is not None:
        return _advance_some(track, tokens, real)
    if track.branch is not None:
        taken = _take_branch(track, tokens)
        if taken is not None:
            return taken, 0
    mask = torch.cat([track.mask, track.mask.new_ones(len(track.mask), 1)], 1)
    program = track.plan.decode(track.position, tokens) if track.plan else {}
    found = _moved(track, tokens.unsqueeze(1), mask if track.padded else None, track.position, program)
    return replace(track, mask=mask, position=track.position + 1, **found.last(), branch=None), 1


def _moved(
    track: Track, tokens: Tensor, seen: Tensor | None, position: Tensor, program: dict[int, RowEdit], **more: Any
) -> Pass:
    """A pass over further tokens of a track that gives what the track keeps."""
    given = {"hidden": track.hidden is not None, "reader": track.reader, **more}
    return _forward(track.body, tokens, seen, position, track.cache, program, **given)


def _advance_some(track: Track, tokens: Tensor, real: Tensor) -> tuple[Track, int]:
    if track.branch is not None:
        crop_last(track.cache, track.branch[0].shape[1])
        track.branch = None
    mask = torch.cat([track.mask, real.to(track.mask).unsqueeze(1)], 1)
    program = track.plan.decode(track.position, tokens, real) if track.plan else {}
    # A waiting row must still attend to something: its junk key, which no later step will see.
    seen = mask.clone()
    seen[:, -1] = 1
    found = _moved(track, tokens.unsqueeze(1), seen, track.position, program).last()
    keep = real.unsqueeze(1)
    kept: dict[str, Any] = {
        name: None if x is None else torch.where(keep, x, getattr(track, name)) for name, x in found.items()
    }
    return replace(track, mask=mask, padded=True, position=track.position + real, branch=None, **kept), 1


def replay(track: Track, tokens: Tensor, real: Tensor) -> Track:
    """The track after several tokens `[N, T]` in one pass. Rows are aligned on the right: where they are not `real`
    `[N, T]`, on the left, there is no token. Consumes the track.
    """
    position = track.position.unsqueeze(1) + (real.long().cumsum(1) - 1).clamp_min(0)
    mask = torch.cat([track.mask, real.to(track.mask)], 1)
    padded = track.padded or not bool(real.all())
    program = track.plan.chunk(position, tokens, real) if track.plan else {}
    found = _moved(track, tokens, mask if padded else None, position, program)
    return replace(track, mask=mask, padded=padded, position=track.position + real.sum(1), **found.last(), branch=None)


def stack(tracks: Sequence[Track]) -> Track:
    """The rows of several tracks of one model as one. Copies; caches that are narrower are padded."""
    first, width = tracks[0], max(track.mask.shape[1] for track in tracks)
    short = [width - track.mask.shape[1] for track in tracks]

    def wide(x: Tensor, missing: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x

    cache = first.body.new_cache()
    for i, layer in enumerate(cache.layers):
        parts = [(t.cache.layers[i], n) for t, n in zip(tracks, short, strict=True)]
        layer.update(*(torch.cat([wide(getattr(p, name), n) for p, n in parts]) for name in ("keys", "values")))
    masks = [torch.nn.functional.pad(t.mask, (0, n)) for t, n in zip(tracks, short, strict=True)]
    return _as_one(tracks, cache, torch.cat(masks), any(short))


def join(tracks: Sequence[Track]) -> Track:
    """The rows of several tracks of one model and width as one. Copies."""
    return _as_one(tracks, join_rows([t.cache for t in tracks]), torch.cat([t.mask for t in tracks]), False)


def _as_one(tracks: Sequence[Track], cache: Cache, mask: Tensor, padded: bool) -> Track:
    first, plans = tracks[0], [t.plan for t in tracks]
    return replace(
        first,
        cache=cache,
        mask=mask,
        padded=padded or any(t.padded for t in tracks),
        position=torch.cat([t.position for t in tracks]),
        logits=torch.cat([t.logits for t in tracks]),
        hidden=None if first.hidden is None else torch.cat([t.hidden for t in tracks if t.hidden is not None]),
        readings=None if first.readings is None else torch.cat([t.readings for t in tracks if t.readings is not None]),
        plan=HiddenProgram.stack([p for p in plans if p is not None]) if any(plans) else None,
        branch=None,
    )


def look(track: Track, candidates: Tensor) -> Tensor:
    """Hidden states after each of `candidates` `[N, K]` in one pass of tree attention: all K share the row's prefix and
    its next position, and none sees another. `[N, K, D]`. What was computed is kept for `advance`.
    """
    n, k = candidates.shape
    old = track.mask.shape[1]
    blocked = torch.full((n, 1, k, old + k), torch.finfo(track.logits.dtype).min, dtype=track.logits.dtype)
    blocked = blocked.to(track.logits.device)
    blocked[..., :old].masked_fill_(track.mask[:, None, None, :].bool(), 0.0)
    blocked[..., old:].masked_fill_(torch.eye(k, dtype=torch.bool, device=blocked.device), 0.0)
    position = track.position.unsqueeze(1).expand(n, k)
    program = track.plan.branches(track.position, candidates) if track.plan else {}
    found = _moved(track, candidates, blocked, position, program, keep=0, hidden=True)
    assert found.hidden is not None
    track.branch = (candidates, found)
    return found.hidden


def _take_branch(track: Track, tokens: Tensor) -> Track | None:
    """The track after `tokens` where each is among the candidates that were looked at; otherwise drop the branch."""
    assert track.branch is not None
    candidates, looked = track.branch
    found = candidates == tokens.unsqueeze(1)
    width = candidates.shape[1]
    track.branch = None
    if not bool(found.any(1).all()):
        crop_last(track.cache, width)
        return None
    choice = found.int().argmax(1)
    if track.plan is not None:
        track.plan.take(tokens)
    for layer in track.cache.layers:
        layer.keep_branch(width, choice)
    rows = torch.arange(len(choice), device=choice.device)
    return replace(
        track,
        mask=torch.cat([track.mask, track.mask.new_ones(len(track.mask), 1)], 1),
        position=track.position + 1,
        **looked.at(rows, choice),
        branch=None,
    )


def continuation_logits(track: Track, tokens: Tensor) -> Tensor:
    """Logits `[N, T, V]` that each of `tokens` `[N, T]` was predicted from, in one pass. Consumes the track."""
    if tokens.shape[1] == 1:
        return track.logits.unsqueeze(1)
    found = _continued(track, tokens[:, :-1], hidden=False)
    return torch.cat([track.logits.unsqueeze(1), found.logits], 1)


def continuation_hidden(track: Track, tokens: Tensor) -> Tensor:
    """Final hidden states `[N, T + 1, D]` before the first of `tokens` `[N, T]` and after each. Consumes the track."""
    assert track.hidden is not None
    hidden = _continued(track, tokens, hidden=True).hidden
    assert hidden is not None
    return torch.cat([track.hidden.unsqueeze(1), hidden], 1)


def _continued(track: Track, fed: Tensor, hidden: bool) -> Pass:
    position = track.position.unsqueeze(1) + torch.arange(fed.shape[1], device=fed.device)
    mask = torch.cat([track.mask, track.mask.new_ones(fed.shape)], 1)
    program = track.plan.chunk(position, fed) if track.plan else {}
    given = {"keep": 1 if hidden else 0, "hidden": hidden, "reader": None}
    return _moved(track, fed, mask if track.padded else None, position, program, **given)
