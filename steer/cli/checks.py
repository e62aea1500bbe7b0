"""Everything that can be told wrong before a model is loaded."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from steer.cli.options import ModelOptions
from steer.core import Edit, InputError, check
from steer.models import resolve
from steer.mount import load_edit, split_spec

__all__ = [
    "check_decoding", "check_folder", "check_model", "check_output", "edit_maker", "read_pairs", "read_prompts",
    "read_strengths",
]  # fmt: skip

_PROMPTS = "a JSON list of prompts, each a text that is not empty or a list of messages"
_DTYPES = ("auto", "float32", "bfloat16", "float16")

Coming = frozenset[Path]
"""Files that are not there yet: earlier steps of the recipe make them."""


def check_model(options: ModelOptions) -> None:
    """The model's name, precision and device."""
    resolve(options.model)
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


def check_decoding(temperature: float, max_new_tokens: int, top_k: int = 0, top_p: float = 1.0) -> None:
    """The same bounds that the adapter has, before it is imported."""
    check(0 <= temperature < math.inf, "temperature", temperature, "a number of 0 (greedy) or more")
    check(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "an integer of 1 or more")
    check(top_k >= 0, "top_k", top_k, "an integer of 0 (off) or more")
    check(0 < top_p <= 1, "top_p", top_p, "0 < top_p <= 1")


# ------------------------------------------------------------------------------------------------------------ files


def _read(field: str, path: Path, allowed: str) -> str:
    check(path.is_file(), field, str(path), f"a file that exists: {allowed}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(field, f"{path} ({error})", allowed) from error


def _parsed(field: str, path: Path, text: str, allowed: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(field, f"{path} (not JSON: {error})", allowed) from error


def read_prompts(path: Path, field: str = "prompts") -> list[Any]:
    """A JSON list of prompts."""
    found = _parsed(field, path, _read(field, path, _PROMPTS), _PROMPTS)
    check(isinstance(found, list) and bool(found), field, f"{path} ({type(found).__name__})", _PROMPTS)
    for i, prompt in enumerate(found):
        check_prompt(f"{field}[{i}]", prompt)
    return found


def check_prompt(field: str, prompt: Any) -> None:
    """One prompt: a text that is not empty, or messages."""
    if isinstance(prompt, str):
        check(bool(prompt.strip()), field, prompt, "text that is not empty")
        return
    check(isinstance(prompt, list) and bool(prompt), field, prompt, "text or messages")
    for message in prompt:
        fits = isinstance(message, dict) and {"role", "content"} <= set(message)
        check(fits, field, message, "messages with role and content")


def read_pairs(path: Path) -> list[dict[str, str]]:
    """JSON lines `{"positive": text, "negative": text}`, with `"prompt"` where there is one."""
    allowed = 'lines of JSON {"positive": text, "negative": text}'
    rows = []
    for number, line in enumerate(_read("pairs", path, allowed).splitlines(), 1):
        if not line.strip():
            continue
        row = _parsed(f"pairs line {number}", path, line, allowed)
        texts = [row.get(side) for side in ("positive", "negative")] if isinstance(row, dict) else [None]
        check(all(isinstance(t, str) and t.strip() for t in texts), f"pairs line {number}", row, allowed)
        rows.append(row)
    check(len(rows) >= 2, "pairs", f"{path} ({len(rows)} rows)", "at least 2 rows")
    return rows


def check_output(path: Path, field: str = "out") -> None:
    """A file that can be written."""
    check(not path.is_dir(), field, str(path), "a file, not a folder")
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


def read_strengths(text: str | None) -> list[float] | None:
    """Numbers with commas between them."""
    if text is None:
        return None
    allowed = "numbers with commas between them, such as -0.2,0,0.2"
    number = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
    parts = [part.strip() for part in text.split(",")]
    check(all(re.fullmatch(number, part) for part in parts), "strengths", text, allowed)
    found = [float(part) for part in parts]
    check(all(map(math.isfinite, found)), "strengths", text, allowed)
    return found
