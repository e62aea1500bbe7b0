"""Values of episodes: what is still to come, by a function, and what a turn has taught the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from steer.core import Cost, Process, Reward, RewardError, Samples, UnsupportedError, check
from steer.rewards.algebra import Composable
from steer.rewards.verifiable import prompt_key
from steer.sampling.lookahead import Lookahead
from steer.turns.episode import Episode
from steer.turns.process import TurnProcess

__all__ = ["InformationGain", "TurnValue"]


@dataclass(frozen=True)
class TurnValue(Lookahead):
    """The return so far and a value of what is still to come, `value(episode)`: for SVDD and FK steering over episodes
    (ArCHer's critic, Zhou et al. 2024). Episodes that have ended get their reward.

    SVDD chooses after the environment has answered, so it chooses luck, too; `Candidates` chooses before.
    """

    value: Callable[[Episode], float]

    def check(self, process: Process) -> None:
        if not isinstance(process, TurnProcess):
            raise UnsupportedError(f"TurnValue values episodes: of a TurnProcess, not of {type(process).__name__}")

    def __call__(
        self, process: Process, state: Any, reward: Reward, beta: float, generator: torch.Generator
    ) -> tuple[Tensor, Cost]:
        ended = process.finished(state)
        found = [0.0 if end else e.total + self.value(e) for e, end in zip(state.episodes, ended.tolist(), strict=True)]
        values = torch.tensor(found, dtype=torch.float64)
        if not bool(ended.any()):
            return values, Cost()
        return torch.where(ended, reward(process.preview(state)), values), Cost(reward_calls=int(ended.sum()))


@dataclass(frozen=True, repr=False)
class InformationGain(Composable):
    """What an episode taught the model of the right answer (IGPO, Wang et al. 2025): the sum over turns of
    `p_t - p_{t-1}`, where `p_t = exp(mean log-probability of the answer's tokens)` after the conversation so far and
    `template`. It telescopes to `p_T - p_0`. It needs the answer, so it is for reports and training, never for
    deployment.

    Args:
        reference: the right answer of every prompt, a table by prompt or one text for all.
        template: the user's message that asks for the answer.
    """

    reference: Mapping[str, str] | str
    template: str = "Give the final answer now, and nothing else."
    model: Any = None

    modality: ClassVar = "text"

    def bind(self, model: Any) -> Reward:
        return replace(self, model=model) if self.model is None else self

    def gains(self, samples: Samples) -> list[list[float]]:
        """By episode, the gain of every turn."""
        check(self.model is not None, "reward information gain", None, "a model with log_likelihood, bound to it")
        asked: list[Any] = []
        answers: list[str] = []
        for b, episode in zip(samples.group.tolist(), samples.outputs, strict=True):
            if not hasattr(episode, "actions"):
                raise RewardError(
                    "reward information gain: these outputs are no episodes; allowed: those of a TurnProcess"
                )
            first = len(episode.messages) - 2 * len(episode.actions)
            for t in range(len(episode.actions) + 1):
                asked.append(_asking(episode.messages[: first + 2 * t], self.template))
                answers.append(self._answer(samples.prompts[b]))
        rows = Samples(asked, answers, torch.arange(len(asked)), torch.zeros(len(asked), dtype=torch.float64))
        total, count = self.model.log_likelihood(rows)
        p = (total / count).exp().tolist()
        found, at = [], 0
        for episode in samples.outputs:
            mine = p[at : at + len(episode.actions) + 1]
            found.append([after - before for before, after in pairwise(mine)])
            at += len(mine)
        return found

    def _answer(self, prompt: Any) -> str:
        if isinstance(self.reference, str):
            return self.reference
        key = prompt_key(prompt)
        check(key in self.reference, "reward information gain", prompt, "prompts whose answers are known")
        return self.reference[key]

    def score(self, samples: Samples) -> Tensor:
        return torch.tensor([sum(turns) for turns in self.gains(samples)], dtype=torch.float64)

    def __repr__(self) -> str:
        return "information_gain"


def _asking(messages: list[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    """The conversation with the question for the answer, in the user's last message where that is the last."""
    last = messages[-1]
    if last["role"] != "user":
        return [*messages, {"role": "user", "content": template}]
    return [*messages[:-1], {**last, "content": f"{last['content']}\n\n{template}"}]
