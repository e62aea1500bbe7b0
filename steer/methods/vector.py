"""Steering vectors: one direction for each of some layers, and what to do with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.core import HiddenEdit, InputError, ModelInfo, Operator, Scope, Term, check
from steer.core.edit import ranges
from steer.methods.operators import Ablate, Add, Clamp, KeepNorm, Probe, Rotate, Where

__all__ = ["OPERATORS", "Gate", "SteeringVector", "check_model"]


OPERATORS = ("add", "ablate", "clamp", "rotate")


def check_model(given: Mapping[str, Any], model: ModelInfo, what: str) -> None:
    """Refuse an artifact that was made for another model. `given` is a card's model entry; empty entries match."""
    for name, mine in (("num_layers", model.num_layers), ("width", model.width), ("fingerprint", model.fingerprint)):
        theirs = given.get(name)
        if theirs not in (None, "", mine):
            raise InputError(
                what,
                f"made for {given.get('name', 'another model')} ({name} {theirs})",
                f"an artifact of {model.name} ({name} {mine}); model=any skips the fingerprint",
            )


@dataclass(frozen=True, eq=False)
class Gate:
    """Steer only the prompts on which a probe fires at their last token (conditional activation steering, Lee et al.
    2025, decided for each row).
    """

    probe: Probe
    layer: int


