"""The policy that draws phrases of the input, as it is trained: fitted to hints, then moved by a policy gradient.

Letters: `P` phrases of an input, `F` features, `N` drawn hints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steer.methods.extract import BUCKETS, FEATURES, Extractor, bucket, draw_laws, excerpt, phrases_of
from steer.rewards.text import words
from steer.train.reward.heads import minimised
from steer.train.reward.measures import auroc
from steer.train.stimulus.rows import Row
from steer.train.stimulus.settings import StimulusSettings

__all__ = ["Drawn", "ExtractPolicy", "Policy", "overlap"]


@dataclass(frozen=True)
class Drawn:
    """A hint, and what was drawn: the policy's own, in the order of the draws."""

    hint: str
    choice: tuple[int, ...]


class Policy(Protocol):
    """What is trained: it draws hints, tells how likely they were, and how far it is from where the rounds began."""

    chunk: int
    """Hints whose gradients are taken at once."""

    def __call__(self, inputs: Sequence[str]) -> list[str]:
        """The hints that it would give."""

    def draw(self, inputs: Sequence[str], n: int, generator: torch.Generator) -> list[list[Drawn]]:
        """`n` hints for each input."""

    def terms(self, inputs: Sequence[str], drawn: Sequence[Drawn]) -> tuple[Tensor, Tensor]:
        """Log-probability `[N]` of each hint, and the KL of the laws of its draws to those of the reference, exact and
        summed along the draws `[N]`; both with a graph.
        """

    def fit(self, rows: Sequence[Row], settings: StimulusSettings, **more: Any) -> dict[str, Any]:
        """SFT on the rows' hints; returns figures."""

    def begin(self) -> None:
        """Take the policy as it is for the reference."""

    def weights(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""


class ExtractPolicy:
    """A softmax over phrases, drawn without replacement; see `steer.methods.extract`."""

    chunk = 1024

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor
        self.free = nn.Parameter(extractor.weights.double().clone())
        self.reference = self.free.detach().clone()
        self._features: dict[str, Tensor] = {}

    @classmethod
    def of(cls, texts: Sequence[str], settings: StimulusSettings) -> ExtractPolicy:
        """One with equal scores, whose features are standardised on `texts`."""
        seen = [excerpt(text, settings.words) for text in texts]
        counts = torch.zeros(BUCKETS, dtype=torch.float64)
        for text in seen:
            counts[sorted({bucket(word) for word in words(text)})] += 1
        idf = ((1 + len(seen)) / (1 + counts)).log().float()
        found = {text: phrases_of(short, idf) for text, short in zip(texts, seen, strict=True)}
        features = torch.cat([phrases.features for phrases in found.values()])
        std = torch.where(features.std(0, correction=0) < 1e-6, 1.0, features.std(0, correction=0)).float()
        mean = features.mean(0).float()
        made = Extractor(torch.zeros(len(FEATURES)), mean, std, idf, settings.most, settings.words)
        made.kept.update(found)
        return cls(made)

    def __call__(self, inputs: Sequence[str]) -> list[str]:
        return self.frozen(inputs)

    @property
    def frozen(self) -> Extractor:
        """The policy as it is."""
        was = self.extractor
        made = Extractor(self.free.detach().float(), was.mean, was.std, was.idf, was.most, was.words)
        made.kept.update(was.kept)
        return made

    def weights(self) -> dict[str, nn.Parameter]:
        return {"weights": self.free}

    def begin(self) -> None:
        self.reference = self.free.detach().clone()

    def features(self, text: str) -> Tensor:
        """Standardised `[P, F]`."""
        if text not in self._features:
            self._features[text] = self.extractor.standardised(self.extractor.phrases(text))
        return self._features[text]

    def draw(self, inputs: Sequence[str], n: int, generator: torch.Generator, equal: bool = False) -> list[list[Drawn]]:
        """As for `Policy`; `equal` gives every phrase the same score, which is the control of every table."""
        found = []
        for text in inputs:
            phrases = self.extractor.phrases(text)
            scores = self.features(text) @ self.free.detach()
            scores = torch.zeros_like(scores) if equal else scores
            row = []
            for _ in range(n):
                choice = _sequence(scores, phrases.nested, self.extractor.most, generator)
                row.append(Drawn(phrases.hint(choice), choice))
            found.append(row)
        return found

    def terms(self, inputs: Sequence[str], drawn: Sequence[Drawn]) -> tuple[Tensor, Tensor]:
        logs, kls = [], []
        for text, one in zip(inputs, drawn, strict=True):
            features, nested = self.features(text), self.extractor.phrases(text).nested
            now = draw_laws(features @ self.free, nested, one.choice)
            before = draw_laws(features @ self.reference, nested, one.choice)
            at = torch.arange(len(one.choice))
            logs.append(now[at, list(one.choice)].sum())
            open_ = now > -math.inf
            gap = torch.where(open_, now, 0.0) - torch.where(open_, before, 0.0)
            kls.append((now.exp() * gap).sum())
        return torch.stack(logs), torch.stack(kls)

    def fit(self, rows: Sequence[Row], settings: StimulusSettings, **more: Any) -> dict[str, Any]:
        """Logistic regression of whether all words of a phrase occur in the hint, with an intercept."""
        some = [row for row in rows if row.hint]
        x = torch.cat([self.features(row.input) for row in some])
        y = torch.cat([self.labels(row) for row in some])

        def loss(w: Tensor, b: Tensor) -> Tensor:
            fit = nn.functional.binary_cross_entropy_with_logits(x @ w + b, y)
            return fit + 0.5e-3 * w.square().sum()

        found, _ = minimised(loss, x.shape[1], True)
        with torch.no_grad():
            self.free.copy_(found)
        return {}

    def labels(self, row: Row) -> Tensor:
        """Which phrases the row's hint has `[P]`."""
        wanted = {word for phrase in row.hint for word in words(phrase)}
        return torch.tensor([float(wanted >= set(p)) for p in self.extractor.phrases(row.input).texts]).double()

    def judged(self, rows: Sequence[Row]) -> dict[str, Any]:
        """How well the scores rank the phrases of rows with hints."""
        found = []
        for row in rows:
            labels = self.labels(row)
            if row.hint and 0 < float(labels.sum()) < len(labels):
                found.append(auroc(self.features(row.input) @ self.free.detach(), labels > 0.5))
        return {"auroc": round(sum(found) / len(found), 4)} if found else {}


def _sequence(scores: Tensor, nested: Tensor, most: int, generator: torch.Generator) -> tuple[int, ...]:
    open_ = torch.ones(len(scores), dtype=torch.bool)
    chosen: list[int] = []
    while len(chosen) < most and bool(open_.any()):
        law = scores.masked_fill(~open_, -math.inf).softmax(0)
        chosen.append(int(torch.multinomial(law, 1, generator=generator)))
        open_ = open_ & ~nested[chosen[-1]]
    return tuple(chosen)


def overlap(hints: Sequence[str], rows: Sequence[Row]) -> float:
    """Mean F-measure of the words of hints against those of the rows' own."""
    found = []
    for hint, row in zip(hints, rows, strict=True):
        a, b = set(words(hint)), {word for phrase in row.hint for word in words(phrase)}
        if b:
            found.append(2 * len(a & b) / (len(a) + len(b)))
    return sum(found) / len(found) if found else math.nan
