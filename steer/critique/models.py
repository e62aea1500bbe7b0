"""Critics that are language models: a verdict with a reason, the first wrong step, and which of two is better."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from steer.core import Cost, Samples, check, check_whole
from steer.critique.critics import Critic, Verdicts, pairs_of
from steer.rewards.heads import load_model
from steer.rewards.judged import filled, spoken

__all__ = ["ModelCritic", "Pairwise", "StepCritic", "step_accuracy", "steps_of"]


INSTRUCTION = (
    "Here is a request and an answer to it.\n\nRequest: {prompt}\n\nAnswer: {output}\n\n"
    "Say briefly what is wrong with the answer, if anything is. End with one word: correct or incorrect."
)
_STEPS = (
    "Here is a request and a solution in numbered steps.\n\nRequest: {prompt}\n\n{output}\n\n"
    "Check the steps one after the other. Give the number of the first wrong step in \\boxed{}, or \\boxed{-1} where "
    "all steps are right."
)
_BETTER = (
    "Request: {prompt}\n\nAnswer A: {first}\n\nAnswer B: {second}\n\n"
    "Which answer is better? Say why in a sentence, then end with one letter: A or B."
)
_BOXED = re.compile(r"\\boxed\{\s*(-?\d+)\s*\}")
_NUMBERED = re.compile(r"(?m)^\s*(?:step\s*)?\d+\s*[.):]\s*", re.IGNORECASE)


@dataclass(frozen=True, repr=False)
class _Asking(Critic):
    """What is asked of a model: `votes` replies to each question, at `temperature`."""

    model: Any
    instruction: str = INSTRUCTION
    votes: int = 1
    temperature: float = 0.0
    max_new_tokens: int = 128
    seed: int = 0

    slots: ClassVar[tuple[str, ...]] = ("prompt", "output")

    def __post_init__(self) -> None:
        for slot in self.slots:
            allowed = "a text with " + " and ".join(f"{{{name}}}" for name in self.slots)
            check(f"{{{slot}}}" in self.instruction, "critic instruction", self.instruction, allowed)
        check_whole("critic votes", self.votes)
        check(self.temperature >= 0, "critic temperature", self.temperature, "a number of 0 or more")
        alike = self.votes > 1 and self.temperature == 0
        check(not alike, "critic votes", self.votes, "1 at temperature 0: all votes would be alike")
        named = hasattr(self.model, "generate") or self.model is None or isinstance(self.model, str)
        check(named, "critic model", self.model, "a model or its name; None: the model that generates")

    @property
    def name(self) -> str:
        own = "self" if self.model is None else self.model
        return f"model:{getattr(own, 'name', own)}"

    def bind(self, model: Any) -> Critic:
        return replace(self, model=model) if self.model is None else self

    def ask(self, questions: Sequence[str]) -> tuple[list[list[str]], Cost]:
        """`votes` replies to each question, and what they cost."""
        check(self.model is not None, "critic model", None, "a model: nothing was bound to it")
        model = load_model(self.model) if isinstance(self.model, str) else self.model
        drawn: Samples = model.generate(
            [[{"role": "user", "content": question}] for question in questions],
            n=self.votes,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
        )
        replies: list[list[str]] = [[] for _ in questions]
        for b, text in zip(drawn.group.tolist(), drawn.texts, strict=True):
            replies[b].append(text)
        return replies, replace(drawn.cost, seconds=0.0)


@dataclass(frozen=True, repr=False)
class ModelCritic(_Asking):
    """A model that reads `instruction`, with {prompt} and {output} filled in, and ends with a verdict.

    Of the matches of `verdict` in a reply the last decides: it accepts where its group is `accept`. With several votes
    the majority accepts and ties reject; the score is the share of votes that accept, the text the longest reply of
    the majority. A reply without a verdict counts as rejection and, where no vote has one, as unparsed.

    Attributes:
        model: any engine's, `openai:` too; None is the model that generates (self-critique).
        temperature: above 0 for several votes.
    """

    verdict: str = r"\b(correct|incorrect)\b"
    accept: str = "correct"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            groups = re.compile(self.verdict).groups
        except re.error:
            groups = 0
        check(groups >= 1, "critic verdict", self.verdict, "a regular expression with a group, which holds the verdict")

    def judge(self, samples: Samples) -> Verdicts:
        asked = [filled(self.instruction, prompt=spoken(p), output=str(y)) for p, y in pairs_of(samples)]
        replies, cost = self.ask(asked)
        rows = [self._decided(mine) for mine in replies]
        return Verdicts(
            torch.tensor([accept for accept, _, _, _ in rows]),
            torch.tensor([score for _, score, _, _ in rows], dtype=torch.float64),
            [text for _, _, text, _ in rows],
            cost,
            torch.tensor([unread for _, _, _, unread in rows]),
        )

    def _decided(self, replies: list[str]) -> tuple[bool, float, str, bool]:
        found = [list(re.finditer(self.verdict, reply, re.IGNORECASE)) for reply in replies]
        votes = [bool(m) and m[-1][1].lower() == self.accept.lower() for m in found]
        accept = sum(votes) * 2 > len(votes)
        text = max((r for r, vote in zip(replies, votes, strict=True) if vote == accept), key=len, default="")
        return accept, sum(votes) / len(votes), text.strip(), not any(found)


def steps_of(text: str) -> list[str]:
    """The steps of a solution: by their numbers, else by paragraphs or lines."""
    numbered = [part.strip() for part in _NUMBERED.split(text)]
    if len(numbered) > 2:
        return [part for part in numbered[1:] if part]
    parts = text.split("\n\n") if "\n\n" in text.strip() else text.splitlines()
    return [part.strip() for part in parts if part.strip()]


@dataclass(frozen=True, repr=False)
class StepCritic(_Asking):
    """A model that names the first wrong step (DeepCritic, Yang et al. 2025): the last \\boxed{} of its reply is a
    number from 1, or -1 where all steps are right, which accepts. With several votes the commonest number decides, the
    smallest among equals; the score is the share of votes for "all right". A number that no step has is no verdict.

    The paper's settings: 8 votes at temperature 1.
    """

    instruction: str = _STEPS
    max_new_tokens: int = 512

    def judge(self, samples: Samples) -> Verdicts:
        steps = [steps_of(str(y)) for y in samples.outputs]
        asked = [
            filled(self.instruction, prompt=spoken(p), output="\n".join(f"{i}. {s}" for i, s in enumerate(mine, 1)))
            for (p, _), mine in zip(pairs_of(samples), steps, strict=True)
        ]
        replies, cost = self.ask(asked)
        numbers = [[first_wrong(r, len(mine)) for r in said] for said, mine in zip(replies, steps, strict=True)]
        chosen = [_commonest(mine) for mine in numbers]
        text = [
            "" if at in (-1, None) else f"Step {at} is the first wrong one: {mine[at - 1]}\n{_with(said, found, at)}"
            for at, mine, said, found in zip(chosen, steps, replies, numbers, strict=True)
        ]
        return Verdicts(
            torch.tensor([at == -1 for at in chosen]),
            torch.tensor([mine.count(-1) / len(mine) for mine in numbers], dtype=torch.float64),
            text,
            cost,
            torch.tensor([at is None for at in chosen]),
        )


def first_wrong(reply: str, steps: int) -> int | None:
    """The number in the last box of a reply; None where there is none, or no step has it."""
    boxes = _BOXED.findall(reply)
    number = int(boxes[-1]) if boxes else 0
    return number if number == -1 or 1 <= number <= steps else None


def _commonest(votes: Sequence[int | None]) -> int | None:
    known = [vote for vote in votes if vote is not None]
    return min(known, key=lambda vote: (-known.count(vote), vote)) if known else None


def _with(replies: Sequence[str], votes: Sequence[int | None], at: int) -> str:
    """The longest reply that voted so."""
    return max((r for r, vote in zip(replies, votes, strict=True) if vote == at), key=len).strip()


def step_accuracy(found: Sequence[int | None], known: Sequence[int]) -> tuple[float, float, float]:
    """Accuracy of first wrong steps on solutions with a wrong one, on right ones (-1), and their harmonic mean, which
    is 0 where both are 0. Raises `InputError` where one of the two kinds is missing.
    """
    pairs = list(zip(found, known, strict=True))
    wrong = [a == b for a, b in pairs if b != -1]
    right = [a == b for a, b in pairs if b == -1]
    check(bool(wrong) and bool(right), "known", list(known), "solutions with a wrong step, and right ones (-1)")
    a, b = sum(wrong) / len(wrong), sum(right) / len(right)
    return a, b, 2 * a * b / (a + b) if a + b else 0.0


@dataclass(frozen=True, repr=False)
class Pairwise(_Asking):
    """Prefers one of two drafts, asked in both orders, since models lean to a place (LLaVA-Critic-R1's self-critique):
    a model, or a function `prefer(prompt, first, second)` that is true where the first is better. It accepts nothing on
    its own: `Critique(Pairwise(model), drafts=8, rounds=0, keep="tournament")`.
    """

    model: Any = None
    instruction: str = _BETTER
    prefer: Callable[[Any, Any, Any], bool] | None = None

    compares = True
    slots = ("prompt", "first", "second")

    @property
    def name(self) -> str:
        return "pairwise" if self.prefer is not None else f"pairwise {super().name}"

    def judge(self, samples: Samples) -> Verdicts:
        none: Tensor = torch.zeros(len(samples), dtype=torch.bool)
        return Verdicts(none, none.double(), [""] * len(samples))

    def better(self, rivals: Sequence[tuple[Any, Any, Any]]) -> tuple[list[bool], Cost]:
        """Whether the first is better, or as good, for each (prompt, first, second), and what that cost."""
        if self.prefer is not None:
            return [bool(self.prefer(*rival)) for rival in rivals], Cost(critic_calls=len(rivals))
        orders = [(p, a, b) for p, a, b in rivals] + [(p, b, a) for p, a, b in rivals]
        asked = [filled(self.instruction, prompt=spoken(p), first=str(a), second=str(b)) for p, a, b in orders]
        replies, cost = self.ask(asked)
        votes = [sum(_letter(reply) for reply in said) for said in replies]
        count = len(rivals)
        found = [votes[i] - votes[count + i] >= 0 for i in range(count)]
        return found, cost + Cost(critic_calls=2 * count)


def _letter(reply: str) -> int:
    """1 for A, -1 for B, 0 where the reply says neither."""
    letters = re.findall(r"\b([AB])\b", reply)
    return 0 if not letters else 1 if letters[-1] == "A" else -1
