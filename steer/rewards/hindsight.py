"""Rewards in hindsight: what a reply is worth once its consequences are seen.

    r(x, y) = mean over n of evaluator(x, y, o_i),  o_i ~ simulator(x, y)

An evaluator that looks at the reply alone rewards promises; one that sees what came of them rewards keeping them (Liang
et al., RLHS, 2501.08617). It is only as honest as its simulator.

Letters: `N` samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steer.core import InputError, Reward, Samples, check
from steer.rewards.algebra import Composable
from steer.rewards.text import texts_of

__all__ = ["Hindsight"]


@dataclass(frozen=True, repr=False)
class Hindsight(Composable):
    """A reward on replies together with what follows them.

    Args:
        simulator: what follows, for lists of prompts and replies: a function of the two; or a model with `generate`,
            which is asked with `template`.
        evaluator: a reward of texts, which reads the reply, an empty line and what follows, with the prompt; or a
            function of three texts (prompt, reply, what follows).
        n: consequences for each reply, over which the mean is taken.
        reveal: "chosen" shows the consequence of the reply itself; "all" also those of the other replies to the prompt,
            as the reference's full hindsight does.
        template: what a model is asked; `{prompt}` and `{reply}` are filled in.
        max_tokens: of a model's consequence.
        seed: of a model's.

    Raises `InputError` for an empty consequence, with the number of its sample. A model's texts are counted as calls of
    the reward, not as generated tokens.
    """

    modality: ClassVar[Literal["text", "image"] | None] = "text"
    simulator: Any
    evaluator: Reward | Callable[[Any, str, str], float]
    n: int = 1
    reveal: str = "chosen"
    template: str = "{prompt}\n\nReply: {reply}\n\nWhat does the reader do next, and what comes of it? One sentence."
    max_tokens: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        check(isinstance(self.n, int) and self.n >= 1, "hindsight n", self.n, "an integer of 1 or more")
        check(self.reveal in ("chosen", "all"), "hindsight reveal", self.reveal, "chosen, all")
        able = callable(self.simulator) or hasattr(self.simulator, "generate")
        check(able, "hindsight simulator", self.simulator, "a function of prompts and replies, or a model")
        check(callable(self.evaluator), "hindsight evaluator", self.evaluator, "a reward, or a function of three texts")

    def score(self, samples: Samples) -> Tensor:
        texts = texts_of(samples, self)
        group = samples.group.tolist()
        prompts = [samples.prompts[b] for b in group]
        total = torch.zeros(len(texts), dtype=torch.float64)
        for number in range(self.n):
            after = self._after(prompts, texts, number)
            if self.reveal == "all":
                after = _with_others(after, texts, group)
            total += self._worth(samples, prompts, texts, after)
        return total / self.n

    def _after(self, prompts: Sequence[Any], texts: Sequence[str], number: int) -> list[str]:
        if hasattr(self.simulator, "generate"):
            asked = [self._asked(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
            drawn = self.simulator.generate(asked, max_new_tokens=self.max_tokens, seed=self.seed + number)
            after = list(drawn.texts)
        else:
            after = list(self.simulator(list(prompts), list(texts)))
        check(
            len(after) == len(texts), "hindsight simulator", f"{len(after)} texts", f"{len(texts)}, one for each reply"
        )
        for i, text in enumerate(after):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"hindsight: consequence of sample {i}", text, "a text that is not empty")
        return after

    def _asked(self, prompt: Any, reply: str) -> str:
        shown = prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)
        return self.template.replace("{reply}", reply).replace("{prompt}", shown)

    def _worth(self, samples: Samples, prompts: Sequence[Any], texts: Sequence[str], after: Sequence[str]) -> Tensor:
        rows = zip(prompts, texts, after, strict=True)
        if isinstance(self.evaluator, Reward):
            seen = [f"{text}\n\n{then}" for text, then in zip(texts, after, strict=True)]
            judged = Samples(samples.prompts, seen, samples.group, torch.zeros(len(seen), dtype=torch.float64))
            return self.evaluator(judged).double()
        return torch.tensor([float(self.evaluator(*row)) for row in rows], dtype=torch.float64)

    def __repr__(self) -> str:
        return f"Hindsight({self.evaluator!r}, n={self.n})"


def _with_others(after: Sequence[str], texts: Sequence[str], group: Sequence[int]) -> list[str]:
    """Each consequence with those of the other replies to its prompt."""
    found = []
    for i, then in enumerate(after):
        others = [
            f"Had the reply been {texts[j]!r}: {after[j]}" for j in range(len(after)) if j != i and group[j] == group[i]
        ]
        found.append("\n".join([then, *others]))
    return found
