"""State of generation through an endpoint, and what a transition edit sees of it.

Letters: `N` rows, `K` candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steer.adapters.language.model import shown
from steer.adapters.openai.dialect import Question
from steer.core import Context, Process, Prompt, Samples, UnsupportedError
from steer.core.rows import Rows

__all__ = ["EndpointContext", "EndpointState", "cut", "samples_of"]


def cut(text: str, stops: Sequence[str], since: int = 0) -> tuple[str, bool]:
    """The text before the first of the strings in `stops`, and whether there was one; none begins before `since`."""
    found = [at for at in (text.find(stop, since) for stop in stops) if at >= 0]
    return (text[: min(found)], True) if found else (text, False)


def samples_of(prompts: Sequence[Prompt], group: Tensor, texts: Sequence[str]) -> Samples:
    """Texts as `Samples` with equal weights, and nothing else known of them."""
    zero = torch.zeros(len(group), dtype=torch.float64)
    return Samples(prompts=[shown(p) for p in prompts], outputs=list(texts), group=group, log_weight=zero)


@dataclass(frozen=True)
class EndpointState(Rows):
    """Rows of texts in mid-generation; `step` counts blocks. Nothing of them is kept at the endpoint."""

    each = ("texts", "finished")
    packed = ("finished",)

    finished: Tensor
    texts: tuple[str, ...] = field(repr=False)
    questions: tuple[Question, ...] = field(repr=False)


@dataclass(frozen=True)
class EndpointContext:
    """What a transition edit sees of a black box: for every row the log-law over its own K candidates.

    `base` `[N, K]` holds log-probabilities of the K likeliest tokens that the endpoint named, after temperature, which
    sum to 1 over the K; a row with fewer has -infinity at the end. Candidates are columns: `candidates[i, j] = k` is
    column k of row i. What they are is known as text only, so a value looks at `after(candidates)`.
    """

    step: int
    prompts: list[Prompt] = field(repr=False)
    group: Tensor = field(repr=False)
    texts: tuple[str, ...] = field(repr=False)
    """Texts so far `[N]`."""
    stop: tuple[str, ...] = ()
    """Strings before which texts end."""
    limit: int = 0
    """The most tokens that a text may have."""
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

    @property
    def left(self) -> Tensor:
        raise UnsupportedError("an endpoint counts tokens of its own: use context.limit")

    def after(self, candidates: Tensor) -> Samples:
        """The texts after each of `candidates` `[N, K]`, row-major: `N K` samples that a reward can score."""
        added = self._named(candidates)
        texts = [
            text if token is None else cut(text + token, self.stop)[0]
            for text, tokens in zip(self.texts, added, strict=True)
            for token in tokens
        ]
        self.scored.append(len(texts))
        return samples_of(self.prompts, self.group.repeat_interleave(candidates.shape[1]), texts)

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
