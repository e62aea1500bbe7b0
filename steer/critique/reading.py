"""Critics from text: `REWARD>=NUMBER`, `module:function`, `model:ID`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steer.core import InputError, Reward, check
from steer.critique.critics import Critic, FunctionCritic, Panel, Threshold
from steer.critique.models import INSTRUCTION, ModelCritic
from steer.rewards.parse import named_function, parse_reward

__all__ = ["as_critic", "parse_critic"]

_ALLOWED = "REWARD>=NUMBER, such as 'keywords:lake,boat>=1'; module:function; model:ID, or model:self"


def parse_critic(text: str, instruction: str | None = None, rewards: Callable[[str], Reward] | None = None) -> Critic:
    """The critic that `text` describes. `model:self` is the model that generates; any other model is loaded when it is
    first asked.

    With `rewards`, which reads the rewards that a stranger may name, only `REWARD>=NUMBER` is allowed. Raises
    `InputError`.
    """
    check(isinstance(text, str) and bool(text.strip()), "critic", text, _ALLOWED)
    kind, colon, name = text.strip().partition(":")
    if kind == "model" and colon and rewards is None:
        check(bool(name), "critic", text, _ALLOWED)
        return ModelCritic(None if name == "self" else name, instruction or INSTRUCTION)
    check(instruction is None, "critic_instruction", instruction, "unset: the critic is no model")
    before, at_least, number = text.rpartition(">=")
    if at_least:
        return Threshold((rewards or parse_reward)(before.strip()), _number(number, text))
    check(rewards is None, "critic", text, "REWARD>=NUMBER, of the rewards that may be named here")
    check(bool(colon) and bool(name), "critic", text, _ALLOWED)
    found: Any = named_function("critic", text)
    if isinstance(found, Critic):
        return found
    check(callable(found) and not isinstance(found, Reward), "critic", text, _ALLOWED)
    return FunctionCritic(found, text.strip())


def _number(text: str, given: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError("critic", given, _ALLOWED) from None


def as_critic(x: Any) -> Critic:
    """A critic is itself, text is parsed (`REWARD>=NUMBER`, `module:function`, `model:ID`), a list is a panel, and a
    function of (prompt, output) is wrapped. Raises `InputError`.
    """
    if isinstance(x, Critic):
        return x
    if isinstance(x, str):
        return parse_critic(x)
    if isinstance(x, list | tuple):
        return Panel(tuple(as_critic(member) for member in x))
    check(not isinstance(x, Reward), "critic", x, "a reward with a threshold: threshold(reward, 0.5) or 'NAME>=0.5'")
    check(callable(x), "critic", x, "a critic, REWARD>=NUMBER, module:function, model:ID, or a function")
    return FunctionCritic(x)
