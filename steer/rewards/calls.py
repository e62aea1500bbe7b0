"""Rewards of what a reply does: the tools that it calls, and code that passes tests."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from steer.core import check
from steer.rewards.verifiable import Verifiable, code_of

__all__ = ["ToolCall", "UnitTests", "correctness", "passes"]


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
