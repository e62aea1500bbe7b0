"""Rows that one call of `generate` answers: images, endpoints, masked language models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from steer.bulk.source import Row, spent
from steer.core import Samples, check
from steer.seeds import mixed

__all__ = ["Outputs"]

_FIELDS = frozenset({"id", "prompt", "messages", "n", "seed"})
_LONGEST = 200
"""Characters of an image's name, before its number."""


@dataclass(frozen=True)
class _Call:
    """One row's prompt, seed and settings."""

    prompt: Any
    seed: int
    settings: dict[str, Any]
    kept: dict[str, Any]


class Outputs:
    """Answers each row by a call of `generate`.

    A row has `prompt` or `messages`, and may have `n` and `seed`. Images are written to a folder, and their paths, as
    they are seen from the records' folder, into the record.

    Args:
        model: what generates: a `steer.model.Model`.
        settings: of `generate`, for every row.
        images: the folder for images; None for texts.
        seed: rows without a seed get one that follows from this and their id.
        keep: further fields, which are carried into the record.
        capacity: calls that run at one time, each in a thread: more than one for endpoints alone.
        write: writes an image `[C, H, W]` to a path.
    """

    def __init__(
        self,
        model: Any,
        settings: Mapping[str, Any],
        *,
        images: Path | None = None,
        seed: int = 0,
        keep: frozenset[str] = frozenset(),
        capacity: int = 1,
        write: Callable[[Any, Path], None] | None = None,
    ) -> None:
        self.model, self.settings, self.images = model, dict(settings), images
        self.seed, self.keep, self.capacity, self._write = seed, keep, capacity, write

    def check_fields(self, names: frozenset[str]) -> None:
        """Raise `InputError` for columns that are neither a row's nor kept."""
        check_fields(names, self.keep)

    def rows(self, asked: _Call) -> int:
        """One call."""
        return 1

    def prepare(self, row: Row) -> _Call:
        """A row's call. Raises `InputError`."""
        data = row.data or {}
        named = [name for name in ("prompt", "messages") if name in data]
        check(len(named) == 1, "prompt", None, "a row with a prompt or messages")
        seed = data.get("seed", mixed("bulk", self.seed, row.id) % 2**31)
        check(isinstance(seed, int) and not isinstance(seed, bool), "seed", seed, "an integer")
        more = {"n": data["n"]} if "n" in data else {}
        kept = {name: data[name] for name in (*named, *sorted(self.keep & data.keys()))}
        return _Call(data[named[0]], seed, {**self.settings, **more}, kept)

    async def answer(self, row: Row, asked: _Call) -> dict[str, Any]:
        """The row's record."""
        drawn: Samples = await asyncio.to_thread(self.model.generate, [asked.prompt], seed=asked.seed, **asked.settings)
        samples = drawn.to_dict()["prompts"][0]["samples"]
        if self.images is not None and self._write is not None:
            for i, (sample, image) in enumerate(zip(samples, drawn.outputs, strict=True)):
                path = self.images / f"{_file_name(row.id)}-{i}.png"
                await asyncio.to_thread(self._write, image, path)
                sample["image"] = f"{self.images.name}/{path.name}"
        return {"id": row.id, **asked.kept, "samples": samples, "seed": asked.seed, "cost": spent(drawn.cost)}

    def failure(self, row: Row, message: str, field: str | None) -> dict[str, Any]:
        """The record of a row that failed."""
        return {"id": row.id, "samples": [], "error": {"message": message, "param": field}}

    def close(self) -> None:
        """Nothing is held."""


def _file_name(text: str) -> str:
    """A file's name for an id: other signs than letters, digits, dot (but at the start) and dash are written as their
    code, and a long name ends in a digest.
    """
    spelled = [
        c if c.isascii() and (c.isalnum() or c == "-" or (c == "." and i)) else f"_{ord(c):x}_"
        for i, c in enumerate(text)
    ]
    name = "".join(spelled)
    return (
        name
        if len(name) <= _LONGEST
        else f"{name[: _LONGEST - 33]}_{blake2b(text.encode(), digest_size=16).hexdigest()}"
    )


def check_fields(names: frozenset[str], keep: frozenset[str]) -> None:
    """Raise `InputError` for columns that are neither a row's nor kept."""
    unknown = sorted(names - _FIELDS - keep)
    check(not unknown, "source", f"a field {', '.join(unknown)}", f"{', '.join(sorted(_FIELDS))}, or --keep NAME")
