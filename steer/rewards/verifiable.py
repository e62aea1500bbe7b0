"""Verifiable rewards: what a completion is worth by what the data knows of its prompt, or by running it.

They read columns of the data's rows (`answer`, `pattern`, `schema`, `calls`, `tests`, `boxes`), which training hands
them by `with_rows`; in Python a table of columns by prompt does the same. Scores are 1 for right and 0 for wrong unless
said.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from steer.core import Reward, Samples, SteerError, check
from steer.rewards.algebra import Composable
from steer.rewards.text import Rouge, texts_of

__all__ = [
    "Answer",
    "JsonSchema",
    "Overlong",
    "ReferenceRouge",
    "Regex",
    "Verifiable",
    "code_of",
    "library",
    "with_rows",
]


@dataclass(frozen=True, repr=False)
class Verifiable(Composable):
    """A reward that reads a column of the data beside the text.

    Attributes:
        table: the column's value by prompt (as `prompt_key` writes it).
    """

    modality: ClassVar = "text"
    column: ClassVar[str] = ""
    alone: ClassVar = True
    table: Mapping[str, Any] | None = field(default=None, kw_only=True)

    @abstractmethod
    def verify(self, text: str, known: Any) -> float:
        """The score of one text, given what the data knows of its prompt."""

    def known(self, prompt: Any) -> Any:
        """What the data says of a prompt. Raises `InputError`."""
        key = prompt_key(prompt)
        there = self.table is not None and key in self.table
        check(there, f"reward {self}", prompt, f"prompts whose rows have the column {self.column}")
        return self.table[key]  # type: ignore[index]

    def score(self, samples: Samples) -> Tensor:
        columns = [self.known(prompt) for prompt in samples.prompts]
        owners = zip(texts_of(samples, self), samples.group.tolist(), strict=True)
        return torch.tensor(self.verify_all([(text, columns[b]) for text, b in owners]), dtype=torch.float64)

    def verify_all(self, pairs: Sequence[tuple[str, Any]]) -> list[float]:
        """The scores of many texts."""
        return [self.verify(text, known) for text, known in pairs]

    def check_known(self, known: Any, where: str) -> None:  # most read anything
        """Refuse a column's value that this reward cannot read."""

    @property
    def optional(self) -> bool:
        """Whether rows may lack the column."""
        return False


def prompt_key(prompt: Any) -> str:
    """A prompt as the key of a table: its text, or its messages as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)


def with_rows(reward: Reward, prompts: Sequence[Any], rows: Sequence[Any]) -> Reward:
    """The reward with every verifiable member knowing the rows of `prompts`; itself where there is none.

    Raises:
        InputError: a row lacks the column that a member reads, or it holds what the member cannot read.
    """
    if isinstance(reward, Verifiable):
        if not reward.column or reward.table is not None:
            return reward
        table: dict[str, Any] = {}
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            where = f"data[{i}].{reward.column}"
            there = isinstance(row, Mapping) and row.get(reward.column) is not None
            if not there and reward.optional:
                continue
            check(there, where, "nothing", f"rows with {reward.column}, for the reward {reward}")
            key, value = prompt_key(prompt), row[reward.column]
            reward.check_known(value, where)
            same = key not in table or table[key] == value
            check(same, where, value, f"what the same prompt has before: {table.get(key)!r}")
            table[key] = value
        return replace(reward, table=table)
    if not is_dataclass(reward):
        return reward
    held = {f.name: getattr(reward, f.name) for f in fields(reward) if f.init}
    made = {name: _with_rows(value, prompts, rows) for name, value in held.items()}
    changed = {name: value for name, value in made.items() if value is not held[name]}
    return replace(reward, **changed) if changed else reward


def _with_rows(x: Any, prompts: Sequence[Any], rows: Sequence[Any]) -> Any:
    if isinstance(x, Reward):
        return with_rows(x, prompts, rows)
    if isinstance(x, tuple):
        members = tuple(_with_rows(member, prompts, rows) for member in x)
        return x if all(a is b for a, b in zip(x, members, strict=True)) else members
    return x


# ----------------------------------------------------------------------------------------------------------- references


@dataclass(frozen=True, repr=False)
class ReferenceRouge(Verifiable):
    """The ROUGE F-measure against the row's `reference`, the mean over `kinds`; see `steer.rewards.Rouge`."""

    column: ClassVar = "reference"
    kinds: tuple[str, ...] = ("1", "2", "L")

    def __post_init__(self) -> None:
        Rouge("", self.kinds)

    def verify(self, text: str, known: Any) -> float:
        return Rouge(known, self.kinds).rate(text)

    def check_known(self, known: Any, where: str) -> None:
        check(isinstance(known, str) and bool(known.strip()), where, known, "a text that is not empty")

    def __repr__(self) -> str:
        if len(self.kinds) == 3:
            return "rouge"
        return f"rouge:kinds={self.kinds[0]}" if len(self.kinds) == 1 else f'rouge:kinds="{"/".join(self.kinds)}"'


# -------------------------------------------------------------------------------------------------------------- answers

_BOXED = re.compile(r"\\boxed\s*\{")
_STATED = re.compile(r"(?:####|answer\s*(?:is|:|=))\s*\**\s*(.+)", re.IGNORECASE)
_NUMERAL = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?")


