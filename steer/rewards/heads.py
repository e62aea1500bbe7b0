"""Trained rewards: linear heads on the hidden state at the end of a reply, as `steer train reward` makes them.

Letters: `N` samples, `M` members, `K` attributes, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steer.core import InputError, Prompt, RawText, Reward, Samples, SteerError, check
from steer.rewards.algebra import Composable
from steer.rewards.text import texts_of

__all__ = ["HeadReward", "load_model", "models_from", "reply_ids"]


def reply_ids(model: Any, prompt: Prompt, reply: str) -> list[int]:
    """Token ids of a prompt and its reply, the end of the turn included: where a head reads."""
    end = list(model.eos_token_ids[:1])
    if isinstance(prompt, RawText) or not model.chats:
        before = prompt if isinstance(prompt, str) else "\n".join(str(m["content"]) for m in prompt)
        return [*model.encode(RawText(f"{before}{reply}")), *end]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return [*model.encode([*messages, {"role": "assistant", "content": reply}]), *end]


@dataclass(frozen=True, repr=False)
class HeadReward(Composable):
    """Scores of heads on frozen features.

        z = (h - mean) / std,   r = heads z + bias  [M, K],   score_m = sum_k weights_k r_mk

    then the mean of the members, their minimum ("worst"), or mean - coefficient * variance ("uncertainty"), as in
    `steer.rewards.Ensemble`. All members are read from one pass of the unedited model.

    Args:
        heads, bias: `[M, K, D]` and `[M, K]`.
        mean, std: of the training features `[D]`.
        layer: after which block the state is read.
        names: of the attributes.
        weights: of the attributes `[K]`.
        how, coefficient, ddof: as for `Ensemble`.
        probability: the score is `sigmoid(score_m)` (a binary head's probability), not log-odds.
        trained_on: `name` and `fingerprint` of the model whose states these are.
        model: that model; where nothing is bound it is loaded by its name.
    """

    heads: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    layer: int
    names: tuple[str, ...]
    weights: Tensor
    how: str = "mean"
    coefficient: float = 0.5
    ddof: int = 0
    probability: bool = False
    trained_on: dict[str, Any] = field(default_factory=dict)
    model: Any = None
    text: str = "heads"
    """How it was written, for messages."""

    modality: ClassVar[Literal["text", "image"] | None] = "text"
    alone = True

    def __post_init__(self) -> None:
        check(self.how in ("mean", "worst", "uncertainty"), "reward how", self.how, "mean, worst, uncertainty")
        check(self.weights.shape == (len(self.names),), "reward weights", self.weights.tolist(), f"{len(self.names)}")
        enough = self.how != "uncertainty" or len(self.heads) > self.ddof
        check(enough, "reward how", self.how, "mean or worst: it has one member")

    def __repr__(self) -> str:
        return self.text

    def bind(self, model: Any) -> Reward:
        """The reward on the states of `model`, where it is the one that the heads were trained on."""
        info = getattr(model, "info", None)
        same = info is not None and info.entry().get("fingerprint") == self.trained_on.get("fingerprint")
        return replace(self, model=model) if same and hasattr(model, "hidden_states") else self

    def attributes(self, samples: Samples) -> Tensor:
        """Every attribute of every sample, the mean over members `[N, K]`."""
        return self._members(samples).mean(1)

    def score(self, samples: Samples) -> Tensor:
        members = self._members(samples) @ self.weights.double()
        members = members.sigmoid() if self.probability else members
        if self.how == "worst":
            return members.amin(1)
        mean = members.mean(1)
        return mean if self.how == "mean" else mean - self.coefficient * members.var(1, correction=self.ddof)

    def _members(self, samples: Samples) -> Tensor:
        """`[N, M, K]`, float64."""
        texts = texts_of(samples, self)
        if not texts:
            return torch.zeros(0, len(self.heads), len(self.names), dtype=torch.float64)
        model = self.model if self.model is not None else self._own()
        prompts: Sequence[Prompt] = [samples.prompts[b] for b in samples.group.tolist()]
        ids = [reply_ids(model, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        states = model.hidden_states(ids, [self.layer])[self.layer].double()
        z = (states - self.mean.double()) / self.std.double()
        return torch.einsum("nd,mkd->nmk", z, self.heads.double()) + self.bias.double()

    def _own(self) -> Any:
        name = str(self.trained_on.get("name", ""))
        if not _loaders or not name:
            raise InputError(
                "reward", self.text, f"the model that it was trained on, {name}, as the one that generates"
            )
        return load_model(name)


_loaders: list[Callable[[str], Any]] = []


def models_from(load: Callable[[str], Any]) -> None:
    """Have rewards that were trained on another model than the generating one load it so. Called by `steer.loading`,
    which knows all engines and stands above the rewards.
    """
    _loaders[:] = [load]


@cache
def load_model(name: str) -> Any:
    """A model by its name, loaded once; see `models_from`. Raises `SteerError`."""
    if not _loaders:
        raise SteerError(f"model {name}: nothing loads models here; import steer.loading")
    return _loaders[0](name)
