"""`PoolEngine`: several models behind a router, served as one.

A request is answered whole: the router needs the prompt and a cascade the answer. Answers are given one request after
the other; what a router saves is price, and not waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.core import InputError, ModelInfo, Prompt, Reward, Samples, check
from steer.routing.model import Pool
from steer.serving.engine import Delta, Ended, Event, Finished, Load, Sampling, Started, Task, TokenPrompt

__all__ = ["PoolEngine", "PoolRequest"]


@dataclass(frozen=True)
class PoolRequest:
    """A checked request."""

    task: Task
    prompts: list[Prompt]
    settings: dict[str, Any]
    reward: Reward | None


class PoolEngine:
    """The engine of a `RoutedModel` or a `Cascade`; see `steer.serving.engine.Engine`."""

    kind = "router"

    def __init__(self, model: Pool, name: str | None = None) -> None:
        self.model, self.name = model, name or model.name
        limits = [getattr(member, "context_length", None) for member in model.models.values()]
        known = [limit for limit in limits if limit is not None]
        self.context_length: int | None = min(known) if known else None
        self.own_edits: tuple[str, ...] = ()
        self.edit_kinds: tuple[str, ...] = ()
        self._turn = asyncio.Lock()
        self._waiting = 0

    def own_sampling(self) -> Sampling:
        """Raises `InputError`: each model would have its own."""
        raise InputError("generation_config", "checkpoint", "unset: several models are behind the router")

    @property
    def info(self) -> ModelInfo:
        """Raises `InputError`: an edit fits one model."""
        raise InputError("steer.edits", "edits", "unset: an edit fits one model, and here are several")

    def check_artifact(self, path: Path) -> None:
        """Raises `InputError`: an artifact fits one model."""
        raise InputError("artifact", path.name, "none: an artifact fits one model, and here are several")

    def prepare(self, task: Task) -> PoolRequest:
        """The request with everything checked. Raises `InputError`."""
        steering, sampling = task.steering, task.sampling
        if steering is not None:
            check(not steering.edits, "steer.edits", "edits", "unset: an edit fits one model, and here are several")
            check(not steering.readings, "steer.readings", "readings", "unset: an artifact fits one model")
            check(steering.sampler is None, "steer.sampler", steering.sampler, "unset: the router chooses a model")
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            check(not getattr(sampling, name), name, getattr(sampling, name), "unset: not every model has it")
        check(sampling.logprobs is None, "logprobs", True, "unset: models differ in their tokens")
        check(task.n == 1, "n", task.n, "1: a router gives one answer for each prompt")
        prompts: list[Prompt] = []
        for prompt in task.prompts:
            if isinstance(prompt, TokenPrompt):
                raise InputError("prompt", "token ids", "text: models differ in their tokens")
            prompts.append(prompt)
        self.model.check_prompts(prompts)
        settings: dict[str, Any] = {"max_new_tokens": sampling.max_tokens, "temperature": sampling.temperature}
        settings["seed"] = sampling.seed
        settings |= {"top_p": sampling.top_p} if sampling.top_p != 1 else {}
        settings |= {"top_k": sampling.top_k} if sampling.top_k else {}
        settings |= {"min_p": sampling.min_p} if sampling.min_p else {}
        settings |= {"stop": list(sampling.stop)} if sampling.stop else {}
        return PoolRequest(task, prompts, settings, None if steering is None else steering.reward)

    async def run(self, prepared: PoolRequest) -> AsyncGenerator[Event]:
        """Answer. The models compute in a thread, so that others can ask meanwhile."""
        self._waiting += 1
        try:
            async with self._turn:
                drawn: Samples = await asyncio.to_thread(
                    self.model.generate, prepared.prompts, reward=prepared.reward, **prepared.settings
                )
        finally:
            self._waiting -= 1
        yield Started(drawn.cost.prompt_tokens)
        limit = prepared.task.sampling.max_tokens
        for i, choice in enumerate(drawn.group.tolist()):
            count = 0 if drawn.tokens is None else len(drawn.tokens[i])
            yield Delta(choice, drawn.texts[i])
            reward = None if drawn.reward is None else float(drawn.reward[i])
            yield Ended(choice, "length" if count >= limit else "stop", count, reward)
        yield Finished(len(drawn), drawn.cost)

    def load(self) -> Load:
        """For metrics."""
        return Load(rows=min(self._waiting, 1), waiting=max(self._waiting - 1, 0))

    def give_back_memory(self) -> None:
        """Nothing is kept between requests."""

    def close(self) -> None:
        """A request that runs ends by itself."""
