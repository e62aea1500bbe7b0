"""Masked diffusion of text as a process."""

from __future__ import annotations

from steer.masked.draws import MarginalDraws
from steer.masked.process import MaskedContext, MaskedDenoiser, MaskedProcess
from steer.masked.state import MaskedState

__all__ = ["MarginalDraws", "MaskedContext", "MaskedDenoiser", "MaskedProcess", "MaskedState"]
