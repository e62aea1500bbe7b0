"""Ends of texts: tokens, criteria and strings after which a row draws no more, or waits for the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from steer.adapters.language.decoding import Decoding
from steer.adapters.transformers.state import TextState

__all__ = ["ended", "spelled"]


def ended(state: TextState, token: Tensor, filled: int, decoding: Decoding) -> Tensor:
    """Whether the text of a row ends with its new token `[N]`, by the token itself or by the library's criteria, which
    see the prompt and all `filled` columns: `[N]` bool.
    """
    found = torch.zeros_like(state.finished)
    for end in decoding.eos_token_id or ():
        found |= token == end
    if state.ids is not None:
        ids = torch.cat([state.ids, state.prefix[:, :filled]], 1)
        for criterion in decoding.stopping_criteria:
            found |= torch.as_tensor(criterion(ids, None), device=found.device)
    return found


def spelled(
    state: TextState,
    alive: Tensor,
    stop: Sequence[str],
    until: Sequence[str],
    decode: Callable[[list[int]], str],
) -> TextState:
    """The state with what the text of the last tokens says of rows that were `alive` `[N]`: which are finished, since a
    string of `stop` is there, and which wait, since their last token holds one of `until`.
    """
    # A stop string lies within the last tokens: as many as it has bytes, and one that it ends inside of.
    tail = max((len(s.encode()) + 1 for s in stop), default=1)
    last = state.prefix[:, max(0, state.filled - tail) : state.filled]
    told = torch.cat([last, torch.stack([alive, state.finished], 1).long()], 1).tolist()
    finished, waiting = [], []
    for *tokens, drew, over in told:
        text = decode(tokens) if drew and stop else ""
        finished.append(bool(over) or any(end in text for end in stop))
        word = decode(tokens[-1:]) if drew and until else ""
        waiting.append(not drew or any(end in word for end in until))
    device = state.finished.device
    return replace(
        state,
        finished=torch.tensor(finished, device=device),
        over=all(finished),
        waiting=torch.tensor(waiting, device=device) if until else None,
        resting=bool(until) and all(a or b for a, b in zip(finished, waiting, strict=True)),
    )
