"""Edits: what is changed in a model, at which site, on which rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from torch import Tensor

from steer.core.errors import UnsupportedError
from steer.core.scope import Scope

Prompt = str | Sequence[dict[str, Any]]
"""Text, or a chat: `[{"role": "user", "content": "..."}]`."""


Prompts = str | Sequence[Prompt | dict[str, Any]]
"""One prompt, or a list of several."""


class RawText(str):
    """Text to be continued as it stands, without the chat template."""


# ---------------------------------------------------------------------------------------------------------- edits


class Site(Enum):
    """The quantity that an edit changes."""

    PROMPT = "prompt"
    """The text or messages that go in."""
    HIDDEN = "hidden"
    """The residual stream after a block, `[N, D]` at every position."""
    TRANSITION = "transition"
    """The law of the next step: next-token logits `[N, V]`, or a denoiser's prediction `[N, ...]`."""


class Edit(ABC):
    """A change at one site. Edits are frozen dataclasses; they hold no state of a run."""

    site: ClassVar[Site]

    def with_beta(self, beta: float) -> Edit:
        """The edit for a run at KL coefficient `beta`; edits that were given their own, or need none, are unchanged."""
        return self


class PromptEdit(Edit):
    """Rewrites what goes in."""

    site = Site.PROMPT

    @abstractmethod
    def rewrite(self, prompt: Prompt) -> Prompt:
        """The prompt that the process sees in place of `prompt`."""

    def rewrite_all(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The same for several, which an edit that runs a model does together."""
        return [self.rewrite(prompt) for prompt in prompts]


class Operator(ABC):
    """A pure function on hidden rows `[..., D]`: the unit that every engine knows how to apply.

    An operator used with weight `w` acts as `h + w (operator(h) - h)`, so weight 0 is the identity.
    """

    @abstractmethod
    def __call__(self, hidden: Tensor) -> Tensor:
        """Changed rows, same shape as `hidden` `[..., D]`."""

    @property
    def constant(self) -> Tensor | None:
        """The vector `[D]` that is added whatever the input, or None when the change depends on the input."""
        return None


@dataclass(frozen=True)
class Term:
    """What a hidden edit does after block `layer` (0 = the first block)."""

    layer: int
    operator: Operator


@dataclass(frozen=True)
class ModelInfo:
    """What an edit may know about the model that it is mounted on."""

    name: str
    fingerprint: str
    """Hash of architecture and weights' shape and sample; a vector made for one model is refused by another."""
    num_layers: int
    width: int
    model_type: str
    """The architecture's name in its configuration ("llama")."""
    residual_norms: Callable[[], Tensor] = field(repr=False, compare=False)
    """Median norm of the residual stream after each block `[L]`, measured on first use."""
    unembedding: Callable[[], Tensor] = field(repr=False, compare=False)
    """Output embedding matrix `[V, D]`."""
    token_id: Callable[[str], int | None] = field(default=lambda text: None, repr=False, compare=False)
    """The id of the token that is written so, None where the tokenizer has no such token."""

    def entry(self) -> dict[str, Any]:
        """The facts that an artifact's card keeps about its model."""
        return {name: getattr(self, name) for name in ("name", "fingerprint", "num_layers", "width", "model_type")}


class HiddenEdit(Edit):
    """Changes the residual stream. `terms` says what happens where; an edit with `reads` also decides, once a prompt,
    how much: the engine reads the prompt without edits, asks for `weights`, and from then on everything is constant.
    """

    site = Site.HIDDEN
    scope: Scope

    @abstractmethod
    def terms(self, model: ModelInfo) -> list[Term]:
        """Operators by layer, in order. Raises `InputError` where the edit does not fit the model."""

    @property
    def reads(self) -> tuple[int, ...]:
        """Layers whose state at the last prompt position `weights` wants to see."""
        return ()

    def weights(self, hidden: dict[int, Tensor]) -> Tensor:
        """Weight of every term `[N, len(terms)]` from prompt states `{layer: [N, D]}`; only called with `reads`."""
        raise UnsupportedError(f"{type(self).__name__} reads no hidden states")


def ranges(numbers: Iterable[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
