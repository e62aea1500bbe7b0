"""The algebra of rewards: `0.7 * sentiment - 0.3 * length`, clips and caches.

Scores are float64 `[N]`, one for each of `N` samples, higher is better.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import operator
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from steer.core import InputError, Reward, RewardError, Samples, UnsupportedError, check

__all__ = [
    "Cached",
    "CallableReward",
    "Clipped",
    "Combination",
    "Composable",
    "Constant",
    "Standardised",
    "Wrapped",
    "check_reward",
    "lift",
    "members_of",
    "scores_of",
]


class Composable(Reward):
    """A reward with operators: `+ - *` with rewards, callables and numbers, `/` by a number, unary minus."""

    __array_ufunc__ = None  # a numpy scalar on the left then leaves the operator to us

    def __add__(self, other: Any) -> Composable:
        return combine(self, "+", other)

    def __radd__(self, other: Any) -> Composable:
        return combine(other, "+", self)

    def __sub__(self, other: Any) -> Composable:
        return combine(self, "-", other)

    def __rsub__(self, other: Any) -> Composable:
        return combine(other, "-", self)

    def __mul__(self, other: Any) -> Composable:
        return combine(self, "*", other)

    def __rmul__(self, other: Any) -> Composable:
        return combine(other, "*", self)

    def __truediv__(self, other: Any) -> Composable:
        return combine(self, "/", other)

    def __neg__(self) -> Composable:
        return combine(-1, "*", self)

    def clip(self, low: float | None = None, high: float | None = None) -> Composable:
        """Scores limited to `[low, high]`."""
        return Clipped(self, low, high)

    def cached(self) -> Composable:
        """The same scores, computed once for each (prompt, output)."""
        return Cached(self)

    def standardised(self, mean: float, std: float) -> Composable:
        """`(score - mean) / std`."""
        return Standardised(self, mean, std)

    @property
    def alone(self) -> bool:
        """As for `Reward`: where all members are. A reward without members says it for itself."""
        members = members_of(self)
        return bool(members) and all(member.alone for member in members)

    def bind(self, model: Any) -> Reward:
        """The reward with every member bound to `model`; itself where nothing binds."""
        if not is_dataclass(self):
            return self
        old = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        new = {name: _bound(value, model) for name, value in old.items()}
        changed = {name: value for name, value in new.items() if value is not old[name]}
        return replace(self, **changed) if changed else self


def members_of(reward: Reward) -> list[Reward]:
    """The rewards that a reward is made of, one level down."""
    names: list[str] = [option.name for option in fields(reward)] if is_dataclass(reward) else []
    values = [getattr(reward, name) for name in names]
    held = [x for value in values for x in (value if isinstance(value, list | tuple) else (value,))]
    return [x for x in held if isinstance(x, Reward)]


def check_reward(reward: Reward, images: bool) -> None:
    """Refuse a reward of texts for images, and the other way round, as far as the reward says what it is of."""
    for part in _parts(reward):
        wrong = part.modality == ("text" if images else "image")
        what = ("images such as brightness or class:LABEL" if images else "texts such as sentiment") if wrong else ""
        check(not wrong, "reward", str(part), f"rewards of {what}")


def _parts(reward: Reward) -> Iterator[Reward]:
    """A reward and those that it is made of."""
    yield reward
    for member in members_of(reward):
        yield from _parts(member)


def _bound(x: Any, model: Any) -> Any:
    if isinstance(x, Reward):
        return x.bind(model)
    if isinstance(x, tuple):
        members = tuple(_bound(member, model) for member in x)
        return x if all(a is b for a, b in zip(x, members, strict=True)) else members
    return x


def scores_of(member: Reward, samples: Samples) -> Tensor:
    """A member's checked scores `[N]`, float64: `member(samples)`, but with the graph to outputs that need a gradient.

    `UnsupportedError` where the member cannot be differentiated: half a gradient would mislead without a word.
    """
    outputs = samples.outputs
    tracks = isinstance(outputs, Tensor) and outputs.requires_grad and torch.is_grad_enabled()
    if not tracks or isinstance(member, Constant):
        return member(samples)
    kept = _Kept(member)
    kept(samples)
    if not kept.scores.requires_grad:
        raise UnsupportedError(f"reward {member}: its scores have no gradient; use a sampler that needs none")
    return kept.scores


class _Kept(Reward):
    """Goes through the checks of `Reward.__call__`, which detaches, and keeps the scores as they were."""

    scores: Tensor

    def __init__(self, member: Reward) -> None:
        self.member = member

    def score(self, samples: Samples) -> Tensor:
        self.scores = torch.as_tensor(self.member.score(samples)).cpu().double()
        return self.scores

    def __repr__(self) -> str:
        return repr(self.member)


def lift(x: Any) -> Composable:
    """A reward with operators from a reward, a Python callable or a finite number."""
    if isinstance(x, Composable):
        return x
    if isinstance(x, Reward):
        return Wrapped(x)
    if isinstance(x, Real) and not isinstance(x, bool):
        return Constant(float(x))
    if callable(x) and not isinstance(x, type):
        return CallableReward(x)
    raise InputError("reward", x, "a reward (an instance, not its class), a callable or a number")


@dataclass(frozen=True, repr=False)
class Constant(Composable):
    """The same score for every sample."""

    alone = True
    value: float

    def __post_init__(self) -> None:
        check(math.isfinite(self.value), "reward", self.value, "a finite number")

    def score(self, samples: Samples) -> Tensor:
        return torch.full((len(samples),), self.value, dtype=torch.float64)

    def __repr__(self) -> str:
        return repr(self.value).removesuffix(".0")


@dataclass(frozen=True, repr=False)
class Wrapped(Composable):
    """Any `Reward`, with operators."""

    inner: Reward

    def score(self, samples: Samples) -> Tensor:
        return scores_of(self.inner, samples)

    def __repr__(self) -> str:
        plain = type(self.inner).__repr__ is object.__repr__
        return type(self.inner).__name__ if plain else repr(self.inner)


@dataclass(frozen=True, repr=False)
class CallableReward(Composable):
    """A Python function `fn(texts)` or `fn(prompts, texts)` that returns one number for each text.

    With two parameters the second may instead be called `prompts`; it then gets the prompts. Images come as one
    tensor `[N, C, H, W]` in place of texts. The result is a list, an array or a tensor `[N]`.
    """

    fn: Callable[..., Any]
    name: str = ""

    def __post_init__(self) -> None:
        check(callable(self.fn), "reward function", self.fn, "a callable")
        self._order()

    def _order(self) -> tuple[str, ...]:
        try:
            parameters = list(inspect.signature(self.fn).parameters.values())
        except (TypeError, ValueError):
            return ("outputs",)
        required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        keyword = [p for p in required if p.kind is p.KEYWORD_ONLY]
        takes = len(required) in (1, 2) or (not required and any(p.kind is not p.VAR_KEYWORD for p in parameters))
        check(takes and not keyword, "reward function", self.fn, "fn(texts) or fn(prompts, texts)")
        if len(required) < 2:
            return ("outputs",)
        return ("outputs", "prompts") if required[1].name.startswith("prompt") else ("prompts", "outputs")

    def score(self, samples: Samples) -> Tensor:
        given = {"outputs": samples.outputs, "prompts": [samples.prompts[b] for b in samples.group.tolist()]}
        scores = self.fn(*(given[name] for name in self._order()))
        try:
            made = scores if isinstance(scores, Tensor) else torch.as_tensor(scores, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            made = None
        if made is None or made.shape != (len(samples),):
            told = type(scores).__name__ if made is None else f"shape {tuple(made.shape)}"
            expected = f"one number for each of the {len(samples)} outputs, which it gets all at once"
            raise RewardError(f"reward {self}: returned {told}; allowed: {expected}: shape ({len(samples)},)")
        return made

    def __repr__(self) -> str:
        return self.name or getattr(self.fn, "__name__", type(self.fn).__name__)


_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


@dataclass(frozen=True, repr=False)
class Combination(Composable):
    """Two rewards joined by `+`, `-`, `*` or `/`."""

    left: Composable
    symbol: str
    right: Composable

    def score(self, samples: Samples) -> Tensor:
        return _OPERATIONS[self.symbol](scores_of(self.left, samples), scores_of(self.right, samples))

    def __repr__(self) -> str:
        tight = self.symbol in "*/"
        left = _grouped(self.left) if tight else repr(self.left)
        right = _grouped(self.right) if tight or self.symbol == "-" else repr(self.right)
        if tight:
            return f"-{right}" if (left, self.symbol) == ("-1", "*") else f"{left}{self.symbol}{right}"
        return f"{left} {self.symbol} {right}"


def _grouped(x: Composable) -> str:
    return f"({x!r})" if isinstance(x, Combination) and x.symbol in "+-" else repr(x)


def combine(left: Any, symbol: str, right: Any) -> Composable:
    """`left symbol right` for anything that `lift` takes; constants are folded. The divisor must be a number."""
    a, b = lift(left), lift(right)
    divides = symbol != "/" or (isinstance(b, Constant) and b.value != 0)
    check(divides, "reward divisor", b, "a number that is not 0")
    if isinstance(a, Constant) and isinstance(b, Constant):
        return Constant(_OPERATIONS[symbol](a.value, b.value))
    return Combination(a, symbol, b)


@dataclass(frozen=True, repr=False)
class Clipped(Composable):
    """`inner` limited to `[low, high]`; None leaves that side open."""

    inner: Composable
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        given = (self.low, self.high)
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        check(given != (None, None) and low <= high, "clip", given, "low <= high, at least one of them a number")

    def score(self, samples: Samples) -> Tensor:
        return scores_of(self.inner, samples).clamp(self.low, self.high)

    def __repr__(self) -> str:
        return f"({self.inner!r}).clip({self.low}, {self.high})"


@dataclass(frozen=True, repr=False)
class Standardised(Composable):
    """`(inner - mean) / std`."""

    inner: Composable
    mean: float
    std: float

    def __post_init__(self) -> None:
        check(math.isfinite(self.mean), "mean", self.mean, "a finite number")
        check(math.isfinite(self.std) and self.std > 0, "std", self.std, "a finite number > 0")

    def score(self, samples: Samples) -> Tensor:
        return (scores_of(self.inner, samples) - self.mean) / self.std

    def __repr__(self) -> str:
        return f"({self.inner!r}).standardised({self.mean:.4g}, {self.std:.4g})"


@dataclass(frozen=True, repr=False)
class Cached(Composable):
    """Remembers `inner` by (prompt, output). Missing ones are scored in one call, duplicates within it once.

    The token ids behind a text are no part of the key. Outputs that need a gradient are scored anew.
    """

    inner: Composable
    memo: dict[Hashable, float] = field(default_factory=dict, init=False, compare=False)

    @property
    def alone(self) -> bool:
        """A function on texts is taken to be what can be cached."""
        return isinstance(self.inner, CallableReward) or self.inner.alone

    def score(self, samples: Samples) -> Tensor:
        if isinstance(samples.outputs, Tensor) and samples.outputs.requires_grad:
            return scores_of(self.inner, samples)
        prompts = [p if isinstance(p, str) else repr(p) for p in samples.prompts]
        groups = samples.group.tolist()
        keys = [(prompts[b], _key(samples.outputs[i])) for i, b in enumerate(groups)]
        first: dict[Hashable, int] = {}
        for i, key in enumerate(keys):
            if key not in self.memo:
                first.setdefault(key, i)
        if first:
            scores = self.inner(samples.select(torch.tensor(list(first.values()))))
            self.memo.update(zip(first, scores.tolist(), strict=True))
        return torch.tensor([self.memo[key] for key in keys], dtype=torch.float64)

    def __repr__(self) -> str:
        return repr(self.inner)


def _key(output: Any) -> Hashable:
    if not isinstance(output, Tensor):
        return output
    raw = output.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return (tuple(output.shape), output.dtype, hashlib.sha256(raw).digest())
