"""Rewards from Hugging Face models."""

from __future__ import annotations

from steer.adapters.rewards.images import AestheticReward, ClipReward, ImageClassifierReward, PickScore
from steer.adapters.rewards.text import ModelReward

__all__ = ["AestheticReward", "ClipReward", "ImageClassifierReward", "ModelReward", "PickScore"]
