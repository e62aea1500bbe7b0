"""Diffusion and flow models through diffusers."""

from __future__ import annotations

from steer.adapters.diffusers.loading import load
from steer.adapters.diffusers.model import DiffusionModel

__all__ = ["DiffusionModel", "load"]
