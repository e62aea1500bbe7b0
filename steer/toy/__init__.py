"""Toy processes whose laws can be enumerated: the oracles of every method."""

from __future__ import annotations

from steer.toy.gaussian import GaussianProcess
from steer.toy.tabular import TabularProcess, markov_lm

__all__ = ["GaussianProcess", "TabularProcess", "markov_lm"]
