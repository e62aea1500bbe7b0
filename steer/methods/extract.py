"""Hints out of the input itself: a law over its phrases, which needs no network.

    p(next = i | chosen) = softmax over the phrases that neither are, hold nor lie in a chosen one of w . f_i

`most` phrases are drawn one after the other without replacement; the hint is what was drawn, in the order of the text,
joined by "; ". The policy of directional stimulus prompting (Li et al. 2023, 2302.11520) in its smallest form: the
paper tunes a seq2seq model to write such lists.

Letters: `P` phrases of an input, `F` features, `T` draws.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steer.core import check
from steer.rewards.text import located_words, words

__all__ = [
    "BUCKETS",
    "FEATURES",
    "STOP_WORDS",
    "Extractor",
    "Phrases",
    "bucket",
    "draw_laws",
    "excerpt",
    "phrases_of",
    "reference_hint",
    "stop_list_hash",
    "within",
]

BUCKETS = 1 << 14
"""Of the table of inverse document frequencies, into which words are hashed."""
LONGEST = 3
"""Words of a phrase at most."""
FEATURES = (
    "log count",
    "mean idf",
    "highest idf",
    "place of the first mention",
    "in the first sentence",
    "share of capitalised words",
    "two words",
    "three words",
    "a whole run",
    "log mean count of its words",
    "has a digit",
    "repeated and in the first sentence",
)
STOP_WORDS = frozenset(
    re.findall(
        r"\S+",
        """
    a about above after again against all also although always am among an and another any are around as at back be
    became because become been before behind being below between both but by can cannot could did do does doing done
    down during each either else enough ever every few first for from further get give go got had has have having he
    her here hers herself him himself his how however i if in into is it its itself just last least less let like made
    make many may me might more most much must my myself near neither never next no nor not now of off often on once
    one only onto or other others our ours out over own per perhaps rather said same say says she should since so some
    still such take than that the their theirs them themselves then there these they this those though through thus to
    together too toward towards under until up upon us very was we well were what when where whether which while who
    whom whose why will with within without would yet you your yours yourself
    it's he's she's i'm i've you're we're they're that's don't didn't doesn't isn't wasn't won't can't
    """,
    )
)
"""English words that no phrase holds."""


def bucket(word: str) -> int:
    """The place of a word in the table of inverse document frequencies."""
    return zlib.crc32(word.encode()) % BUCKETS


def excerpt(text: str, count: int | None) -> str:
    """The first `count` words of `text`, between spaces; None: all of it."""
    parts = text.split()
    return text if count is None or len(parts) <= count else " ".join(parts[:count])


@dataclass(frozen=True)
class Phrases:
    """The phrases of one input, in the order of their first mention, shorter ones first."""

    texts: tuple[tuple[str, ...], ...]
    features: Tensor
    """`[P, F]`, not standardised."""
    nested: Tensor
    """Which are, hold or lie in which `[P, P]` bool."""

    def __len__(self) -> int:
        return len(self.texts)

    def hint(self, chosen: Sequence[int]) -> str:
        """The chosen phrases, in the order of the text."""
        return "; ".join(" ".join(self.texts[i]) for i in sorted(chosen))


def _runs(stream: Sequence[str], kept: Sequence[bool]) -> list[tuple[int, int]]:
    """Beginnings and ends of the maximal runs of words that are kept."""
    found, start = [], None
    for i, keep in enumerate([*kept, False]):
        if keep and start is None:
            start = i
        elif not keep and start is not None:
            found.append((start, i))
            start = None
    return found


def within(inner: tuple[str, ...], outer: tuple[str, ...]) -> bool:
    """Whether the words of one phrase stand side by side in another."""
    return any(outer[i : i + len(inner)] == inner for i in range(len(outer) - len(inner) + 1))


def phrases_of(text: str, idf: Tensor) -> Phrases:
    """The phrases of `text`: runs of words that are no stop words, cut into up to three words. `idf` is `[BUCKETS]`."""
    located = located_words(text)
    stream = [folded for _, _, folded in located]
    first_end = _first_sentence(text, located)
    counts = Counter(stream)
    seen: dict[tuple[str, ...], list[int]] = {}
    whole: set[tuple[str, ...]] = set()
    for begin, end in _runs(stream, [word not in STOP_WORDS and len(word) > 1 for word in stream]):
        for i in range(begin, end):
            for n in range(1, min(LONGEST, end - i) + 1):
                seen.setdefault(tuple(stream[i : i + n]), []).append(i)
        whole.add(tuple(stream[begin:end]))
    grams = sorted(seen, key=lambda gram: (seen[gram][0], len(gram)))
    rows = []
    for gram in grams:
        at = seen[gram]
        weights = [float(idf[bucket(word)]) for word in gram]
        shown = [spelt for _, spelt, _ in located[at[0] : at[0] + len(gram)]]
        early = at[0] < first_end
        rows.append(
            [
                math.log(len(at)),
                sum(weights) / len(gram),
                max(weights),
                at[0] / max(1, len(stream)),
                float(early),
                sum(spelt[:1].isupper() for spelt in shown) / len(gram),
                float(len(gram) == 2),
                float(len(gram) == 3),
                float(gram in whole),
                math.log(sum(counts[word] for word in gram) / len(gram)),
                float(any(c.isdigit() for word in gram for c in word)),
                float(early and len(at) > 1),
            ]
        )
    number = {gram: k for k, gram in enumerate(grams)}
    nested = torch.eye(len(grams), dtype=torch.bool)
    for gram, k in number.items():
        for n in range(1, len(gram)):
            for i in range(len(gram) - n + 1):
                part = number[gram[i : i + n]]
                nested[k, part] = nested[part, k] = True
    features = torch.tensor(rows, dtype=torch.float64).reshape(len(grams), len(FEATURES))
    return Phrases(tuple(grams), features, nested)


def _first_sentence(text: str, located: Sequence[tuple[int, str, str]]) -> int:
    """How many words stand in the first sentence."""
    end = re.search(r"(?<=\w\w)\s?[.!?](?=\s)", text)
    return len(located) if end is None else sum(place < end.start() for place, _, _ in located)


def reference_hint(seen: str, reference: str, most: int = 8) -> list[str]:
    """Phrases of `reference` that also stand in `seen`, in the reference's order: its runs of words that are no stop
    words and occur in `seen`, cut from the left into the longest pieces, up to three words, that stand side by side
    there. Words of one character are left out, and phrases that lie in an earlier one.
    """
    stream, there = words(reference), words(seen)
    grams = {tuple(there[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(there) - n + 1)}
    kept = [word not in STOP_WORDS and len(word) > 1 and (word,) in grams for word in stream]
    found: list[tuple[str, ...]] = []
    for begin, end in _runs(stream, kept):
        i = begin
        while i < end:
            sizes = range(min(LONGEST, end - i), 0, -1)
            gram = next(g for n in sizes if (g := tuple(stream[i : i + n])) in grams)
            i += len(gram)
            if not any(within(gram, earlier) for earlier in found):
                found.append(gram)
    return [" ".join(gram) for gram in found[:most]]


def draw_laws(scores: Tensor, nested: Tensor, chosen: Sequence[int]) -> Tensor:
    """Log-laws `[T, P]` of the draws that led to `chosen`, each over the phrases that were left then."""
    open_, laws = torch.ones(len(scores), dtype=torch.bool), []
    for i in chosen:
        laws.append(scores.masked_fill(~open_, -math.inf).log_softmax(0))
        open_ = open_ & ~nested[i]
    return torch.stack(laws) if laws else scores.new_zeros(0, len(scores))


@dataclass(frozen=True, eq=False)
class Extractor:
    """A policy of hints: given inputs, the mode of each draw.

    Args:
        weights: of the standardised features `[F]`.
        mean, std: of the features `[F]`.
        idf: inverse document frequencies by hashed word `[BUCKETS]`.
        most: phrases of a hint.
        words: of an input that are read; None reads all.
    """

    weights: Tensor
    mean: Tensor
    std: Tensor
    idf: Tensor
    most: int = 8
    words: int | None = 150
    kept: dict[str, Phrases] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        width = len(FEATURES)
        for name in ("weights", "mean", "std"):
            given = tuple(getattr(self, name).shape)
            check(given == (width,), f"extractor {name}", given, f"({width},)")
        check(tuple(self.idf.shape) == (BUCKETS,), "extractor idf", tuple(self.idf.shape), f"({BUCKETS},)")
        check(isinstance(self.most, int) and self.most >= 1, "most", self.most, "an integer of 1 or more")

    def __call__(self, inputs: Sequence[str]) -> list[str]:
        return [self.best(text) for text in inputs]

    def phrases(self, text: str) -> Phrases:
        """Those of an input's excerpt."""
        if text not in self.kept:
            while len(self.kept) >= 4096:
                del self.kept[next(iter(self.kept))]
            self.kept[text] = phrases_of(excerpt(text, self.words), self.idf)
        return self.kept[text]

    def standardised(self, found: Phrases) -> Tensor:
        """Features as the weights see them `[P, F]`."""
        return (found.features - self.mean.double()) / self.std.double()

    def best(self, text: str) -> str:
        """The hint of the modes."""
        found = self.phrases(text)
        scores, open_ = self.standardised(found) @ self.weights.double(), [True] * len(found)
        chosen: list[int] = []
        for i in scores.argsort(descending=True, stable=True).tolist():
            if open_[i] and len(chosen) < self.most:
                chosen.append(i)
                open_ = [here and not there for here, there in zip(open_, found.nested[i].tolist(), strict=True)]
        return found.hint(chosen)


def stop_list_hash() -> str:
    """A digest of the stop list, for cards."""
    return f"{zlib.crc32(' '.join(sorted(STOP_WORDS)).encode()):08x}"
