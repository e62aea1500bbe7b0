"""Settings of decoding: temperature, truncation, penalties, and what ends a text.

Order at every step: the user's `LogitsProcessor`s and penalties, temperature, transition edits, truncation (top-k, then
top-p, then min-p). So `beta` means what it says whatever the temperature, and the tilted law is what gets truncated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from transformers.generation.stopping_criteria import StoppingCriteria

from steer.adapters.language.generation import decoding_settings
from steer.core import check
from steer.core.errors import check_unicode
from steer.core.names import check_known
from steer.sampling import laws

_BOUNDS = {
    "max_new_tokens": (lambda x: isinstance(x, int) and x >= 1, "an integer of 1 or more"),
    "temperature": (lambda x: _finite(x) and x >= 0, "a number of 0 (greedy) or more"),
    "top_k": (lambda x: isinstance(x, int) and x >= 0, "an integer of 0 (off) or more"),
    "top_p": (lambda x: _finite(x) and 0 < x <= 1, "0 < top_p <= 1"),
    "min_p": (lambda x: _finite(x) and 0 <= x < 1, "0 <= min_p < 1"),
    "repetition_penalty": (lambda x: _finite(x) and x > 0, "a number above 0 (1 is off)"),
    "no_repeat_ngram_size": (lambda x: isinstance(x, int) and x >= 0, "an integer of 0 (off) or more"),
    "min_new_tokens": (lambda x: isinstance(x, int) and x >= 0, "an integer of 0 or more"),
}

_OF_LAWS = frozenset(
    {
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "no_repeat_ngram_size",
        "min_new_tokens",
        "bad_words_ids",
        "suppress_tokens",
        "logits_processor",
    }
)


def _finite(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and x == x and abs(x) != float("inf")


@dataclass(frozen=True)
class Decoding:
    """Settings with the names that transformers gives them; `temperature=0` is greedy.

    Raises `InputError` naming the field where a value is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    eos_token_id: tuple[int, ...] | None = None
    """None: the model's own."""
    logits_processor: tuple[LogitsProcessor, ...] = field(default=(), repr=False)
    stopping_criteria: tuple[StoppingCriteria, ...] = field(default=(), repr=False)

    def heated(self, by: float, most: float = 1.5) -> Decoding:
        """At a temperature that is `by` higher, at most `most` or its own."""
        return replace(self, temperature=max(self.temperature, min(self.temperature + by, most)))

    def __post_init__(self) -> None:
        for name, (holds, allowed) in _BOUNDS.items():
            value = getattr(self, name)
            check(bool(holds(value)), name, value, allowed)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        check(all(isinstance(s, str) and s for s in self.stop), "stop", self.stop, "non-empty strings")
        check_unicode("stop", self.stop)

    @classmethod
    def create(
        cls, config: GenerationConfig | str | None = None, own: Mapping[str, Any] | None = None, **settings: Any
    ) -> Decoding:
        """From a `GenerationConfig`, or "checkpoint" for the model's `own`, and settings that override it. Fields that
        steer does not honour are refused; see `steer.adapters.language.generation`.
        """
        known = {f.name for f in fields(cls)}
        for name in settings:
            check_known("generate()", name, known)
        values = {} if config is None else decoding_settings(config, own or {})
        values.update({k: v for k, v in settings.items() if v is not None})
        for name, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            total = values.pop(name, None)
            check(
                total is None or new in values, f"generation_config.{name}", total, f"{new}: prompts differ in length"
            )
        for name in ("logits_processor", "stopping_criteria", "stop", "suppress_tokens"):
            if name in values and not isinstance(values[name], str | tuple):
                values[name] = tuple(values[name])
        if isinstance(values.get("eos_token_id"), int):
            values["eos_token_id"] = (values["eos_token_id"],)
        elif values.get("eos_token_id") is not None:
            values["eos_token_id"] = tuple(values["eos_token_id"])
        if "bad_words_ids" in values:
            values["bad_words_ids"] = tuple(tuple(ids) for ids in values["bad_words_ids"])
        return cls(**values)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        return self.greedy or self.cuts

    @property
    def cuts(self) -> bool:
        """Whether top-k, top-p or min-p is set."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def of_laws(self) -> list[str]:
        """Names of the settings of a token's law that are not at their defaults."""
        return [f.name for f in fields(self) if f.name in _OF_LAWS and getattr(self, f.name) != f.default]

    def processors(self, prompt_length: int, eos: Sequence[int], device: torch.device) -> list[LogitsProcessor]:
        """The processors to run on `(ids [N, T], logits [N, V])` before temperature."""
        made: list[LogitsProcessor] = list(self.logits_processor)
        if self.repetition_penalty != 1:
            made.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.no_repeat_ngram_size:
            made.append(NoRepeatNGramLogitsProcessor(self.no_repeat_ngram_size))
        if self.bad_words_ids:
            made.append(NoBadWordsLogitsProcessor([list(w) for w in self.bad_words_ids], list(eos)))
        if self.suppress_tokens:
            made.append(SuppressTokensLogitsProcessor(list(self.suppress_tokens), device=str(device)))
        if self.min_new_tokens:
            made.append(MinNewTokensLengthLogitsProcessor(prompt_length, self.min_new_tokens, list(eos), str(device)))
        return made

    def tempered(self, logits: Tensor) -> Tensor:
        """Log-law `[..., V]` after temperature; greedy decoding keeps that of temperature 1."""
        return laws.temper(logits, self.temperature)

    def truncated(self, log_law: Tensor) -> Tensor:
        """The log-law `[..., V]` cut by top-k, top-p and min-p, in this order, normalised again."""
        return laws.truncate(log_law, self.top_k, self.top_p, self.min_p)

    def draw(self, log_law: Tensor, generator: torch.Generator) -> Tensor:
        """One token for each row `[N]` of `[N, V]`: the mode when greedy, otherwise at one uniform number a row."""
        if self.greedy:
            return log_law.argmax(-1)
        shape, kind = (len(log_law), 1), log_law.dtype
        uniform = torch.rand(shape, dtype=kind, generator=generator, device=generator.device)
        return laws.draw(log_law, uniform).squeeze(1)

    def with_eos(self, eos: Sequence[int]) -> Decoding:
        """The same settings, ending at `eos` where no other token was asked for."""
        return self if self.eos_token_id is not None else replace(self, eos_token_id=tuple(eos))
