"""Chains of tokens as processes: any function that gives the logits of the next one.

A `FunctionProcess` is what samplers, transition edits and rewards need of a policy of one's own (a network that is no
language model of transformers, a simulator, a table): it is sampled, forked, weighed and searched like any other.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from steer.core import (
    Ability,
    Context,
    Cost,
    Mounted,
    Process,
    Prompt,
    Samples,
    Site,
    TransitionEdit,
    check,
    check_whole,
)
from steer.core.context import Opaque, aimed, shifted
from steer.core.rows import Rows, accounted, beginning
from steer.sampling.laws import check_possible, divergence

__all__ = ["ChainContext", "ChainState", "FunctionProcess", "TokenChain"]


@dataclass(frozen=True)
class ChainState(Rows):
    """Prefixes `x` `[N, step]`."""

    each = packed = ("x",)

    x: Tensor


@dataclass(frozen=True)
class ChainContext(Opaque):
    """`Context` of a chain; `base` is the unedited log-law `[N, V]`."""

    no_hidden = no_lookahead = "a chain that is given by its laws shows no hidden states"

    prefix: Tensor
    step: int
    base: Tensor
    prompts: tuple[Any, ...] | None = None
    """Prompt of every row, where laws depend on it."""

    def companion(self, process: Process) -> Context:
        """The same rows under another chain."""
        assert isinstance(process, TokenChain)
        return process.view(self.prefix, self.prompts)


class TokenChain(Process):
    """A chain over `V` tokens of at most `length` steps; a class says what the law of the next one is, in `view`."""

    sites = frozenset({Site.TRANSITION})
    length: int

    @property
    def abilities(self) -> frozenset[Ability]:
        return frozenset({Ability.FORK, Ability.BRANCH, Ability.LOG_PROB, Ability.PREVIEW})

    @property
    def num_steps(self) -> int:
        return self.length

    @property
    def transitions(self) -> Mounted:
        """Its edits of the next token's law."""
        return tuple((edit, wanted) for edit, wanted in self.edits if isinstance(edit, TransitionEdit))

    @abstractmethod
    def view(self, prefix: Tensor, prompts: Sequence[Any] | None = None) -> ChainContext:
        """What an edit sees of rows `prefix` `[N, step]`, whose prompts are `prompts`."""

    def copy(self, edits: Mounted) -> Self:
        return replace(self, edits=edits)  # type: ignore[type-var]

    def done(self, state: ChainState) -> bool:
        return state.step >= self.length

    def init(self, prompts: Sequence[Prompt], n: int, generator: torch.Generator) -> ChainState:
        common = beginning(prompts, n)
        return ChainState(torch.zeros(len(common["group"]), 0, dtype=torch.long), **common)

    def context(self, state: ChainState) -> ChainContext:
        return self.view(state.x, tuple(state.prompts[b] for b in state.group.tolist()))

    def gather(self, state: ChainState, index: Tensor) -> ChainState:
        return state.take(index)

    def stack(self, states: Sequence[ChainState]) -> ChainState:
        return ChainState.join(states)

    def settle(self, state: ChainState) -> tuple[ChainState, Cost]:
        return replace(state, cost=Cost()), state.cost

    def pack(self, state: ChainState) -> dict[str, Tensor]:
        return state.pack()

    def unpack(self, prompts: Sequence[Prompt], step: int, packed: dict[str, Tensor]) -> ChainState:
        return ChainState.unpack(packed, step, prompts)

    def identify(self, state: ChainState) -> list[Any]:
        return [tuple(row) for row in state.x.tolist()]

    def preview(self, state: ChainState) -> Samples:
        """The prefixes."""
        return self.decode(state)

    def decode(self, state: ChainState) -> Samples:
        zero = torch.zeros(len(state), dtype=torch.float64)
        return accounted(Samples(state.prompts, self.show(state.x), state.group, zero), state)

    def show(self, x: Tensor) -> Any:
        """Outputs of rows `[N, step]`."""
        return x

    def propose(self, state: ChainState, generator: torch.Generator) -> ChainState:
        context = self.context(state)
        base = context.base
        law = check_possible(torch.log_softmax(shifted(self.transitions, context, state.group), -1))
        token = torch.multinomial(law.exp(), 1, generator=generator)
        drawn = law.gather(1, token).squeeze(1)
        aim = aimed(self.edits, context, state.group, token)
        after = state.add(drawn, base.gather(1, token).squeeze(1), aim, divergence(law, base))
        spent = Cost(model_calls=1, nfe=len(state), generated_tokens=len(state))
        return replace(after, x=torch.cat([state.x, token], 1), step=state.step + 1, cost=state.cost + spent)


@dataclass(frozen=True)
class FunctionProcess(TokenChain):
    """A process from a function of prefixes.

    Attributes:
        logits: `logits(prefix)` or `logits(prefix, prompts)` gives the logits `[N, V]` of the next token of `N` rows,
            from their tokens so far `[N, step]` (int64) and the prompt of each. A network with such a `forward` will
            do; it is run without its gradient.
        length: steps at most.
        end: the token with which a row ends early, or None.
        words: the text of each token, joined to outputs; None gives token ids, a list for each row.
    """

    logits: Callable[..., Tensor]
    length: int
    end: int | None = None
    words: Sequence[str] | None = None
    edits: Mounted = ()

    def __post_init__(self) -> None:
        check(callable(self.logits), "logits", self.logits, "a function logits(prefix) or logits(prefix, prompts)")
        check_whole("length", self.length)

    def view(self, prefix: Tensor, prompts: Sequence[Any] | None = None) -> ChainContext:
        with torch.no_grad():
            made = self.logits(prefix, list(prompts or ())) if self._asks else self.logits(prefix)
        given = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        fits = isinstance(made, Tensor) and made.dim() == 2 and len(made) == len(prefix)
        check(fits, "logits", f"a result of {given}", f"a tensor ({len(prefix)}, V)")
        check(not bool(made.isnan().any()), "logits", "NaN", "numbers, and -infinity for what is impossible")
        base = torch.log_softmax(made.detach().cpu().double(), -1)
        ended = self._ended(prefix)
        if self.end is not None and bool(ended.any()):
            stay = torch.full_like(base, -torch.inf)
            stay[:, self.end] = 0.0
            base = torch.where(ended.unsqueeze(1), stay, base)
        return ChainContext(prefix, prefix.shape[1], base, None if prompts is None else tuple(prompts))

    @property
    def _asks(self) -> bool:
        """Whether the function wants the prompts."""
        call = self.logits.forward if isinstance(self.logits, torch.nn.Module) else self.logits
        needed = [p for p in inspect.signature(call).parameters.values() if p.default is p.empty]
        return len(needed) > 1

    def _ended(self, x: Tensor) -> Tensor:
        return (x == self.end).any(1) if self.end is not None else torch.zeros(len(x), dtype=torch.bool)

    def done(self, state: ChainState) -> bool:
        return super().done(state) or bool(self._ended(state.x).all())

    def finished(self, state: ChainState) -> Tensor:
        return self._ended(state.x) | super().done(state)

    def show(self, x: Tensor) -> list[Any]:
        rows = [row[: row.index(self.end)] if self.end in row else row for row in x.tolist()]
        return rows if self.words is None else ["".join(self.words[i] for i in row) for row in rows]
