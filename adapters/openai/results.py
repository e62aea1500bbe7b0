"""Answers that were paid for, kept in a file of JSON lines from which a repeated run goes on.

The first line says what the file is. Every other holds one answer under the hash of what was asked: address, path,
body and seed. Lines are appended whole, in one write each, so that a run that is killed leaves at most one torn line at
the end, which the next run passes over. Prompts are not kept, answers are.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from steer.core import InputError, SteerError, check

__all__ = ["Results"]


_HEADER = {"format": "steer-endpoint-results", "version": 1}


class Results:
    """The answers in `path`, which is made where it is not there. Raises `InputError` for a file that is not one of
    these.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._answers: dict[str, Any] = {}
        place = self.path if self.path.exists() else self.path.parent
        check(
            self.path.parent.is_dir() and os.access(place, os.W_OK),
            "results",
            str(path),
            "a file that can be written, in a folder that exists",
        )
        content = self._content()
        lines = content.split(b"\n")
        if content:
            check(_parsed(lines[0]) == _HEADER, "results", str(path), "a new file, or one that a run like this wrote")
            for line in lines[1:]:
                entry = _parsed(line)
                if entry is not None and {"key", "answer"} <= entry.keys():
                    self._answers[entry["key"]] = entry["answer"]
        self._opening = b"" if content.endswith(b"\n") else b"\n" if content else _line(_HEADER)

    def __repr__(self) -> str:
        return f"Results({str(self.path)!r})"

    def __len__(self) -> int:
        return len(self._answers)

    def _content(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise InputError("results", str(self.path), f"a file ({error.strerror})") from None

    @staticmethod
    def key(*asked: Any) -> str:
        """The name of an answer, from everything that it depends on."""
        return hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def find(self, key: str) -> Any | None:
        return self._answers.get(key)

    def keep(self, key: str, answer: Any) -> None:
        """Append an answer. Raises `SteerError` where the disk does not take it."""
        with self._lock:
            try:
                self._append(self._opening + _line({"key": key, "answer": answer}))
            except OSError as error:
                raise SteerError(f"results: could not write {str(self.path)!r}: {error.strerror}") from error
            self._opening = b""
            self._answers[key] = answer

    def _append(self, content: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            while content:
                content = content[os.write(descriptor, content) :]
        finally:
            os.close(descriptor)


def _line(entry: Any) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
