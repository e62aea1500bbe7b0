"""Which rewards a request may name: shipped ones that load nothing, and those that the server's owner allowed."""

from __future__ import annotations

from collections.abc import Sequence

from steer.core import InputError, Reward, check
from steer.rewards import parse_reward, register, shipped
from steer.rewards.kinds import check_reward

__all__ = ["Rewards"]


class Rewards:
    """Reads the `reward` of requests.

    Args:
        allowed: further rewards, as `NAME=REWARD` (from then on part of expressions) or as a whole text that a request
            must repeat letter by letter.
    """

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        self._whole: dict[str, Reward] = {}
        for text in allowed:
            name, equals, given = text.partition("=")
            if equals and name.isidentifier():
                reward = parse_reward(given)
                check(name not in shipped(), "allow_reward", text, "a name that is not taken")
                register(name, lambda reward=reward: reward, name)
            else:
                self._whole[text] = parse_reward(text)

    def parse(self, text: str) -> Reward:
        """The reward that a request asks for. Raises `InputError` that names `steer.reward`."""
        if text in self._whole:
            return self._whole[text]
        try:
            reward = parse_reward(text, trusted=False)
            check_reward(reward, images=False)
        except InputError as error:
            raise InputError("steer.reward", error.given, error.allowed) from error
        except (OSError, ValueError) as error:  # what is too long to be the name of anything
            raise InputError("steer.reward", text, "an expression of named rewards") from error
        return reward

    def usages(self) -> dict[str, str]:
        """Names that requests may use, and how each is written."""
        usages = {}
        for name, usage in shipped().items():
            example = usage.split("[")[0].replace("WORD,WORD", "word").replace("LABEL,LABEL", "label")
            try:
                check_reward(parse_reward(example, trusted=False), images=False)
            except InputError:
                continue
            usages[name] = usage
        return {**usages, **{text: text for text in self._whole}}
