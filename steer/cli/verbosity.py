"""How much a command says: `--verbose` has the libraries below speak, and errors tell where they come from."""

from __future__ import annotations

import logging
import os

__all__ = ["is_talking", "talk"]

_NAME = "STEER_VERBOSE"
_LIBRARIES = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")


def talk() -> None:
    """Say more, from now on."""
    os.environ[_NAME] = "1"
    for name in _LIBRARIES:
        os.environ[name] = "info"
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")


def is_talking() -> bool:
    """Whether more is to be said; `STEER_VERBOSE=1` in the environment asks for the same."""
    return os.environ.get(_NAME, "") not in ("", "0")
