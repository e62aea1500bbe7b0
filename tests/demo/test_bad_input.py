"""Bad input in every field of every tab: one line that names the field, and the page goes on working."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import PAIRS, Visit, open_tab, run

NAN, INF = float("nan"), float("inf")
LONG = "x" * 100_000
SHAPES: list[Any] = [{"a": 1}, [[1], {}], True]
"""Values that no field takes."""
TEXT = [*SHAPES, None, "", LONG]
OPTIONAL = [*SHAPES, LONG]
EXPRESSION = [*TEXT, " ", "sentiment -", "sentiment * (", "__import__('os')", "nobody", "1/0", "(" * 5000, "\x00"]
NUMBER = [{"a": 1}, [1], None, "", "NaN", "many", NAN, INF, -INF, -1, 10**9, 1e300, 10**400]
WHOLE = [*NUMBER, 2.5]
CHOICE = [*SHAPES, None, "", "nothing", LONG, 3]
CARDS = [None, "nothing", 3, [], {}, {"cards": [1]}, {"cards": {}}, {"cards": [{}]}] + [
    {"cards": [{"name": "glad", "strength": 1.0, **wrong}]}
    for wrong in (
        {"strength": NAN},
        {"strength": None},
        {"strength": "much"},
        {"strength": 1e30},
        {"name": "../glad"},
        {"name": "nobody"},
        {"name": LONG},
        {"name": None},
        {"name": ["glad"]},
        {"layers": "1; rm"},
        {"layers": "99"},
        {"layers": [1]},
        {"scope": "here"},
        {"scope": {"a": 1}},
        {"other": 1},
    )
]
SENTENCES = [*SHAPES, None, "", "one line", LONG * 5, "\n".join(map(str, range(3000)))]

VALID: dict[str, dict[str, Any]] = {
    "steer": {
        "prompt": "tell me",
        "raw": False,
        "edits": {"cards": [{"name": "glad", "strength": 1.0}]},
        "system": "",
        "reward": "sentiment",
        "temperature": 0.7,
        "max_tokens": 4,
        "seed": 0,
    },
    "make_vector": {
        "positive": "the dog is good\nthe cat is good",
        "negative": "the dog is bad\nthe cat is bad",
        "name": "mine",
        "method": "mean",
    },
    "search": {
        "prompt": "tell me",
        "reward": "sentiment",
        "sampler": "fk",
        "budget": 16,
        "max_tokens": 4,
        "beta": 0.1,
        "temperature": 0.7,
        "seed": 0,
    },
    "images": {
        "prompt": "bag",
        "reward": "class:bag",
        "methods": ["plain"],
        "particles": 2,
        "steps": 2,
        "beta": 1.0,
        "w": 1.0,
        "seed": 0,
    },
    "frontier": {
        "prompts": "tell me\nthe dog",
        "reward": "sentiment",
        "methods": ["best-of-n"],
        "edits": "glad",
        "strengths": "0.5",
        "system": "",
        "n": 1,
        "max_tokens": 2,
        "temperature": 0.7,
        "seed": 0,
    },
}
"""What every endpoint takes."""
BAD: dict[str, dict[str, list[Any]]] = {
    "steer": {
        "prompt": TEXT,
        "raw": [{"a": 1}, [1], "perhaps", 7],
        "edits": CARDS,
        "system": OPTIONAL,
        "reward": [value for value in EXPRESSION if value not in (None, "", " ")],
        "temperature": NUMBER,
        "max_tokens": WHOLE,
        "seed": [value for value in WHOLE if value != 10**9],
    },
    "make_vector": {
        "positive": SENTENCES,
        "negative": SENTENCES,
        "name": [*TEXT, "../mine", "a b", "a" * 49, "-"],
        "method": CHOICE,
    },
    "search": {
        "prompt": TEXT,
        "reward": EXPRESSION,
        "sampler": CHOICE,
        "budget": WHOLE,
        "max_tokens": WHOLE,
        "beta": NUMBER,
        "temperature": NUMBER,
        "seed": [value for value in WHOLE if value != 10**9],
    },
    "images": {
        "prompt": [*OPTIONAL, "a spoon"],
        "reward": [*EXPRESSION, "sentiment", "class:", "class:spoon"],
        "methods": [*SHAPES, None, "", [], ["nothing"], [None]],
        "particles": WHOLE,
        "steps": WHOLE,
        "beta": NUMBER,
        "w": [value for value in NUMBER if value != -1],
        "seed": [value for value in WHOLE if value != 10**9],
    },
    "frontier": {
        "prompts": [*SHAPES, None, "", "one line", f"a\n{LONG}", "\n".join(map(str, range(40)))],
        "reward": EXPRESSION,
        "methods": [*SHAPES, None, "", [], ["nothing"], [None]],
        "edits": [*SHAPES, "nobody", "glad, nobody", "../glad", LONG],
        "strengths": [*SHAPES, None, "", "much", "1, NaN", "1e400", "1,,2", ",".join(["1"] * 40)],
        "system": OPTIONAL,
        "n": WHOLE,
        "max_tokens": WHOLE,
        "temperature": NUMBER,
        "seed": [value for value in WHOLE if value != 10**9],
    },
}
SAID = {"positive": "sentences", "negative": "sentences", "reward": "class:"}
"""What a line may name in place of a field."""


def _handler(page: Any, endpoint: str) -> Any:
    return next(one.fn for one in page.blocks.fns.values() if one.api_name == endpoint)


def _asked(page: Any, endpoint: str, **given: Any) -> list[dict[str, Any]]:
    """What the endpoint says in its line, update by update."""

    async def gathered() -> list[dict[str, Any]]:
        found, who = [], SimpleNamespace(session_hash="hostile")
        async for update in _handler(page, endpoint)(who, None, *(VALID[endpoint] | given).values()):
            found += [
                value for value in update.values() if isinstance(value, dict) and value.keys() == {"text", "wrong"}
            ]
        return found

    found: list[dict[str, Any]] = run(gathered())
    return found


@pytest.mark.parametrize(("endpoint", "field"), [(endpoint, field) for endpoint in BAD for field in BAD[endpoint]])
def test_bad_values_are_one_line(page: Any, endpoint: str, field: str) -> None:
    wrong = []
    for value in BAD[endpoint][field]:
        line = _asked(page, endpoint, **{field: value})[-1]
        clear = line["wrong"] and (field in line["text"] or SAID.get(field, field) in line["text"])
        if not clear or "went wrong" in line["text"] or "Traceback" in line["text"] or len(line["text"]) > 600:
            wrong.append((repr(value)[:60], line["text"][:200]))
    assert wrong == []


@pytest.mark.parametrize("endpoint", VALID)
def test_what_is_right_is_taken(page: Any, endpoint: str) -> None:
    assert not any(line["wrong"] for line in _asked(page, endpoint))


def test_every_endpoint_is_in_the_table(page: Any) -> None:
    named = {one.api_name for one in page.blocks.fns.values() if one.api_name and one.fn is not None}
    assert set(VALID) | {"estimate"} <= named
    assert all(VALID[name].keys() == BAD[name].keys() for name in VALID)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("pairs.jsonl", b"", "pairs"),
        ("pairs.jsonl", b"{", "pairs"),
        ("pairs.jsonl", b"\xff\xfe\x00\x01", "pairs"),
        ("pairs.jsonl", b'{"positive": 1, "negative": []}\n', "pairs"),
        ("pairs.csv", b"a,b\n1,2\n", "pairs"),
    ],
)
def test_a_wrong_file_is_one_line(visit: Any, tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    tab = visit()
    open_tab(tab, "Make a vector")
    tab.set_input_files("#pairs-file input[type=file], input#pairs-file, input[type=file]", tmp_path / name)
    tab.wait_for_selector("#vector-note .wrong")
    text = tab.inner_text("#vector-note")
    assert told in text and "Traceback" not in text and "went wrong" not in text
    for field, side in (("more", "positive"), ("less", "negative")):
        tab.fill(f"#{field} textarea", "\n".join(pair[side] for pair in PAIRS))
    tab.click("#make")
    tab.wait_for_selector(".steer-layers .layer")


def test_numbers_beyond_a_slider_are_one_line(page: Any, chromium: Any) -> None:
    """As they are typed beside it, where the browser lets them through."""
    from helpers import number

    visit = Visit(chromium, page.url)
    open_tab(visit.tab, "Search")
    number(visit.tab, "Tokens at most, of one text", 10**9)
    visit.tab.fill("#search-budget input", str(10**9))
    visit.tab.click("#search-go")
    visit.tab.wait_for_selector("#search-note .wrong")
    assert "budget" in visit.tab.inner_text("#search-note") or "max_tokens" in visit.tab.inner_text("#search-note")
    visit.close()
