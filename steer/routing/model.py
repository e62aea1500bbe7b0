"""`RoutedModel`: several models behind one, each prompt to the one that is worth its price."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steer.core import InputError, Process, Prompt, Samples, UnsupportedError, check
from steer.core.edit import Prompts
from steer.core.names import meant
from steer.model import Model, as_prompts
from steer.rewards import as_reward

__all__ = ["Choice", "Pool", "RoutedModel", "check_plain", "merged"]

Scores = Callable[[Sequence[Prompt]], Any]
"""Expected scores `[B, M]` of the models, in the order of the pool, for `B` prompts."""


@dataclass(frozen=True)
class Choice:
    """Which model answered a prompt, and what its texts cost."""

    prompt: int
    model: str
    price: float


class Pool(Model):
    """Models by name, each with a price. A price is of a prompt's answer, or, with `per="tokens"`, of a thousand
    generated tokens.
    """

    def __init__(
        self, models: Mapping[str, Any], price: Mapping[str, float] | None = None, per: str = "answer"
    ) -> None:
        check(isinstance(models, Mapping) and len(models) >= 1, "models", models, "models by name")
        for name, model in models.items():
            check(hasattr(model, "generate"), f"models.{name}", type(model).__name__, "a model, as steer.load gives it")
            check(not getattr(model, "images", False), f"models.{name}", type(model).__name__, "a language model")
        self.models, self.names = dict(models), list(models)
        given = dict(price or {})
        for name, cost in given.items():
            check(name in self.models, "price", name, f"{', '.join(self.models)}{meant(name, self.models)}")
            number = isinstance(cost, int | float) and not isinstance(cost, bool) and 0 <= cost < math.inf
            check(number, f"price.{name}", cost, "a number of 0 or more")
        check(per in ("answer", "tokens"), "per", per, "answer, tokens")
        self.prices, self.per = [float(given.get(name, 0.0)) for name in self.names], per
        self.name = "+".join(self.names)

    def process(self, **settings: Any) -> Process:
        raise UnsupportedError(f"{type(self).__name__} is several models: generate with it; one process has one model")

    @property
    def settings(self) -> frozenset[str]:
        return frozenset.intersection(*(model.settings for model in self.models.values()))

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise `InputError` for prompts that one of the models cannot read, whichever is asked in the end."""
        for model in self.models.values():
            encode: Any = getattr(model, "encode", None)
            for prompt in prompts if encode is not None else ():
                encode(prompt)

    def ask(self, which: int, prompts: list[Prompt], settings: dict[str, Any]) -> tuple[Samples, list[float]]:
        """The answers of one model, and the price of each prompt's."""
        drawn: Samples = self.models[self.names[which]].generate(prompts, **settings)
        return drawn, [self._price(which, drawn, b) for b in range(len(prompts))]

    def _price(self, which: int, drawn: Samples, prompt: int) -> float:
        rows = [i for i, b in enumerate(drawn.group.tolist()) if b == prompt]
        if self.per == "answer":
            return self.prices[which] * len(rows)
        check(drawn.tokens is not None, "per", "tokens", "answer: this engine does not count tokens")
        assert drawn.tokens is not None
        return self.prices[which] * sum(len(drawn.tokens[i]) for i in rows) / 1000


class RoutedModel(Pool):
    """Each prompt goes to `argmax_m q_m(prompt) - cost_weight * price_m`, the first of equals.

    `samples.cost.price` is the sum, and `samples.trace` has a `Choice` for each prompt.

    Args:
        models: by name; any engines.
        price: by name; 0 unless given.
        router: expected scores `[B, M]` of the models in their order for B prompts: a `Router`, a function, or None,
            which takes the dearest model, as the one that should be best.
        cost_weight: lambda, what a unit of price is worth in score.
    """

    def __init__(
        self,
        models: Mapping[str, Any],
        price: Mapping[str, float] | None = None,
        router: Scores | None = None,
        cost_weight: float = 0.0,
        per: str = "answer",
    ) -> None:
        super().__init__(models, price, per)
        number = isinstance(cost_weight, int | float) and 0 <= cost_weight < math.inf
        check(number, "cost_weight", cost_weight, "a number of 0 or more")
        check(router is None or callable(router), "router", router, "a function of prompts that gives scores [B, M]")
        self.cost_weight = float(cost_weight)
        known = getattr(router, "names", None)
        fits = known is None or list(known) == self.names
        check(fits, "router", known, f"one that was trained for {', '.join(self.names)}, in this order")
        self.router: Scores = router or (lambda prompts: torch.tensor([self.prices] * len(prompts)))

    def worth(self, prompts: Sequence[Prompt]) -> Tensor:
        """Score less price `[B, M]` of every model for every prompt. Raises `InputError` for a router that gives
        something else than numbers of that shape.
        """
        try:
            scores = torch.as_tensor(self.router(prompts)).double()
        except (TypeError, ValueError) as error:
            raise InputError("router", f"scores that are no tensor ({error})", "numbers [B, M]") from error
        shape = (len(prompts), len(self.names))
        check(tuple(scores.shape) == shape, "router", f"scores of shape {tuple(scores.shape)}", f"{shape}")
        check(not bool(scores.isnan().any()), "router", "NaN", "numbers")
        return scores - self.cost_weight * torch.tensor(self.prices, dtype=torch.float64)

    def generate(self, prompts: Prompts = "", **settings: Any) -> Samples:
        """As every model's `generate`; settings go to each model that is asked."""
        several = as_prompts(prompts)
        check_plain(settings)
        reward = as_reward(settings.pop("reward", None))
        chosen = self.worth(several).argmax(1).tolist()
        parts, trace = [], []
        for which in sorted(set(chosen)):
            mine = [b for b, m in enumerate(chosen) if m == which]
            drawn, prices = self.ask(which, [several[b] for b in mine], {**settings, "reward": reward})
            parts.append((mine, drawn))
            trace += [Choice(b, self.names[which], price) for b, price in zip(mine, prices, strict=True)]
        return merged(several, parts, sorted(trace, key=lambda c: c.prompt))


def check_plain(settings: Mapping[str, Any]) -> None:
    """Refuse settings of `generate` that several models cannot share. Raises `InputError`."""
    stream = settings.get("stream", False)
    check(stream is False, "stream", stream, "unset: a routed answer is given when it is whole")
    edits = settings.get("edits", ())
    shared = not isinstance(edits, list | tuple) or not any(isinstance(e, list | tuple) or e is None for e in edits)
    check(shared, "edits", edits, "edits for all prompts: a router divides them among models")


def merged(prompts: list[Prompt], parts: Sequence[tuple[list[int], Samples]], trace: list[Choice]) -> Samples:
    """Answers of several models as one, by prompt; each part has the numbers of its prompts."""
    moved = [
        replace(s, prompts=prompts, group=torch.tensor([mine[b] for b in s.group.tolist()]), trace=None, log_z=None)
        for mine, s in parts
    ]
    whole = Samples.stack(moved)
    order = whole.group.argsort(stable=True)
    price = sum(choice.price for choice in trace)
    return replace(whole.select(order), trace=trace, cost=replace(whole.cost, price=whole.cost.price + price))
