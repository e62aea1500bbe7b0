"""Values of texts, with which `ValueGuidance` guides a model that shows nothing but text.

Letters: `N` rows, `K` candidates, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from steer.adapters.openai.state import EndpointContext
from steer.core import Context, InputError, Prompt, Reward
from steer.methods.value import ValueHead
from steer.rewards import as_reward

__all__ = ["LocalValue", "TextValue"]


def _endpoint(context: Context) -> EndpointContext:
    if not isinstance(context, EndpointContext):
        raise InputError(
            "value", type(context).__name__, "a model behind an endpoint: values of texts guide only these"
        )
    return context


@dataclass(frozen=True, eq=False)
class TextValue:
    """Q as a function of the text that a candidate leads to: `value(texts [N K]) -> [N K]`, a reward or its expression,
    which then scores unfinished texts.

    A candidate that ends the text has the value of the text as it stands.
    """

    value: Reward | str | Callable[[Sequence[str]], Any]

    def __post_init__(self) -> None:
        reward = as_reward(self.value)
        if reward is None:
            raise InputError("value", None, "a callable on texts, a reward or its expression")
        object.__setattr__(self, "value", reward)

    def __call__(self, context: Context, candidates: Tensor) -> Tensor:
        """Values `[N, K]` in float64."""
        assert isinstance(self.value, Reward)
        return self.value(_endpoint(context).after(candidates)).reshape(candidates.shape)


class Reader(Protocol):
    """A language model that can be read, such as `steer.adapters.transformers.LanguageModel`."""

    tokenizer: Any

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt."""

    def features(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Final hidden states `[N, D]` after the last token of each row."""


@dataclass(frozen=True, eq=False)
class LocalValue:
    """Q by a `ValueHead` on a local language model, which reads prompt and text after each candidate with its own
    tokenizer: N K passes over whole texts for each token.

    Tokens that may follow are counted by that tokenizer. Approximate where the head was trained on texts of another
    model than the endpoint's, and where prompts differ by the chat template.
    """

    model: Reader
    head: ValueHead
    max_rows: int = 64

    @torch.inference_mode()
    def __call__(self, context: Context, candidates: Tensor) -> Tensor:
        """Values `[N, K]` in float64."""
        seen = _endpoint(context)
        samples, ends = seen.after(candidates), seen.ends(candidates).flatten().tolist()
        prompts = [self.model.encode(prompt) for prompt in samples.prompts]
        rows = zip(samples.group.tolist(), samples.texts, ends, strict=True)
        ids = [[*prompts[b], *self._tokens(text, end)] for b, text, end in rows]
        written = [len(row) - len(prompts[b]) for row, b in zip(ids, samples.group.tolist(), strict=True)]
        left = (seen.limit - torch.tensor(written)).split(self.max_rows)
        parts = [ids[i : i + self.max_rows] for i in range(0, len(ids), self.max_rows)]
        values = [self.head(self.model.features(part), rest) for part, rest in zip(parts, left, strict=True)]
        return torch.cat(values).double().cpu().reshape(candidates.shape)

    def _tokens(self, text: str, end: bool) -> list[int]:
        ids = list(self.model.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
        return ids + list(self.model.eos_token_ids[:1]) if end else ids
