"""Verifiable rewards: what a completion is worth by what the data knows of its prompt, or by running it.

They read columns of the data's rows (`answer`, `pattern`, `schema`, `calls`, `tests`, `boxes`), which training hands
them by `with_rows`; in Python a table of columns by prompt does the same. Scores are 1 for right and 0 for wrong unless
said.
"""

from __future__ import annotations

import ast
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from steer.core import Reward, Samples, SteerError, check
from steer.rewards.algebra import Composable
from steer.rewards.text import texts_of

__all__ = ["Answer", "Boxes", "JsonSchema", "Overlong", "Regex", "ToolCall", "UnitTests", "Verifiable", "with_rows"]


@dataclass(frozen=True, repr=False)
class Verifiable(Composable):
    """A reward that reads a column of the data beside the text.

    Attributes:
        table: the column's value by prompt (as `prompt_key` writes it).
    """

    modality: ClassVar = "text"
    column: ClassVar[str] = ""
    alone: ClassVar = True  # type: ignore[misc]
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
        exceptions, validators = _library("jsonschema.exceptions"), _library("jsonschema.validators")

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
        validators = _library("jsonschema.validators")
        schema = json.loads(known) if isinstance(known, str) else known
        try:
            found = json.loads(code_of(text))
        except (ValueError, RecursionError):
            return 0.0
        return float(validators.validator_for(schema)(schema).is_valid(found))

    def __repr__(self) -> str:
        return "json_schema" if self.file is None else f'json_schema:"{self.file}"'


def _library(name: str) -> Any:
    """A library that one reward needs. Raises `SteerError` with what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SteerError(f"this reward needs the extra verify: pip install 'steer-engine[verify]' ({error})") from error


def code_of(text: str) -> str:
    """The first fenced block of a text, or the text."""
    found = re.search(r"```[\w+-]*\n(.*?)```", text, re.DOTALL)
    return (found[1] if found else text).strip()


# ----------------------------------------------------------------------------------------------------------- tool calls


@dataclass(frozen=True, repr=False)
class ToolCall(Verifiable):
    """ToolRL's reward: 1 for the right layout, and from -3 to 3 for how well the calls are the row's `calls`.

    `calls` is a list of `{"name", "parameters"}`; `[]` where none is expected. A reply thinks in `<think>`, and calls
    in `<tool_call>`, a JSON object a line, or answers in `<response>`. Correctness: 3 for equal lists, -3 for what
    cannot be read, 0 where no call is expected, else `6 S / S_max - 3` by names, parameters and values (Qian et al.
    2025).
    """

    column: ClassVar = "calls"
    layout: bool = True

    def check_known(self, known: Any, where: str) -> None:
        allowed = 'a list of {"name": text, "parameters": object}'
        calls = json.loads(known) if isinstance(known, str) else known
        check(isinstance(calls, list), where, known, allowed)
        for call in calls:
            check(isinstance(call, Mapping) and isinstance(call.get("name"), str), where, known, allowed)

    def verify(self, text: str, known: Any) -> float:
        gold = json.loads(known) if isinstance(known, str) else known
        shape = float(_layout(text, bool(gold))) if self.layout else 0.0
        return shape + correctness(_calls_in(text), [_call(x) for x in gold])

    def __repr__(self) -> str:
        return "tool_call" if self.layout else "tool_call:plain"


Call = tuple[str, dict[str, Any]]


def _call(x: Mapping[str, Any]) -> Call:
    given = x.get("parameters", x.get("arguments", {}))
    return str(x["name"]), dict(json.loads(given) if isinstance(given, str) else given)


def _layout(text: str, calls: bool) -> bool:
    """Whether the tags stand as the row wants them: thoughts, then calls or an answer."""
    end = r"<tool_call>.*</tool_call>(?:\s*<response>.*</response>)?" if calls else r"<response>.*</response>"
    once = all(text.count(tag) <= 1 for tag in ("<think>", "<tool_call>", "<response>"))
    return once and re.fullmatch(rf"\s*<think>.*</think>\s*{end}\s*", text, re.DOTALL) is not None


def _calls_in(text: str) -> list[Call] | None:
    """The calls of a reply; None where they cannot be read."""
    found = re.search(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL)
    if found is None:
        return []
    try:
        return [_call(json.loads(line)) for line in found[1].strip().split("\n") if line.strip()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def correctness(calls: list[Call] | None, gold: list[Call]) -> float:
    """How well calls are the gold ones, from -3 to 3."""
    if not gold:
        return 0.0
    if not calls:
        return -3.0
    if calls == gold:
        return 3.0
    names, wanted = Counter(name for name, _ in calls), Counter(name for name, _ in gold)
    total = (names & wanted).total() / (names | wanted).total()
    free = list(calls)
    for name, parameters in gold:
        same = [(i, _agreement(given, parameters)) for i, (other, given) in enumerate(free) if other == name]
        if same:
            best, value = max(same, key=lambda entry: entry[1])
            total += value
            del free[best]
    return 6 * total / (1 + sum(1 + len(parameters) for _, parameters in gold)) - 3


def _agreement(given: dict[str, Any], gold: dict[str, Any]) -> float:
    """Overlap of parameter names, and how many values are equal."""
    either = given.keys() | gold.keys()
    names = len(given.keys() & gold.keys()) / len(either) if either else 1.0
    return names + sum(key in given and given[key] == value for key, value in gold.items())


# ----------------------------------------------------------------------------------------------------- boxes and length


@dataclass(frozen=True, repr=False)
class Boxes(Verifiable):
    """Vision-R1's reward of a text that names boxes: precision + recall + layout, of boxes matched to the row's
    `boxes`.

    Boxes are `[x0, y0, x1, y1]`; the text is a JSON list of them, or of objects with `box` and `label`, as gold may be.
    A matched pair counts by its generalised IoU, as 0 below `low` and as 1 above `high`. `over` "matched" divides by
    the matched pairs, so that boxes too many cost nothing, as released; "all" by all predictions.
    """

    column: ClassVar = "boxes"
    low: float = 0.5
    high: float = 0.75
    over: str = "matched"

    def __post_init__(self) -> None:
        check(0 <= self.low <= self.high <= 1, "reward vision_boxes", (self.low, self.high), "0 <= low <= high <= 1")
        check(self.over in ("matched", "all"), "reward vision_boxes", self.over, "matched, all")

    def check_known(self, known: Any, where: str) -> None:
        check(_boxes(known) is not None, where, known, "a list of [x0, y0, x1, y1], or of {box, label}")

    def verify(self, text: str, known: Any) -> float:
        gold = _boxes(known) or []
        found = _boxes(code_of(text))
        if found is None:
            return 0.0
        if not gold or not found:
            return 3.0 * (not gold and not found)
        return sum(box_scores(found, gold, self.low, self.high, self.over == "all")) + 1.0

    def __repr__(self) -> str:
        return "vision_boxes"


Box = tuple[tuple[float, ...], str]


def _boxes(x: Any) -> list[Box] | None:
    try:
        listed = json.loads(x) if isinstance(x, str) else x
        pairs = [(b["box"], str(b.get("label", ""))) if isinstance(b, Mapping) else (b, "") for b in listed]
        made = [(tuple(float(v) for v in box), label) for box, label in pairs]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return made if all(len(box) == 4 and all(map(math.isfinite, box)) for box, _ in made) else None


def generalised_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, less the share of their hull that neither covers."""

    def area(x: Sequence[float]) -> float:
        return max(0.0, x[2] - x[0]) * max(0.0, x[3] - x[1])

    inner = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    hull = area((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))
    union = area(a) + area(b) - inner
    return (inner / union if union else 0.0) - ((hull - union) / hull if hull else 0.0)


