"""Language models behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from steer.adapters.openai.model import EndpointModel, load

__all__ = ["EndpointModel", "load"]
