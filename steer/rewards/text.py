"""Rewards for text that need no download, and measures of a set of texts' diversity.

Words are runs of letters, marks and digits; in scripts written without spaces (Chinese, Japanese, Thai, ...) every
character counts as a word. Scores are finite for every text, the empty one included.
"""

from __future__ import annotations

import re
import unicodedata
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from steer.core import InputError, Samples, check
from steer.rewards.algebra import Composable

__all__ = [
    "Keywords",
    "Length",
    "Profanity",
    "Readability",
    "Refusal",
    "Rouge",
    "Sentiment",
    "TextReward",
    "distinct_n",
    "diversity",
    "located_words",
    "texts_of",
    "words",
]


_REFUSAL = re.compile(
    r"\b(?:i'm sorry|i am sorry|sorry, (?:but )?i|i apologi[sz]e|i can't|i cannot|i can not|i won't|i will not"
    r"|i'm (?:not able|unable)|i am (?:not able|unable)|unable to (?:assist|help|provide|comply|fulfil)"
    r"|(?:can't|cannot|not able to) (?:assist|help|provide|comply|fulfil)|i (?:must|have to) (?:decline|refuse))",
    re.IGNORECASE,
)
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"


@cache
def _word() -> str:
    marks = "".join(chr(i) for i in range(0x300, 0x1F000) if unicodedata.category(chr(i))[0] == "M")
    return rf"\w{re.escape(marks)}"


@cache
def _word_pattern() -> re.Pattern[str]:
    spaced = rf"(?:(?![{_UNSPACED}_])[{_word()}])+"
    return re.compile(rf"[{_UNSPACED}]|{spaced}(?:['’.-]{spaced})*")


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def words(text: str) -> list[str]:
    """The words of `text`, case folded; `don't`, `well-known` and `3.5` are one word each."""
    return _word_pattern().findall(_folded(text))


def located_words(text: str) -> list[tuple[int, str, str]]:
    """The words of `text` in its compatibility form (NFKC): where each begins there, as it is written, and folded."""
    plain = unicodedata.normalize("NFKC", text)
    return [(m.start(), m[0], _folded(m[0])) for m in _word_pattern().finditer(plain)]


def texts_of(samples: Samples, reward: object) -> list[str]:
    """The outputs as texts; `InputError` naming `reward` where they are images or other tensors."""
    if isinstance(samples.outputs, Tensor):
        raise InputError(f"reward {reward}", f"a tensor {tuple(samples.outputs.shape)}", "outputs that are texts")
    wrong = next((x for x in samples.outputs if not isinstance(x, str)), None)
    check(wrong is None, f"reward {reward}", wrong, "outputs that are texts")
    return list(samples.outputs)


class TextReward(Composable):
    """A reward that looks at one text at a time."""

    modality = "text"
    alone = True

    @abstractmethod
    def rate(self, text: str) -> float:
        """The score of one text."""

    def score(self, samples: Samples) -> Tensor:
        return torch.tensor([self.rate(text) for text in texts_of(samples, self)], dtype=torch.float64)


@cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


@dataclass(frozen=True, repr=False)
class Sentiment(TextReward):
    """VADER's compound score in [-1, 1] (English): 1 positive, 0 neutral or empty, -1 negative."""

    def rate(self, text: str) -> float:
        return float(_vader().polarity_scores(text)["compound"])

    def __repr__(self) -> str:
        return "sentiment"


class Refusal(TextReward):
    """1 where a reply opens with a refusal, 0 elsewhere: a keyword match on its first 160 characters, as in the papers.

    It tells "I can't help with that" from an answer, not a harmful answer from a harmless one.
    """

    def rate(self, text: str) -> float:
        return float(bool(_REFUSAL.search(text[:160].replace("\u2019", "'"))))

    def __repr__(self) -> str:
        return "refusal"


