"""Registered vectors, controllers and value heads: files in one folder, known by name.

    FOLDER/calm.safetensors               put there by a person: never evicted, and its file is never deleted
    FOLDER/registered/bright.safetensors  sent by a client: evicted when there is no room, least recently used first
    FOLDER/registered/calm.deleted        says that calm was deleted as it stands; a new file is there again

The folder is the truth, and any number of servers may share it: a name is looked up there each time that it is asked
for, a file that is new or has changed is checked and its digest taken, and one that is gone is forgotten. A file takes
its place all at once, so that a server that is killed in the middle of an upload loses nothing and keeps no half of it.
Servers that register at the same moment can together go over the limits by what they then add.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from steer.artifacts import Card, load
from steer.core import InputError, SteerError, check
from steer.edits import KINDS
from steer.files import write_text
from steer.serving.engine import TooLargeError
from steer.serving.wire import NAME

__all__ = ["Entry", "Store", "UnknownArtifactError", "check_name", "digest"]


_SUFFIX = ".safetensors"
REWARD = "reward"
"""The kind of artifacts that are no edits: rewards get their names at `/v1/steer/rewards`."""
_LEFT = 3600.0
"""Seconds after which a half-written file belongs to nobody any more."""
_NAMES = "letters, digits, dot, dash and underscore, a letter or digit first, at most 128 of them"


class UnknownArtifactError(SteerError):
    """No artifact is registered under this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"artifact {name!r} is not registered")


@dataclass(frozen=True)
class Entry:
    """One registered artifact."""

    name: str
    path: Path
    digest: str
    """sha256 of the file."""
    size: int
    created: int
    card: Card
    fixed: bool
    stamp: Stamp | None = None
    """Of the file in the folder; None for one elsewhere, which is never looked at again."""


Stamp = tuple[int, int, int]
"""Time of change, size and number of a file."""


