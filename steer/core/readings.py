"""Readings: numbers that vectors and probes read from the residual stream wherever a token is chosen.

Letters: `N` rows, `K` readings, `D` width.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steer.core.errors import check
from steer.core.names import NAME, check_known

__all__ = ["Reading", "Readings", "StopIf"]


@dataclass(frozen=True, eq=False)
class Reading:
    """`sum_l h_l . w_l + bias`, of the residual stream `h_l` after block l, as edited."""

    name: str
    weights: Mapping[int, Tensor]
    """`{layer: [D]}`, 0 the first block."""
    bias: float = 0.0


_SIGNS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_RULE = re.compile(rf"\s*({NAME.pattern})\s*(<=|>=|<|>)\s*(\S+)\s*")


@dataclass(frozen=True)
class StopIf:
    """A text ends with the first token whose reading `name` stands so to `bound`."""

    name: str
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: Any, names: Sequence[str], field: str = "stop_if") -> StopIf:
        """From a text such as "calm < -1.5", of readings `names`. Raises `InputError`."""
        allowed = 'one comparison of a reading with a number, such as "calm < -1.5" (<, <=, >, >=)'
        found = _RULE.fullmatch(text) if isinstance(text, str) else None
        check(found is not None, field, text, allowed)
        assert found is not None
        name, sign, given = found.groups()
        try:
            bound = float(given)
        except ValueError:
            bound = math.nan
        check(math.isfinite(bound), field, text, allowed)
        check(bool(names), field, text, "unset without readings")
        check_known(field, name, names)
        return cls(name, sign, bound)

    def met(self, value: Any) -> Any:
        """Whether a number, or each of a tensor's, ends the text."""
        return _SIGNS[self.sign](value, self.bound)

    def __str__(self) -> str:
        return f"{self.name} {self.sign} {self.bound:g}"


@dataclass(frozen=True, eq=False)
class Readings:
    """What is read of every row at every token, and the rule that may end a text by it."""

    items: tuple[Reading, ...]
    stop: StopIf | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which values are numbered."""
        return tuple(item.name for item in self.items)

    @property
    def layers(self) -> set[int]:
        """Blocks after which something is read."""
        return {layer for item in self.items for layer in item.weights}

    def met(self, values: Any) -> Any:
        """Whether the rule ends a row with these values `[..., K]`, given a tensor or one row's list; False without a
        rule.
        """
        if self.stop is None:
            return False
        k = self.names.index(self.stop.name)
        return self.stop.met(values[..., k] if isinstance(values, Tensor) else values[k])
