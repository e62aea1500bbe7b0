"""Vectors that come with a request: numbers become an artifact in memory, which no folder ever sees."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steer.artifacts import Card, encode
from steer.core import InputError, ModelInfo, check
from steer.edits import Artifact
from steer.serving.engine import NamedEdit, TooLargeError
from steer.serving.wire import EditRequest

__all__ = ["OFF", "Inline"]


OFF = (
    "unset: this server takes vectors by name alone, unless it is started with --inline-vectors "
    '(vllm serve: "inline_vectors": true in the settings of the server)'
)
_LEAST, _MOST = 1e-12, 1e18
"""Norms between which a direction can be made a unit vector in float32."""


@dataclass(frozen=True)
class Inline:
    """Reads vectors of requests for one model.

    Attributes:
        info: facts of the model, asked for with each vector.
        limit_bytes: of the vectors of one request together, as float32.
    """

    info: Callable[[], ModelInfo]
    limit_bytes: int

    def named(self, request: EditRequest, where: str) -> NamedEdit:
        """The vector as an edit of the request. Its digest is that of its numbers: the same ones in another request, as
        numbers or as base64, are the same vector. Raises `InputError` that names the field.
        """
        assert request.vector is not None
        info, given = self.info(), request.vector.layers
        for layer in given:
            allowed = f"0 to {info.num_layers - 1}, the blocks of the served model"
            check(int(layer) < info.num_layers, f"{where}.vector.layers", layer, allowed)
        self._check_size(len(given) * info.width * 4, f"{where}.vector")
        rows = {int(k): _direction(v, info.width, f"{where}.vector.layers.{k}") for k, v in given.items()}
        card = Card(
            "vector",
            {"num_layers": info.num_layers, "width": info.width},
            sorted(rows),
            {"unit": "norm"},
            {"method": "inline"},
        )
        artifact = Artifact({f"direction.{layer}": rows[layer] for layer in sorted(rows)}, card)
        return NamedEdit(None, hashlib.sha256(encode(*artifact)).hexdigest(), request, artifact)

    def check_all(self, requests: list[EditRequest]) -> None:
        """Raise `TooLargeError` where the vectors of one request are too much together."""
        layers = sum(len(edit.vector.layers) for edit in requests if edit.vector is not None)
        if layers:
            self._check_size(layers * self.info().width * 4, "steer.edits")

    def _check_size(self, size: int, where: str) -> None:
        if size > self.limit_bytes:
            raise TooLargeError(where, f"vectors of {size} bytes in float32", f"at most {self.limit_bytes}")


def _direction(given: list[float] | str, width: int, where: str) -> Tensor:
    """`[width]` in float32."""
    allowed = f"{width} finite numbers that are not all 0, the model's width, or base64 of them as float32"
    if isinstance(given, str):
        try:
            data = base64.b64decode(given, validate=True)
        except (binascii.Error, ValueError):
            raise InputError(where, "a text that is not base64", allowed) from None
        check(len(data) == 4 * width, where, f"base64 of {len(data)} bytes", f"{4 * width} bytes: {allowed}")
        row = torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32))
    else:
        check(len(given) == width, where, f"{len(given)} numbers", allowed)
        row = torch.tensor(given, dtype=torch.float64).to(torch.float32)
    check(bool(torch.isfinite(row).all()), where, "NaN, infinity or a number beyond float32", allowed)
    norm = float(row.double().norm())
    check(norm > 0, where, "zeros", allowed)
    check(_LEAST <= norm <= _MOST, where, f"a direction of norm {norm:.3g}", f"a norm from {_LEAST:g} to {_MOST:g}")
    return row
