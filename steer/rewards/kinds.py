"""Which rewards are of texts and which of images."""

from __future__ import annotations

from collections.abc import Iterator

from steer.core import Reward, check
from steer.rewards.algebra import members_of

__all__ = ["check_reward"]


_TEXT_REWARDS = frozenset({"steer.rewards.text", "steer.rewards.likelihood", "steer.adapters.rewards.text"})
_IMAGE_REWARDS = frozenset({"steer.rewards.image", "steer.adapters.rewards.images"})


def check_reward(reward: Reward, images: bool) -> None:
    """Refuse a reward of texts for images, and the other way round, as far as the reward's kind is known."""
    for part in _parts(reward):
        wrong = type(part).__module__ in (_TEXT_REWARDS if images else _IMAGE_REWARDS)
        what = ("images such as brightness or class:LABEL" if images else "texts such as sentiment") if wrong else ""
        check(not wrong, "reward", str(part), f"rewards of {what}")


def _parts(reward: Reward) -> Iterator[Reward]:
    """A reward and those that it is made of."""
    yield reward
    for member in members_of(reward):
        yield from _parts(member)
