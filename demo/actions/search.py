"""Action of the tab in which texts are searched for.

An update is `{"say": text}` while it goes on, and at the end `{"rows", "facts"}`: the outputs and the candidates as
score and text, the best first, and what the search cost.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from steer.adapters.transformers.serving.work import Done
from steer.demo.actions.shared import Shared
from steer.demo.recipes.search import SearchRecipe
from steer.methods.samplers import make_sampler
from steer.model import as_prompts, execute, prepare

__all__ = ["run"]


async def run(recipe: SearchRecipe, shared: Shared) -> AsyncGenerator[dict[str, Any]]:
    """Search. Raises `SteerError` for what a person can mend."""
    shared.check_model(recipe.model)
    reward = shared.reward(recipe.reward)
    async for text in shared.ready():
        yield {"say": text}
    yield {"say": f"In line: {shared.waiting} before this one"}
    async with shared.line(), aclosing(shared.engine().run_work(_search(recipe, shared, reward))) as steps:
        async for event in steps:
            yield event.value if isinstance(event, Done) else {"say": f"Step {event.value}"}


def _search(recipe: SearchRecipe, shared: Shared, reward: Any) -> Callable[[Callable[[Any], None]], dict[str, Any]]:
    def work(tell: Callable[[Any], None]) -> dict[str, Any]:
        count = 0

        def step(first: int, state: Any) -> None:
            nonlocal count
            count += 1
            tell(count)

        model, prompts = shared.engine().model, as_prompts([{"role": "user", "content": recipe.prompt}])
        process = model.process(**model.fit({"max_new_tokens": recipe.max_tokens}, prompts, ()))
        own = recipe.own()
        beta = own.pop("beta", 1.0)
        sampler = make_sampler(recipe.sampler, **own)
        plan = prepare(process, prompts, sampler=sampler, reward=reward, beta=beta, seed=recipe.seed, model=model)
        samples = execute(plan, step)
        seen = samples if samples.pool is None else samples.pool
        assert seen.reward is not None
        rows = sorted(zip(seen.reward.tolist(), seen.texts, strict=True), key=lambda row: -row[0])
        return {
            "rows": [[round(score, 4), text] for score, text in rows],
            "best": samples.best.texts[0],
            "facts": {"tokens": samples.cost.generated_tokens, "reward_calls": samples.cost.reward_calls},
        }

    return work
