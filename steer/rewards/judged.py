"""The reward of a language model that rates outputs by a rubric: a judge (Zheng et al. 2023)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from steer.core import Samples, SteerError, check, check_whole
from steer.rewards.algebra import Composable
from steer.rewards.heads import load_model
from steer.rewards.text import texts_of

__all__ = ["JudgeReward", "filled", "spoken"]

DEFAULT = (
    "Here is a request and an answer to it.\n\nRequest: {prompt}\n\nAnswer: {output}\n\n"
    "How good is the answer? Weigh whether it does what was asked, whether what it says is right, and whether it reads "
    'well. End with "Rating: " and a whole number from {low} (worst) to {high} (best).'
)
_ASK = 'End with "Rating: " and a whole number from {low} (worst) to {high} (best).'
_RATING = re.compile(r"rating\W{0,4}\s*(-?\d+(?:\.\d+)?)", re.IGNORECASE)
_UNREAD = 0.05
"""Share of replies without a rating from which on a judge is refused, once there are twenty."""


@dataclass(frozen=True, repr=False)
class JudgeReward(Composable):
    """What a model says of each output: the last `Rating: NUMBER` of its reply.

    Attributes:
        rubric: what it is told: a text with {prompt} and {output}, {low} and {high}; one without {output} is a
            criterion, which is put before the request and the answer. "" asks how good the answer is.
        model: any engine's model or its name, `openai:URL#NAME` too; None is the model that generates, which judges
            itself without its edits.
        low, high: the scale. A rating beyond it is cut to it.
        max_new_tokens: of a reply.

    Replies are greedy. A reply without a rating counts as `low`; `SteerError` where more than one in twenty has none.
    Equal questions are asked once. The scores are as good as the judge: measure it (`steer eval pairs`) before you
    train on it.
    """

    modality: ClassVar = "text"
    rubric: str = ""
    model: Any = field(default=None, compare=False)
    low: float = 1.0
    high: float = 10.0
    max_new_tokens: int = 128
    text: str = "judge"
    _seen: dict[str, float | None] = field(default_factory=dict, init=False, compare=False)

    def __post_init__(self) -> None:
        check(self.low < self.high, "judge low", self.low, f"a number below high ({self.high:g})")
        check_whole("judge max_new_tokens", self.max_new_tokens)
        named = self.model is None or isinstance(self.model, str) or hasattr(self.model, "generate")
        check(named, "judge model", self.model, "a model, its name, or None: the model that generates")

    @classmethod
    def read(cls, file: str = "", model: str | None = None, low: str = "1", high: str = "10") -> JudgeReward:
        """As an expression has it: `judge:rubric.txt,model="openai:http://host/v1#name",low=1,high=5`."""
        rubric = ""
        if file:
            check(Path(file).is_file(), "judge rubric", file, "a text file that exists")
            rubric = Path(file).read_text(encoding="utf-8-sig").strip()
            check(bool(rubric), "judge rubric", file, "a file that is not empty")
        ends = []
        for name, value in (("low", low), ("high", high)):
            try:
                ends.append(float(value))
            except ValueError:
                check(False, f"judge {name}", value, "a number")
        text = f"judge:{file or 'plain'}" + (f",model={model!r}" if model else "")
        return cls(rubric, model, ends[0], ends[1], text=text)

    def bind(self, model: Any) -> JudgeReward:
        return replace(self, model=model) if self.model is None and model is not None else self

    def score(self, samples: Samples) -> Tensor:
        texts = texts_of(samples, self)
        prompts = [spoken(prompt) for prompt in samples.prompts]
        questions = [self._question(prompts[b], y) for b, y in zip(samples.group.tolist(), texts, strict=True)]
        fresh = [q for q in dict.fromkeys(questions) if q not in self._seen]
        for question, reply in zip(fresh, self._replies(fresh), strict=True):
            found = _RATING.findall(reply)
            self._seen[question] = min(self.high, max(self.low, float(found[-1]))) if found else None
        self._check_read()
        ratings = [self._seen[q] for q in questions]
        return torch.tensor([self.low if r is None else r for r in ratings], dtype=torch.float64)

    def _replies(self, questions: Sequence[str]) -> list[str]:
        if not questions:
            return []
        check(self.model is not None, f"reward {self}", None, "a model: generate() binds one, or call .bind(model)")
        model = load_model(self.model) if isinstance(self.model, str) else self.model
        asked = [[{"role": "user", "content": question}] for question in questions]
        found: list[str] = model.generate(asked, temperature=0, max_new_tokens=self.max_new_tokens, seed=0).texts
        return found

    def _question(self, prompt: str, output: str) -> str:
        rubric = self.rubric or DEFAULT
        if "{output}" not in rubric:
            rubric = f"{rubric}\n\nRequest: {{prompt}}\n\nAnswer: {{output}}\n\n{_ASK}"
        return filled(rubric, prompt=prompt, output=output, low=f"{self.low:g}", high=f"{self.high:g}")

    def _check_read(self) -> None:
        missing = sum(rating is None for rating in self._seen.values())
        if len(self._seen) >= 20 and missing > _UNREAD * len(self._seen):
            raise SteerError(f'reward {self}: {missing} of {len(self._seen)} replies have no "Rating: NUMBER"')

    def __repr__(self) -> str:
        return self.text


def spoken(prompt: Any) -> str:
    """A prompt as a judge reads it: text as it is, a chat with the speaker before each message."""
    if isinstance(prompt, str):
        return str(prompt)
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def filled(template: str, **slots: str) -> str:
    """The template with each slot filled once, whatever braces the texts hold."""
    pattern = re.compile("|".join(re.escape(f"{{{name}}}") for name in slots))
    return pattern.sub(lambda found: slots[found[0][1:-1]], template)
