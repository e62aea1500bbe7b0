"""Checks of options that need no loaded model."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch

from steer.cli.options import ImageOptions, ModelOptions, TextOptions
from steer.cli.values import spelled
from steer.core import Edit, InputError, check
from steer.core.errors import first_line
from steer.core.names import NAME
from steer.core.readings import StopIf
from steer.data import FORMATS, plain_pair, plain_row, prompt_of, read_json, read_table, read_text
from steer.edits import load_artifact, load_edit, split_spec
from steer.embedded import CARD_NAME, resolve
from steer.loading import is_diffusion, is_endpoint, is_masked
from steer.serving.artifact_store import digest

__all__ = [
    "check_beta",
    "check_causal",
    "check_decoding",
    "check_folder",
    "check_kind",
    "check_model",
    "check_output",
    "denoises_text",
    "draws_images",
    "edit_maker",
    "image_prompts",
    "job_of",
    "read_dataset",
    "read_pairs",
    "read_prompts",
    "read_rows",
    "read_strengths",
]


_PROMPTS = f"prompts in {FORMATS}, each a text that is not empty, a list of messages, or a row with one"
_DTYPES = ("auto", "float32", "bfloat16", "float16")

Coming = frozenset[Path]
"""Files that are not there yet: earlier steps of the recipe make them."""


def check_model(options: ModelOptions) -> None:
    """The model's name, precision and device."""
    if is_endpoint(options.model):
        check(options.dtype == "auto", "dtype", options.dtype, "unset: an endpoint has its own")
        check(options.device is None, "device", options.device, "unset: an endpoint has its own")
        check(options.check, "check", False, "unset: nothing is loaded")
        return
    resolve(options.model)
    causal = options.check or not (draws_images(options) or denoises_text(options))
    check(causal, "check", False, "unset: no causal language model")
    check(options.dtype in _DTYPES, "dtype", options.dtype, ", ".join(_DTYPES))
    if options.device is None:
        return
    try:
        kind = torch.device(options.device).type
    except RuntimeError:
        raise InputError("device", options.device, "a device such as cpu or cuda:0") from None
    missing = (kind == "cuda" and not torch.cuda.is_available()) or (
        kind == "mps" and not torch.backends.mps.is_available()
    )
    check(not missing, "device", options.device, "a device of this machine, such as cpu")


def draws_images(options: ModelOptions) -> bool:
    """Whether the model is a diffusion model, by its folder or its files on the hub."""
    return not is_endpoint(options.model) and is_diffusion(resolve(options.model))


def denoises_text(options: ModelOptions) -> bool:
    """Whether the model is a masked language model, by its folder or its files on the hub."""
    return not is_endpoint(options.model) and is_masked(resolve(options.model))


def check_causal(options: ModelOptions) -> None:
    """Refuse models that draw images or denoise text."""
    check(not draws_images(options), "model", options.model, "a language model")
    check(not denoises_text(options), "model", options.model, "a language model that writes from left to right")


_CAUSAL = (
    "edit",
    "reading",
    "stop_if",
    "repetition_penalty",
    "generation_config",
    "base",
    "split_special_tokens",
    "block",
    "until",
    "stream",
    "tuned",
    "w",
)
"""Options of models that write from left to right."""


def check_kind(options: ModelOptions, images: bool, masked: bool = False) -> None:
    """Refuse options of language models for a diffusion model, and the other way round."""
    others, what = (TextOptions, "draws images") if images else (ImageOptions, "writes text")
    unfit = [(option, what) for option in fields(others) if not (masked and option.name == "steps")]
    if masked:
        unfit += [(option, "denoises masked text") for option in fields(options) if option.name in _CAUSAL]
    for option, what in unfit:
        given = getattr(options, option.name, None)
        default = option.default if option.default_factory is MISSING else option.default_factory()
        unset = not hasattr(options, option.name) or given == default
        shown = str(given) if isinstance(given, Path) else given
        check(unset, spelled(option.name), shown, f"unset: {options.model} {what}")


def check_beta(beta: float) -> None:
    """The KL coefficient."""
    check(0 < beta < math.inf, "beta", beta, "a number above 0")


def check_decoding(
    temperature: float | None, max_new_tokens: int, top_k: int | None = None, top_p: float | None = None
) -> None:
    """The same bounds that the adapter has, before it is imported; None is its default."""
    good = temperature is None or 0 <= temperature < math.inf
    check(good, "temperature", temperature, "a number of 0 (greedy) or more")
    check(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "an integer of 1 or more")
    check(top_k is None or top_k >= 0, "top_k", top_k, "an integer of 0 (off) or more")
    check(top_p is None or 0 < top_p <= 1, "top_p", top_p, "0 < top_p <= 1")


def check_generation_config(given: str | None) -> None:
    """Whose settings are followed where no option says otherwise."""
    allowed = "checkpoint, or unset: the model's whole law at temperature 1"
    check(given in (None, "checkpoint"), "generation_config", given, allowed)


