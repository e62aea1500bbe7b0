"""Scores of outputs that are there already, whoever made them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steer.core import InputError, Reward, Samples, check
from steer.rewards.parse import as_reward

__all__ = ["score"]


def score(
    outputs: Samples | Sequence[str] | Tensor,
    reward: Reward | str | Callable[..., Any],
    *,
    prompts: Sequence[Any] | None = None,
    model: Any = None,
) -> Tensor:
    """Scores `[N]` in float64 of `N` outputs.

    Args:
        outputs: texts, images `[N, C, H, W]` in [0, 1], or `Samples`.
        reward: a `Reward`, an expression such as "sentiment - 0.3*profanity", or a function, as for `generate`.
        prompts: what each output answers, for rewards that look at it; those of `Samples` are their own.
        model: for rewards that score under a model, such as the likelihood.

    Raises `InputError`, and `RewardError` for a reward that fails.
    """
    scored = as_reward(reward)
    if scored is None:
        raise InputError("reward", reward, "a reward, an expression or a function")
    return (scored if model is None else scored.bind(model))(_samples(outputs, prompts))


def _samples(outputs: Any, prompts: Sequence[Any] | None) -> Samples:
    if isinstance(outputs, Samples):
        check(prompts is None, "prompts", prompts, "unset: samples have their own")
        return outputs
    check(not isinstance(outputs, str), "outputs", outputs, "a list of texts, images, or samples")
    listed = outputs if isinstance(outputs, Tensor) else list(outputs)
    asked = [""] * len(listed) if prompts is None else list(prompts)
    check(len(asked) == len(listed), "prompts", f"{len(asked)} prompts", f"one for each of {len(listed)} outputs")
    return Samples(asked, listed, torch.arange(len(listed)), torch.zeros(len(listed), dtype=torch.float64))
