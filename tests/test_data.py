"""Data files as people have them: what is read is what was written, and what is not read is named by its row."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from steer.cli.checks import read_pairs, read_prompts, read_rows
from steer.core import InputError
from steer.data import plain_pair, read_table
from steer.train.vector import encode_pairs

PAIRS = [{"positive": f"good\u2028day {i}", "negative": f'bad, "day"\n{i}'} for i in range(3)]
JSONL = "\n".join(json.dumps(row, ensure_ascii=False) for row in PAIRS)


@pytest.mark.parametrize(
    "data",
    [
        JSONL.encode(),
        JSONL.encode("utf-8-sig"),
        JSONL.encode("utf-16"),
        JSONL.replace("\n", "\r\n").encode(),
        (JSONL + "\n\n").encode(),
        json.dumps(PAIRS, indent=1).encode(),
        json.dumps(PAIRS).encode("utf-8-sig"),
    ],
)
def test_json_as_editors_and_programs_write_it(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(data)
    assert read_pairs(tmp_path / "pairs.jsonl") == PAIRS


@pytest.mark.parametrize("delimiter, suffix", [(",", ".csv"), ("\t", ".tsv")])
def test_csv_with_a_byte_order_mark_quotes_and_further_columns(delimiter: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"pairs{suffix}"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["id", "positive", "negative"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows({"id": i, **row} for i, row in enumerate(PAIRS))
    assert [{k: row[k] for k in ("positive", "negative")} for row in read_pairs(path)] == PAIRS


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "pairs.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(PAIRS), path)
    assert read_pairs(path) == PAIRS
    chats = [[{"role": "user", "content": "hello"}], [{"role": "user", "content": "Ho"}]]
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": c, "n": None} for c in chats]), path)
    assert read_prompts(path) == chats
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(InputError, match="parquet"):
        read_pairs(path)


CHAT = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(["Hello", CHAT]),
        json.dumps(["Hello", CHAT], indent=1),
        f'"Hello"\n{json.dumps(CHAT)}\n',
        f'{{"prompt": "Hello"}}\n{json.dumps({"prompt": CHAT, "id": 3})}',
        f'{{"prompt": "Hello"}}\n{json.dumps({"messages": CHAT})}',
        f'{{"text": "Hello", "id": 3}}\n{json.dumps({"messages": CHAT, "text": "not this"})}',
    ],
)
def test_prompts_as_a_list_as_lines_and_as_rows(text: str, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text(text)
    assert read_prompts(tmp_path / "prompts") == ["Hello", CHAT]


def test_a_row_without_a_prompt_is_told_what_it_may_have(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"question": "Hello"}')
    with pytest.raises(InputError, match=r"line 1: got .*question.* a row with one as prompt, messages or text"):
        read_prompts(tmp_path / "prompts.jsonl")


def test_prompts_of_chats_a_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(f"{json.dumps(CHAT)}\n{json.dumps(CHAT)}\n")
    assert read_prompts(tmp_path / "prompts.jsonl") == [CHAT, CHAT]


USER, GOOD, BAD = CHAT[0], {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
PARTS = {"role": "assistant", "content": [{"type": "text", "text": "go"}, {"type": "text", "text": "od"}]}


@pytest.mark.parametrize(
    "columns, row, want",
    [
        ("prompt completion", {"messages": [USER, GOOD]}, {"prompt": CHAT, "completion": "good"}),
        ("prompt completion", {"prompt": CHAT, "completion": [GOOD]}, {"prompt": CHAT, "completion": "good"}),
        ("prompt completion", {"prompt": "hello", "completion": [PARTS]}, {"prompt": "hello", "completion": "good"}),
        (
            "prompt chosen rejected",
            {"prompt": CHAT, "chosen": [GOOD], "rejected": [BAD]},
            {"prompt": CHAT, "chosen": "good", "rejected": "bad"},
        ),
        (
            "prompt chosen rejected",
            {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
            {"prompt": CHAT, "chosen": "good", "rejected": "bad"},
        ),
        (
            "prompt completion label",
            {"prompt": "hello", "completion": [GOOD], "label": "True"},
            {"prompt": "hello", "completion": "good", "label": True},
        ),
        (
            "prompt completion label",
            {"prompt": "hello", "completion": "bad", "label": 0},
            {"prompt": "hello", "completion": "bad", "label": False},
        ),
    ],
)
def test_columns_of_trl(columns: str, row: dict[str, Any], want: dict[str, Any], tmp_path: Path, tiny_lm: Any) -> None:
    from steer.adapters.transformers.policy.data import PolicySettings
    from steer.adapters.transformers.policy.data import read_rows as as_tokens

    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    assert read_rows(tmp_path / "data.jsonl", columns.split()) == [want]
    method = {"completion": "sft", "rejected": "dpo", "label": "kto"}[columns.split()[-1]]
    loss = {"loss": "apo_zero_unpaired"} if method == "kto" else {}
    tuning = PolicySettings(method=method, lora_rank=4, batch_size=2, group_size=2, max_new_tokens=4, steps=1, **loss)
    assert as_tokens(tiny_lm, [row], tuning) == as_tokens(tiny_lm, [want], tuning)


def test_pairs_with_the_columns_of_preferences(tmp_path: Path, tiny_lm: Any) -> None:
    rows = [{"chosen": [USER, GOOD], "rejected": [USER, BAD]}, {"prompt": "hello", "chosen": "good", "rejected": "bad"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_pairs(tmp_path / "pairs.jsonl")
    assert found == [{"prompt": p, "positive": "good", "negative": "bad"} for p in (CHAT, "hello")]
    positive, negative = encode_pairs(tiny_lm, rows)
    assert positive[0] == positive[1] != negative[0] == negative[1]


@pytest.mark.parametrize(
    "name, data, said",
    [
        ("p.jsonl", b'{"positive": "a", "negative": "b"}\n{"positive": "a"', "pairs line 2"),
        ("p.jsonl", b'{"positive": "half \\ud83d", "negative": "b"}', "pairs line 1.positive"),
        ("p.jsonl", b'{"chosen": [{"role": "user", "content": "a"}], "rejected": []}', "pairs line 1"),
        ("p.json", b'[{"positive": "a", "negative": "b"}, ["a", "b"]]', "pairs row 2"),
        ("p.json", b'[{"positive": "a", "negative": "b"}', "not JSON"),
        ("p.csv", b"positive,negative\na,b\n,c\n", "pairs row 2"),
        ("p.csv", b"text,label\na,b\n", "pairs row 1"),
        ("p.jsonl", "{'positive': 'ä'}".encode("latin-1"), "utf-8"),
        ("p.jsonl", b"\x1f\x8b\x08\x00", "decode"),
        ("p.jsonl", b"", "0 rows"),
        ("p.jsonl", b"\n \n", "0 rows"),
    ],
)
def test_what_is_not_read_is_named_by_its_row(name: str, data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as refused:
        read_pairs(tmp_path / name)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_replies_of_several_messages_and_other_conversations_are_refused(tmp_path: Path) -> None:
    for row in (
        {"prompt": CHAT, "chosen": [GOOD, USER, GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "Ho"}, BAD]},
        {"prompt": CHAT, "chosen": [{"role": "assistant", "content": [{"type": "image"}]}], "rejected": [BAD]},
        {"prompt": CHAT, "chosen": [USER], "rejected": [BAD]},
    ):
        (tmp_path / "data.jsonl").write_text(json.dumps(row))
        with pytest.raises(InputError, match=r"data line 1\.(chosen|rejected)"):
            read_rows(tmp_path / "data.jsonl", ("prompt", "chosen", "rejected"))


def test_half_an_emoji_in_rows_that_a_program_hands_over(tiny_lm: Any) -> None:
    good = {"positive": "a", "negative": "b"}
    with pytest.raises(InputError, match=r"pairs\[1\].negative"):
        encode_pairs(tiny_lm, [good, {"positive": "a", "negative": "b \ude00"}])


# ---------------------------------------------------------------------------------------- CSV as spreadsheets write it


@pytest.mark.parametrize(
    "text",
    [
        "positive;negative\na, b;c\nd;e\n",
        "sep=;\npositive;negative\na, b;c\nd;e\n",
        'sep=,\r\npositive,negative\r\n"a, b",c\r\nd,e\r\n',
        'positive,negative,,\n"a, b",c,,\nd,e,,\n',
        'positive,negative\n\n"a, b",c\n\nd,e\n',
    ],
    ids=["semicolons", "sep=;", "sep=,", "empty columns", "empty lines"],
)
def test_spreadsheets_csv(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text, newline="")
    assert [row for _, row in read_table("pairs", tmp_path / "a.csv", "rows")] == [
        {"positive": "a, b", "negative": "c"},
        {"positive": "d", "negative": "e"},
    ]


def test_a_long_cell(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("positive,negative\n" + "x" * 200_000 + ",y\n")
    (_, row), *_ = read_table("pairs", tmp_path / "a.csv", "rows")
    assert len(row["positive"]) == 200_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("positive,negative\na,b\nwell, now,b\n", ["pairs row 2", "without a column", "quoted"]),
        ("positive,negative,positive\na,b,c\n", ["pairs", "several columns ['positive']"]),
    ],
    ids=["a comma that is not quoted", "a column twice"],
)
def test_cells_are_never_dropped(text: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError) as caught:
        read_table("pairs", tmp_path / "a.csv", "rows")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("prompt", ["q", [{"role": "user", "content": "q"}]], ids=["text", "messages"])
def test_replies_that_repeat_the_prompt(prompt: Any) -> None:
    """As the UltraFeedback files have it: the prompt, and whole conversations."""
    asked = [{"role": "user", "content": "q"}]
    replies = (("chosen", "a"), ("rejected", "b"))
    row = {name: [*asked, {"role": "assistant", "content": text}] for name, text in replies}
    assert plain_pair({"prompt": prompt, **row}, "pairs") == {"prompt": prompt, "positive": "a", "negative": "b"}
    with pytest.raises(InputError, match="chosen"):
        plain_pair({"prompt": "another", **row}, "pairs")
