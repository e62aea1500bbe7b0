"""The process: what generates in steps, and what can be mounted on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from steer.core.edit import Edit, Prompt, PromptEdit, Site
from steer.core.errors import UnsupportedError
from steer.core.readings import Readings
from steer.core.samples import Cost, Samples

__all__ = ["Ability", "Context", "Mounted", "Process", "State", "TransitionEdit"]


@runtime_checkable
class Context(Protocol):
    """What a transition edit may look at: the rows as they stand before the step is drawn."""

    @property
    def step(self) -> int:
        """Steps already taken."""

    @property
    def prefix(self) -> Tensor:
        """What was generated so far, `[N, step]` for chains of tokens, the latent `[N, ...]` for diffusion."""

    @property
    def hidden(self) -> Tensor:
        """Final hidden state that the step is predicted from `[N, D]` (language models)."""

    @property
    def base(self) -> Tensor:
        """The quantity before any transition edit, log-probabilities `[N, V]` for chains of tokens."""

    @property
    def left(self) -> Tensor:
        """How many tokens may still follow the one that is drawn next `[N]` (language models)."""

    def lookahead(self, candidates: Tensor) -> Tensor:
        """Final hidden states after appending each of `candidates` `[N, K]` to its row: `[N, K, D]`."""

    def companion(self, process: Process) -> Context:
        """The same rows as seen by another process that the edit declared in `companions`."""

    def guidance(self, score: Callable[[Samples], Tensor]) -> Tensor:
        """The shift of the quantity, same shape, that moves the mean of the next step by its variance times the
        gradient with respect to `prefix` of `score` `[N]`, a function of what `base` shows. Only for edits that declare
        `gradient`.
        """


class TransitionEdit(Edit):
    """Changes the law of the next step, after temperature and before truncation."""

    site = Site.TRANSITION
    gradient: ClassVar[bool] = False
    """Whether `shift` calls `context.guidance`; the network is then run with its gradient."""

    @abstractmethod
    def shift(self, x: Tensor, context: Context) -> Tensor:
        """The changed quantity, same shape as `x`."""

    @property
    def power(self) -> tuple[Process, float] | None:
        """A companion and w where samplers that weigh should aim at `p^(1 - w) p_companion^w` in place of p."""
        return None

    @property
    def companions(self) -> tuple[Process, ...]:
        """Other processes that must follow the rows in lockstep, each with its own cache."""
        return ()


# ---------------------------------------------------------------------------------------------------------- process


class Ability(Enum):
    """What a process may or may not be able to do."""

    FORK = "fork"
    """Rows can be copied, dropped and reordered."""
    BRANCH = "branch"
    """Copies of a row part ways again, because steps are stochastic."""
    LOG_PROB = "log-prob"
    """Rows know their log-probability under the law that was sampled from."""
    GRADIENT = "gradient"
    """A transition edit may ask for `Context.guidance`."""
    PREVIEW = "preview"
    """Unfinished rows can be shown to a reward."""


class State(Protocol):
    """Rows of a process in mid-generation. Opaque to samplers beyond these fields.

    `propose` consumes the state that it is given (its cache goes on in the next one); `gather` copies.
    """

    group: Tensor
    """Prompt of every row, `[N]` int64."""
    step: int
    log_prob: Tensor
    """Log-probability of each row so far under the law that was really sampled from, `[N]`."""
    base_log_prob: Tensor | None
    """The same rows under the process without edits `[N]`; None where only a second pass can tell."""
    aim_log_prob: Tensor | None
    """The same rows under the law that weights aim at `[N]`: the base law unless an edit has a `power`."""
    kl: Tensor | None
    """Sum over steps of the exact KL between the step's law and the base law `[N]`, where it is known."""
    cost: Cost

    def __len__(self) -> int: ...


P = TypeVar("P", bound="Process")


Mounted = tuple[tuple[Edit, frozenset[int] | None], ...]
"""Edits in order, each with the prompts that asked for it (None: all)."""


