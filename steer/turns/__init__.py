"""Agents: environments, episodes as a process whose step is a turn, and exact values of small problems."""

from __future__ import annotations

from steer.turns.actors import AdvantageCritic, LegalCritic, UniformActor
from steer.turns.candidates import Candidates
from steer.turns.environment import Environment, EnvironmentFailure, Outcome
from steer.turns.episode import Episode, Transcript, Turn
from steer.turns.process import TurnProcess
from steer.turns.registry import ENVIRONMENTS, make
from steer.turns.tools import Tool, Tools, tool
from steer.turns.values import InformationGain, TurnValue

__all__ = [
    "ENVIRONMENTS",
    "AdvantageCritic",
    "Candidates",
    "Environment",
    "EnvironmentFailure",
    "Episode",
    "InformationGain",
    "LegalCritic",
    "Outcome",
    "Tool",
    "Tools",
    "Transcript",
    "Turn",
    "TurnProcess",
    "TurnValue",
    "UniformActor",
    "make",
    "tool",
]
