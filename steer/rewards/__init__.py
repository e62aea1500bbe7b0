"""Rewards: what generation is steered by. They add, subtract, scale, clip, cache, ensemble and constrain.

`parse_reward("0.7*sentiment - 0.3*length:target=20")` reads one from text; in Python the shipped ones compose directly.
"""

from __future__ import annotations

from steer.rewards.algebra import (
    Cached,
    CallableReward,
    Clipped,
    Combination,
    Composable,
    Constant,
    Standardised,
    Wrapped,
    lift,
    scores_of,
)
from steer.rewards.constraints import Constraints, ProxyPoint, proxy_points, solve_multipliers
from steer.rewards.ensemble import Constrained, Ensemble, solve_multiplier
from steer.rewards.hindsight import Hindsight
from steer.rewards.image import (
    Brightness,
    Classifier,
    Compressibility,
    Contrast,
    ImageClass,
    Incompressibility,
    Sharpness,
    Symmetry,
    images_of,
)
from steer.rewards.likelihood import Fluency, Perplexity, Scorer
from steer.rewards.parse import as_reward, parse_reward, register, shipped
from steer.rewards.text import (
    Keywords,
    Length,
    Profanity,
    Readability,
    Refusal,
    Rouge,
    Sentiment,
    TextReward,
    distinct_n,
    diversity,
)

__all__ = [
    "Brightness",
    "Cached",
    "CallableReward",
    "Classifier",
    "Clipped",
    "Combination",
    "Composable",
    "Compressibility",
    "Constant",
    "Constrained",
    "Constraints",
    "Contrast",
    "Ensemble",
    "Fluency",
    "Hindsight",
    "ImageClass",
    "Incompressibility",
    "Keywords",
    "Length",
    "Perplexity",
    "Profanity",
    "ProxyPoint",
    "Readability",
    "Refusal",
    "Rouge",
    "Scorer",
    "Sentiment",
    "Sharpness",
    "Standardised",
    "Symmetry",
    "TextReward",
    "Wrapped",
    "as_reward",
    "brightness",
    "compressibility",
    "contrast",
    "distinct_n",
    "diversity",
    "fluency",
    "images_of",
    "incompressibility",
    "length",
    "lift",
    "parse_reward",
    "perplexity",
    "profanity",
    "proxy_points",
    "readability",
    "register",
    "scores_of",
    "sentiment",
    "sharpness",
    "shipped",
    "solve_multiplier",
    "solve_multipliers",
    "symmetry",
]


sentiment, readability, length, profanity = Sentiment(), Readability(), Length(), Profanity()
fluency, perplexity = Fluency(), Perplexity()
brightness, contrast, symmetry, sharpness = Brightness(), Contrast(), Symmetry(), Sharpness()
compressibility, incompressibility = Compressibility(), Incompressibility()