class Process(ABC):
    """A generative process that runs in steps and whose states can be forked."""

    sites: ClassVar[frozenset[Site]] = frozenset()
    edits: Mounted = ()
    """Mounted edits in order, each with the prompts that asked for it (None: all)."""

    @property
    def abilities(self) -> frozenset[Ability]:
        """What it can do, with the settings that it has."""
        return frozenset()

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """The largest number of steps."""

    @abstractmethod
    def init(self, prompts: Sequence[Prompt], n: int, generator: torch.Generator) -> Any:
        """State of `n` rows for each prompt, prompt-major; `N = len(prompts) * n`."""

    @abstractmethod
    def propose(self, state: Any, generator: torch.Generator) -> Any:
        """One stochastic step of every unfinished row. Consumes `state`."""

    @abstractmethod
    def gather(self, state: Any, index: Tensor) -> Any:
        """A new state whose row i is row `index[i]` of `state` (fork, drop, reorder). Caches are included."""

    @abstractmethod
    def done(self, state: Any) -> bool:
        """Whether no row can take another step."""

    @abstractmethod
    def decode(self, state: Any) -> Samples:
        """The finished rows as `Samples`, unweighted and unscored."""

    def preview(self, state: Any) -> Samples:
        """What a reward may look at before the end: partial text, x0-hat."""
        raise UnsupportedError(f"{type(self).__name__} has no preview of unfinished rows")

    @property
    def kl_kind(self) -> str:
        """What the KL of its own samples is; see `Samples.kl_kind`."""
        return "exact"

    # What samplers use that go beyond propose, gather and decode.

    random_start: ClassVar[bool] = False
    """Whether `init` draws (noise) rather than starting every row alike (a prompt)."""
    noise_by_row: ClassVar[bool] = False
    """Whether all that `propose` draws is noise with a row's own part, so that rows can lie in several processes."""
    reads: ClassVar[bool] = False
    """Whether it can read vectors and probes where each token is chosen (`watched`)."""
    consumes: ClassVar[bool] = False
    """Whether `propose` changes the state that it is given, so that a state to be kept must be copied first."""

    def read(self, state: Any) -> Any:
        """The same rows with the network's view of them at hand, so that `propose`, `preview` and `context` have no
        pass left to pay, nor do copies made by `gather`. Consumes `state`; nothing happens where all rows are done.
        """
        return state

    def context(self, state: Any) -> Context:
        """What a transition edit would see of rows that were read."""
        raise UnsupportedError(f"{type(self).__name__} shows nothing of its rows to a value function")

    def observed(self: P) -> P:
        """The process with hidden states at hand in `context`, where it has any."""
        return self

    def watched(self: P, readings: Readings) -> P:
        """The process that reads vectors and probes on its way, into `Samples.readings`."""
        allowed = "language models through transformers and vLLM do"
        raise UnsupportedError(f"readings: {type(self).__name__} gives none; {allowed}")

    def finished(self, state: Any) -> Tensor:
        """Rows that take no further step `[N]`."""
        return torch.full((len(state),), self.done(state))

    def diverges(self, state: Any) -> bool:
        """Whether noise is still to come: otherwise copies of a row stay copies."""
        return not self.done(state)

    def stack(self, states: Sequence[Any]) -> Any:
        """One state of all rows of several at the same step, in order. Copies."""
        raise UnsupportedError(f"{type(self).__name__} cannot stack states")

    def settle(self, state: Any) -> tuple[Any, Cost]:
        """The state with its account at zero, and what it had cost, for samplers that keep states."""
        raise UnsupportedError(f"{type(self).__name__} cannot keep states")

    def pack(self, state: Any) -> dict[str, Tensor]:
        """What cannot be computed again of a state, as tensors on the CPU with one row for each row."""
        raise UnsupportedError(f"{type(self).__name__} cannot pack states")

    def unpack(self, prompts: Sequence[Prompt], step: int, packed: dict[str, Tensor]) -> Any:
        """The state at `step` that `pack` made tensors of; what it leaves out is computed when it is next needed."""
        raise UnsupportedError(f"{type(self).__name__} cannot unpack states")

    def nbytes(self, state: Any) -> int:
        """Memory that rows take while they can go on at once."""
        return sum(t.numel() * t.element_size() for t in self.pack(state).values())

    def identify(self, state: Any) -> list[Any] | None:
        """A hashable identity for every row where different rows can be equal (tokens); None where they cannot."""
        return None

    def as_proposal(self: P) -> P:
        """The process with its edits used as a proposal that weights correct for: they leave alone those steps whose
        law is a point, since no finite weight corrects for a point that was moved.
        """
        return self

    @abstractmethod
    def copy(self: P, edits: Mounted) -> P:
        """The same process under exactly these edits."""

    def renumbered(self: P, origin: Sequence[int]) -> P:
        """The process for prompts of which number i was number `origin[i]`: edits follow the prompts that asked."""
        if all(wanted is None for _, wanted in self.edits):
            return self

        def moved(wanted: frozenset[int] | None) -> frozenset[int] | None:
            return None if wanted is None else frozenset(i for i, b in enumerate(origin) if b in wanted)

        return self.copy(tuple((edit, moved(wanted)) for edit, wanted in self.edits))

    def heated(self: P, by: float) -> P:
        """The process at a temperature that is `by` higher, at most 1.5 (or its own, where that is more)."""
        raise UnsupportedError(f"{type(self).__name__} has no temperature")

    def session(self) -> AbstractContextManager[None]:
        """Held open around a run: what an engine sets up once rather than at every step. Steps also work without."""
        return nullcontext()

    def validate(self, edit: Edit) -> None:  # noqa: B027
        """Raise where `edit` does not fit this process. Called when it is mounted, before any work."""

    def edited(self: P, edit: Edit, prompts: Sequence[int] | None = None) -> P:
        """The process under one more edit, for all prompts or for those numbered in `prompts`."""
        if edit.site not in self.sites:
            allowed = ", ".join(sorted(site.value for site in self.sites)) or "none"
            raise UnsupportedError(
                f"{type(edit).__name__} edits the {edit.site.value} site, which {type(self).__name__} does not have "
                f"(it has: {allowed})"
            )
        self.validate(edit)
        return self.copy((*self.edits, (edit, None if prompts is None else frozenset(prompts))))

    def rewritten(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts after the prompt edits that each of them asked for."""
        seen = list(prompts)
        for edit, wanted in self.edits:
            if isinstance(edit, PromptEdit):
                mine = [b for b in range(len(seen)) if wanted is None or b in wanted]
                for b, prompt in zip(mine, edit.rewrite_all([seen[b] for b in mine]), strict=True):
                    seen[b] = prompt
        return seen

    def unedited(self: P) -> P:
        """The base process."""
        return self.copy(()) if self.edits else self

    def check_search(self, who: str) -> None:  # noqa: B027
        """Warn where a sampler that chooses, called `who`, would not do what a person expects of it here."""

    def require(self, ability: Ability, who: str) -> None:
        """Raise `UnsupportedError` unless the process has `ability`."""
        if ability not in self.abilities:
            hint = self.way_out(ability)
            raise UnsupportedError(
                f"{who} needs a process that can {ability.value}; {type(self).__name__} cannot{hint and f': {hint}'}"
            )

    def way_out(self, ability: Ability) -> str:
        """What a person can change to get `ability`, or ""."""
        return ""
