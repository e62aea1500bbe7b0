"""Files and folders written in one step, so that a reader never sees half of one."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from steer.core.errors import InputError, SteerError, check
from steer.core.names import nearby

_PICKLES = {b"\x80": "a pickle", b"PK\x03\x04": "a zip archive (torch.save)"}


def is_pointer(file: Path) -> bool:
    """Whether a file is a Git LFS pointer: what Git leaves in the place of a large file that was not fetched."""
    with file.open("rb") as stream:
        return stream.read(len(_POINTER)) == _POINTER


_POINTER = b"version https://git-lfs.github.com/"


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place, all at once, when the block ends well."""
    final = Path(path)
    check(not final.is_dir(), "path", str(path), "a file, not a folder")
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        mode = _new(temporary)
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        _open_to_others(temporary, mode)
        os.replace(temporary, final)
    except OSError as error:
        raise SteerError(f"cannot write {final}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _new(path: Path) -> int:
    """Make an empty file; returns the permissions that it got. (To ask for the umask is to change it, and while it is
    changed other threads write files open to all.)
    """
    path.touch()
    return path.stat().st_mode & 0o777


def _open_to_others(path: Path, mode: int) -> None:
    """Give a file the permissions of any new one: some libraries write what nobody but the owner can read."""
    if path.is_file() and not path.is_symlink():
        path.chmod(mode | path.stat().st_mode & 0o111)


# ------------------------------------------------------------------------------------------------------------- JSON


def as_json(data: Any) -> str:
    """One line of JSON, in which NaN and infinity are null."""
    return json.dumps(_finite(data), ensure_ascii=False, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    return [_finite(item) for item in data] if isinstance(data, list | tuple) else data


def write_text(path: Path, text: str) -> None:
    """Write a file in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final` that takes its place when the block ends well."""
    mark = secrets.token_hex(4)
    temporary, before = (final.with_name(f".{final.name}.{mark}.{end}") for end in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        mode = _new(temporary / mark)
        (temporary / mark).unlink()
        yield temporary
        for path in temporary.rglob("*"):
            _open_to_others(path, mode)
        if final.exists():
            os.rename(final, before)
        os.rename(temporary, final)
    except OSError as error:
        if before.exists() and not final.exists():
            os.rename(before, final)
        raise SteerError(f"cannot write {final}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(before, ignore_errors=True)


def check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
        raise InputError(name, "a tensor with NaN or infinity", "finite numbers")


def check_file(path: Path | str, allowed: str) -> Path:
    """`path`, where it is a file that could be what is wanted."""
    file = Path(path)
    check(not file.is_dir(), "artifact", f"{file} (a folder)", allowed)
    check(file.is_file(), "artifact", f"{file} (no such file)", f"{allowed}{nearby(file)}")
    try:
        with file.open("rb") as stream:
            head = stream.read(9)
    except OSError as error:
        raise InputError("artifact", f"{file} ({error.strerror or error})", allowed) from error
    if is_pointer(file):
        raise SteerError(f"artifact: {file} is a Git LFS pointer, not the file itself; run `git lfs pull`")
    for magic, what in _PICKLES.items():
        # The length of a safetensors header may begin with the same bytes; then JSON follows at the ninth.
        pickled = head.startswith(magic) and head[8:] != b"{"
        check(not pickled, "artifact", f"{file} ({what}, which may run code)", allowed)
    return file
