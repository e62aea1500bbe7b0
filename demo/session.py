"""What belongs to one visitor: a folder, the names in it, and the end of it.

A visitor is known by the hash that the page made when it was opened. What they make is written into a folder of their
own, which is removed when they leave, or when they have been away for too long.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steer.core import InputError, check

__all__ = ["LIMIT_BYTES", "LIMIT_SECONDS", "Visitor", "Visitors"]

LIMIT_BYTES = 64 << 20
"""Of everything that one visitor keeps."""
LIMIT_SECONDS = 3600.0
"""Without a sign of life, after which a visitor's folder is removed."""
_LIMIT_VISITORS = 1000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,47}")


@dataclass
class Visitor:
    """One open page."""

    folder: Path
    seen: float = field(default_factory=time.monotonic)
    _runs: list[tuple[Any, asyncio.Event]] = field(default_factory=list)

    @contextmanager
    def run(self, place: Any) -> Iterator[asyncio.Event]:
        """Something that runs at a place of the page while the block does; gives an event that is set once it is not
        wanted any more. For one event loop, as `stop` is.
        """
        mine = (place, asyncio.Event())
        self._runs.append(mine)
        try:
            yield mine[1]
        finally:
            self._runs.remove(mine)

    def stop(self, place: Any) -> bool:
        """Stop what runs at a place; says whether anything did."""
        wanted = [event for where, event in self._runs if where is place]
        for event in wanted:
            event.set()
        return bool(wanted)

    def path(self, name: str) -> Path:
        """Where the artifact of this name lies, or will. Raises `InputError` for what is no name."""
        check(bool(_NAME.fullmatch(name)), "name", name, "letters, digits, dash and underscore, at most 48 of them")
        return self.folder / f"{name}.safetensors"

    def artifacts(self) -> dict[str, Path]:
        """What the visitor has made or sent, by name, the oldest first."""
        found = sorted(self.folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        return {path.stem: path for path in found}

    def check_room(self, size: int) -> None:
        """Raise `InputError` where `size` more bytes are too many."""
        used = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        if used + size > LIMIT_BYTES:
            raise InputError("file", f"{size} bytes beside {used}", f"{LIMIT_BYTES} bytes in all for one visitor")


class Visitors:
    """All open pages. Safe to call from several threads."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="steer-demo-"))
        self._open: dict[str, Visitor] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def sessions(self) -> set[str]:
        """Who is here."""
        with self._lock:
            return set(self._open)

    def get(self, session: str | None) -> Visitor:
        """The visitor of a session, made when it is first asked for."""
        self.sweep()
        key = session or "anonymous"
        with self._lock:
            if key not in self._open:
                check(len(self._open) < _LIMIT_VISITORS, "visitors", len(self._open), f"at most {_LIMIT_VISITORS}")
                self._open[key] = Visitor(Path(tempfile.mkdtemp(dir=self._root)))
            self._open[key].seen = time.monotonic()
            return self._open[key]

    def leave(self, session: str | None) -> None:
        """Remove what a visitor had."""
        with self._lock:
            visitor = self._open.pop(session or "anonymous", None)
        if visitor is not None:
            shutil.rmtree(visitor.folder, ignore_errors=True)

    def sweep(self, now: float | None = None) -> None:
        """Remove what belongs to visitors who have been away for too long."""
        limit = (time.monotonic() if now is None else now) - LIMIT_SECONDS
        for key in [key for key, visitor in list(self._open.items()) if visitor.seen < limit]:
            self.leave(key)

    def close(self) -> None:
        """Remove everything."""
        for key in list(self._open):
            self.leave(key)
        shutil.rmtree(self._root, ignore_errors=True)