@dataclass(frozen=True, repr=False)
class Answer(Verifiable):
    """Whether the answer is the row's `answer`.

    `how` "final" compares what stands in the last `\\boxed{}`, after the last "answer:" or "####", or the whole text;
    where the gold answer is a number, the last number of the text counts too. "whole" compares the whole text, "number"
    the last number alone. Texts are compared without case, outer punctuation and runs of space; numbers by value.
    """

    column: ClassVar = "answer"
    how: str = "final"

    def __post_init__(self) -> None:
        check(self.how in ("final", "whole", "number"), "reward answer", self.how, "final, whole, number")

    def verify(self, text: str, known: Any) -> float:
        gold = str(known)
        value = _value(gold)
        if self.how == "whole":
            return float(_same(text, gold))
        found = [] if self.how == "number" else [text, *_stated(text)]
        if value is not None:
            numbers = _NUMERAL.findall(_stated(text)[0] if self.how != "number" and _stated(text) else text)
            return float(any(_same(x, gold) for x in [*found, *numbers[-1:]]))
        return float(any(_same(x, gold) for x in found))

    def __repr__(self) -> str:
        return "answer" if self.how == "final" else f"answer:{self.how}"


def _stated(text: str) -> list[str]:
    """What a text says is its answer, if it says so."""
    boxes = list(_BOXED.finditer(text))
    if boxes:
        return [_braced(text, boxes[-1].end())]
    said = _STATED.findall(text)
    return [said[-1].split("\n")[0]] if said else []


def _braced(text: str, start: int) -> str:
    depth = 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i]
    return text[start:]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`*$()[]")


def _value(text: str) -> float | None:
    plain = text.strip().strip("$. ").replace(",", "").replace(" ", "")
    top, _, bottom = plain.partition("/")
    try:
        found = float(top) / float(bottom) if bottom else float(top)
    except (ValueError, ZeroDivisionError):
        return None
    return found if math.isfinite(found) else None


def _same(text: str, gold: str) -> bool:
    a, b = _value(text), _value(gold)
    if a is not None and b is not None:
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    return _plain(text) == _plain(gold) != ""


@dataclass(frozen=True, repr=False)
class Regex(Verifiable):
    """Whether a regular expression is found in the text: `pattern`, or the row's `pattern`."""

    column: ClassVar = "pattern"
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.pattern is not None:
            self.check_known(self.pattern, "reward regex")

    def check_known(self, known: Any, where: str) -> None:
        try:
            re.compile(known)
        except (re.error, TypeError) as error:
            check(False, where, known, f"a regular expression ({error})")

    def known(self, prompt: Any) -> Any:
        return super().known(prompt) if self.pattern is None else self.pattern

    @property
    def optional(self) -> bool:
        return self.pattern is not None

    def verify(self, text: str, known: Any) -> float:
        return float(re.search(known, text) is not None)

    def __repr__(self) -> str:
        return "regex" if self.pattern is None else f'regex:"{self.pattern}"'


@dataclass(frozen=True, repr=False)
class JsonSchema(Verifiable):
    """Whether the text, or its first block of code, is JSON that fits a schema: of a file, or the row's `schema`."""

    column: ClassVar = "schema"
    file: str | None = None

    def __post_init__(self) -> None:
        if self.file is not None:
            self.check_known(self._read(), f"reward json_schema:{self.file}")

    def _read(self) -> Any:
        path = Path(str(self.file))
        check(path.is_file(), "reward json_schema", self.file, "a file with a JSON schema")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            check(False, "reward json_schema", f"{path} (not JSON: {error})", "a file with a JSON schema")

    def check_known(self, known: Any, where: str) -> None:
        exceptions, validators = library("jsonschema.exceptions"), library("jsonschema.validators")

        schema = json.loads(known) if isinstance(known, str) else known
        try:
            validators.validator_for(schema).check_schema(schema)
        except (exceptions.SchemaError, TypeError, AttributeError) as error:
            check(False, where, known, f"a JSON schema ({str(error).splitlines()[0]})")

    @property
    def optional(self) -> bool:
        return self.file is not None

    def known(self, prompt: Any) -> Any:
        return super().known(prompt) if self.file is None else self._read()

    def verify(self, text: str, known: Any) -> float:
        validators = library("jsonschema.validators")
        schema = json.loads(known) if isinstance(known, str) else known
        try:
            found = json.loads(code_of(text))
        except (ValueError, RecursionError):
            return 0.0
        return float(validators.validator_for(schema)(schema).is_valid(found))

    def __repr__(self) -> str:
        return "json_schema" if self.file is None else f'json_schema:"{self.file}"'


def library(name: str) -> Any:
    """A library that one reward needs. Raises `SteerError` with what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SteerError(f"this reward needs the extra verify: pip install 'steer-engine[verify]' ({error})") from error


def code_of(text: str) -> str:
    """The first fenced block of a text, or the text."""
    found = re.search(r"```[\w+-]*\n(.*?)```", text, re.DOTALL)
    return (found[1] if found else text).strip()


@dataclass(frozen=True, repr=False)
class Overlong(Composable):
    """DAPO's soft punishment of long replies: 0 up to `limit - buffer` tokens, down to -1 at `limit`, and -1 beyond."""

    modality: ClassVar = "text"
    alone: ClassVar = True
    limit: int
    buffer: int

    def __post_init__(self) -> None:
        check(
            0 < self.buffer <= self.limit,
            "reward overlong",
            (self.limit, self.buffer),
            "0 < BUFFER <= LIMIT, in tokens",
        )

    def score(self, samples: Samples) -> Tensor:
        check(samples.tokens is not None, "reward overlong", "outputs without tokens", "samples of a language model")
        counts = [len(row) for row in samples.tokens or []]
        return torch.tensor(
            [-min(1.0, max(0.0, (n - self.limit + self.buffer) / self.buffer)) for n in counts]
        ).double()

    def __repr__(self) -> str:
        return f"overlong:{self.limit},{self.buffer}"
