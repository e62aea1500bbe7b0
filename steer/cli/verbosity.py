"""How much a command says: with `--verbose` the libraries below speak, and an error tells where it comes from."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["talking"]

_LIBRARIES = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")


@contextmanager
def talking(verbose: bool) -> Iterator[None]:
    """Say more within the block, where that was asked for."""
    if not verbose:
        yield
        return
    before = {name: os.environ.get(name) for name in _LIBRARIES}
    os.environ.update(dict.fromkeys(_LIBRARIES, "info"))
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        yield
    except Exception:
        traceback.print_exc()
        raise
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
