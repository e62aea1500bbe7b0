"""Steering inside transformers' own `generate`: `network.generate(**inputs, custom_generate=steer.hf(model, edits))`.

transformers prepares everything (processors, criteria, lengths), and this draws the tokens under the edits: without any
those that transformers draws itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steer.adapters.transformers.model import LanguageModel
from steer.core import PromptEdit, UnsupportedError, check
from steer.edits import as_edits

__all__ = ["hf"]

_REFUSED = ("num_beams", "penalty_alpha", "prompt_lookup_num_tokens", "assistant_confidence_threshold")


def hf(model: LanguageModel, edits: Any = (), beta: float = 1.0) -> Callable[..., Any]:
    """A decoding loop for `custom_generate=` of the network that `model` holds.

    Args:
        model: what `steer.load(network, tokenizer=...)` returns; the network itself is not changed.
        edits: as of `generate`, for every row: edits of hidden states and of the next token.
        beta: KL coefficient, for edits that have none of their own.

    The loop raises `InputError` for another network than the model's, and `UnsupportedError` for beams, assistants,
    embeddings in place of tokens, and edits of the prompt, which transformers has already read.
    """
    mounted = [edit.with_beta(beta) for edit, _ in as_edits(edits, 1, model)]
    for edit in mounted:
        if isinstance(edit, PromptEdit):
            raise UnsupportedError(f"{type(edit).__name__}: with custom_generate, put it into the prompt's own text")

    def decode(
        network: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **given: Any,
    ) -> Any:
        check(network is model.network, "model", type(network).__name__, "the network that steer.load was given")
        _check(generation_config, given)
        return _drawn(model, mounted, input_ids, logits_processor, stopping_criteria, generation_config, given)

    return decode


def _check(config: Any, given: dict[str, Any]) -> None:
    for name in _REFUSED:
        value = getattr(config, name, None)
        if value not in (None, 1) and not (name.startswith("assistant") and given.get("assistant_model") is None):
            raise UnsupportedError(f"{name}={value}: custom_generate=steer.hf draws one token for each row at a time")
    if given.get("inputs_embeds") is not None or config.return_dict_in_generate:
        raise UnsupportedError(
            "inputs_embeds, return_dict_in_generate: custom_generate=steer.hf gives token ids for ids"
        )


@torch.inference_mode()
def _drawn(
    model: LanguageModel,
    edits: list[Any],
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    config: Any,
    given: dict[str, Any],
) -> Tensor:
    mask = given.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    rows = [ids[real.bool()].tolist() for ids, real in zip(input_ids, mask, strict=True)]
    process: Any = model.process(max_new_tokens=config.max_length - input_ids.shape[1], eos_token_id=[])
    for edit in edits:
        process = process.edited(edit)
    pad = config._pad_token_tensor if config._pad_token_tensor is not None else model.pad_token_id
    unfinished, ids, streamer = torch.ones_like(input_ids[:, 0], dtype=torch.bool), input_ids, given.get("streamer")
    with process.session():
        state = process.begin_tokens([""] * len(rows), rows, 1)
        while bool(unfinished.any()):
            state = process.read(state)
            law = process.laws(state)[1]
            scores = logits_processor(ids, law)
            token = _chosen(scores, config.do_sample)
            state = process.take(state, token)
            token = torch.where(unfinished, token, torch.as_tensor(pad, device=token.device))
            ids = torch.cat([ids, token.unsqueeze(1)], 1)
            if streamer is not None:
                streamer.put(token.cpu())
            unfinished &= ~stopping_criteria(ids, scores)
    if streamer is not None:
        streamer.end()
    return ids


def _chosen(scores: Tensor, sample: bool) -> Tensor:
    """A token `[N]` for each row of `scores` `[N, V]`, drawn as transformers draws it."""
    if sample:
        return torch.multinomial(torch.softmax(scores, -1), 1).squeeze(1)
    return scores.argmax(-1)
