"""Rows of data files as the ecosystem writes them: JSON lines, a JSON list, CSV, parquet; texts or conversations."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from steer.core import InputError, check
from steer.core.errors import check_unicode, first_line
from steer.core.messages import plain_messages
from steer.core.names import nearby

__all__ = ["FORMATS", "csv_row", "plain_pair", "plain_row", "prompt_of", "read_json", "read_table", "read_text"]

FORMATS = "JSON lines, a JSON list, CSV or parquet"
_ENCODED = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def read_text(field: str, path: Path, allowed: str) -> str:
    """A file's text, or that of standard input for `-`: UTF-8, or UTF-16 where its first bytes say so, without its
    byte-order mark. Raises `InputError`.
    """
    try:
        if str(path) == "-":
            data = sys.stdin.buffer.read()
        else:
            given = f"{path} (a folder)" if path.is_dir() else f"{path} (no such file)"
            check(path.is_file(), field, given, f"{allowed}{nearby(path)}")
            data = path.read_bytes()
        return data.decode(_ENCODED.get(data[:2], "utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(field, f"{path} ({error})", allowed) from error


def read_json(field: str, path: Path, text: str, allowed: str) -> Any:
    """Text as JSON. Raises `InputError`, for half a surrogate pair too."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(field, f"{path} (not JSON: {error})", allowed) from error
    check_unicode(field, found)
    return found


