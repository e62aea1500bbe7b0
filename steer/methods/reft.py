"""Representation fine-tuning: a trained low-rank change of some layers, at some positions of the prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from steer.core import HiddenEdit, ModelInfo, Scope, Term, check
from steer.core.edit import ranges
from steer.methods.operators import LowRank
from steer.methods.vector import check_model

__all__ = ["POSITIONS", "Ends", "Reft", "position"]


POSITIONS = "fN (the first N positions of the prompt) or lN (the last N)"
_POSITION = re.compile(r"([fl])([1-9][0-9]{0,5})")


@dataclass(frozen=True)
class Ends(Scope):
    """The first or last `number` positions of the prompt, and of a short one at most half of them, as pyreft counts
    (`get_intervention_locations`): so the two ends never meet.
    """

    number: int = 1
    last: bool = False

    def bounds(self, prompt_length: int) -> tuple[int, float]:
        count = min(self.number, prompt_length // 2)
        return (prompt_length - count, prompt_length) if self.last else (0, count)

    @property
    def name(self) -> str | None:
        return None

    def __str__(self) -> str:
        return f"{'l' if self.last else 'f'}{self.number}"


def position(text: Any) -> Ends:
    """`f3` or `l1`, as pyreft writes positions. Raises `InputError`; of `f1+l1` each end is an edit of its own."""
    found = _POSITION.fullmatch(str(text))
    both = "+" in str(text)
    ends = " and ".join(f"position={end}" for end in str(text).split("+"))
    allowed = f"one end at a time; for both, the same file twice: {ends}" if both else POSITIONS
    check(found is not None, "position", text, allowed)
    assert found is not None
    return Ends(number=int(found[2]), last=found[1] == "l")


@dataclass(frozen=True, eq=False)
class Reft(HiddenEdit):
    """`h_l <- h_l + s U_l^T (A_l h_l + b_l)` at every layer that has an operator, at the positions in `scope`: LoReFT
    and its kin (Wu et al. 2024, "ReFT: Representation Finetuning for Language Models").

    Attributes:
        operators: `{layer: LowRank}`, 0 the first block.
        strength: s, on top of the operators' own; 1 is what was trained, 0 nothing.
        scope: token positions, see `Scope.parse` and `position`.
        model: the card's entry of the model that it belongs to.
    """

    operators: Mapping[int, LowRank]
    strength: float = 1.0
    scope: Scope = field(default_factory=Scope)
    model: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(bool(self.operators), "operators", {}, "an operator for at least one layer")
        number = isinstance(self.strength, int | float) and abs(self.strength) < float("inf")
        check(number, "strength", self.strength, "a finite number")
        object.__setattr__(self, "scope", Scope.parse(self.scope))
        for layer, made in self.operators.items():
            rank = len(made.bias)
            for name, shape in (("reads", (rank, made.writes.shape[-1])), ("writes", (rank, made.reads.shape[-1]))):
                given = tuple(getattr(made, name).shape)
                check(given == shape, f"{name} of layer {layer}", given, f"shape {shape}, as the other tensors say")
            finite = all(bool(torch.isfinite(x).all()) for x in (made.reads, made.bias, made.writes))
            check(finite, f"operator of layer {layer}", "NaN or infinity", "finite numbers")

    def terms(self, model: ModelInfo) -> list[Term]:
        check_model(self.model, model, "reft")
        for layer, made in self.operators.items():
            depth, width = model.num_layers, made.writes.shape[-1]
            check(0 <= layer < depth, "layer", layer, f"0 to {depth - 1}, the blocks of {model.name}")
            check(width == model.width, f"reft of layer {layer}", f"width {width}", f"width {model.width}")
        if self.strength == 0:
            return []
        return [
            Term(layer, replace(made, strength=self.strength * made.strength))
            for layer, made in sorted(self.operators.items())
        ]

    def __mul__(self, factor: float) -> Reft:
        return replace(self, strength=self.strength * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Reft:
        return self * (1 / divisor)

    def __neg__(self) -> Reft:
        return self * -1.0

    def __repr__(self) -> str:
        ranks = sorted({len(made.bias) for made in self.operators.values()})
        what = f"layers {ranges(self.operators)}, rank {ranges(ranks)}, strength {self.strength:.4g}"
        return f"Reft({what}, scope {self.scope})"
