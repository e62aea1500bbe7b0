"""The five things that everything in `steer` is made of.

A `Process` generates in steps, an `Edit` changes one quantity inside it, a `Sampler` owns the loop, a `Reward`
scores what came out, and `Samples` is what a person gets. One goal stands behind all of them: draw from

    p*(x)  proportional to  p(x) exp(r(x) / beta)

where `p` is the process without edits and `beta` is the KL coefficient.

Axis letters used in this package: `B` prompts, `N` rows (particles, candidates), `L` layers, `T` tokens, `D` width,
`V` vocabulary, `K` candidate tokens.
"""

from __future__ import annotations

from steer.core.edit import Edit, HiddenEdit, ModelInfo, Operator, Prompt, PromptEdit, RawText, Site, Term
from steer.core.errors import InputError, RewardError, SteerError, UnsupportedError, check, check_whole
from steer.core.process import Ability, Context, Mounted, Process, State, TransitionEdit
from steer.core.sampler import Run, Sampler
from steer.core.samples import Cost, Reward, Samples
from steer.core.scope import Scope

__all__ = [
    "Ability",
    "Context",
    "Cost",
    "Edit",
    "HiddenEdit",
    "InputError",
    "ModelInfo",
    "Mounted",
    "Operator",
    "Process",
    "Prompt",
    "PromptEdit",
    "RawText",
    "Reward",
    "RewardError",
    "Run",
    "Sampler",
    "Samples",
    "Scope",
    "Site",
    "State",
    "SteerError",
    "Term",
    "TransitionEdit",
    "UnsupportedError",
    "check",
    "check_whole",
]