def syllables(word: str) -> int:
    """Syllables of an English word, estimated from its groups of vowels; at least 1."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", word.lower()) if "a" <= c <= "z")
    count = len(re.findall(r"[aeiouy]+", plain))
    silent = re.search(r"([^aeiouy]es?|[^aeiouytd]ed)$", plain) and not re.search(r"([^aeiouy]les?|[cgsxz]es)$", plain)
    return max(count - bool(silent), 1)


@dataclass(frozen=True, repr=False)
class Readability(TextReward):
    """How hard an English text is to read, from words a sentence and estimated syllables a word; empty: 0.

    `ease`: Flesch reading ease in points, about 0 to 100, higher is easier. `grade`: Flesch-Kincaid, in US school
    years, higher is harder, so use `-readability:grade` for plain text.
    """

    scale: str = "ease"

    def __post_init__(self) -> None:
        check(self.scale in ("ease", "grade"), "readability scale", self.scale, "ease, grade")

    def rate(self, text: str) -> float:
        found = words(text)
        if not found:
            return 0.0
        sentences = max(len(re.findall(r"\w\W*?[.!?…。！？]+(?=\s|$|[\"'”’)])", text)), 1)
        a_sentence = len(found) / sentences
        a_word = sum(map(syllables, found)) / len(found)
        if self.scale == "ease":
            return 206.835 - 1.015 * a_sentence - 84.6 * a_word
        return 0.39 * a_sentence + 11.8 * a_word - 15.59

    def __repr__(self) -> str:
        return "readability" if self.scale == "ease" else "readability:grade"


@dataclass(frozen=True, repr=False)
class Length(TextReward):
    """The number of words; with a `target`, `-|words - target| / target` (0 is best)."""

    target: float | None = None

    def __post_init__(self) -> None:
        usable = self.target is None or 0 < self.target < float("inf")
        check(usable, "length target", self.target, "a number of words > 0")

    def rate(self, text: str) -> float:
        count = len(words(text))
        return float(count) if self.target is None else -abs(count - self.target) / self.target

    def __repr__(self) -> str:
        return "length" if self.target is None else f"length:target={self.target:g}"


@dataclass(frozen=True, repr=False)
class Keywords(TextReward):
    """The share of the keywords (words or phrases) that occur, in [0, 1]: whole words, upper or lower case alike."""

    keywords: tuple[str, ...]

    def __post_init__(self) -> None:
        given = (self.keywords,) if isinstance(self.keywords, str) else tuple(self.keywords)
        check(bool(given) and all(k.strip() for k in given), "keywords", given, "at least one word, none of them empty")
        object.__setattr__(self, "keywords", given)

    def rate(self, text: str) -> float:
        folded = _folded(text)
        return sum(bool(_keyword_pattern(k).search(folded)) for k in self.keywords) / len(self.keywords)

    def __repr__(self) -> str:
        return "keywords:" + ",".join(k if k.isalnum() else quoted(k) for k in self.keywords)


def quoted(text: str) -> str:
    return f"'{text}'" if '"' in text else f'"{text}"'


@cache
def _keyword_pattern(keyword: str) -> re.Pattern[str]:
    text = " ".join(_folded(keyword).split())
    edge = re.compile(rf"(?![{_UNSPACED}])[{_word()}]")
    before = rf"(?<![{_word()}])" if edge.match(text[0]) else ""
    after = rf"(?![{_word()}])" if edge.match(text[-1]) else ""
    return re.compile(before + re.escape(text).replace(r"\ ", r"\s+") + after)


_ROOTS = (
    r"arseholes?|asses|ass|assholes?|bastards?|bitch\w*|bollocks|bull-?shit\w*|cocksuck\w*|crap|crappy|cunts?|"
    r"damn(?:ed|it)?|dickheads?|douchebags?|dumbass\w*|fags?|faggots?|fuck\w*|goddam\w*|jackass\w*|kikes?|"
    r"mother-?fuck\w*|nigg(?:a|er)\w*|piss(?:ed|ing)?|shits?|shitt\w+|shit-?heads?|slut\w*|spics?|trann(?:y|ies)|"
    r"twats?|wank\w*|wetbacks?|whores?"
)
_LOOKALIKES = {"a": "[a@4*]", "e": "[e3*]", "i": "[i1!*]", "o": "[o0*]", "u": "[u*]", "s": "[s$]"}


@cache
def _profane() -> re.Pattern[str]:
    spelt = re.sub(r"[aeious]", lambda m: _LOOKALIKES[m[0]], _ROOTS)
    return re.compile(rf"(?<!\w)(?:{spelt})(?!\w)")


@dataclass(frozen=True, repr=False)
class Profanity(TextReward):
    """Swear words and slurs (English, common disguises such as `sh1t` included): use `-profanity` to avoid them.

    `any`: 1 where there is one, else 0. `share`: profane words over words, in [0, 1].
    """

    how: str = "any"

    def __post_init__(self) -> None:
        check(self.how in ("any", "share"), "profanity how", self.how, "any, share")

    def rate(self, text: str) -> float:
        found = len(_profane().findall(_folded(text)))
        return float(found > 0) if self.how == "any" else min(found / max(len(words(text)), 1), 1.0)

    def __repr__(self) -> str:
        return "profanity" if self.how == "any" else "profanity:share"


@dataclass(frozen=True, repr=False)
class Rouge(Composable):
    """Mean over `kinds` of the ROUGE F-measure against a reference, in [0, 1], on words without stemming.

    `references`: one text for all, a list with one for each prompt of the samples, or `{prompt: text}`, which also
    holds when prompts are run in batches. Lin (2004).
    """

    modality: ClassVar = "text"
    references: str | Sequence[str] | Mapping[str, str]
    kinds: tuple[str, ...] = ("1", "2", "L")

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))
        known = bool(self.kinds) and set(self.kinds) <= {"1", "2", "L"}
        check(known, "rouge kinds", self.kinds, "some of 1, 2, L")

    def score(self, samples: Samples) -> Tensor:
        texts = texts_of(samples, self)
        references = [words(reference) for reference in self._references(samples.prompts)]
        scores = [self._f(words(t), references[b]) for t, b in zip(texts, samples.group.tolist(), strict=True)]
        return torch.tensor(scores, dtype=torch.float64)

    def rate(self, text: str) -> float:
        """The score of one text, where the reference is one text."""
        check(isinstance(self.references, str), "rouge references", self.references, "one text")
        return self._f(words(text), words(str(self.references)))

    def _references(self, prompts: list[Any]) -> list[str]:
        if isinstance(self.references, str):
            return [self.references] * len(prompts)
        if isinstance(self.references, Mapping):
            for prompt in prompts:
                known = isinstance(prompt, str) and prompt in self.references
                check(known, "rouge references", prompt, "a prompt that has a reference")
            return [self.references[prompt] for prompt in prompts]
        count, allowed = len(self.references), f"{len(prompts)}, one for each prompt; or {{prompt: text}}"
        check(count == len(prompts), "rouge references", count, allowed)
        return list(self.references)

    def _f(self, text: list[str], reference: list[str]) -> float:
        return sum(_rouge_f(text, reference, kind) for kind in self.kinds) / len(self.kinds)

    def __repr__(self) -> str:
        kinds = "rouge" if len(self.kinds) == 3 else f"rouge-{'/'.join(self.kinds)}"
        return f"{kinds}:{quoted(self.references)}" if isinstance(self.references, str) else kinds


def _rouge_f(text: list[str], reference: list[str], kind: str) -> float:
    if kind == "L":
        common, total = _longest_common(text, reference), len(text) + len(reference)
    else:
        a, b = Counter(_ngrams(text, int(kind))), Counter(_ngrams(reference, int(kind)))
        common, total = (a & b).total(), a.total() + b.total()
    return 2 * common / total if total else 0.0


def _longest_common(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        new = [0]
        for y, (diagonal, above) in zip(b, pairwise(row), strict=True):
            new.append(diagonal + 1 if x == y else max(above, new[-1]))
        row = new
    return row[-1]


def _ngrams(tokens: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Unique n-grams of words over all n-grams of the texts, in [0, 1]; 0 where there are none."""
    check(isinstance(n, int) and n > 0, "n", n, "an integer > 0")
    found = [gram for text in texts for gram in _ngrams(words(text), n)]
    return len(set(found)) / len(found) if found else 0.0


def diversity(texts: Sequence[str]) -> dict[str, float]:
    """`distinct-1`, `distinct-2`, `distinct-3`, and `unique`, the share of texts that differ from all before them."""
    measures = {f"distinct-{n}": distinct_n(texts, n) for n in (1, 2, 3)}
    return {**measures, "unique": len(set(texts)) / len(texts) if texts else 0.0}
