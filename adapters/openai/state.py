"""What is known of rows behind an endpoint: their state, and what a transition edit sees of them.

Letters: `N` rows, `K` candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steer.adapters.openai.dialect import Question
from steer.core import Context, Cost, Process, Prompt, Samples, UnsupportedError
from steer.core.rows import Aimed

if TYPE_CHECKING:
    from steer.adapters.openai.process import EndpointProcess

__all__ = ["EndpointContext", "EndpointState"]


@dataclass(frozen=True)
class EndpointState(Aimed):
    """Rows of texts in mid-generation. Nothing of them is kept at the endpoint."""

    group: Tensor
    step: int
    """Blocks drawn so far."""
    log_prob: Tensor
    base_log_prob: Tensor | None
    tilt: Tensor
    kl: Tensor | None
    cost: Cost
    finished: Tensor
    texts: tuple[str, ...] = field(repr=False)
    prompts: list[Prompt] = field(repr=False)
    questions: tuple[Question, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.group)


@dataclass(frozen=True)
class EndpointContext:
    """What a transition edit sees of a black box: for every row the log-law over its own K candidates.

    `base` `[N, K]` holds log-probabilities of the K likeliest tokens that the endpoint named, after temperature, which
    sum to 1 over the K; a row with fewer has -infinity at the end. Candidates are columns: `candidates[i, j] = k` is
    column k of row i. What they are is known as text only, so a value looks at `after(candidates)`.
    """

    step: int
    process: EndpointProcess = field(repr=False)
    prompts: list[Prompt] = field(repr=False)
    group: Tensor = field(repr=False)
    texts: tuple[str, ...] = field(repr=False)
    """Texts so far `[N]`."""
    law: Tensor | None = None
    tokens: tuple[tuple[str | None, ...], ...] = field(default=(), repr=False)
    """Text of each candidate, None for one that ends the text."""
    scored: list[int] = field(default_factory=list, repr=False)
    """Sizes of the batches that were asked for with `after`."""

    @property
    def base(self) -> Tensor:
        if self.law is None:
            raise UnsupportedError("an endpoint shows its law only while a token is drawn from it")
        return self.law

    @property
    def prefix(self) -> Tensor:
        raise UnsupportedError("an endpoint shows texts and no token ids: use context.texts")

    @property
    def hidden(self) -> Tensor:
        raise UnsupportedError("an endpoint shows no hidden states")

    def after(self, candidates: Tensor) -> Samples:
        """The texts after each of `candidates` `[N, K]`, row-major: `N K` samples that a reward can score."""
        added = self._named(candidates)
        texts = [
            text if token is None else self.process.cut(text + token)[0]
            for text, tokens in zip(self.texts, added, strict=True)
            for token in tokens
        ]
        self.scored.append(len(texts))
        return self.process.samples(self.prompts, self.group.repeat_interleave(candidates.shape[1]), texts)

    def ends(self, candidates: Tensor) -> Tensor:
        """Whether each of `candidates` `[N, K]` ends its text."""
        return torch.tensor([[token is None for token in row] for row in self._named(candidates)])

    def _named(self, candidates: Tensor) -> list[list[str | None]]:
        pairs = zip(self.tokens, candidates.tolist(), strict=True)
        return [[tokens[k] if k < len(tokens) else None for k in columns] for tokens, columns in pairs]

    def lookahead(self, candidates: Tensor) -> Tensor:
        raise UnsupportedError("an endpoint shows no hidden states")

    def companion(self, process: Process) -> Context:
        raise UnsupportedError("an endpoint's tokens are known as text only: another process cannot follow them")

    def guidance(self, score: Callable[[Samples], Tensor]) -> Tensor:
        raise UnsupportedError("tokens have no gradient: guide text by values (ValueGuidance)")
