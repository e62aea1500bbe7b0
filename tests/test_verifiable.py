"""Verifiable rewards: closed forms, what the data knows of a prompt, and code that is run with limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from steer.core import InputError, Samples
from steer.rewards import parse_reward
from steer.rewards.algebra import Composable
from steer.rewards.boxes import Boxes, box_scores, generalised_iou
from steer.rewards.calls import ToolCall, UnitTests, passes
from steer.rewards.verifiable import Answer, JsonSchema, Overlong, Regex, with_rows


def one(reward: Any, text: str, column: Any = None, tokens: int = 0) -> float:
    """The score of a text for one prompt, whose row has this column."""
    known = with_rows(reward, ["p"], [{"prompt": "p", reward.column: column}]) if column is not None else reward
    samples = Samples(["p"], [text], torch.tensor([0]), torch.zeros(1).double(), tokens=[[1] * tokens])
    return float(known(samples)[0])


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("Paris", "paris", 1),
        ("The answer is Paris.", "Paris", 1),
        ("Paris or London", "Paris", 0),
        ("so it is\n#### 1,024", "1024", 1),
        (r"thus \boxed{\frac{1}{2}} and then \boxed{x^{2}}", "x^{2}", 1),
        ("first 3, then 7 apples", "7", 1),
        ("first 3, then 7 apples", "3", 0),
        ("it is 0.50", "1/2", 1),
        ("answer: 12 of 40 people", "12", 0),
        ("answer: 12", 12, 1),
        ("", "0", 0),
        ("nan", "nan", 1),
    ],
)
def test_answers(text: str, gold: Any, right: float) -> None:
    assert one(Answer(), text, gold) == right


def test_other_forms_of_answers() -> None:
    assert one(Answer("whole"), "The answer is 4", "4") == 0 and one(Answer("whole"), " 4. ", "4") == 1
    assert one(Answer("number"), "answer: 12 of 40", "40") == 1
    with pytest.raises(InputError, match="final, whole, number"):
        Answer("loose")


def test_regular_expressions_and_schemas(tmp_path: Path) -> None:
    assert one(Regex(r"\d{3}"), "abc 123") == 1 and one(Regex(r"\d{3}"), "12") == 0
    assert one(Regex(), "abc", "^a.c$") == 1
    with pytest.raises(InputError, match="a regular expression"):
        Regex("(")
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
    assert one(JsonSchema(), '{"name": "a"}', schema) == 1 and one(JsonSchema(), '{"name": 1}', schema) == 0
    assert one(JsonSchema(), 'Here:\n```json\n{"name": "a"}\n```', json.dumps(schema)) == 1
    assert one(JsonSchema(), "not json", schema) == 0
    (tmp_path / "s.json").write_text(json.dumps(schema))
    assert one(JsonSchema(str(tmp_path / "s.json")), '{"name": "a"}') == 1
    with pytest.raises(InputError, match="a JSON schema"):
        one(JsonSchema(), "{}", {"type": "nothing"})


GOLD = [{"name": "search", "parameters": {"q": "a", "k": 3}}, {"name": "add", "parameters": {"x": 1}}]


def call(*calls: dict[str, Any]) -> str:
    return "<tool_call>\n" + "\n".join(map(json.dumps, calls)) + "\n</tool_call>"


@pytest.mark.parametrize(
    ("calls", "score"),
    [
        ((GOLD[0] | {"parameters": {"q": "a", "k": 4}}, GOLD[1]), 2.0),
        (({"name": "search", "parameters": {"q": "a", "z": 4}},), -1.166667),
        (({"name": "foo", "parameters": {}},), -3.0),
        (tuple(GOLD), 3.0),
    ],
)
def test_tool_calls(calls: Any, score: float) -> None:
    assert one(ToolCall(layout=False), call(*calls), GOLD) == pytest.approx(score, abs=2e-6)
    told = f"<think>so</think>\n{call(*calls)}"
    assert one(ToolCall(), told, GOLD) == pytest.approx(score + 1, abs=2e-6)


def test_tool_calls_that_cannot_be_read_or_are_not_wanted() -> None:
    assert one(ToolCall(), "<think>x</think> <response>hello</response>", []) == 1
    assert one(ToolCall(), "hello", []) == 0
    for text in ("no call", "<tool_call>{</tool_call>", "<tool_call>[1]</tool_call>"):
        assert one(ToolCall(layout=False), text, GOLD) == -3
    with pytest.raises(InputError, match=r"data\[0\]\.calls: .*a list of"):
        one(ToolCall(), "x", [{"parameters": {}}])


def test_boxes() -> None:
    found = [((0, 0, 10, 10), ""), ((20, 20, 30, 30), ""), ((50, 50, 60, 60), "")]
    gold = [((0, 0, 10, 8), ""), ((22, 20, 32, 30), "")]
    assert generalised_iou(found[0][0], gold[0][0]) == pytest.approx(0.8)
    assert generalised_iou(found[1][0], gold[1][0]) == pytest.approx(0.666667, abs=2e-6)
    pytest.importorskip("scipy")
    for high, low, over_all, wanted in (
        (0.75, 0.5, False, (0.833333, 1.0)),
        (0.9, 0.75, False, (0.4, 0.5)),
        (0.75, 0.5, True, (0.555556, 1.0)),
        (0.9, 0.75, True, (0.266667, 0.5)),
    ):
        assert box_scores(found, gold, low, high, over_all) == pytest.approx(wanted, abs=2e-6)
    text = json.dumps([list(box) for box, _ in found])
    assert one(Boxes(), text, [list(box) for box, _ in gold]) == pytest.approx(2.833333, abs=2e-6)
    assert one(Boxes(), "[]", []) == 3 and one(Boxes(), "[]", [[0, 0, 1, 1]]) == 0 and one(Boxes(), "none", []) == 0


def test_overlong() -> None:
    reward = Overlong(20480, 4096)
    for tokens, score in ((100, 0), (16384, 0), (18432, -0.5), (20480, -1), (30000, -1)):
        assert one(reward, "x", tokens=tokens) == score


def test_unit_tests() -> None:
    tests = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]
    right = "```python\ndef add(a, b):\n    return a + b\n```"
    assert one(UnitTests(), right, tests) == 1
    assert one(UnitTests(), "def add(a, b): return a - b", tests) == 0
    assert one(UnitTests(), "def add(a, b:", tests) == 0
    with pytest.raises(InputError, match="Python code"):
        one(UnitTests(), right, "assert (")


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "while True: pass",
        "import time; time.sleep(60)",
        "x = [0] * 10**9",
        "open('big', 'wb').write(b'0' * 10**8)",
        "raise SystemExit",
        "open('passed', 'w').write('x')",
    ],
)
def test_code_that_does_not_pass(code: str) -> None:
    assert not passes(code, "raise SystemExit(1)" if "passed" in code else "assert True", seconds=1)


def test_code_that_passes_sees_nothing_of_the_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    assert passes("import os", "assert 'SECRET' not in os.environ and os.listdir('.')", seconds=5)


def test_rewards_in_the_algebra() -> None:
    """Verifiable members of a sum read their columns; prompts are texts or chats; what is missing is named."""
    reward = parse_reward("2*answer - 0.5*length + overlong:8,4")
    chat = [{"role": "user", "content": "two and two"}]
    known = with_rows(reward, ["p", chat], [{"prompt": "p", "answer": "4"}, {"prompt": chat, "answer": "4"}])
    assert isinstance(known, Composable)
    samples = Samples(
        ["p", chat], ["4", "5 5"], torch.tensor([0, 1]), torch.zeros(2).double(), tokens=[[1] * 2, [1] * 6]
    )
    assert known(samples).tolist() == [2 - 0.5, -1.0 - 0.5]
    with pytest.raises(InputError, match=r"data\[0\]\.answer: got 'nothing'; allowed: rows with answer"):
        with_rows(reward, ["p"], ["p"])
    with pytest.raises(InputError, match="prompts whose rows have the column answer"):
        one(parse_reward("answer"), "4")
    with pytest.raises(InputError, match="what the same prompt has before"):
        with_rows(reward, ["p", "p"], [{"answer": "1"}, {"answer": "2"}])
    for text in ("regex:a", "unit_tests", "json_schema"):
        with pytest.raises(InputError):
            parse_reward(text, trusted=False)
