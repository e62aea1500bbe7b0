"""Layouts of rows, tried on a network as it was loaded: a few tokens of two rows of unequal length, against single
passes of the library without a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from steer.adapters.transformers import rectangle
from steer.adapters.transformers.body import Body
from steer.adapters.transformers.hidden import RowEdit
from steer.adapters.transformers.rectangle import Track
from steer.adapters.transformers.serving.slots import SlotRows
from steer.core import UnsupportedError
from steer.core.errors import first_line

__all__ = ["Trial"]

_SHORT, _LONG, _NEW = 3, 7, 3
"""Tokens of the two rows, and how many are added to each."""

_WIDE = 300
"""Columns between the tokens of one row, where the configuration names no window."""


class Trial:
    """Tries layouts on one network. `text`: token ids of an ordinary sentence. Both rows are openings of it, so that
    one pass of the library serves as the reference of both.
    """

    def __init__(self, body: Body, text: Sequence[int]) -> None:
        self.body = body
        self.text = [token % body.vocabulary for token in [*text, *range(5, 5 + _LONG + _NEW)][: _LONG + _NEW]]
        self.rows = [self.text[: length + _NEW] for length in (_SHORT, _LONG)]

    def __call__(self, layout: str) -> str | None:
        """What is wrong with a layout, or None."""
        try:
            with torch.inference_mode():
                worst = max(self._errors(layout))
        except UnsupportedError as error:
            return str(error)
        except Exception as error:  # of any library's model
            return f"{type(error).__name__}: {first_line(error)}"
        allowed = self.tolerance * (4 if layout == "single" else 1)
        if worst <= allowed:
            return None
        return f"next-token logits differ by {worst:.2g} of their spread, more than rounding's {allowed:.2g}"

    @cached_property
    def tolerance(self) -> float:
        """The square root of the coarsest arithmetic's rounding: it grows through the layers, but not to what a missing
        or surplus token does. A GPU may multiply float32 in ten bits.
        """
        dtypes = {p.dtype for p in self.body.network.parameters()}
        eps = [torch.finfo(d).eps for d in dtypes if d.is_floating_point and d.itemsize > 1]
        if _quantised(self.body.network):
            eps.append(2**-6)
        if self.body.device.type != "cpu":
            eps.append(2**-10)
        return float(max(eps, default=2**-6)) ** 0.5

    @cached_property
    def _reference(self) -> list[Tensor]:
        """Logits `[_NEW + 1, V]` after each row's prompt and after each further token, in one pass of the library."""
        tokens = torch.tensor([self.text], device=self.body.device)
        given = {"attention_mask": torch.ones_like(tokens), "use_cache": False}
        layers = range(len(self.body.blocks))
        with self.body.recording(layers) as seen:
            out = self.body.network(input_ids=tokens, **{k: v for k, v in given.items() if k in self.body.takes})
        wanted = (*tokens.shape, int(self.body.config.hidden_size))
        for layer in layers:
            if layer not in seen:
                raise UnsupportedError(f"block {layer} is not run on text alone")
            if seen[layer].shape != wanted:
                shape = tuple(seen[layer].shape)
                raise UnsupportedError(f"block {layer} gives {shape} where {wanted} is one residual stream")
        return [out.logits[0, length - 1 : length + _NEW].float() for length in (_SHORT, _LONG)]

    def _error(self, logits: Tensor, row: int, step: int) -> float:
        wanted, found = self._reference[row][step], logits.float()
        gap = torch.where(found == wanted, 0.0, found - wanted)  # a token may be excluded by both, at -infinity
        away = gap.square().mean().sqrt() / wanted[wanted.isfinite()].std().clamp_min(1e-30)
        return float(away) if bool(away.isfinite()) else float("inf")

    def _start(self, rows: Sequence[int]) -> Track:
        """The prompt pass. What blocks give for padding is spoilt, as edits may: nobody is to see it.
        (It does not grow from block to block: float16 overflows in sixteen doublings, and 0 times infinity is NaN.)
        """
        body = self.body
        tokens, mask = rectangle.left_padded([self.rows[i][:-_NEW] for i in rows], body.pad_token_id, body.device)
        position = (mask.cumsum(1) - 1).clamp_min(0)
        padded, cache = bool((mask == 0).any()), body.new_cache()

        def spoil(hidden: Tensor) -> Tensor:
            return torch.where(mask.to(hidden.device).unsqueeze(-1) == 0, 1 - hidden, hidden)

        spoilt: dict[int, RowEdit] = dict.fromkeys(range(len(body.blocks)), spoil) if padded else {}
        logits, _ = body.forward(tokens, mask if padded else None, position, cache, spoilt)
        return Track(body, cache, mask, padded, position[:, -1] + 1, logits[:, -1], None, None)

    def _token(self, rows: Sequence[int], step: int) -> Tensor:
        return torch.tensor([self.rows[i][step - _NEW] for i in rows], device=self.body.device)

    def _compare(self, track: Track, rows: Sequence[int], step: int) -> Iterator[float]:
        for logits, row in zip(track.logits, rows, strict=True):
            yield self._error(logits, row, step)

    def _errors(self, layout: str) -> Iterator[float]:
        tries: dict[str, Callable[[], Iterator[float]]] = {
            "single": self._single,
            "pads": self._pads,
            "chunks": self._chunks,
            "gaps": self._gaps,
            "branches": self._branches,
            "shares": self._shares,
        }
        return tries[layout]()

    def _single(self) -> Iterator[float]:
        return self._forked([1], [1, 1])

    def _pads(self) -> Iterator[float]:
        return self._forked([0, 1], [1, 0, 1])

    def _forked(self, rows: Sequence[int], copies: Sequence[int]) -> Iterator[float]:
        """Two tokens of copies of some rows, and between them one of the rows themselves."""
        track = self._start(rows)
        yield from self._compare(track, rows, 0)
        other = rectangle.fork(track, torch.tensor([list(rows).index(row) for row in copies]))
        other, _ = rectangle.advance(other, self._token(copies, 0))
        yield from self._compare(other, copies, 1)
        track, _ = rectangle.advance(track, self._token(rows, 0))
        yield from self._compare(track, rows, 1)
        other, _ = rectangle.advance(other, self._token(copies, 1))
        yield from self._compare(other, copies, 2)

    def _chunks(self) -> Iterator[float]:
        rows = [0, 1] if self.body.allows("pads") else [1]
        tokens = torch.stack([self._token(rows, step) for step in range(_NEW)], 1)
        logits = rectangle.continuation_logits(self._start(rows), tokens)
        for i, row in enumerate(rows):
            for step in range(_NEW):
                yield self._error(logits[i, step], row, step)
        track = rectangle.replay(self._start(rows), tokens[:, :2], torch.ones_like(tokens[:, :2], dtype=torch.bool))
        yield from self._compare(track, rows, 2)

    def _gaps(self) -> Iterator[float]:
        """The first row waits for two tokens of the second, and both have waited for longer than any window."""
        track, waits = self._start([0, 1]), torch.tensor([False, True], device=self.body.device)
        gap = self._wide() - _LONG
        for layer in track.cache.layers:
            layer.keys, layer.values = (torch.nn.functional.pad(x, (0, 0, 0, gap)) for x in (layer.keys, layer.values))
        track = replace(track, mask=torch.nn.functional.pad(track.mask, (0, gap)), padded=True)
        for step in range(2):
            track, _ = rectangle.advance(track, self._token([0, 1], step), waits)
        yield self._error(track.logits[0], 0, 0)
        yield self._error(track.logits[1], 1, 2)
        mixed = torch.tensor([self.rows[0][-_NEW], self.rows[1][2 - _NEW]], device=self.body.device)
        track, _ = rectangle.advance(track, mixed)
        yield self._error(track.logits[0], 0, 1)
        yield self._error(track.logits[1], 1, 3)

    def _branches(self) -> Iterator[float]:
        """The token that is taken stands last among the candidates."""
        rows = [0, 1] if self.body.allows("pads") else [1]
        track, token = self._start(rows), self._token(rows, 0)
        others = [(token + i) % self.body.vocabulary for i in (1, 2)]
        rectangle.look(track, torch.stack([*others, token], 1))
        track, _ = rectangle.advance(track, token)
        yield from self._compare(track, rows, 1)
        track, _ = rectangle.advance(track, self._token(rows, 1))
        yield from self._compare(track, rows, 2)

    def _shares(self) -> Iterator[float]:
        """Both rows in a rectangle that is wider than any window of the model's."""
        view = SlotRows(self.body)
        view.join(self._start([0]), [0])
        view.join(self._start([1]), [0])
        view.width = self._wide()
        for step in range(2):
            view.advance(self._token([0, 1], step))
            for row in (0, 1):
                assert view.logits is not None
                yield self._error(view.logits[row], row, step + 1)

    def _wide(self) -> int:
        """Columns that are more than any window holds."""
        named = [
            value
            for name, value in self.body.config.to_dict().items()
            if isinstance(value, int) and any(word in name for word in ("window", "local", "chunk"))
        ]
        return min(_LONG + 1 + max([_WIDE, *(n for n in named if n <= 8192)]), (self.body.context or 2**20) - 2 * _NEW)


def _quantised(network: Any) -> bool:
    """Whether weights or activations are rounded to some eight bits: by the kinds of weights, or of modules that hold
    none which torch knows of.
    """
    weights = any(not p.is_floating_point() or type(p.data) is not Tensor for p in network.parameters())
    homes = {type(module).__module__ for module in network.modules()}
    return weights or any("quant" in home or "bitsandbytes" in home for home in homes)
