"""Recipe of the tab in which texts are searched for: a prompt, a reward, a sampler and its candidates."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from steer.demo.recipes import LIMIT_TEXT, Job, Recipe

__all__ = ["SearchRecipe"]


class SearchRecipe(Recipe):
    """What was asked there."""

    tab: ClassVar[str] = "search"

    model: Annotated[str, Field(max_length=400)]
    prompt: Annotated[str, Field(min_length=1, max_length=LIMIT_TEXT)]
    reward: Annotated[str, Field(min_length=1, max_length=2000)] = "sentiment"
    sampler: Literal["best-of-n", "fk"] = "fk"
    candidates: Annotated[int, Field(ge=2, le=32)] = 8
    beta: Annotated[float, Field(gt=0, le=100)] = 0.1
    """Of FK: how much reward one nat of drift has to bring."""
    max_tokens: Annotated[int, Field(ge=1, le=256)] = 40
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    def settings(self) -> dict[str, Any]:
        """Of `generate`, beside the prompt, the sampler and what it takes of its own."""
        return {"max_new_tokens": self.max_tokens, "seed": self.seed, "reward": self.reward, "sampler": self.sampler}

    def own(self) -> dict[str, Any]:
        """Settings of the sampler."""
        if self.sampler == "fk":
            return {"num_particles": self.candidates, "beta": self.beta}
        return {"n": self.candidates}

    def jobs(self) -> list[Job]:
        own = self.own()
        given = {"model": self.model, "prompt": self.prompt, **self.settings()}
        given |= {key: own.pop(key) for key in ("n", "beta") if key in own}
        given |= {"set": [f"{key}={value}" for key, value in own.items()]} if own else {}
        return [Job("search", "generate", given)]

    def python(self) -> str:
        given = "".join(f", {key}={value!r}" for key, value in {**self.settings(), **self.own()}.items())
        prompt = f"[{{'role': 'user', 'content': {self.prompt!r}}}]"
        return (
            f"import steer\n\nmodel = steer.load({self.model!r})\n"
            f"print(model.generate({prompt}{given}).best.texts[0])\n"
        )
