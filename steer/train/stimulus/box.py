"""The black box inside the reward: texts that are paid for once, and what hints are worth by them.

Letters: `N` hints.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.core import Cost, RawText, Reward, Samples, SteerError, check
from steer.methods.prompt import Template
from steer.rewards.text import words

__all__ = ["Bench", "BlackBox", "shares"]

_TOGETHER = 64
"""Prompts of one call of `generate`."""


@dataclass
class BlackBox:
    """A model that is asked and never touched. Texts are kept by what was asked, on disk where there is a `path`, so
    that a run that was killed goes on with the same texts.

    Args:
        model: anything with `generate`.
        settings: of the decoding.
        seed: of the texts.
        limit: different texts that may be asked for.
        path: a file of JSON lines.
    """

    model: Any
    settings: dict[str, Any]
    seed: int = 0
    limit: int = 2000
    path: Path | None = None
    asked: set[str] = field(default_factory=set)
    """Of this run, whether paid for now or before."""
    paid: int = 0
    """Texts that the model wrote in this process."""
    failed: int = 0
    known: dict[str, tuple[str, int, bool]] = field(default_factory=dict)
    """Text, tokens and whether it ended by itself."""
    reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path is None or not self.path.is_file():
            return
        for line in self.path.read_text(encoding="utf-8").split("\n"):
            try:
                entry = json.loads(line)
                self.known[str(entry["key"])] = (str(entry["text"]), int(entry["tokens"]), bool(entry["ended"]))
            except (ValueError, KeyError, TypeError):  # the line that a kill cut short
                continue

    def key(self, prompt: str, number: int) -> str:
        """What a text is known by: the model, the filled prompt, the decoding, the seed and its number."""
        facts = [self.model.name, str(prompt), isinstance(prompt, RawText), self.settings, self.seed, number]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    def new(self, prompts: Sequence[str], count: int) -> int:
        """How many texts, `count` for each prompt, this run has not asked for yet."""
        return len({self.key(p, j) for p in prompts for j in range(count)} - self.asked)

    @property
    def left(self) -> int:
        return self.limit - len(self.asked)

    @property
    def tokens(self) -> int:
        """Generated in this run's texts."""
        return sum(self.known[key][1] for key in self.asked if key in self.known)

    def ask(self, prompts: Sequence[str], count: int, tick: Any = None) -> list[list[str | None]]:
        """`count` texts for each prompt; None for what failed."""
        wanted = [(p, j) for p in dict.fromkeys(prompts) for j in range(count)]
        keys = {(p, j): self.key(p, j) for p, j in wanted}
        missing = [at for at in wanted if keys[at] not in self.known]
        for first in range(0, len(missing), _TOGETHER):
            some = missing[first : first + _TOGETHER]
            for at, text in zip(some, self._drawn([p for p, _ in some], [keys[at] for at in some]), strict=True):
                if text is not None:
                    self._keep(keys[at], text)
            if tick is not None:
                tick(len(some))
        self.asked |= set(keys.values())
        texts = {at: self.known[key][0] if (key := keys[at]) in self.known else None for at in wanted}
        return [[texts[p, j] for j in range(count)] for p in prompts]

    def _drawn(self, prompts: list[str], keys: list[str]) -> list[tuple[str, int, bool] | None]:
        """What the model writes; where a batch fails each prompt is tried alone."""
        seed = int(hashlib.sha256("".join(keys).encode()).hexdigest()[:7], 16)
        try:
            drawn = self.model.generate(list(prompts), seed=seed, **self.settings)
        except SteerError as error:
            if len(prompts) == 1:
                self.failed += 1
                self.reasons.append(str(error))
                return [None]
            return [self._drawn([p], [key])[0] for p, key in zip(prompts, keys, strict=True)]
        self.paid += len(prompts)
        rows = zip(drawn.texts, drawn.tokens or [None] * len(prompts), strict=True)
        return [self._entry(text, row) for text, row in rows]

    def _entry(self, text: str, row: list[int] | None) -> tuple[str, int, bool]:
        count = len(words(text)) if row is None else len(row)
        ends = tuple(getattr(self.model, "eos_token_ids", ()))
        ended = row is None or count < self.settings["max_new_tokens"] or (bool(row) and row[-1] in ends)
        return text, count, ended

    def _keep(self, key: str, entry: tuple[str, int, bool]) -> None:
        self.known[key] = entry
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"key": key, "text": entry[0], "tokens": entry[1], "ended": entry[2]})
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}")
                file.flush()


