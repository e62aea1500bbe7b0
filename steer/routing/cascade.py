"""A cascade: the small model first, the large one where a critic rejects its answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from steer.core import Samples, check
from steer.core.edit import Prompts
from steer.critique.reading import as_critic
from steer.model import as_prompts
from steer.rewards import as_reward
from steer.routing.model import Choice, Pool, check_plain, merged

__all__ = ["Cascade"]


class Cascade(Pool):
    """`small` answers every prompt; where `critic` rejects its answer, `large` answers it, too, and that counts.

    With a critic that knows right from wrong it can be above the large model alone, since such prompts are tried twice.
    `samples.trace` has a `Choice` for each prompt, whose price is that of both answers where both were asked.

    Args:
        small, large: models.
        critic: a critic, or what makes one (see `steer.critique.as_critic`).
        price: of "small" and "large".
    """

    def __init__(
        self, small: Any, large: Any, critic: Any, price: dict[str, float] | None = None, per: str = "answer"
    ) -> None:
        super().__init__({"small": small, "large": large}, price, per)
        self.critic = as_critic(critic)
        check(not self.critic.compares, "critic", self.critic.name, "a critic that judges one answer at a time")

    def generate(self, prompts: Prompts = "", **settings: Any) -> Samples:
        """As every model's `generate`, one output for each prompt; settings go to both models."""
        several = as_prompts(prompts)
        check_plain(settings)
        n = settings.get("n")
        check(n in (None, 1), "n", n, "1: a cascade judges one answer for each prompt")
        reward = as_reward(settings.pop("reward", None))
        first, paid = self.ask(0, several, {**settings, "reward": reward})
        verdicts = self.critic.bind(self.models["small"])(first)
        again = first.group[~verdicts.accept].tolist()
        kept = first.select(verdicts.accept.nonzero().squeeze(1))
        parts, trace = [(list(range(len(several))), kept)], {b: Choice(b, "small", p) for b, p in enumerate(paid)}
        if again:
            second, more = self.ask(1, [several[b] for b in again], {**settings, "reward": reward})
            parts.append((again, second))
            trace |= {b: Choice(b, "large", paid[b] + p) for b, p in zip(again, more, strict=True)}
        whole = merged(several, [(mine, s) for mine, s in parts if len(s)], list(trace.values()))
        cost = first.cost + verdicts.cost
        cost = cost + second.cost if again else cost
        return replace(whole, cost=replace(cost, price=whole.cost.price))
