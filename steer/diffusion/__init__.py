"""Diffusion and flow models as a process."""

from __future__ import annotations

from steer.diffusion.process import DiffusionContext, DiffusionProcess
from steer.diffusion.schedule import Schedule
from steer.diffusion.state import DiffusionState

__all__ = ["DiffusionContext", "DiffusionProcess", "DiffusionState", "Schedule"]
