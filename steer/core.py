"""The five things that everything in `steer` is made of.

A `Process` generates in steps, an `Edit` changes one quantity inside it, a `Sampler` owns the loop, a `Reward`
scores what came out, and `Samples` is what a person gets. One goal stands behind all of them: draw from

    p*(x)  proportional to  p(x) exp(r(x) / beta)

where `p` is the process without edits and `beta` is the KL coefficient.

Axis letters used in this package: `B` prompts, `N` rows (particles, candidates), `L` layers, `T` tokens, `D` width,
`V` vocabulary, `K` candidate tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from steer.errors import InputError, RewardError, SteerError, UnsupportedError, check, check_whole
from steer.samples import Cost, Reward, Samples

__all__ = [
    "Ability",
    "Context",
    "Cost",
    "Edit",
    "HiddenEdit",
    "InputError",
    "ModelInfo",
    "Mounted",
    "Operator",
    "Process",
    "Prompt",
    "PromptEdit",
    "RawText",
    "RewardError",
    "Reward",
    "Sampler",
    "Samples",
    "Scope",
    "Site",
    "State",
    "SteerError",
    "Term",
    "TransitionEdit",
    "UnsupportedError",
    "check",
    "check_whole",
]

Prompt = str | Sequence[dict[str, Any]]
"""Text, or a chat: `[{"role": "user", "content": "..."}]`."""


class RawText(str):
    """Text to be continued as it stands, without the chat template."""


# ---------------------------------------------------------------------------------------------------------- edits


class Site(Enum):
    """The quantity that an edit changes."""

    PROMPT = "prompt"
    """The text or messages that go in."""
    HIDDEN = "hidden"
    """The residual stream after a block, `[N, D]` at every position."""
    TRANSITION = "transition"
    """The law of the next step: next-token logits `[N, V]`, or a denoiser's prediction `[N, ...]`."""


class Edit(ABC):
    """A change at one site. Edits are frozen dataclasses; they hold no state of a run."""

    site: ClassVar[Site]

    def with_beta(self, beta: float) -> Edit:
        """The edit for a run at KL coefficient `beta`; edits that were given their own, or need none, are unchanged."""
        return self


class PromptEdit(Edit):
    """Rewrites what goes in."""

    site = Site.PROMPT

    @abstractmethod
    def rewrite(self, prompt: Prompt) -> Prompt:
        """The prompt that the process sees in place of `prompt`."""

    def rewrite_all(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The same for several, which an edit that runs a model does together."""
        return [self.rewrite(prompt) for prompt in prompts]


class Operator(ABC):
    """A pure function on hidden rows `[..., D]`: the unit that every engine knows how to apply.

    An operator used with weight `w` acts as `h + w (operator(h) - h)`, so weight 0 is the identity.
    """

    @abstractmethod
    def __call__(self, hidden: Tensor) -> Tensor:
        """Changed rows, same shape as `hidden` `[..., D]`."""

    @property
    def constant(self) -> Tensor | None:
        """The vector `[D]` that is added whatever the input, or None when the change depends on the input."""
        return None


@dataclass(frozen=True)
class Scope:
    """The token positions at which a hidden edit acts, absolute and without padding: `start <= position < stop`.

    A bound counts from the start of the prompt, or, where `*_at_reply` is set, from the prompt's length.
    """

    start: int = 0
    stop: int | None = None
    start_at_reply: bool = False
    stop_at_reply: bool = False

    NAMES: ClassVar[str] = "all, prompt, last, generated, reply, from:K"

    @classmethod
    def parse(cls, text: str | Scope) -> Scope:
        """`all`; `prompt`; `last` (the last prompt position, which chooses the first token); `generated` (positions
        of generated tokens, so from the second token on); `reply` (last + generated: every choice of a token);
        `from:K` (absolute position K and later).
        """
        if isinstance(text, Scope):
            return text
        named = {
            "all": cls(),
            "prompt": cls(stop=0, stop_at_reply=True),
            "last": cls(start=-1, stop=0, start_at_reply=True, stop_at_reply=True),
            "generated": cls(start_at_reply=True),
            "reply": cls(start=-1, start_at_reply=True),
        }
        if text in named:
            return named[text]
        kind, _, position = str(text).partition(":")
        check(kind == "from" and position.isdecimal(), "scope", text, cls.NAMES)
        return cls(start=int(position))

    def bounds(self, prompt_length: int) -> tuple[int, float]:
        """`(start, stop)` for a prompt of this length; `stop` is infinite where the scope has no end."""
        start = self.start + (prompt_length if self.start_at_reply else 0)
        stop = float("inf") if self.stop is None else self.stop + (prompt_length if self.stop_at_reply else 0)
        return max(start, 0), stop


@dataclass(frozen=True)
class Term:
    """What a hidden edit does after block `layer` (0 = the first block)."""

    layer: int
    operator: Operator


@dataclass(frozen=True)
class ModelInfo:
    """What an edit may know about the model that it is mounted on."""

    name: str
    fingerprint: str
    """Hash of architecture and weights' shape and sample; a vector made for one model is refused by another."""
    num_layers: int
    width: int
    model_type: str
    """The architecture's name in its configuration ("llama")."""
    residual_norms: Callable[[], Tensor] = field(repr=False, compare=False)
    """Median norm of the residual stream after each block `[L]`, measured on first use."""
    unembedding: Callable[[], Tensor] = field(repr=False, compare=False)
    """Output embedding matrix `[V, D]`."""

    def entry(self) -> dict[str, Any]:
        """The facts that an artifact's card keeps about its model."""
        return {name: getattr(self, name) for name in ("name", "fingerprint", "num_layers", "width", "model_type")}


class HiddenEdit(Edit):
    """Changes the residual stream. `terms` says what happens where; an edit with `reads` also decides, once a prompt,
    how much: the engine reads the prompt without edits, asks for `weights`, and from then on everything is constant.
    """

    site = Site.HIDDEN
    scope: Scope

    @abstractmethod
    def terms(self, model: ModelInfo) -> list[Term]:
        """Operators by layer, in order. Raises `InputError` where the edit does not fit the model."""

    @property
    def reads(self) -> tuple[int, ...]:
        """Layers whose state at the last prompt position `weights` wants to see."""
        return ()

    def weights(self, hidden: dict[int, Tensor]) -> Tensor:
        """Weight of every term `[N, len(terms)]` from prompt states `{layer: [N, D]}`; only called with `reads`."""
        raise UnsupportedError(f"{type(self).__name__} reads no hidden states")


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
    tilt: Tensor
    """Log of the law that weights aim at over the base law so far `[N]`: 0 unless an edit has a `power`."""
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

    # What samplers use that go beyond propose, gather and decode.

    random_start: ClassVar[bool] = False
    """Whether `init` draws (noise) rather than starting every row alike (a prompt)."""
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


class Sampler(ABC):
    """Hyper-parameters of one way to draw; owns the loop over a process."""

    needs_reward: ClassVar[bool] = False
    """Whether it draws by a reward, rather than having one score what it drew."""

    @property
    def rows(self) -> int:
        """Rows that it keeps going for each prompt."""
        return 1

    def updates(self, process: Process) -> int:
        """About how many times a run calls `on_step`, for progress bars."""
        return process.num_steps

    @abstractmethod
    def run(
        self,
        process: Process,
        prompts: Sequence[Prompt],
        *,
        generator: torch.Generator,
        reward: Reward | None = None,
        beta: float = 1.0,
        on_step: Callable[[Any], None] | None = None,
    ) -> Samples:
        """Draw for every prompt. `on_step` sees each state (progress, streaming); it must not change it."""
