"""One network following rows of tokens, laid out as is right for it: in one rectangle, or where rows of unequal length
would change each other in groups, each a rectangle of its own.

Letters: `B` prompts, `N` rows, `T` positions, `K` candidates, `D` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steer.adapters.transformers import rectangle
from steer.adapters.transformers.body import Body
from steer.adapters.transformers.cache import full_attention
from steer.adapters.transformers.cache import nbytes as cache_bytes
from steer.adapters.transformers.reader import Reader
from steer.adapters.transformers.rectangle import Mounted, Track, left_padded
from steer.core import Cost, UnsupportedError

__all__ = [
    "AnyTrack",
    "Groups",
    "Track",
    "advance",
    "continuation_hidden",
    "continuation_logits",
    "fork",
    "left_padded",
    "look",
    "nbytes",
    "replay",
    "stack",
    "start",
]


@dataclass
class Groups:
    """Rows of one network in several rectangles: part i holds the rows numbered `parts[i][0]`."""

    parts: tuple[tuple[Tensor, Track], ...]

    @property
    def body(self) -> Body:
        return self.parts[0][1].body

    @property
    def logits(self) -> Tensor:
        return self.ordered([part.logits for _, part in self.parts])

    @property
    def hidden(self) -> Tensor | None:
        found = [part.hidden for _, part in self.parts if part.hidden is not None]
        return self.ordered(found) if found else None

    @property
    def readings(self) -> Tensor | None:
        found = [part.readings for _, part in self.parts if part.readings is not None]
        return self.ordered(found) if found else None

    def ordered(self, values: Sequence[Tensor]) -> Tensor:
        """One value for each row of each part, by the rows' numbers."""
        numbers = torch.cat([rows for rows, _ in self.parts])
        return torch.cat(list(values))[numbers.argsort().to(values[0].device)]


AnyTrack = Track | Groups


def start(
    body: Body,
    ids: Sequence[Sequence[int]],
    edits: Mounted,
    n: int,
    hidden: bool,
    new: int = 0,
    reader: Reader | None = None,
) -> tuple[AnyTrack, Cost]:
    """The prompt pass: every prompt is read once, then its cache serves `n` rows, of up to `new` more tokens. `reader`
    reads every position from which a token is predicted.
    """
    body.layout.check(body)
    lengths = sorted({len(row) for row in ids})
    if len(lengths) == 1 or (body.alike(lengths[-1] + new) and body.allows("pads")):
        track, cost = rectangle.start(body, ids, edits, hidden, reader)
        whole: AnyTrack = track
    else:
        parts, cost = [], Cost()
        for length in lengths:
            rows = [i for i, row in enumerate(ids) if len(row) == length]
            part, more = rectangle.start(body, [ids[i] for i in rows], _numbered(edits, rows), hidden, reader)
            parts.append((torch.tensor(rows), part))
            cost = cost + more
        whole = Groups(tuple(parts))
    return (fork(whole, torch.arange(len(ids)).repeat_interleave(n)) if n > 1 else whole), cost


def _numbered(edits: Mounted, rows: Sequence[int]) -> Mounted:
    """Edits of some rows, by their numbers among these."""
    return [
        (edit, None if wanted is None else frozenset(i for i, row in enumerate(rows) if row in wanted))
        for edit, wanted in edits
    ]


def fork(track: AnyTrack, index: Tensor) -> AnyTrack:
    """New rows; row i is row `index[i]`. The old rows stay usable."""
    if isinstance(track, Track):
        return rectangle.fork(track, index)
    index, parts = index.cpu(), []
    for rows, part in track.parts:
        inside = torch.full((_count(track),), -1).index_copy(0, rows, torch.arange(len(rows)))[index]
        mine = (inside >= 0).nonzero().squeeze(1)
        if len(mine):
            parts.append((mine, rectangle.fork(part, inside[mine])))
    return Groups(tuple(parts) or ((index, rectangle.fork(track.parts[0][1], index)),))


def advance(track: AnyTrack, tokens: Tensor, real: Tensor | None = None) -> tuple[AnyTrack, int]:
    """Every row takes its token `[N]`; returns the rows (the same cache, moved on) and the model calls spent. Rows
    that are not `real` `[N]` wait.
    """
    if isinstance(track, Track) and (real is None or _may_wait(track)):
        return rectangle.advance(track, tokens, real)
    if real is not None and bool(real.all()):
        return advance(track, tokens)
    parts, calls = [], 0
    for rows, part in _parts(track):
        for mine, sub, goes in _split(rows, part, None if real is None else real[rows.to(real.device)]):
            moved, more = rectangle.advance(sub, tokens[mine.to(tokens.device)]) if goes else (sub, 0)
            parts.append((mine, moved))
            calls += more
    return _joined(parts), calls


def _may_wait(track: Track) -> bool:
    return track.body.alike(None) and track.body.allows("gaps")


def _split(rows: Tensor, part: Track, real: Tensor | None) -> Iterator[tuple[Tensor, Track, bool]]:
    """The rows of a part that go on, and those that wait."""
    if real is None or bool(real.all()) or not bool(real.any()):
        yield rows, part, real is None or bool(real.any())
        return
    for goes in (True, False):
        mine = (real.cpu() == goes).nonzero().squeeze(1)
        yield rows[mine], rectangle.fork(part, mine), goes