# ------------------------------------------------------------------------------------------------------------ files


def read_prompts(path: Path, field: str = "prompts", empty: bool = False) -> list[Any]:
    """Prompts of a file: texts or chats, or rows with a column `prompt`, `messages` or `text`; `empty` where a text may
    be "", which leaves an image model free.
    """
    rows = [(where, prompt_of(row)) for where, row in read_table(field, path, _PROMPTS)]
    check(bool(rows), field, f"{path} (no prompts)", _PROMPTS)
    for where, prompt in rows:
        if not (empty and prompt == ""):
            check_prompt(where, prompt)
    return [prompt for _, prompt in rows]


def check_prompt(field: str, prompt: Any) -> None:
    """One prompt: a text that is not empty, or messages."""
    if isinstance(prompt, str):
        check(bool(prompt.strip()), field, prompt, "text that is not empty")
        return
    allowed = "a text, a list of messages, or a row with one as prompt, messages or text"
    check(isinstance(prompt, list) and bool(prompt), field, prompt, allowed)
    for message in prompt:
        fits = isinstance(message, dict) and {"role", "content"} <= set(message)
        check(fits, field, message, "messages with role and content")


def image_prompts(options: ModelOptions, classes: Sequence[str], prompt: str | None, prompts: Path | None) -> list[str]:
    """What a diffusion model is asked for, checked against the classes or text encoders that its folder tells of;
    asked for nothing, a model that needs no text draws from all that it has learnt.
    """
    given = {"class": bool(classes), "prompt": prompt is not None, "prompts": prompts is not None}
    named = [name for name, there in given.items() if there]
    check(len(named) <= 1, named[0] if named else "prompt", ", ".join(named), "one of --class, --prompt and --prompts")
    known, needs_text = _conditions(resolve(options.model))
    if not named:
        allowed = "a text: this model draws what a text describes (--prompt, --prompts)"
        check(not needs_text, "prompt", None, allowed)
        return [""]
    check(not (classes and needs_text), "class", list(classes), "unset: this model takes texts (--prompt)")
    field = "class" if classes else named[0]
    wanted: list[Any] = list(classes) or ([prompt] if prompts is None else read_prompts(prompts, empty=True))
    for text in wanted:
        check(isinstance(text, str), field, text, "texts, not messages: this model draws images")
        if classes or prompt is not None:
            check_prompt(field, text)
        if known and text:
            _check_class(field, text, known)
    return wanted


def _check_class(field: str, text: str, known: Sequence[str]) -> None:
    close = difflib.get_close_matches(text.casefold(), [name.casefold() for name in known], n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    check(text.casefold() in (name.casefold() for name in known), field, text, f"{', '.join(known)}{hint}")


def _conditions(where: Path | str) -> tuple[list[str], bool]:
    """Classes that a model's folder names, and whether it is a pipeline that is told by text."""
    if isinstance(where, str):
        return [], False  # what a model on the hub takes, loading it says
    if (where / CARD_NAME).is_file():
        card = read_json("model", where / CARD_NAME, read_text("model", where / CARD_NAME, "a model"), "a model's card")
        return [str(name) for name in card.get("classes") or ()], False
    index = read_json("model", where, read_text("model", where / "model_index.json", "a model"), "a pipeline")
    return [], any(str(name).startswith("text_encoder") for name in index)


def read_rows(path: Path, columns: Sequence[str], field: str = "data") -> list[dict[str, Any]]:
    """Rows of a file that have `columns`, or TRL's conversational ones in their place."""
    allowed = f"{FORMATS} with {', '.join(columns)}"
    rows = [(where, plain_row(row, where)) for where, row in read_table(field, path, allowed)]
    for where, row in rows:
        check(isinstance(row, Mapping) and set(columns) <= set(row), where, row, allowed)
    check(bool(rows), field, f"{path} (no rows)", "at least one row")
    return [row for _, row in rows]


def read_dataset(path: Path, columns: Sequence[str], field: str = "data") -> list[dict[str, Any]]:
    """Rows of a file, of a folder of data files, or of the training split of a dataset on the hub (`org/name`, or
    `org/name:SPLIT`), by `datasets`.
    """
    name = str(path)
    on_hub = not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?", name) and not path.suffix.startswith(".json")
    if path.is_file() or name == "-" or not (on_hub or path.is_dir()):
        return read_rows(path, columns, field)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(field, name, "a file; or install steer-engine[train] for datasets") from error
    where, _, split = name.partition(":")
    try:
        found = list(load_dataset(where, split=split or "train"))
    except Exception as error:  # whatever a library of the network and of many formats raises
        raise InputError(field, f"{name} ({first_line(error)})", f"{FORMATS}, or a dataset with a split") from error
    rows = [
        plain_row({k: v for k, v in row.items() if v is not None}, f"{field} row {n}") for n, row in enumerate(found, 1)
    ]
    for n, row in enumerate(rows, 1):
        check(set(columns) <= set(row), f"{field} row {n}", sorted(row), f"rows with {', '.join(columns)}")
    check(bool(rows), field, f"{name} (no rows)", "at least one row")
    return rows


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """Rows `{"positive": text, "negative": text}`, with `"prompt"` where there is one; or TRL's `chosen` and
    `rejected`.
    """
    allowed = f"{FORMATS} with positive and negative (or chosen and rejected)"
    rows = []
    for where, given in read_table("pairs", path, allowed):
        row = plain_pair(given, where)
        texts = [row.get(side) for side in ("positive", "negative")] if isinstance(row, dict) else [None]
        check(all(isinstance(t, str) and t.strip() for t in texts), where, given, allowed)
        rows.append(row)
    check(len(rows) >= 2, "pairs", f"{path} ({len(rows)} rows)", "at least 2 rows")
    return rows


_REWARD_FILE = re.compile(r"[^\s=*+()]+\.safetensors")


def job_of(options: Any, apart: Collection[str]) -> dict[str, Any]:
    """What samples depend on beside their prompts: the options, but for those that are `apart`, and what is in the
    files that they name.
    """
    given = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in apart}
    job = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    rewards = " ".join([options.reward or "", *getattr(options, "allow_reward", ())])
    named = [*options.edit, *(_named(text)[1] for text in getattr(options, "reading", ()))]
    files = [Path(split_spec(text)[0]) for text in named] + [Path(x) for x in _REWARD_FILE.findall(rewards)]
    return job | {f"{path.name} within": digest(path)[:12] for path in files if path.is_file()}


