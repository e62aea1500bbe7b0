"""Critics: what looks at drafts and accepts or rejects each, with a score and a reason.

A critic is a function `critic(samples) -> Verdicts`. It sees the prompts as they were asked, before any revision, and
one draft a row, be it a text or the transcript of an episode. Letters: `N` drafts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from steer.core import Cost, Reward, RewardError, Samples, SteerError, check

__all__ = ["Critic", "FunctionCritic", "Panel", "Threshold", "Verdicts", "pairs_of", "threshold", "united"]


@dataclass(frozen=True)
class Verdicts:
    """What a critic said of `N` drafts."""

    accept: Tensor
    """Whether each will do, bool `[N]`."""
    score: Tensor
    """How good each is, float64 `[N]`, higher is better; comparable within one critic."""
    text: list[str]
    """What is told to whoever revises, "" where there is nothing to say."""
    cost: Cost = field(default_factory=Cost)
    """What the critic's own models and rewards took."""
    unparsed: Tensor | None = None
    """Drafts of whose critique no verdict could be read, bool `[N]`: they count as rejected."""

    def __len__(self) -> int:
        return len(self.accept)


class Critic(ABC):
    """Judges drafts. A class implements `judge`; calling one checks what comes back."""

    compares: ClassVar[bool] = False
    """Whether it prefers one of two drafts and accepts none on its own: for `keep="tournament"`."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What errors and panels call it."""

    @abstractmethod
    def judge(self, samples: Samples) -> Verdicts:
        """A verdict on every row."""

    def bind(self, model: Any) -> Critic:
        """The critic for use with `model` (see `Reward.bind`)."""
        return self

    def __call__(self, samples: Samples) -> Verdicts:
        """Checked verdicts with every draft counted in their cost. Raises `RewardError` that names the critic."""
        try:
            found = self.judge(samples)
        except SteerError:
            raise
        except Exception as error:
            raise RewardError(f"critic {self.name}: raised {type(error).__name__}: {error}") from error
        if not isinstance(found, Verdicts):
            raise RewardError(f"critic {self.name}: returned {type(found).__name__}; allowed: Verdicts")
        sizes = {len(found.accept), len(found.score), len(found.text)}
        if sizes != {len(samples)}:
            raise RewardError(f"critic {self.name}: returned {sorted(sizes)} verdicts; allowed: {len(samples)}")
        score = torch.as_tensor(found.score).detach().cpu().double()
        if bool(score.isnan().any()):
            raise RewardError(f"critic {self.name}: returned NaN for draft {int(score.isnan().nonzero()[0])}")
        accept = torch.as_tensor(found.accept).detach().cpu()
        if accept.dtype != torch.bool:
            raise RewardError(f"critic {self.name}: accept is {accept.dtype}; allowed: bool")
        cost = found.cost + Cost(critic_calls=len(samples))
        return replace(found, accept=accept, score=score, cost=cost)

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, repr=False)
class Threshold(Critic):
    """Accepts where a reward is `at` or more; the score is the reward. `say` is the reason that is given for rejection,
    a text or a function of (prompt, output).
    """

    reward: Reward
    at: float
    say: str | Callable[[Any, Any], str] = ""

    def __post_init__(self) -> None:
        check(isinstance(self.reward, Reward), "critic", self.reward, "a reward with a threshold")
        number = isinstance(self.at, int | float) and not isinstance(self.at, bool) and math.isfinite(self.at)
        check(number, "critic threshold", self.at, "a number")

    @property
    def name(self) -> str:
        return f"{self.reward}>={self.at:g}"

    def bind(self, model: Any) -> Critic:
        bound = self.reward.bind(model)
        return self if bound is self.reward else replace(self, reward=bound)

    def judge(self, samples: Samples) -> Verdicts:
        score = self.reward(samples)
        accept = score >= self.at
        says = self.say
        text = [
            "" if ok else says(samples.prompts[b], samples.outputs[i]) if callable(says) else says
            for i, (ok, b) in enumerate(zip(accept.tolist(), samples.group.tolist(), strict=True))
        ]
        return Verdicts(accept, score, text, Cost(reward_calls=len(samples)))