class Store:
    """The artifacts of the servers that share a folder. Safe to call from several threads.

    Args:
        folder: where they live; None takes no registrations.
        accept: raises where a file does not fit the model.
        files: artifacts elsewhere, registered as they lie there.
        limit: artifacts at most.
        limit_bytes: of all of them together.
    """

    def __init__(
        self,
        folder: Path | None,
        accept: Callable[[Path], None],
        *,
        files: Sequence[Path] = (),
        limit: int = 256,
        limit_bytes: int = 1 << 30,
    ) -> None:
        self.folder, self._accept = folder, accept
        self.limit, self.limit_bytes = limit, limit_bytes
        self.refused: dict[str, str] = {}
        """Files that were found and could not be registered, with the reason."""
        self.changed: Callable[[str], None] = lambda name: None
        """Told each name that now stands for something else, or for nothing; called in the thread that changed it or
        found it changed, once it is done and others may change the store again.
        """
        self._bad: dict[str, Stamp] = {}
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._used: Counter[str] = Counter()
        self._lock = threading.RLock()
        for path in files:
            self._entries[path.stem] = self._checked(path.stem, path, fixed=True)
        if folder is not None:
            check(folder.is_dir() or not folder.exists(), "artifacts", str(folder), "a folder")
            self._found()

    @property
    def _own(self) -> Path:
        assert self.folder is not None
        return self.folder / "registered"

    def _found(self) -> None:
        """Register what is there; remove what a killed server left half written."""
        for left in self._own.glob(".*.tmp"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > _LEFT:  # a younger one may be another server's, on its way
                    left.unlink()
        self.sync()

    # ---- the folder

    def sync(self) -> None:
        """Find out what others have changed."""
        if self.folder is None:
            return
        sent = sorted(self._own.glob(f"*{_SUFFIX}"), key=lambda path: (_stamp(path) or (0,))[0])
        there = [path.stem for path in (*sorted(self.folder.glob(f"*{_SUFFIX}")), *sent)]
        with self._lock:
            known = [entry.name for entry in self._entries.values() if entry.stamp is not None]
        for name in dict.fromkeys((*there, *known)):
            self._resolve(name)

    def _resolve(self, name: str) -> None:
        """Have the entry of a name be what lies in the folder."""
        with self._lock:
            known = self._entries.get(name)
            if self.folder is None or not NAME.fullmatch(name) or (known is not None and known.stamp is None):
                return
        path, stamp, fixed = self._look(name)
        if stamp == (None if known is None else known.stamp) or (stamp is not None and self._bad.get(name) == stamp):
            return
        entry = None
        if stamp is not None:
            try:
                entry = replace(self._checked(name, path, fixed), stamp=stamp)
            except SteerError as error:
                if _stamp(path) != stamp:  # replaced or deleted meanwhile: the next look tells
                    return
                self.refused[path.name], self._bad[name] = str(error), stamp
        with self._changing() as names:
            if self._look(name)[1] == stamp:
                self._put(name, entry)
                names.append(name)

    def _put(self, name: str, entry: Entry | None) -> None:
        if entry is None:
            self._entries.pop(name, None)
        else:
            self._entries[name] = entry

    def _look(self, name: str) -> tuple[Path, Stamp | None, bool]:
        """Where a name's file lies, its stamp where there is one, and whether a person put it there."""
        assert self.folder is not None
        fixed, sent = self.folder / f"{name}{_SUFFIX}", self._own / f"{name}{_SUFFIX}"
        stamp = _stamp(fixed)
        if stamp is not None and not self._deleted(name, stamp):
            return fixed, stamp, True
        return sent, None if sent.is_symlink() else _stamp(sent), False

    def _deleted(self, name: str, stamp: Stamp) -> bool:
        try:
            return self._mark(name).read_text(encoding="utf-8") == _text(stamp)
        except OSError:
            return False

    def _mark(self, name: str) -> Path:
        return self._own / f"{name}.deleted"

    # ---- reading

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Of all files together."""
        with self._lock:
            return sum(entry.size for entry in self._entries.values())

    def entries(self) -> list[Entry]:
        """All of them, the least recently used first."""
        self.sync()
        with self._lock:
            return list(self._entries.values())

    def get(self, name: str) -> Entry:
        """The artifact of this name, as it lies in the folder now. Raises `UnknownArtifactError`."""
        self._resolve(name)
        with self._lock:
            if name not in self._entries:
                raise UnknownArtifactError(name)
            return self._entries[name]

    def has(self, name: str) -> bool:
        """Whether there is an artifact of this name."""
        self._resolve(name)
        with self._lock:
            return name in self._entries

    @contextmanager
    def using(self, names: Sequence[str]) -> Iterator[None]:
        """Keep these from being evicted meanwhile, and note that they were used."""
        with self._lock:
            for name in names:
                if name in self._entries:
                    self._entries.move_to_end(name)
            self._used.update(names)
        try:
            yield
        finally:
            with self._lock:
                self._used.subtract(names)
                self._used += Counter()

    # ---- changing

    def add(self, name: str, source: Path, wanted: Callable[[], bool] = lambda: True) -> Entry:
        """Register a copy of the file `source` under `name`, in place of a sent one of that name.

        `wanted` is asked between the steps whether to go on. Raises `InputError` for what is no artifact of this model,
        `TooLargeError` where there is no room, `SteerError` where the folder cannot be written.
        """
        check_name(name)
        if self.folder is None:
            raise InputError("name", name, "nothing: the server was started without --artifacts")
        size = source.stat().st_size
        if size > self.limit_bytes:
            raise TooLargeError("file", f"{size} bytes", f"at most {self.limit_bytes}")
        self.sync()
        with self._staged(source) as staged:
            _need(wanted)
            entry = self._checked(name, staged, fixed=False)
            _need(wanted)
            final = self._own / f"{name}{_SUFFIX}"
            with self._changing() as names:
                before = self._entries.get(name)
                check(before is None or not before.fixed, "name", name, "a name that no file of the folder has")
                names += self._make_room(size, 0 if before is None else before.size, name)
                # Of this file: the moment that it is in its place, another server may put its own there.
                entry = replace(entry, path=final, stamp=_stamp(staged))
                os.replace(staged, final)
                _sync_folder(self._own)
                self._entries[name] = entry
                self._entries.move_to_end(name)
                names.append(name)
        return entry

    @contextmanager
    def _staged(self, source: Path) -> Iterator[Path]:
        """`source` or a copy of it beside the registered files, whole on the disk. Raises `SteerError`."""
        ours = source.parent == self._own
        staged = source if ours else self.incoming()
        try:
            if not ours:
                shutil.copyfile(source, staged)
            # To the nanosecond: clocks of file systems tick slowly, and a number of an old file may be given again.
            os.utime(staged, ns=(time.time_ns(),) * 2)
            with staged.open("rb+") as stream:
                os.fsync(stream.fileno())
            yield staged
        except OSError as error:
            raise SteerError(f"the folder of artifacts cannot be written ({error.strerror or error})") from error
        finally:
            with suppress(OSError):
                staged.unlink(missing_ok=True)

    def adopt(self, file: str, name: str | None = None) -> Entry:
        """Register a file of the folder by its name, which is no path: under its own name as it lies there, under
        another a copy of it. Raises as `add` does.
        """
        if self.folder is None:
            raise InputError("file", file, "nothing: the server was started without --artifacts")
        stem = file.removesuffix(_SUFFIX)
        plain = bool(NAME.fullmatch(stem)) and file.endswith(_SUFFIX)
        check(plain, "file", file, f"the name of a {_SUFFIX} file in the folder of artifacts, not a path")
        path = self.folder / file
        check(path.is_file() and not path.is_symlink(), "file", file, "a file in the folder of artifacts")
        if name not in (None, stem):
            return self.add(str(name), path)
        stamp = _stamp(path)  # before it is read: a file that is changed meanwhile is read again
        entry = replace(self._checked(stem, path, fixed=True), stamp=stamp)
        self.sync()
        with self._changing() as names:
            with suppress(OSError):
                self._mark(stem).unlink()
            before = self._entries.get(stem)
            names += self._make_room(entry.size, 0 if before is None else before.size, stem)
            self._entries[stem] = entry
            names.append(stem)
        return entry

    def remove(self, name: str) -> None:
        """Forget an artifact, here and in the other servers of the folder; the file of a sent one is deleted. Raises
        `UnknownArtifactError`, and `SteerError` where the folder cannot be written.
        """
        entry = self.get(name)
        if entry.fixed and entry.stamp is not None:
            self._own.mkdir(parents=True, exist_ok=True)
            write_text(self._mark(name), _text(entry.stamp))
        with self._changing() as names:
            self._forget(entry)
            names.append(name)

    def _forget(self, entry: Entry) -> None:
        self._entries.pop(entry.name, None)
        if not entry.fixed:
            with suppress(FileNotFoundError):
                entry.path.unlink()

    @contextmanager
    def _changing(self) -> Iterator[list[str]]:
        """Hold the lock, and afterwards tell of the names that were put into the list."""
        names: list[str] = []
        try:
            with self._lock:
                yield names
        finally:
            for name in names:
                self.changed(name)

    def incoming(self) -> Path:
        """A fresh path for a file on its way in. Left-overs are removed at the next start."""
        check(self.folder is not None, "name", None, "nothing: the server was started without --artifacts")
        with suppress(OSError):  # told where the file is opened
            self._own.mkdir(parents=True, exist_ok=True)  # somebody may have removed the folder
        return self._own / f".incoming.{os.urandom(8).hex()}.tmp"

    def _checked(self, name: str, path: Path, fixed: bool) -> Entry:
        check_name(name)
        try:
            _, card = load(path)
            check(card.kind in (*KINDS, REWARD), "kind", card.kind, ", ".join((*KINDS, REWARD)))
            self._accept(path)
            status = path.stat()
            return Entry(name, path, digest(path), status.st_size, int(status.st_mtime), card, fixed)
        except InputError as error:  # clients need not know where a file lies
            given = str(error.given).replace(str(path), name).replace(path.stem, name)
            raise InputError(error.field.replace(str(path), name), given, error.allowed) from error
        except SteerError:
            raise
        except Exception as error:  # whatever somebody's file is made to lead to
            given = f"{name} ({type(error).__name__})"
            raise InputError("artifact", given, "an artifact saved by steer (safetensors with a card)") from error

    def _make_room(self, size: int, freed: int, name: str) -> list[str]:
        """Evict the least recently used of those that no request is using; returns their names."""
        count = len(self._entries) + (0 if name in self._entries else 1)
        total = self.nbytes - freed + size
        idle = [e for e in self._entries.values() if not e.fixed and not self._used[e.name] and e.name != name]
        leaving = []
        while count > self.limit or total > self.limit_bytes:
            if not idle:
                raise TooLargeError(
                    "file",
                    f"{count} artifacts of {total} bytes in all",
                    f"{self.limit} artifacts, {self.limit_bytes} bytes; those that are there are in use or fixed",
                )
            leaving.append(idle.pop(0))
            count, total = count - 1, total - leaving[-1].size
        for entry in leaving:
            self._forget(entry)
        return [entry.name for entry in leaving]


def check_name(name: str) -> None:
    """Refuse what is no name, such as a path."""
    check(bool(NAME.fullmatch(name)), "name", name, _NAMES)


def _need(wanted: Callable[[], bool]) -> None:
    if not wanted():
        raise SteerError("nobody waits for this artifact any more")


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def _text(stamp: Stamp) -> str:
    """What all servers see alike of a file: its number may differ between machines."""
    return f"{stamp[0]} {stamp[1]}"


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Have the folder's new entry survive a loss of power too."""
    with suppress(OSError):  # some systems cannot open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