def read_table(field: str, path: Path, allowed: str) -> list[tuple[str, Any]]:
    """Rows of a file, each with its place for messages ("pairs line 3"). Lines of JSON end at line feeds alone. Raises
    `InputError`.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        return list(_numbered(field, _parquet(field, path, allowed)))
    text = read_text(field, path, allowed)
    if kind in (".csv", ".tsv"):
        return list(_numbered(field, _csv(field, text, "\t" if kind == ".tsv" else None, allowed)))
    if str(path) == "-" and _is_head(text):
        return list(_numbered(field, _csv(field, text, "\t" if "\t" in text.partition("\n")[0] else None, allowed)))
    if text.lstrip().startswith("["):
        found = _whole(field, path, text, allowed)
        if found is not None:
            return list(_numbered(field, found))
    lines = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
    return [(f"{field} line {n}", read_json(f"{field} line {n}", path, line, allowed)) for n, line in lines]


_COLUMNS = {"prompt", "messages", "text", "input", "positive", "chosen", "completion"}


def _is_head(text: str) -> bool:
    """Whether a text of standard input, which has no suffix, begins with the names of columns."""
    return bool(_COLUMNS & {name.strip(' \r"') for name in re.split("[,;\t]", text.partition("\n")[0])})


def _numbered(field: str, rows: list[Any]) -> Iterator[tuple[str, Any]]:
    for n, row in enumerate(rows, 1):
        check_unicode(f"{field} row {n}", row)
        yield f"{field} row {n}", row


def _whole(field: str, path: Path, text: str, allowed: str) -> list[Any] | None:
    """A text that is one JSON list; None where each line is one of its own, such as a chat."""
    first = next(line for line in text.split("\n") if line.strip())
    try:
        json.loads(first)
        several = sum(bool(line.strip()) for line in text.split("\n")) > 1
    except (ValueError, RecursionError):
        several = False
    return None if several else list(read_json(field, path, text, allowed))


def _csv(field: str, text: str, delimiter: str | None, allowed: str) -> list[dict[str, Any]]:
    """Rows by the names in the first line, or in the second after Excel's `sep=;`. A cell that is a JSON list, such as
    messages, is one. Raises `InputError` for names that come twice, and for rows with more cells than names.
    """
    head, _, rest = text.partition("\n")
    if delimiter is None and head.rstrip("\r")[:4] == "sep=" and len(head.rstrip("\r")) == 5:
        delimiter, text, head = head[4], rest, rest.partition("\n")[0]
    semicolons = delimiter is None and ";" in head and "," not in head
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter or (";" if semicolons else ","))
    found: list[dict[str, Any]] = []
    try:
        names = next(rows, [])
        twice = [name for i, name in enumerate(names) if name in names[:i] and name]
        check(not twice, field, f"several columns {twice[:1]}", "each column once")
        for row in rows:
            if not row:
                continue
            cells: dict[Any, Any] = {**dict(zip(names, row, strict=False)), None: row[len(names) :]}
            found.append(csv_row(cells, f"{field} row {len(found) + 1}"))
    except csv.Error as error:
        raise InputError(f"{field} row {len(found) + 1}", str(error), allowed) from error
    return found


def csv_row(row: Mapping[Any, Any], field: str = "row") -> dict[str, Any]:
    """A row as `csv.DictReader` gives it, without its empty cells; a cell that is a JSON list of objects, such as
    messages, is one. Raises `InputError` for cells beyond the columns.
    """
    surplus = [cell for cell in row.get(None) or () if cell]
    check(not surplus, field, f"cells without a column, {surplus}", "as many cells as columns; text is quoted")
    return {k: _cell(v) for k, v in row.items() if k is not None and v not in (None, "")}


def _cell(text: str) -> Any:
    if not text.startswith("[{"):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _parquet(field: str, path: Path, allowed: str) -> list[dict[str, Any]]:
    check(path.is_file(), field, f"{path} (no such file)", f"{allowed}{nearby(path)}")
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(field, str(path), "JSON lines or CSV: parquet needs pyarrow (pip install pyarrow)") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(field, f"{path} ({first_line(error)})", allowed) from error
    return [{k: v for k, v in row.items() if v is not None} for row in rows]


# ------------------------------------------------------------------------------------------------------- conversations


def prompt_of(row: Any) -> Any:
    """The prompt of a row, its column `prompt`, `messages` or `text`; a row that is no mapping is one itself."""
    if not isinstance(row, Mapping):
        return row
    return next((row[name] for name in ("prompt", "messages", "text") if name in row), row)


def plain_row(row: Any, field: str) -> Any:
    """A row whose replies are texts, from one in TRL's conversational columns: `messages`; or lists of messages as
    `completion`, `chosen` and `rejected`, whose prompt may be what both begin with, or be repeated in them. Other rows
    are given back as they are. Raises `InputError` for a reply of several messages.
    """
    if not isinstance(row, Mapping):
        return row
    made = dict(row)
    if "messages" in made and "completion" not in made:
        made["prompt"], made["completion"] = _split(made.pop("messages"), f"{field}.messages")
    replies = [name for name in ("completion", "chosen", "rejected") if isinstance(made.get(name), list | tuple)]
    if "prompt" not in made and {"chosen", "rejected"} <= set(replies):
        prompt, made["chosen"] = _split(made["chosen"], f"{field}.chosen")
        other, made["rejected"] = _split(made["rejected"], f"{field}.rejected")
        check(prompt == other, f"{field}.rejected", other, "the conversation that chosen continues")
        made["prompt"] = prompt
        replies = []
    for name in replies:
        before, made[name] = _split(made[name], f"{field}.{name}")
        repeated = not before or _said(before) == _said(made.get("prompt"))
        allowed = "one message of the assistant's: the others are the prompt"
        check(repeated, f"{field}.{name}", row[name], allowed)
    if isinstance(made.get("label"), str | int | float) and str(made["label"]).strip().lower() in _LABELS:
        made["label"] = _LABELS[str(made["label"]).strip().lower()]
    return made


def _said(prompt: Any) -> list[tuple[Any, Any]]:
    """Who says what in a prompt."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    return [(message["role"], message["content"]) for message in plain_messages(messages)]


def plain_pair(row: Any, field: str) -> Any:
    """A row with `positive` and `negative`, which are TRL's `chosen` and `rejected` where it has neither."""
    row = plain_row(row, field)
    if isinstance(row, dict) and {"chosen", "rejected"} <= set(row) and not {"positive", "negative"} & set(row):
        row["positive"], row["negative"] = row.pop("chosen"), row.pop("rejected")
    return row


def _split(messages: Any, field: str) -> tuple[list[dict[str, Any]], str]:
    """The messages before the assistant's last, and its text."""
    try:
        found = plain_messages(messages)
    except InputError as error:
        raise InputError(f"{field}: {error.field}", error.given, error.allowed) from error
    check(found[-1]["role"] == "assistant", field, messages, "messages that end with the assistant's")
    return found[:-1], str(found[-1]["content"])
