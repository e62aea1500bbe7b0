"""A `GenerationConfig` of transformers as settings of `Decoding`: every field is honoured, or refused by name.

Where a field is unset it is what the checkpoint's own `generation_config.json` says, and then the library's default, as
in `generate` of transformers: `GenerationConfig(do_sample=True)` keeps the 50 likeliest tokens. The length alone is
steer's: 64 new tokens where neither says. Without a `GenerationConfig` steer draws from the model's whole law at
temperature 1, whatever the checkpoint says; `generation_config="checkpoint"` follows the checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers import GenerationConfig

from steer.core import InputError, check

__all__ = ["decoding_settings", "fit_lengths", "mention_own", "own_settings", "sampling_settings"]

log = logging.getLogger("steer")

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_HONOURED = (
    "max_new_tokens",
    "min_new_tokens",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "eos_token_id",
)
_ELSEWHERE = ("max_length", "min_length", "num_return_sequences", "do_sample", "stop_strings")
# What every call of steer says by itself: how long, how many, and whether by chance.
_UNMENTIONED = ("max_length", "num_return_sequences", "do_sample")
_OURS = {"stop_strings": "stop", "min_length": "min_new_tokens"}
# Of the search over beams that is refused, the cache, what `generate` returns, and guesses that a model checks.
_WITHOUT_EFFECT = (
    "early_stopping",
    "length_penalty",
    "diversity_penalty",
    "low_memory",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "pad_token_id",
    "bos_token_id",
    "decoder_start_token_id",
    "renormalize_logits",
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "assistant_early_exit",
    "assistant_lookbehind",
    "target_lookbehind",
    "assistant_ensemble_weight",
    "speculation_type",
    "use_mtp",
    "compile_config",
    "disable_compile",
    "prefill_chunk_size",
    "transformers_version",
    "continuous_batching_config",
)


def own_settings(config: GenerationConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    """What a checkpoint's own configuration says of how texts are drawn. Fields that this library does not know are
    passed over, as it does.
    """
    given = {} if config is None else dict(config) if isinstance(config, Mapping) else config.to_dict()
    known = GenerationConfig().to_dict()
    return {k: v for k, v in given.items() if k in known and k not in _WITHOUT_EFFECT and v is not None and k[0] != "_"}


def decoding_settings(config: GenerationConfig | str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by the names of `Decoding`, and `max_length` and `min_length`, which `fit_lengths` turns into others.

    Args:
        config: what the user gave, or "checkpoint" for nothing but what the checkpoint says.
        own: `own_settings` of the checkpoint.

    Raises `InputError` for a field that steer does not honour.
    """
    check(
        isinstance(config, GenerationConfig) or config == "checkpoint",
        "generation_config",
        config,
        'a GenerationConfig, or "checkpoint"',
    )
    given = (
        {} if isinstance(config, str) else {k: v for k, v in config.to_dict().items() if v is not None and k[0] != "_"}
    )
    if "max_new_tokens" in given or "max_length" in given:
        own = {k: v for k, v in own.items() if k not in ("max_new_tokens", "max_length")}
    merged = {**own, **given}
    for name, value in merged.items():
        _check_honoured(name, value)
    values = {name: merged[name] for name in (*_HONOURED, "max_length", "min_length") if name in merged}
    if "max_new_tokens" in values:
        values.pop("max_length", None)
    if values.get("min_new_tokens") is not None or not values.get("min_length"):
        values.pop("min_length", None)
    if "stop_strings" in merged:
        values["stop"] = merged["stop_strings"]
    if not merged.get("do_sample"):
        return {**values, "temperature": 0.0}
    sampling = {"top_k": _neutral()["top_k"], **{name: merged[name] for name in _SAMPLING if name in merged}}
    return {**values, **sampling, "temperature": float(sampling.get("temperature", 1.0))}


def sampling_settings(own: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of temperature and truncation, which is all that a server draws by; the lengths and ends
    of texts are known elsewhere. Raises `InputError` for other settings of the law.
    """
    values = decoding_settings("checkpoint", own)
    for name in ("max_new_tokens", "max_length", "min_length", "eos_token_id"):
        values.pop(name, None)
    for name in values.keys() - {*_SAMPLING}:
        unset = values[name] in (None, _neutral().get(name)) or not values[name]
        allowed = f"unset in generation_config.json: servers draw by {', '.join(_SAMPLING)}"
        check(unset, f"generation_config.{name}", values[name], allowed)
    return {name: values[name] for name in _SAMPLING if values.get(name) is not None}


@lru_cache(1)
def _neutral() -> dict[str, Any]:
    """The library's defaults, under which a field changes nothing (but for those of the sampling)."""
    return dict(GenerationConfig._get_default_generation_params())


def _check_honoured(name: str, value: Any) -> None:
    honoured = (*_SAMPLING, *_HONOURED, *_ELSEWHERE, *_WITHOUT_EFFECT)
    neutral = value is None or value is False or value in ([], {}) or value == _neutral().get(name)
    if name in honoured or neutral or (name in ("num_beam_groups", "guidance_scale") and value == 1):
        return
    raise InputError(
        f"generation_config.{name}",
        value,
        "unset: steer samples token by token (its samplers search) and knows of "
        f"{', '.join(sorted({*_SAMPLING, *_HONOURED, *_ELSEWHERE}))}",
    )


def fit_lengths(settings: Mapping[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
    """`max_length` and `min_length`, which count the prompt, as numbers of new tokens for prompts of `lengths`. Raises
    `InputError` where the prompts differ in length.
    """
    fitted = dict(settings)
    for name, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        total = fitted.pop(name, None)
        if total is None or fitted.get(new) is not None:
            continue
        given = f"{total}, with prompts of {min(lengths)} to {max(lengths)} tokens"
        check(len(set(lengths)) == 1, f"generation_config.{name}", given, f"prompts of one length, or {new}")
        fitted[new] = max(0, total - lengths[0])
        if name == "max_length":
            allowed = "more than the prompt's own tokens, which it counts"
            check(fitted[new] > 0, "generation_config.max_length", f"{total} for {lengths[0]} tokens", allowed)
    return fitted


def mention_own(name: str, own: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Say once for each model which of a checkpoint's own settings are neither followed nor set by the user."""
    draws = own.get("do_sample") and settings.get("temperature") != 0
    considered = (
        *(_SAMPLING if draws else ()),
        *(n for n in own if n not in (*_SAMPLING, *_UNMENTIONED, "eos_token_id")),
    )
    ignored = [
        f"{n} {own[n]}"
        for n in considered
        if n in own and settings.get(_OURS.get(n, n)) is None and own[n] not in (None, _unset(n))
    ]
    if ignored:
        _say(name, ", ".join(ignored))


def _unset(name: str) -> Any:
    """The value of a field that changes nothing about the model's law."""
    return 0 if name == "top_k" else _neutral().get(name)


@lru_cache(256)
def _say(name: str, ignored: str) -> None:
    log.warning(
        'steer: %s: its generation_config.json is not followed (%s); generation_config="checkpoint" follows it',
        name,
        ignored,
    )
