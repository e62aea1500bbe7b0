"""Critics that look before an answer counts, and what a loop of critique and revision does exactly."""

from __future__ import annotations

from steer.critique.critics import (
    Critic,
    FunctionCritic,
    Panel,
    Threshold,
    Verdicts,
    threshold,
)
from steer.critique.laws import (
    critique_accepted,
    critique_accuracy,
    critique_drafts,
    critique_limit,
    gate_law,
    majority,
    redraw_law,
    select_accuracy,
)
from steer.critique.models import ModelCritic, Pairwise, StepCritic, step_accuracy
from steer.critique.reading import as_critic, parse_critic
from steer.critique.rounds import Round, friction_law, rounds_of

__all__ = [
    "Critic",
    "FunctionCritic",
    "ModelCritic",
    "Pairwise",
    "Panel",
    "Round",
    "StepCritic",
    "Threshold",
    "Verdicts",
    "as_critic",
    "critique_accepted",
    "critique_accuracy",
    "critique_drafts",
    "critique_limit",
    "friction_law",
    "gate_law",
    "majority",
    "parse_critic",
    "redraw_law",
    "rounds_of",
    "select_accuracy",
    "step_accuracy",
    "threshold",
]
