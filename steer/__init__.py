"""Steer and align open-weight models at inference time."""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steer.core import Edit, InputError, RawText, Samples, SteerError
    from steer.edits import load_edit, parse_edit
    from steer.loading import load
    from steer.methods.best_of_n import Ancestral, BestOfN
    from steer.methods.controller import Controller
    from steer.methods.dts import DTS, SearchDTS
    from steer.methods.fk import FKSteering
    from steer.methods.prompt import DirectionalStimulus, SystemPrompt
    from steer.methods.rlg import RLGuidance
    from steer.methods.svdd import SVDD
    from steer.methods.value import ValueGuidance
    from steer.methods.vector import Gate, SteeringVector
    from steer.model import generate
    from steer.rewards import as_reward, parse_reward

__all__ = [
    "Ancestral",
    "BestOfN",
    "Controller",
    "DTS",
    "DirectionalStimulus",
    "Edit",
    "FKSteering",
    "Gate",
    "InputError",
    "RLGuidance",
    "RawText",
    "SVDD",
    "Samples",
    "SearchDTS",
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
    "steer.core": ("Edit", "InputError", "RawText", "Samples", "SteerError"),
    "steer.edits": ("load_edit", "parse_edit"),
    "steer.loading": ("load",),
    "steer.methods.best_of_n": ("Ancestral", "BestOfN"),
    "steer.methods.controller": ("Controller",),
    "steer.methods.dts": ("DTS", "SearchDTS"),
    "steer.methods.fk": ("FKSteering",),
    "steer.methods.prompt": ("DirectionalStimulus", "SystemPrompt"),
    "steer.methods.rlg": ("RLGuidance",),
    "steer.methods.svdd": ("SVDD",),
    "steer.methods.value": ("ValueGuidance",),
    "steer.methods.vector": ("Gate", "SteeringVector"),
    "steer.model": ("generate",),
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