@dataclass(frozen=True, eq=False)
class SteeringVector(HiddenEdit):
    """`h_l <- operator(h_l, direction_l)` at every layer that has a direction, at the positions in `scope`.

    Attributes:
        directions: `{layer: [D]}`, 0 the first block.
        strength: for `add` the whole dose, shared evenly by the layers, in units of each layer's median residual norm
            (`unit="norm"`), so that it means the same on one layer and on ten; with `unit="raw"` each layer's direction
            times the strength. For `clamp` the projection to set, in the same units but not shared; for `ablate` the
            share removed; for `rotate` degrees.
        operator: "add", "ablate", "clamp" (sets the projection), "rotate" (towards the direction, in its plane with
            `references`).
        keep_norm: scale each row back to its norm afterwards.
        scope: token positions, see `Scope.parse`.
        gate: steer only prompts on which a probe fires.
        token_probes: `{layer: Probe}`; steer only positions on which that layer's probe fires.
        references: `{layer: [D]}`, the second axis of the plane for `rotate`: the mean state that it was fitted around.
        model: the card's entry of the model that the vector belongs to.
        low, high: of `clamp`, an interval in `unit` that the component along the direction is moved into; one alone
            leaves the other side open. Without them it is set to `strength`.
    """

    directions: Mapping[int, Tensor]
    strength: float = 1.0
    unit: str = "norm"
    operator: str = "add"
    keep_norm: bool = False
    scope: Scope = field(default_factory=Scope)
    gate: Gate | None = None
    token_probes: Mapping[int, Probe] = field(default_factory=dict)
    references: Mapping[int, Tensor] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        self._check_bounds()
        check(bool(self.directions), "directions", {}, "a direction for at least one layer")
        check(self.operator in OPERATORS, "operator", self.operator, ", ".join(OPERATORS))
        check(self.unit in ("norm", "raw"), "unit", self.unit, "norm, raw")
        number = isinstance(self.strength, int | float) and abs(self.strength) < float("inf")
        check(number, "strength", self.strength, "a finite number")
        object.__setattr__(self, "scope", Scope.parse(self.scope))
        for layer, direction in self.directions.items():
            check(
                bool(torch.isfinite(direction).all()),
                f"direction of layer {layer}",
                "NaN or infinity",
                "finite numbers",
            )
            check(direction.dim() == 1, f"direction of layer {layer}", tuple(direction.shape), "shape (width,)")
        if self.operator == "rotate":
            missing = sorted(set(self.directions) - set(self.references))
            check(not missing, "operator", "rotate", f"references for layers {missing}: fit the vector with steer")

    def _check_bounds(self) -> None:
        given = {name: x for name, x in (("low", self.low), ("high", self.high)) if x is not None}
        for name, x in given.items():
            check(self.operator == "clamp", name, x, "unset: a bound of operator clamp")
            check(isinstance(x, int | float) and abs(x) < float("inf"), name, x, "a finite number")
            check(self.strength == 1, "strength", self.strength, "1 beside low and high, which say it all")
        check(len(given) < 2 or given["low"] <= given["high"], "low", self.low, f"at most high, {self.high}")

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.gate.layer,) if self.gate else ()

    def weights(self, hidden: dict[int, Tensor]) -> Tensor:
        assert self.gate is not None
        fires = self.gate.probe(hidden[self.gate.layer]).float()
        return fires.unsqueeze(1).expand(-1, len(self.directions))

    def terms(self, model: ModelInfo) -> list[Term]:
        check_model(self.model, model, "steering vector")
        for layer, direction in self.directions.items():
            check(
                0 <= layer < model.num_layers,
                "layer",
                layer,
                f"0 to {model.num_layers - 1}, the blocks of {model.name}",
            )
            check(
                len(direction) == model.width,
                f"direction of layer {layer}",
                f"width {len(direction)}",
                f"width {model.width}, that of {model.name}",
            )
        if self.strength == 0 and self.operator in ("add", "ablate", "rotate"):
            return []
        return [Term(layer, self._operator(layer, model)) for layer in sorted(self.directions)]

    def _operator(self, layer: int, model: ModelInfo) -> Operator:
        direction = self.directions[layer].float()
        unit = direction / direction.norm().clamp_min(1e-12)
        scale = (
            float(model.residual_norms()[layer]) if self.unit == "norm" and self.operator in ("add", "clamp") else 1.0
        )
        made: Operator
        if self.operator == "add":
            made = Add(self.strength * scale * self._share * direction)
        elif self.operator == "ablate":
            made = Ablate(unit, self.strength)
        elif self.operator == "clamp":
            made = Clamp(unit, *self._interval(scale))
        else:
            made = Rotate(unit, self.references[layer].float(), self.strength)
        made = KeepNorm(made) if self.keep_norm and self.operator != "rotate" else made
        return Where(self.token_probes[layer], made) if layer in self.token_probes else made

    def _interval(self, scale: float) -> tuple[float, float]:
        if self.low is None and self.high is None:
            return self.strength * scale, self.strength * scale
        low = -math.inf if self.low is None else self.low * scale
        return low, math.inf if self.high is None else self.high * scale

    @property
    def _share(self) -> float:
        return 1 / len(self.directions) if self.unit == "norm" else 1.0

    # ---- composition

    def at(self, layers: Sequence[int]) -> SteeringVector:
        """The same vector on these layers only."""
        missing = [layer for layer in layers if layer not in self.directions]
        check(not missing, "layers", missing, f"layers of the vector: {ranges(self.directions)}")
        return replace(self, directions={layer: self.directions[layer] for layer in layers})

    def __repr__(self) -> str:
        name, depth = self.model.get("name"), self.model.get("num_layers")
        where = f"layers {ranges(self.directions)}" + (f" of {depth}" if depth else "")
        facts = [where, f"strength {self.strength:.4g}", f"unit {self.unit}", f"scope {self.scope}"]
        if self.operator != "add":
            facts.append(str(self.operator))
        if self.gate is not None:
            facts.append(f"gated at layer {self.gate.layer}")
        return f"SteeringVector({', '.join([*facts, *([Path(str(name)).name] if name else [])])})"

    def __mul__(self, factor: float) -> SteeringVector:
        return replace(self, strength=self.strength * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> SteeringVector:
        return self * (1 / divisor)

    def __neg__(self) -> SteeringVector:
        return self * -1.0

    def __add__(self, other: SteeringVector) -> SteeringVector:
        """One vector that does what both do; both must add, in the same unit and scope."""
        if not isinstance(other, SteeringVector):
            return NotImplemented
        same = (self.unit, self.scope, self.keep_norm) == (other.unit, other.scope, other.keep_norm)
        plain = all(v.operator == "add" and v.gate is None and not v.token_probes for v in (self, other))
        check(
            same and plain, "vectors", "different operators, units or scopes", "two added vectors of one unit and scope"
        )
        layers = sorted(set(self.directions) | set(other.directions))
        some = next(iter(self.directions.values()))
        nothing = torch.zeros_like(some)
        # Each vector keeps its own dose on its own layers, whatever the number of layers of the sum.
        share = 1 / len(layers) if self.unit == "norm" else 1.0
        mine, theirs = (v.strength * v._share / share for v in (self, other))
        total = {
            layer: mine * self.directions.get(layer, nothing) + theirs * other.directions.get(layer, nothing)
            for layer in layers
        }
        return replace(self, directions=total, strength=1.0)

    def __radd__(self, other: Any) -> SteeringVector:
        """For `sum`, which begins with 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self + (-other)

    def without(self, other: SteeringVector) -> SteeringVector:
        """The part of each direction that is orthogonal to the other vector's direction at that layer."""
        changed = dict(self.directions)
        for layer in set(self.directions) & set(other.directions):
            unit = other.directions[layer] / other.directions[layer].norm().clamp_min(1e-12)
            changed[layer] = self.directions[layer] - (self.directions[layer] @ unit) * unit
        return replace(self, directions=changed)

    def normalised(self) -> SteeringVector:
        """Unit directions: the form in which strength in units of the residual norm means what it says."""
        return replace(self, directions={k: v / v.norm().clamp_min(1e-12) for k, v in self.directions.items()})

    def random(self, seed: int) -> SteeringVector:
        """The control: random directions of the same norms at the same layers."""
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for layer, direction in sorted(self.directions.items()):
            noise = torch.randn(direction.shape, generator=generator)
            made[layer] = noise / noise.norm() * direction.norm()
        return replace(self, directions=made)
