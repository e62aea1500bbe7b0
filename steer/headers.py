"""Headers of safetensors and GGUF files, read with bounds before a library is given the file.

What a header says is believed only as far as the file's size bears it out, so that reading costs no more time and
memory than the file has bytes, whoever wrote it. The layouts are those of the safetensors and GGUF specifications.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["check_gguf", "check_safetensors"]


MAX_BYTES = 4 << 20
"""Of a safetensors header. An artifact of a hundred layers has some 50 kilobytes."""
MAX_TENSORS = 10_000
_MAX_AXES = 8
_MAX_DEPTH = 4
"""Arrays inside arrays in a GGUF header."""
_MAX_VALUES = 2_000_000
"""Values in a GGUF header, those of arrays counted; the largest vocabularies have some 250,000 entries."""

_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
}


# ------------------------------------------------------------------------------------------------------ safetensors


def check_safetensors(path: Path) -> None:
    """Raise `ValueError`, which says why, where the header of a safetensors file is not what its bytes bear out."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        _need(0 < length <= size - 8, "the file ends before its header does")
        _need(length <= MAX_BYTES, f"a header of {length} bytes, at most {MAX_BYTES} are read")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError("its header is not JSON") from error
    _need(isinstance(header, dict), "its header is not a JSON object")
    about = header.pop("__metadata__", {})
    plain = isinstance(about, dict) and all(isinstance(value, str) for value in about.values())
    _need(plain, "its metadata are not texts by name")
    _need(len(header) <= MAX_TENSORS, f"{len(header)} tensors, at most {MAX_TENSORS} are read")
    room = size - 8 - length
    used = sum(_tensor_bytes(name, entry, room) for name, entry in header.items())
    _need(used == room, f"tensors of {used} bytes in {room}")


def _tensor_bytes(name: str, entry: Any, room: int) -> int:
    """What a tensor takes, where its shape and its offsets say the same."""
    where = f"tensor {name[:80]!r}"
    _need(isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}, f"{where} is not described")
    shape, offsets, bits = entry["shape"], entry["data_offsets"], _BITS.get(str(entry["dtype"]))
    _need(bits is not None, f"{where} has dtype {str(entry['dtype'])[:80]!r}")
    _need(_sizes(shape, room) and len(shape) <= _MAX_AXES, f"{where} has shape {str(shape)[:80]}")
    _need(_sizes(offsets, room) and len(offsets) == 2, f"{where} has offsets {str(offsets)[:80]}")
    taken = offsets[1] - offsets[0]
    _need(8 * taken == math.prod(shape) * int(bits or 0), f"{where} has another size than its shape")
    return taken


def _sizes(given: Any, most: int) -> bool:
    """Whether these are whole numbers that the file has room for."""
    return isinstance(given, list) and all(type(x) is int and 0 <= x <= most for x in given)


# ------------------------------------------------------------------------------------------------------------- GGUF


_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY = 8, 9


def check_gguf(path: Path) -> None:
    """Raise `ValueError`, which says why, where a GGUF file's header is not what its bytes bear out: texts, arrays and
    tensors longer than the file, arrays nested without end, keys or tensors that come twice.
    """
    with path.open("rb") as stream:
        _Header(stream, path.stat().st_size).check()


class _Header:
    """A GGUF header on its way through."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size = stream, size
        self._values = self._weights = 0

    def check(self) -> None:
        _need(self._take(4) == b"GGUF", "not GGUF")
        version = self._number("<I")
        _need(version in (2, 3), f"GGUF of version {version}; 2 and 3 are read, in little-endian order")
        tensors, keys = self._number("<Q"), self._number("<Q")
        _need(tensors <= MAX_TENSORS and keys <= MAX_TENSORS, f"{tensors} tensors and {keys} keys")
        for what, count, one in (("keys", keys, self._pair), ("tensors", tensors, self._tensor)):
            names = {one() for _ in range(count)}
            _need(len(names) == count, f"{what} that come twice")

    def _pair(self) -> bytes:
        name = self._text()
        self._value(self._number("<I"), 0)
        return name

    def _tensor(self) -> bytes:
        name = self._text()
        axes = self._number("<I")
        _need(axes <= _MAX_AXES, f"a tensor of {axes} axes")
        shape = [self._number("<Q") for _ in range(axes)]
        self._number("<I")
        offset = self._number("<Q")
        self._weights += math.prod(shape)
        # The smallest types take a little over one bit a weight.
        most = 8 * self._size
        fits = offset <= self._size and self._weights <= most and all(axis <= most for axis in shape)
        _need(fits, f"tensor {name[:80]!r} of shape {shape} at {offset} in a file of {self._size} bytes")
        return name

    def _value(self, kind: int, depth: int) -> None:
        if kind == _TEXT:
            self._text()
        elif kind == _ARRAY:
            self._array(depth)
        else:
            _need(kind in _FORMATS, f"a value of type {kind}")
            self._take(struct.calcsize(_FORMATS[kind]))

    def _array(self, depth: int) -> None:
        kind, count = self._number("<I"), self._number("<Q")
        self._values += count
        _need(depth < _MAX_DEPTH, "arrays nested too deep")
        _need(self._values <= _MAX_VALUES, f"more than {_MAX_VALUES} values")
        if kind in _FORMATS:
            self._skip(count * struct.calcsize(_FORMATS[kind]))
            return
        for _ in range(count):
            self._value(kind, depth + 1)

    def _text(self) -> bytes:
        return self._take(self._number("<Q"))

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _take(self, count: int) -> bytes:
        _need(count <= self._size - self._stream.tell(), "the file ends before its header does")
        return self._stream.read(count)

    def _skip(self, count: int) -> None:
        _need(count <= self._size - self._stream.tell(), "the file ends before its header does")
        self._stream.seek(count, 1)


def _need(condition: bool, why: str) -> None:
    if not condition:
        raise ValueError(why)
