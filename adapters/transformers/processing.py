"""Logits processors over rows of unequal length: each row is judged by its own tokens, as if it were alone.

The library pads short prompts on the left and lets its processors see the padding: a repetition penalty then falls on
the padding token (which is the end of the text for many models), and n-grams of padding count as repeated. Here rows
that processors could tell apart by their padding are handed over in groups of one length, without any.

Letters: `N` rows, `T` prompt tokens, `C` columns, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer.adapters.language.decoding import Decoding

__all__ = ["Processing"]


@dataclass(frozen=True, eq=False)
class Processing:
    """The processors of a run and the lengths of its prompts.

    Attributes:
        made: processors, by the length of the prompt that they count from.
        lengths: of every prompt.
        padded: what stands for each prompt, on one length: it is filled on the left with its own first token, which a
            processor that asks only whether a token was there cannot tell from the prompt itself `[B, T]`.
        apart: whether rows of unequal length must be handed over apart.
        waits: whether rows may sit columns out, which leaves gaps between their tokens.
    """

    made: dict[int, list[Any]]
    lengths: tuple[int, ...]
    padded: Tensor
    apart: bool
    waits: bool

    @classmethod
    def of(cls, decoding: Decoding, ids: Sequence[Sequence[int]], waits: bool, device: torch.device) -> Processing:
        """For prompts of token `ids`."""
        width = max(map(len, ids))
        several = any(len(words) > 1 for words in decoding.bad_words_ids)
        ordered = bool(decoding.no_repeat_ngram_size or several or decoding.logits_processor)
        apart = waits or (ordered and len({len(row) for row in ids}) > 1)
        eos = decoding.eos_token_id or ()
        lengths = tuple(map(len, ids))
        made = {n: decoding.processors(n, eos, device) for n in (set(lengths) if apart else {width})}
        padded = torch.tensor([[*row[:1] * (width - len(row)), *row] for row in map(list, ids)], device=device)
        return cls(made, lengths, padded, apart, waits)

    def __bool__(self) -> bool:
        return any(self.made.values())

    def __call__(self, logits: Tensor, ids: Tensor, prefix: Tensor, real: Tensor, group: Tensor) -> Tensor:
        """Processed logits `[N, V]` of rows with prompt `ids` `[N, T]`, for the prompts `group` `[N]`, and tokens
        `prefix` `[N, C]` where `real` `[N, C]`.
        """
        if not self.apart:
            return _run(self.made[ids.shape[1]], torch.cat([ids, prefix], 1), logits)
        drawn = [prefix.shape[1]] * len(prefix)
        if self.waits:
            drawn = real.sum(1).tolist()
            # Aligned on the right, so that what is cut off on the left is what the row does not have.
            prefix = prefix.gather(1, real.long().argsort(dim=1, stable=True))
        tokens = torch.cat([ids, prefix], 1)
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (b, count) in enumerate(zip(group.tolist(), drawn, strict=True)):
            groups.setdefault((self.lengths[b], count), []).append(row)
        out = logits.clone()
        for (length, count), rows in groups.items():
            at = torch.tensor(rows).to(logits.device, non_blocking=logits.device.type != "mps")
            own = torch.cat([ids[at, ids.shape[1] - length :], tokens[at, tokens.shape[1] - count :]], 1)
            out = out.index_copy(0, at, _run(self.made[length], own, logits[at]))
        return out


def _run(made: Sequence[Any], tokens: Tensor, logits: Tensor) -> Tensor:
    for processor in made:
        logits = processor(tokens, logits)
    return logits
