"""Steering and alignment of open-weight models at inference time: the public names, loaded when first used."""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steer.adapters.diffusers import DiffusionModel
    from steer.adapters.diffusers.guidance import rl_guidance
    from steer.adapters.diffusers.policy.tuning import train_diffusion_policy
    from steer.adapters.openai import EndpointModel
    from steer.adapters.transformers import LanguageModel
    from steer.adapters.transformers.policy.tuning import train_policy
    from steer.chain import FunctionProcess
    from steer.core import Edit, InputError, RawText, Reward, Sampler, Samples, SteerError, UnsupportedError
    from steer.core.samples import Sample
    from steer.edits import Artifact, load_artifact, load_edit, parse_edit
    from steer.loading import load
    from steer.logs import logging_to
    from steer.measure.compare import compare
    from steer.measure.frontier import frontier
    from steer.measure.race import race
    from steer.measure.report import evaluate
    from steer.methods.best_of_n import Ancestral, BestOfN
    from steer.methods.controller import Controller
    from steer.methods.dts import DTS, SearchDTS
    from steer.methods.fk import FKSteering
    from steer.methods.gradient import GradientGuidance
    from steer.methods.prompt import DirectionalStimulus, SystemPrompt
    from steer.methods.rlg import RLGuidance
    from steer.methods.svdd import SVDD
    from steer.methods.value import ValueGuidance
    from steer.methods.vector import Gate, SteeringVector
    from steer.model import generate
    from steer.pictures.charts import draw_frontier, draw_report
    from steer.prompt_files import generate_file
    from steer.rewards import as_reward, parse_reward
    from steer.rewards.scoring import score
    from steer.train.controller import train_controller
    from steer.train.reward import train_reward
    from steer.train.value import train_value
    from steer.train.vector import train_vector

_HOMES = {
    "steer.adapters.diffusers": ("DiffusionModel",),
    "steer.adapters.diffusers.guidance": ("rl_guidance",),
    "steer.adapters.diffusers.policy.tuning": ("train_diffusion_policy",),
    "steer.adapters.openai": ("EndpointModel",),
    "steer.adapters.transformers": ("LanguageModel",),
    "steer.adapters.transformers.policy.tuning": ("train_policy",),
    "steer.chain": ("FunctionProcess",),
    "steer.core": (
        "Edit",
        "InputError",
        "RawText",
        "Reward",
        "Sampler",
        "Samples",
        "SteerError",
        "UnsupportedError",
    ),
    "steer.core.samples": ("Sample",),
    "steer.edits": ("Artifact", "load_artifact", "load_edit", "parse_edit"),
    "steer.prompt_files": ("generate_file",),
    "steer.loading": ("load",),
    "steer.logs": ("logging_to",),
    "steer.measure.compare": ("compare",),
    "steer.measure.frontier": ("frontier",),
    "steer.measure.race": ("race",),
    "steer.measure.report": ("evaluate",),
    "steer.methods.best_of_n": ("Ancestral", "BestOfN"),
    "steer.methods.controller": ("Controller",),
    "steer.methods.dts": ("DTS", "SearchDTS"),
    "steer.methods.fk": ("FKSteering",),
    "steer.methods.gradient": ("GradientGuidance",),
    "steer.methods.prompt": ("DirectionalStimulus", "SystemPrompt"),
    "steer.methods.rlg": ("RLGuidance",),
    "steer.methods.svdd": ("SVDD",),
    "steer.methods.value": ("ValueGuidance",),
    "steer.methods.vector": ("Gate", "SteeringVector"),
    "steer.model": ("generate",),
    "steer.pictures.charts": ("draw_frontier", "draw_report"),
    "steer.rewards": ("as_reward", "parse_reward"),
    "steer.rewards.scoring": ("score",),
    "steer.train.controller": ("train_controller",),
    "steer.train.reward": ("train_reward",),
    "steer.train.value": ("train_value",),
    "steer.train.vector": ("train_vector",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "DTS",
    "SVDD",
    "Ancestral",
    "Artifact",
    "BestOfN",
    "Controller",
    "DiffusionModel",
    "DirectionalStimulus",
    "Edit",
    "EndpointModel",
    "FKSteering",
    "FunctionProcess",
    "Gate",
    "GradientGuidance",
    "InputError",
    "LanguageModel",
    "RLGuidance",
    "RawText",
    "Reward",
    "Sample",
    "Sampler",
    "Samples",
    "SearchDTS",
    "SteerError",
    "SteeringVector",
    "SystemPrompt",
    "UnsupportedError",
    "ValueGuidance",
    "__version__",
    "as_reward",
    "compare",
    "draw_frontier",
    "draw_report",
    "evaluate",
    "frontier",
    "generate",
    "generate_file",
    "load",
    "load_artifact",
    "load_edit",
    "logging_to",
    "parse_edit",
    "parse_reward",
    "race",
    "rl_guidance",
    "score",
    "train_controller",
    "train_diffusion_policy",
    "train_policy",
    "train_reward",
    "train_value",
    "train_vector",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'steer' has no attribute {name!r}")
    globals()[name] = value
    return value


def _version() -> str:
    try:
        return metadata.version("steer-engine")
    except metadata.PackageNotFoundError:
        return "0"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