def box_scores(
    found: Sequence[Box], gold: Sequence[Box], low: float, high: float, over_all: bool
) -> tuple[float, float]:
    """Precision and recall after the best assignment by L1 distance, label and generalised IoU."""
    linear_sum_assignment = _library("scipy.optimize").linear_sum_assignment

    cost = [
        [sum(abs(p - q) for p, q in zip(a, b, strict=True)) - (la == lb) - generalised_iou(a, b) for b, lb in gold]
        for a, la in found
    ]
    rows, columns = linear_sum_assignment(cost)
    overlaps = [generalised_iou(found[i][0], gold[j][0]) for i, j in zip(rows, columns, strict=True)]
    precision = sum(_stepped(x, low, high) for x in overlaps) / (len(found) if over_all else len(overlaps))
    recall = sum(x >= low for x in overlaps) / len(gold)
    return precision, _stepped(recall, 0.5, 0.75)


def _stepped(x: float, low: float, high: float) -> float:
    return 0.0 if x < low else 1.0 if x > high else x


@dataclass(frozen=True, repr=False)
class Overlong(Composable):
    """DAPO's soft punishment of long replies: 0 up to `limit - buffer` tokens, down to -1 at `limit`, and -1 beyond."""

    modality: ClassVar = "text"
    alone: ClassVar = True  # type: ignore[misc]
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


# ----------------------------------------------------------------------------------------------------------- unit tests


@dataclass(frozen=True, repr=False)
class UnitTests(Verifiable):
    """Whether the Python code of a text passes the row's `tests`, which run after it in a process of their own.

    The process has limits of seconds, memory and file size, an empty folder and an empty environment. That holds off
    accidents, not an attacker: run code of models that you do not trust inside a container.
    """

    column: ClassVar = "tests"
    seconds: float = 5.0
    megabytes: int = 512

    def __post_init__(self) -> None:
        check(self.seconds > 0, "reward unit_tests", self.seconds, "seconds above 0")
        check(self.megabytes >= 64, "reward unit_tests", self.megabytes, "64 megabytes or more")

    def check_known(self, known: Any, where: str) -> None:
        try:
            ast.parse(_joined(known))
        except (SyntaxError, ValueError, TypeError) as error:
            check(False, where, known, f"Python code, or a list of lines such as assertions ({error})")

    def verify(self, text: str, known: Any) -> float:
        return float(passes(code_of(text), _joined(known), self.seconds, self.megabytes))

    def verify_all(self, pairs: Sequence[tuple[str, Any]]) -> list[float]:
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            return list(pool.map(lambda pair: self.verify(*pair), pairs))

    def __repr__(self) -> str:
        return "unit_tests"


def _joined(tests: Any) -> str:
    return "\n".join(tests) if isinstance(tests, list | tuple) else str(tests)


_RUN = """\
import resource, sys
seconds, memory = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
space = {"__name__": "__main__"}
exec(compile(open("code.py", encoding="utf-8").read(), "code.py", "exec"), space)
exec(compile(open("tests.py", encoding="utf-8").read(), "tests.py", "exec"), space)
open("passed", "x").write(sys.argv[3])
"""


def passes(code: str, tests: str, seconds: float = 5.0, megabytes: int = 512) -> bool:
    """Whether `tests` run to their end after `code`: code that leaves early, and with success, has not passed."""
    token = os.urandom(16).hex()
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("code.py", code), ("tests.py", tests), ("run.py", _RUN)):
            Path(folder, name).write_text(text, encoding="utf-8", errors="replace")
        limits = [str(math.ceil(seconds)), str(megabytes << 20), token]
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "run.py", *limits],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=seconds + 1,
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        passed = Path(folder, "passed")
        return done.returncode == 0 and passed.is_file() and passed.read_text(encoding="utf-8") == token
