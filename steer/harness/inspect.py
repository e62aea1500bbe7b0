"""A provider for Inspect (inspect_ai): `inspect eval task.py --model steer/smollm2-135m -M edit=calm.safetensors:0.15`.

Inspect finds it by the entry point `inspect_ai`. Everything runs in this process, one request after the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from steer.core import SteerError, UnsupportedError, check
from steer.loading import load

try:
    from inspect_ai.model import (
        ChatMessage,
        GenerateConfig,
        ModelAPI,
        ModelOutput,
        ModelUsage,
        modelapi,
    )
    from inspect_ai.tool import ToolChoice, ToolInfo
except ImportError as error:
    raise SteerError(f"inspect_ai is not installed: pip install 'steer-engine[eval]' ({error})") from error

__all__ = ["SteerAPI", "steer_provider"]

_REFUSED = ("frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs", "num_choices", "best_of")


class SteerAPI(ModelAPI):
    """A language model under edits.

    Args:
        model_name: what `steer.load` takes.
        edit: edits of every text, `FILE[:strength][:key=value]...`, or a list of them.
        sampler, reward, beta, n: as of `generate`; the best output is the answer.
        engine, dtype: of loading.

    Raises `InputError` for settings that are wrong, before anything is loaded where that can be told.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  (Inspect's own signature)
        edit: str | Sequence[str] = (),
        engine: str = "transformers",
        dtype: str = "auto",
        sampler: str | None = None,
        reward: str | None = None,
        beta: float = 1.0,
        n: int | None = None,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        check(base_url is None, "base_url", base_url, "unset: the model runs in this process")
        self.edits = [edit] if isinstance(edit, str) else list(edit)
        self.search = {"sampler": sampler, "reward": reward, "beta": float(beta), "n": n}
        opened: Any = load  # its overloads are for engines that are written out
        self.model: Any = opened(model_name, engine=engine, dtype=dtype)
        self._lock = asyncio.Lock()

    def max_connections(self) -> int:
        """Requests at once: one network answers them."""
        return 1

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer a chat. Raises `UnsupportedError` for tools, and `InputError` for settings that steer has not."""
        if tools:
            raise UnsupportedError("tools: steer's provider writes text; give tasks for models without tools")
        for name in _REFUSED:
            check(getattr(config, name, None) in (None, 1, False), name, getattr(config, name, None), "unset")
        chat = [{"role": message.role, "content": message.text} for message in input]
        drawn = {
            "max_new_tokens": config.max_tokens or 256,
            "temperature": 1.0 if config.temperature is None else config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "seed": 0 if config.seed is None else config.seed,
            "stop": config.stop_seqs,
        }
        async with self._lock:
            samples = await asyncio.to_thread(self._drawn, chat, drawn)
        best = samples.best if samples.reward is not None else samples[:1]
        output = ModelOutput.from_content(self.model_name, best.texts[0].strip())
        cost = samples.cost
        output.usage = ModelUsage(
            input_tokens=cost.prompt_tokens,
            output_tokens=cost.generated_tokens,
            total_tokens=cost.prompt_tokens + cost.generated_tokens,
        )
        return output

    def _drawn(self, chat: list[dict[str, str]], drawn: dict[str, Any]) -> Any:
        asked = {k: v for k, v in {**self.search, **drawn}.items() if v is not None}
        return self.model.generate(chat, edits=self.edits, **asked)


@modelapi(name="steer")
def steer_provider() -> type[ModelAPI]:
    """The provider's class, which Inspect asks for."""
    return SteerAPI
