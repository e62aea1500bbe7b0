"""Recipe of the tab in which texts are searched for: a prompt, a reward, a sampler and its budget."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from steer.demo.recipes import LIMIT_TEXT, Job, Recipe

__all__ = ["BLOCK", "MAX_CANDIDATES", "SearchRecipe"]

BLOCK = 8
"""Tokens in one step of a search."""
MAX_CANDIDATES = 64


class SearchRecipe(Recipe):
    """What was asked there."""

    tab: ClassVar[str] = "search"

    model: Annotated[str, Field(max_length=400)]
    prompt: Annotated[str, Field(min_length=1, max_length=LIMIT_TEXT)]
    reward: Annotated[str, Field(min_length=1, max_length=2000)] = "sentiment"
    sampler: Literal["best-of-n", "fk", "dts-star"] = "fk"
    budget: Annotated[int, Field(ge=2, le=16_384)] = 320
    """Tokens to be drawn at most, of all candidates."""
    beta: Annotated[float, Field(gt=0, le=100)] = 0.1
    """Of samplers that weigh: how much reward one nat of drift has to bring."""
    max_tokens: Annotated[int, Field(ge=1, le=256)] = 32
    """Of one text."""
    temperature: Annotated[float, Field(gt=0, le=5)] = 0.7
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @property
    def candidates(self) -> int:
        """Texts that the budget pays for: candidates, particles, or rollouts of a tree."""
        return max(2, min(MAX_CANDIDATES, self.budget // self.max_tokens))

    def settings(self) -> dict[str, Any]:
        """Of `generate`, beside the prompt, the sampler and what it takes of its own."""
        drawing = {"max_new_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed}
        return {**drawing, "block": BLOCK, "reward": self.reward, "beta": self.beta, "sampler": self.sampler}

    def own(self) -> dict[str, Any]:
        """Settings of the sampler, `n` among them."""
        if self.sampler == "fk":
            return {"n": 1, "num_particles": self.candidates, "select": "best"}
        if self.sampler == "dts-star":
            return {"n": 1, "rollouts": self.candidates, "batch": min(4, self.candidates)}
        return {"n": self.candidates}

    def jobs(self) -> list[Job]:
        own = self.own()
        given = {"model": self.model, "prompt": self.prompt, **self.settings(), "n": own.pop("n")}
        given |= {"set": [f"{key}={value}" for key, value in own.items()]} if own else {}
        return [Job("search", "generate", given)]

    def python(self) -> str:
        given = "".join(f",\n    {key}={value!r}" for key, value in {**self.settings(), **self.own()}.items())
        prompt = f"[{{'role': 'user', 'content': {self.prompt!r}}}]"
        return (
            f"import steer\n\nmodel = steer.load({self.model!r})\n"
            f"found = model.generate(\n    {prompt}{given},\n)\nprint(found.texts[0])\n"
        )

    def request(self) -> dict[str, Any] | None:
        settings = {key: value for key, value in self.own().items() if key in ("select", "batch")}
        asked: dict[str, Any] = {"sampler": self.sampler, "candidates": self.candidates, "settings": settings}
        asked |= {"reward": self.reward, "beta": self.beta, "block": BLOCK}
        drawing = {"max_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed}
        messages = [{"role": "user", "content": self.prompt}]
        return {"model": self.model, "messages": messages, **drawing, "steer": asked}
