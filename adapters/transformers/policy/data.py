"""Data of text policies: checked hyper-parameters, and rows of text as token ids.

Prompts go through `LanguageModel.encode`, so that a policy is tuned on the tokens that it will see; completions are
followed by the model's end-of-sequence token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from steer.core import InputError, check
from steer.core.errors import check_unicode
from steer.data import plain_row, prompt_of
from steer.train.objectives.collecting import Row
from steer.train.objectives.settings import PolicySettings

if TYPE_CHECKING:
    from steer.adapters.transformers.model import LanguageModel


def check_targets(model: LanguageModel, tuning: PolicySettings) -> None:
    """Raise where LoRA is asked for at modules that are not there, or at the output head."""
    if not tuning.lora_rank or isinstance(tuning.targets, str):
        return
    head = model.network.get_output_embeddings()
    linear = {n: m for n, m in model.network.named_modules() if isinstance(m, nn.Linear) and m is not head}
    known = sorted({n.rpartition(".")[2] for n in linear})
    for name in tuning.targets:
        fits = any(n == name or n.endswith(f".{name}") for n in linear)
        check(fits and bool(name), "lora_targets", name, f"all-linear, or names among {', '.join(known)}")


def read_rows(
    model: LanguageModel, data: Sequence[Any], tuning: PolicySettings, drawn: bool | None = None
) -> list[dict[str, Any]]:
    """Token ids of every row: `prompt_ids`, and by method `completion_ids`, `chosen_ids` and `rejected_ids`, `label`,
    `completions_ids` and `scores`, `solution`, `answer_ids`. Where methods learn from samples (`drawn`) only what they
    need beside the prompt.

    Raises:
        InputError: no rows, or a row that lacks a column or is too long; names both.
    """
    check(isinstance(data, Sequence) and not isinstance(data, str), "data", data, "a list of rows")
    check(len(data) > 0, "data", data, "at least one row")
    drawn = tuning.online if drawn is None else drawn
    rows = [_row(model, i, row, tuning, drawn) for i, row in enumerate(data)]
    least = 2 if tuning.method == "kto" and tuning.loss == "kto" else 1
    check(len(rows) >= least, "data", f"{len(rows)} rows", f"at least {least}: this loss compares rows with others")
    return rows


RANKED = ("completions", "scores")
"""Columns of ranked lists, which losses of pairs take too, as pairs are taken for lists of two."""


def _row(model: LanguageModel, i: int, row: Any, tuning: PolicySettings, drawn: bool) -> dict[str, Any]:
    columns = tuning.preset.beside if drawn else tuning.preset.columns
    if drawn and not columns:
        return {"prompt_ids": _prompt_ids(model, i, prompt_of(row), tuning.max_new_tokens)}
    row = plain_row(row, f"data[{i}]")
    shown = ", ".join(dict.fromkeys(("prompt", *columns)))
    check(isinstance(row, Mapping), f"data[{i}]", row, f"a row with {shown}")
    if not drawn and tuning.driver == "rows":
        # Preferences come as pairs or as ranked lists.
        listed, paired = set(RANKED) <= set(row), {"chosen", "rejected"} <= set(row)
        if "chosen" in columns and listed and not paired:
            columns = ("prompt", *RANKED)
        elif "completions" in columns and paired and not listed:
            columns = ("prompt", "chosen", "rejected")
    for column in columns:
        check(column in row, f"data[{i}].{column}", "nothing", f"a row with {shown}")
    found: dict[str, Any] = {}
    for column in (c for c in columns if c not in ("prompt", "label", *RANKED)):
        text = _text(row[column], f"data[{i}].{column}")
        if column == "solution":
            found[column] = text
        elif column == "answer":
            found["answer_ids"] = list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
        else:
            found[f"{column}_ids"] = _ended(model, text)
    if "completions" in columns:
        found |= _ranked(model, i, row)
    if "label" in columns:
        check(isinstance(row["label"], bool), f"data[{i}].label", row["label"], "true, false")
        found["label"] = row["label"]
    lists = [x for k, x in found.items() if k.endswith("_ids") and k != "completions_ids"]
    longest = max(map(len, [*lists, *found.get("completions_ids", []), [0] * (tuning.max_new_tokens if drawn else 0)]))
    return {"prompt_ids": _prompt_ids(model, i, prompt_of(row), longest), **found}


def _text(text: Any, field: str) -> str:
    check(isinstance(text, str) and bool(text.strip()), field, text, "text that is not empty")
    check_unicode(field, text)
    return str(text)


def _ended(model: LanguageModel, text: str) -> list[int]:
    ids, end = list(model.tokenizer(text, add_special_tokens=False)["input_ids"]), _end(model)
    return ids if ids[-1] == end else [*ids, end]


def _ranked(model: LanguageModel, i: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """A list of completions with a score each."""
    texts, scores = row["completions"], row["scores"]
    several = isinstance(texts, list | tuple) and len(texts) >= 2
    check(several, f"data[{i}].completions", texts, "a list of two texts or more")
    numbers = isinstance(scores, list | tuple) and all(_number(x) for x in scores)
    fits = numbers and len(scores) == len(texts)
    check(fits, f"data[{i}].scores", scores, f"{len(texts)} numbers, one for each completion")
    ids = [_ended(model, _text(text, f"data[{i}].completions[{k}]")) for k, text in enumerate(texts)]
    return {"completions_ids": ids, "scores": [float(x) for x in scores]}


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def stored(row: dict[str, Any]) -> Row:
    """A row of token ids as the driver of rows takes it."""
    given: list[tuple[list[int], str, float]] = []
    if "chosen_ids" in row:
        given = [(row["chosen_ids"], "chosen", 1.0), (row["rejected_ids"], "rejected", 0.0)]
    elif "completions_ids" in row:
        given = [(ids, "given", x) for ids, x in zip(row["completions_ids"], row["scores"], strict=True)]
    elif "completion_ids" in row:
        given = [(row["completion_ids"], "gold", 1.0)]
    return Row(row["prompt_ids"], given, row.get("solution"), row.get("answer_ids", []))


def _end(model: LanguageModel) -> int:
    ends = model.eos_token_ids
    check(bool(ends), "model", model.name, "a model that has an end-of-sequence token")
    own = model.tokenizer.eos_token_id
    return own if own in ends else ends[0]


def _prompt_ids(model: LanguageModel, i: int, prompt: Any, more: int) -> list[int]:
    check(isinstance(prompt, str | list | tuple), f"data[{i}].prompt", prompt, "text, or messages")
    try:
        ids = model.encode(prompt)
    except InputError as error:
        raise InputError(f"data[{i}].{error.field}", error.given, error.allowed) from error
    limit = model.context_length
    fits = limit is None or len(ids) + more <= limit
    check(fits, f"data[{i}]", f"a prompt of {len(ids)} tokens and {more} more", f"{limit} tokens, the model's context")
    return ids
