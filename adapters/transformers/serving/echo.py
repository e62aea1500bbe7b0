"""Prompts sent back with their tokens' log-probabilities, for clients that ask `/v1/completions` for `echo`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from steer.adapters.language.texts import token_text
from steer.adapters.transformers.scoring import prompt_logits
from steer.adapters.transformers.serving import rowwise
from steer.serving.engine import Delta, Event, Started, TokenLogprob

if TYPE_CHECKING:
    from steer.adapters.transformers.model import LanguageModel
    from steer.adapters.transformers.serving.preparing import Prepared

__all__ = ["echoes", "with_echo"]


@torch.inference_mode()
def echoes(model: LanguageModel, prepared: Prepared) -> list[tuple[TokenLogprob, ...]]:
    """The tokens of every prompt, each with its log-probability after those before it under the request's hidden edits
    (of the whole text as a prompt), and its likeliest rivals; the first has none.
    """
    wanted = prepared.sampling.logprobs
    if wanted is None:
        return [() for _ in prepared.ids]
    return [_named(model, ids, prompt_logits(model.body, ids, prepared.hidden), wanted) for ids in prepared.ids]


def _named(model: LanguageModel, ids: Sequence[int], logits: torch.Tensor, count: int) -> tuple[TokenLogprob, ...]:
    def named(token: int, logprob: float | None, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        text, raw = token_text(model.tokenizer, token)
        return TokenLogprob(text, None if logprob is None else max(logprob, -9999.0), raw, top)

    found = [named(ids[0], None)]
    if len(ids) == 1:
        return tuple(found)
    law = torch.log_softmax(logits[:-1].float(), -1)
    taken = law.gather(1, torch.tensor(ids[1:], device=law.device).unsqueeze(1)).squeeze(1).tolist()
    values, rivals = rowwise.likeliest(law, count)
    for token, logprob, value, rival in zip(ids[1:], taken, values, rivals, strict=True):
        found.append(named(token, logprob, tuple(named(t, v) for t, v in zip(rival, value, strict=True))))
    return tuple(found)


async def with_echo(
    prepared: Prepared, text: Sequence[str], prompts: Sequence[tuple[TokenLogprob, ...]], events: AsyncGenerator[Any]
) -> AsyncGenerator[Event]:
    """The events of a request with each choice's prompt before what is drawn."""
    async for event in events:
        yield event
        if isinstance(event, Started):
            for choice in range(prepared.choices):
                prompt = choice // prepared.task.n
                yield Delta(choice, text[prompt], prompts[prompt])