@dataclass
class Bench:
    """What a hint is worth: the mean reward of the black box's texts under it.

    Args:
        reward: None where nothing is scored.
        count: texts for each hint.
        whole_sentences: judge a text that was cut by its length without its unfinished last sentence.
    """

    box: BlackBox
    template: Template
    reward: Reward | None
    count: int = 1
    whole_sentences: bool = True

    def prompt(self, text: str, hint: str | None) -> str:
        """What the black box is asked; None asks without a hint, and so does an empty one with the input alone."""
        return self.template.bare(text) if hint is None else self.template.filled(text, hint) if hint else text

    def prompts(self, inputs: Sequence[str], hints: Sequence[str | None]) -> list[str]:
        return [self.prompt(text, hint) for text, hint in zip(inputs, hints, strict=True)]

    def texts(self, inputs: Sequence[str], hints: Sequence[str | None], tick: Any = None) -> list[list[str | None]]:
        """As they are judged, `count` for each."""
        asked = self.prompts(inputs, hints)
        found = self.box.ask(asked, self.count, tick)
        if not self.whole_sentences:
            return found
        ended = [[self._ended(p, j) for j in range(self.count)] for p in asked]
        return [
            [t if t is None or e else _whole(t) for t, e in zip(row, ends, strict=True)]
            for row, ends in zip(found, ended, strict=True)
        ]

    def _ended(self, prompt: str, number: int) -> bool:
        entry = self.box.known.get(self.box.key(prompt, number))
        return entry is None or entry[2]

    def rewards(self, inputs: Sequence[str], texts: Sequence[Sequence[str | None]]) -> Tensor:
        """Mean reward of each row's texts `[N]`, float64; NaN where none came."""
        check(self.reward is not None, "reward", None, "one, to score texts")
        assert self.reward is not None
        places = [(i, text) for i, row in enumerate(texts) for text in row if text is not None]
        total, count = torch.zeros(len(inputs)).double(), torch.zeros(len(inputs)).double()
        if places:
            at = torch.tensor([i for i, _ in places])
            samples = Samples(
                list(inputs), [text for _, text in places], at, torch.zeros(len(places)).double(), cost=Cost()
            )
            total = total.index_add(0, at, self.reward(samples).double())
            count = count.index_add(0, at, torch.ones(len(places)).double())
        return torch.where(count > 0, total / count.clamp_min(1), torch.nan)

    def worth(self, inputs: Sequence[str], hints: Sequence[str | None], tick: Any = None) -> Tensor:
        """Mean reward of each hint `[N]`."""
        return self.rewards(inputs, self.texts(inputs, hints, tick))


def _whole(text: str) -> str:
    """The text up to its last full stop, where it has one."""
    ends = list(re.finditer(r"[.!?][\"'”’)]*(?=\s|$)", text))
    return text[: ends[-1].end()] if ends else text


def shares(hints: Sequence[str], texts: Sequence[Sequence[str | None]]) -> Tensor:
    """Share of each hint's words that its texts have `[N]`; NaN without words or texts."""
    found = []
    for hint, row in zip(hints, texts, strict=True):
        wanted, written = set(words(hint)), [set(words(text)) for text in row if text is not None]
        if not wanted or not written:
            found.append(float("nan"))
        else:
            found.append(sum(len(wanted & said) for said in written) / (len(wanted) * len(written)))
    return torch.tensor(found, dtype=torch.float64)
