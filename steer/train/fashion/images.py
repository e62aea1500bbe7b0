"""Small grey images with a class each, in the idx format of MNIST and Fashion-MNIST.

Nothing is downloaded: the files lie in a folder, for example that of Debian's package dataset-fashion-mnist,
/usr/share/datasets/fashion-mnist.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from steer.core import InputError, check

__all__ = ["FASHION_CLASSES", "idx_sha256", "read_idx", "rows_sha256"]


FASHION_CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
"""What the labels 0 to 9 of Fashion-MNIST mean."""

_PREFIXES = {"train": "train", "test": "t10k"}
_SIDE = 28
_LIMIT = 1 << 28


def read_idx(folder: Path | str, split: str = "train") -> tuple[Tensor, Tensor]:
    """The images uint8 `[N, 28, 28]` (0 black, 255 white) and labels int64 `[N]` of a split, "train" or "test".

    Read are `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, or `t10k-...`, plain or with `.gz`.
    Raises `InputError` where the folder or a file is missing, cut short, or holds something else.
    """
    check(split in _PREFIXES, "split", split, ", ".join(_PREFIXES))
    images = _read(Path(folder), f"{_PREFIXES[split]}-images-idx3-ubyte", 3)
    labels = _read(Path(folder), f"{_PREFIXES[split]}-labels-idx1-ubyte", 1).long()
    given = tuple(images.shape)
    check(given[1:] == (_SIDE, _SIDE) and given[0] > 0, "data", given, f"images of shape [N, {_SIDE}, {_SIDE}]")
    check(len(labels) == len(images), "data", f"{len(images)} images, {len(labels)} labels", "one label for each image")
    check(int(labels.max()) < len(FASHION_CLASSES), "data", f"label {int(labels.max())}", "labels from 0 to 9")
    return images, labels


def idx_sha256(folder: Path | str) -> dict[str, str]:
    """sha256 of the four unpacked files by name: the same however they were packed. Raises `InputError`."""
    names = [f"{prefix}-{kind}" for prefix in _PREFIXES.values() for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    return {name: hashlib.sha256(_content(Path(folder), name)[1]).hexdigest() for name in names}


def rows_sha256(images: Tensor, labels: Tensor) -> str:
    """sha256 of images uint8 `[N, H, W]` and labels int64 `[N]` as they lie in memory; depends on their order."""
    digest = hashlib.sha256(images.contiguous().numpy().data)
    digest.update(labels.contiguous().numpy().data)
    return digest.hexdigest()


def _content(folder: Path, name: str) -> tuple[Path, bytes]:
    allowed = "a folder with Fashion-MNIST's idx files, such as /usr/share/datasets/fashion-mnist"
    check(folder.is_dir(), "data", f"{folder} (no such folder)", allowed)
    packed, plain = folder / f"{name}.gz", folder / name
    path = packed if packed.is_file() else plain
    check(path.is_file(), "data", f"{plain}[.gz] (no such file)", allowed)
    try:
        with gzip.open(path) if path == packed else path.open("rb") as stream:
            content = stream.read(_LIMIT + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError("data", f"{path} (cannot be read: {error})", "a whole idx file, plain or gzip") from error
    check(len(content) <= _LIMIT, "data", f"{path} (too large)", f"at most {_LIMIT} bytes")
    return path, content


def _read(folder: Path, name: str, dims: int) -> Tensor:
    """The bytes of an idx file as uint8 of `dims` dimensions."""
    path, content = _content(folder, name)
    magic, head = bytes([0, 0, 8, dims]), 4 + 4 * dims
    # Two zero bytes, 8 for unsigned bytes, the number of dimensions; then the sizes, big-endian.
    check(content[:4] == magic, "data", f"{path} (begins with {content[:4].hex()})", f"an idx file ({magic.hex()})")
    sizes = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    expected = head + math.prod(sizes)
    check(len(content) == expected, "data", f"{path} ({len(content)} bytes)", f"{expected} bytes, as its header says")
    return torch.frombuffer(bytearray(content[head:]), dtype=torch.uint8).view(sizes)
