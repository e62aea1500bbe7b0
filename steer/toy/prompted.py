"""A process of one step whose law depends on the messages: the oracle of what edits or answers prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steer.chain import ChainContext, ChainState, TokenChain
from steer.core import Mounted, Prompt, PromptEdit, Site, check
from steer.core.rows import beginning

__all__ = ["PromptTable", "refining"]


@dataclass(frozen=True)
class PromptTable(TokenChain):
    """One word, drawn from a law that a function gives for each prompt, after the prompt edits.

    Attributes:
        law: the probabilities `[V]` of `words` for a prompt.
        words: the outputs.
        warmth: added to the temperature 1, which sharpens or flattens every law.
    """

    law: Callable[[Prompt], Sequence[float]]
    words: tuple[str, ...] = ("right", "wrong")
    warmth: float = 0.0
    edits: Mounted = ()

    sites = frozenset({Site.PROMPT, Site.TRANSITION})
    length = 1

    def init(self, prompts: Sequence[Prompt], n: int, generator: torch.Generator) -> ChainState:
        rewrites = any(isinstance(edit, PromptEdit) for edit, _ in self.edits)
        common = beginning(prompts, n, exact=not rewrites)
        return ChainState(torch.zeros(len(common["group"]), 0, dtype=torch.long), **common)

    def context(self, state: ChainState) -> ChainContext:
        seen = self.rewritten(state.prompts)
        return self.view(state.x, tuple(seen[b] for b in state.group.tolist()))

    def view(self, prefix: Tensor, prompts: Sequence[Any] | None = None) -> ChainContext:
        laws = [list(self.law(prompt)) for prompt in prompts or ()]
        fits = all(len(p) == len(self.words) and min(p) >= 0 for p in laws)
        check(fits, "law", laws[:1], f"{len(self.words)} probabilities for each prompt")
        log_law = torch.tensor(laws, dtype=torch.float64).log() / (1 + self.warmth)
        return ChainContext(prefix, prefix.shape[1], torch.log_softmax(log_law, -1), tuple(prompts or ()))

    def heated(self, by: float) -> PromptTable:
        return replace(self, warmth=min(self.warmth + by, 0.5))

    def show(self, x: Tensor) -> list[str]:
        return [self.words[row[0]] if row else "" for row in x.tolist()]


def refining(p0: float, r: float, k: float) -> PromptTable:
    """A solver whose first draft is right with probability `p0`; told that its draft will not do, it puts a wrong one
    right with probability `r` and keeps a right one right with probability `k`.
    """

    def law(prompt: Prompt) -> tuple[float, float]:
        said = [] if isinstance(prompt, str) else [m["content"] for m in prompt if m["role"] == "assistant"]
        right = p0 if not said else k if said[-1] == "right" else r
        return right, 1 - right

    return PromptTable(law)