def threshold(reward: Any, at: float, say: str | Callable[[Any, Any], str] = "") -> Threshold:
    """A critic that accepts where `reward` (as `generate` takes it) is `at` or more."""
    from steer.rewards import as_reward

    found = as_reward(reward)
    check(found is not None, "critic", reward, "a reward with a threshold")
    assert found is not None
    return Threshold(found, at, say)


@dataclass(frozen=True, repr=False)
class FunctionCritic(Critic):
    """A function of (prompt, output) that returns whether it accepts; or a number, which accepts from 1/2 on; or
    (accept, text); or (accept, score, text).
    """

    function: Callable[[Any, Any], Any]
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or getattr(self.function, "__name__", type(self.function).__name__)

    def judge(self, samples: Samples) -> Verdicts:
        rows = [self._read(self.function(p, y)) for p, y in pairs_of(samples)]
        return Verdicts(
            torch.tensor([accept for accept, _, _ in rows], dtype=torch.bool),
            torch.tensor([score for _, score, _ in rows], dtype=torch.float64),
            [text for _, _, text in rows],
        )

    def _read(self, said: Any) -> tuple[bool, float, str]:
        if isinstance(said, tuple) and len(said) in (2, 3):
            accept, text = bool(said[0]), str(said[-1])
            return accept, float(said[1]) if len(said) == 3 else float(accept), text
        if isinstance(said, bool):
            return said, float(said), ""
        if isinstance(said, int | float) or (isinstance(said, Tensor) and said.numel() == 1):
            return float(said) >= 0.5, float(said), ""
        raise RewardError(
            f"critic {self.name}: returned {said!r:.80}; allowed: a bool, a number, (accept, text), "
            "(accept, score, text)"
        )


@dataclass(frozen=True, repr=False)
class Panel(Critic):
    """Several critics (MultiCritique): the majority decides and a tie rejects, the score is the mean of theirs, and
    the text is what each of them said, under its name.
    """

    members: tuple[Critic, ...]

    def __post_init__(self) -> None:
        check(len(self.members) >= 1, "critic", list(self.members), "at least one critic")
        for member in self.members:
            check(not member.compares, "critic", member.name, "critics that judge one draft at a time")

    @property
    def name(self) -> str:
        return f"[{', '.join(member.name for member in self.members)}]"

    def bind(self, model: Any) -> Critic:
        return replace(self, members=tuple(member.bind(model) for member in self.members))

    def judge(self, samples: Samples) -> Verdicts:
        found = [member(samples) for member in self.members]
        said = [
            "\n".join(f"{m.name}: {v.text[i]}" for m, v in zip(self.members, found, strict=True) if v.text[i])
            for i in range(len(samples))
        ]
        # Each member counts the drafts that it saw; the panel itself is one more name for the same call.
        cost = sum((v.cost for v in found), Cost())
        return replace(united(found), text=said, cost=replace(cost, critic_calls=cost.critic_calls - len(samples)))


def united(found: Sequence[Verdicts]) -> Verdicts:
    """Several verdicts on the same drafts as one: the majority accepts, ties reject; mean score; the longest text of
    those who were with the majority; no verdict where nobody's could be read.
    """
    if len(found) == 1:
        return found[0]
    votes = torch.stack([v.accept for v in found])
    accept = votes.sum(0) * 2 > len(found)
    text = [
        max((v.text[i] for v in found if bool(v.accept[i]) == bool(accept[i])), key=len, default="")
        for i in range(len(accept))
    ]
    blank = torch.zeros_like(accept)
    unparsed = torch.stack([blank if v.unparsed is None else v.unparsed for v in found]).all(0)
    score = torch.stack([v.score for v in found]).mean(0)
    return Verdicts(accept, score, text, sum((v.cost for v in found), Cost()), unparsed)


def pairs_of(samples: Samples) -> list[tuple[Any, Any]]:
    """Prompt and output of every row."""
    return [(samples.prompts[b], y) for b, y in zip(samples.group.tolist(), samples.outputs, strict=True)]
