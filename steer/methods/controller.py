"""The weighted controller of "Guiding Giants" (Hegazy et al. 2025), with its layer weights trained for real.

A prompt pass reads the model's own states and computes one scale s and a weight w_l for every layer; decoding adds

    h_l <- h_l + s * w_l * alpha * norm_l * d_l

with both fixed. Letters: `N` rows, `L` layers, `D` width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steer.core import HiddenEdit, ModelInfo, Scope, Term, check
from steer.methods.operators import Add
from steer.methods.vector import check_model

__all__ = ["Controller", "ControllerNetwork"]


class ControllerNetwork(nn.Module):
    """Prompt states `[N, len(reads) * D]` to the scale's logit `[N]` and the layer weights `[N, L]` in (0, 1).

    Inputs are standardised by buffers that are fitted once. The scale and the weights have a hidden layer each, so that
    telling prompts apart does not fight with choosing layers.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, inputs: int, num_layers: int, hidden: int = 128) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        self.scale_inner = nn.Linear(inputs, hidden)
        self.scale_outer = nn.Linear(hidden, 1)
        self.weight_inner = nn.Linear(inputs, hidden)
        self.weight_outer = nn.Linear(hidden, num_layers)
        nn.init.zeros_(self.weight_outer.weight)
        nn.init.zeros_(self.weight_outer.bias)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        x = (states.float() - self.mean) / self.std
        scale = self.scale_outer(torch.relu(self.scale_inner(x))).squeeze(-1)
        weights = torch.sigmoid(self.weight_outer(torch.relu(self.weight_inner(x))))
        return scale, weights


@dataclass(frozen=True, eq=False)
class Controller(HiddenEdit):
    """A trained controller as an edit.

    Attributes:
        network: computes scale and weights from the last prompt position at `inputs`.
        inputs: layers that are read.
        directions: `[L, D]`, unit vectors, one for each block.
        strength: alpha, in units of the layer's residual norm (`unit="norm"`) or of the direction ("raw").
        threshold: a scale below it becomes 0, so that prompts not meant to be steered keep every bit.
        scope: default "reply", every position that chooses a generated token.
    """

    network: ControllerNetwork
    inputs: tuple[int, ...]
    directions: Tensor
    strength: float = 1.0
    unit: str = "norm"
    threshold: float = 0.5
    scope: Scope = field(default_factory=lambda: Scope.parse("reply"))
    model: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(0 <= self.threshold < 1, "threshold", self.threshold, "0 <= threshold < 1")
        check(abs(self.strength) < float("inf"), "strength", self.strength, "a finite number")
        check(self.unit in ("norm", "raw"), "unit", self.unit, "norm, raw")
        object.__setattr__(self, "scope", Scope.parse(self.scope))

    @property
    def reads(self) -> tuple[int, ...]:
        return self.inputs

    def scale(self, hidden: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Scale s `[N]` and layer weights `[N, L]`, both in (0, 1), from `{layer: [N, D]}`."""
        with torch.no_grad():
            states = torch.cat([hidden[layer].float() for layer in self.inputs], -1)
            logit, weights = self.network(states.to(self.network.mean.device))
        return torch.sigmoid(logit), weights

    def weights(self, hidden: dict[int, Tensor]) -> Tensor:
        scale, weights = self.scale(hidden)
        scale = torch.where(scale < self.threshold, 0.0, scale)
        return scale.unsqueeze(1) * weights

    def terms(self, model: ModelInfo) -> list[Term]:
        check_model(self.model, model, "controller")
        shape = tuple(self.directions.shape)
        check(
            shape == (model.num_layers, model.width),
            "controller",
            f"directions of shape {shape}",
            f"({model.num_layers}, {model.width}), that of {model.name}",
        )
        norms = model.residual_norms() if self.unit == "norm" else torch.ones(model.num_layers)
        return [
            Term(layer, Add(self.strength * float(norms[layer]) * self.directions[layer].float()))
            for layer in range(model.num_layers)
        ]