def replay(track: AnyTrack, tokens: Tensor, real: Tensor) -> AnyTrack:
    """The rows after several tokens `[N, T]`. They are aligned on the right: where they are not `real` `[N, T]`, on the
    left, there is no token. Consumes the track.
    """
    chunks = track.body.allows("chunks")
    if isinstance(track, Track) and chunks and (bool(real.all()) or _may_wait(track)):
        return rectangle.replay(track, tokens, real)
    parts = []
    for rows, part in _parts(track):
        mine = rows.to(tokens.device)
        counts = real[mine].sum(1).cpu()
        for count in counts.unique().tolist():
            at = (counts == count).nonzero().squeeze(1)
            fed = tokens[mine[at.to(mine.device)], tokens.shape[1] - count :]
            parts.append((rows[at], _fed(rectangle.fork(part, at), fed, chunks)))
    return _joined(parts)


def _fed(track: Track, tokens: Tensor, chunks: bool) -> Track:
    """The track after tokens `[N, T]`, all real."""
    if chunks and tokens.shape[1]:
        return rectangle.replay(track, tokens, torch.ones_like(tokens, dtype=torch.bool))
    for column in tokens.unbind(1):
        track, _ = rectangle.advance(track, column)
    return track


def stack(tracks: Sequence[AnyTrack]) -> AnyTrack:
    """The rows of several tracks of one model as one. Copies."""
    whole = [t for t in tracks if isinstance(t, Track)]
    if len(whole) == len(tracks) and all(full_attention(t.cache) for t in whole) and _may_wait(whole[0]):
        return rectangle.stack(whole)
    parts, first = [], 0
    for track in tracks:
        parts += [(rows + first, replace(part, branch=None)) for rows, part in _parts(track)]
        first += _count(track)
    return _joined(parts)


def look(track: AnyTrack, candidates: Tensor) -> Tensor:
    """Hidden states after each of `candidates` `[N, K]` in one pass of tree attention: all K share the row's prefix and
    its next position, and none sees another. `[N, K, D]`. What was computed is kept for `advance`. Raises
    `UnsupportedError` of models in which the candidates would see each other.
    """
    if not track.body.allows("branches"):
        raise UnsupportedError(
            "lookahead over candidates needs a model in which every layer attends to the whole prefix, by positions "
            "that can be given; use a Q-head, which needs no lookahead"
        )
    if isinstance(track, Track):
        return rectangle.look(track, candidates)
    return track.ordered([rectangle.look(part, candidates[rows.to(candidates.device)]) for rows, part in track.parts])


def continuation_logits(track: AnyTrack, tokens: Tensor) -> Tensor:
    """Logits `[N, T, V]` that each of `tokens` `[N, T]` was predicted from. Consumes the track."""
    if tokens.shape[1] == 1 or not track.body.allows("chunks"):
        return torch.stack([rows.logits for rows in _along(track, tokens[:, :-1])], 1)
    if isinstance(track, Track):
        return rectangle.continuation_logits(track, tokens)
    parts = [rectangle.continuation_logits(part, tokens[rows.to(tokens.device)]) for rows, part in track.parts]
    return track.ordered(parts)


def continuation_hidden(track: AnyTrack, tokens: Tensor) -> Tensor:
    """Final hidden states `[N, T + 1, D]` before the first of `tokens` `[N, T]` and after each. Consumes the track."""
    if not track.body.allows("chunks"):
        return torch.stack([rows.hidden for rows in _along(track, tokens) if rows.hidden is not None], 1)
    if isinstance(track, Track):
        return rectangle.continuation_hidden(track, tokens)
    parts = [rectangle.continuation_hidden(part, tokens[rows.to(tokens.device)]) for rows, part in track.parts]
    return track.ordered(parts)


def _along(track: AnyTrack, tokens: Tensor) -> Iterator[AnyTrack]:
    """The rows before the first of `tokens` `[N, T]` and after each, token by token."""
    yield track
    for column in tokens.unbind(1):
        track, _ = advance(track, column)
        yield track


def nbytes(track: AnyTrack) -> int:
    """Memory of the cache."""
    return sum(cache_bytes(part.cache) for _, part in _parts(track))


def _parts(track: AnyTrack) -> tuple[tuple[Tensor, Track], ...]:
    return track.parts if isinstance(track, Groups) else ((torch.arange(_count(track)), track),)


def _count(track: AnyTrack) -> int:
    return sum(len(rows) for rows, _ in track.parts) if isinstance(track, Groups) else len(track.mask)


def _joined(parts: Sequence[tuple[Tensor, Track]]) -> AnyTrack:
    """Parts of one width are made one; where that leaves one part, it stands alone."""
    widths: dict[tuple[int, bool], list[tuple[Tensor, Track]]] = {}
    for rows, part in parts:
        widths.setdefault((part.mask.shape[1], part.branch is None), []).append((rows, part))
    made = []
    for (_, plain), mine in widths.items():
        if len(mine) == 1 or not plain:
            made += mine
        else:
            made.append((torch.cat([rows for rows, _ in mine]), rectangle.join([part for _, part in mine])))
    if len(made) == 1:
        rows, part = made[0]
        order = rows.argsort()
        return part if bool((order == torch.arange(len(rows))).all()) else rectangle.fork(part, order)
    return Groups(tuple(made))