def check_output(path: Path, field: str = "out", suffixes: Sequence[str] = ()) -> None:
    """A file that can be written, whose name says what will be in it."""
    check(not path.is_dir(), field, str(path), "a file, not a folder")
    fits = path.suffix.lower() in suffixes or not suffixes
    check(fits, field, str(path), f"a file that ends in {' or '.join(suffixes)}")
    _check_writable(path.parent, field)


def check_folder(path: Path, field: str = "out") -> None:
    """A folder that can be written to, or made."""
    check(path.is_dir() or not path.exists(), field, str(path), "a folder, not a file")
    _check_writable(path, field)


def _check_writable(folder: Path, field: str) -> None:
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    check(there.is_dir() and os.access(there, os.W_OK | os.X_OK), field, str(folder), "a folder that can be written to")


# ------------------------------------------------------------------------------------------------------------ edits


def edit_maker(text: str, coming: Coming = frozenset()) -> Callable[[Any], Edit]:
    """Check an edit's specification as far as it can be without its model; the result takes the model."""
    path, strength, options = split_spec(text)
    if options.get("model") == "any":
        options["model_check"] = options.pop("model")

    def make(model: Any) -> Edit:
        return load_edit(path, strength, model=model, **options)

    needed = [path, *(options[key] for key in ("gate", "tokens") if options.get(key))]
    if any(Path(file).absolute() in coming for file in needed):
        return make
    try:
        make(None)
    except InputError as error:
        if error.field != "model":  # a value head is complete only with its model
            raise
    return make


def _named(text: str) -> tuple[str, str]:
    """The name and the file of `[NAME=]FILE[:KEY=VALUE]`; a file without a name is called by its stem."""
    name, equals, rest = text.partition("=")
    return (name, rest) if equals and NAME.fullmatch(name) else (Path(split_spec(text)[0]).stem, text)


def readings_of(texts: Sequence[str], rule: str | None, coming: Coming = frozenset()) -> dict[str, str]:
    """What is to be read, by name, from `[NAME=]FILE[:layers=10-19]` each, checked as far as it can be without the
    model; so is the rule that ends texts. Raises `InputError`.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, rest = _named(text)
        check(name not in found, "reading", text, f"another name for it, as in NAME=FILE: {name} is taken")
        path, strength, _ = split_spec(rest)
        check(strength is None, "reading", text, "[NAME=]FILE[:layers=10-19]: a reading has no strength")
        if Path(path).absolute() not in coming:
            kind = load_artifact(path).card.kind
            check(kind == "vector", "reading", f"{path}, a {kind}", "a vector, or a probe (a vector's, method=probe)")
        found[name] = rest
    if rule is not None:
        StopIf.parse(rule, list(found))
    return found


def read_strengths(text: str | None, field: str = "strengths") -> list[float] | None:
    """Numbers with commas between them."""
    if text is None:
        return None
    allowed = "numbers with commas between them, such as -0.2,0,0.2"
    number = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
    parts = [part.strip() for part in text.split(",")]
    check(all(re.fullmatch(number, part) for part in parts), field, text, allowed)
    found = [float(part) for part in parts]
    check(all(map(math.isfinite, found)), field, text, allowed)
    return found
