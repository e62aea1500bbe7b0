"""Rewards: what generation is steered by. They add, subtract, scale, clip, cache, ensemble and constrain.

`parse_reward("0.7*sentiment - 0.3*length:target=20")` reads one from text; in Python the shipped ones compose directly.
"""

from .algebra import (
    Cached,
    CallableReward,
    Clipped,
    Combination,
    Composable,
    Constant,
    Standardised,
    Wrapped,
    lift,
)
from .ensemble import Constrained, Ensemble, solve_multiplier
from .likelihood import Fluency, Perplexity, Scorer
from .parse import as_reward, parse_reward, register, shipped
from .text import (
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
    "Cached",
    "CallableReward",
    "Clipped",
    "Combination",
    "Composable",
    "Constant",
    "Constrained",
    "Ensemble",
    "Fluency",
    "Keywords",
    "Length",
    "Perplexity",
    "Profanity",
    "Readability",
    "Refusal",
    "Rouge",
    "Scorer",
    "Sentiment",
    "Standardised",
    "TextReward",
    "Wrapped",
    "as_reward",
    "distinct_n",
    "diversity",
    "fluency",
    "length",
    "lift",
    "parse_reward",
    "perplexity",
    "profanity",
    "readability",
    "register",
    "sentiment",
    "shipped",
    "solve_multiplier",
]

sentiment, readability, length, profanity = Sentiment(), Readability(), Length(), Profanity()
fluency, perplexity = Fluency(), Perplexity()
