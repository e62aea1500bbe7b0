"""Diffusion and flow models through diffusers: a network with its scheduler, or any stock pipeline."""

from __future__ import annotations

from steer.core import SteerError

try:
    from steer.adapters.diffusers.loading import load
    from steer.adapters.diffusers.model import Classifier, DiffusionModel, Source
    from steer.adapters.diffusers.network import Labels, NetworkDenoiser, NetworkSource
    from steer.adapters.diffusers.tuned import tuned_network
except ImportError as error:
    if (error.name or "").split(".")[0] != "diffusers":
        raise
    raise SteerError("diffusion models need diffusers: pip install diffusers") from error

__all__ = [
    "Classifier",
    "DiffusionModel",
    "Labels",
    "NetworkDenoiser",
    "NetworkSource",
    "Source",
    "load",
    "tuned_network",
]
