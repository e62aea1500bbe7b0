"""Steer and align open-weight models at inference time."""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steer.core import Edit, InputError, RawText, Samples, SteerError
    from steer.engine import generate, load
    from steer.methods.best_of_n import Ancestral, BestOfN
    from steer.methods.controller import Controller
    from steer.methods.prompt import DirectionalStimulus, SystemPrompt
    from steer.methods.value import ValueGuidance
    from steer.methods.vector import Gate, SteeringVector
    from steer.mount import load_edit, parse_edit
    from steer.rewards import as_reward, parse_reward

__all__ = [
    "Ancestral",
    "BestOfN",
    "Controller",
    "DirectionalStimulus",
    "Edit",
    "Gate",
    "InputError",
    "RawText",
    "Samples",
    "SteerError",
    "SteeringVector",
    "SystemPrompt",
    "ValueGuidance",
    "__version__",
    "as_reward",
    "generate",
    "load",
    "load_edit",
    "parse_edit",
    "parse_reward",
]

_HOMES = {
    "steer.adapters.transformers": ("RawText",),
    "steer.core": ("Edit", "InputError", "RawText", "Samples", "SteerError"),
    "steer.engine": ("generate", "load"),
    "steer.methods.best_of_n": ("Ancestral", "BestOfN"),
    "steer.methods.controller": ("Controller",),
    "steer.methods.prompt": ("DirectionalStimulus", "SystemPrompt"),
    "steer.methods.value": ("ValueGuidance",),
    "steer.methods.vector": ("Gate", "SteeringVector"),
    "steer.mount": ("load_edit", "parse_edit"),
    "steer.rewards": ("as_reward", "parse_reward"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return metadata.version("steer-engine")
        except metadata.PackageNotFoundError:
            return "0"
    if name not in _HOME:
        raise AttributeError(f"module 'steer' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
