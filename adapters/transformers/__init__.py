"""Language models through transformers."""

from __future__ import annotations

from steer.adapters.transformers.model import LanguageModel, load

__all__ = ["LanguageModel", "load"]
