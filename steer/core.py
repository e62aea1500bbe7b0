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
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "Ability",
    "Context",
    "Cost",
    "Edit",
    "HiddenEdit",
    "InputError",
    "ModelInfo",
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
]

Prompt = str | Sequence[dict[str, Any]]
"""Text, or a chat: `[{"role": "user", "content": "..."}]`."""


class RawText(str):
    """Text to be continued as it stands, without the chat template."""


# ---------------------------------------------------------------------------------------------------------- errors


class SteerError(Exception):
    """Anything `steer` refuses or cannot finish; the message is one line for the person who asked."""


class InputError(SteerError, ValueError):
    """Bad input: names the field, what was given and what is allowed."""

    def __init__(self, field: str, given: object, allowed: str) -> None:
        shown = repr(given)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        self.field, self.given, self.allowed = field, given, allowed
        super().__init__(f"{field}: got {shown}; allowed: {allowed}")


class UnsupportedError(SteerError):
    """A method asks a process for something that it cannot do; the message says which engine can."""


class RewardError(SteerError):
    """A reward raised, or returned NaN or the wrong number of scores."""


def check(condition: bool, field: str, given: object, allowed: str) -> None:
    """Raise `InputError` unless `condition` holds."""
    if not condition:
        raise InputError(field, given, allowed)


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


class TransitionEdit(Edit):
    """Changes the law of the next step, after temperature and before truncation."""

    site = Site.TRANSITION

    @abstractmethod
    def shift(self, x: Tensor, context: Context) -> Tensor:
        """The changed quantity, same shape as `x`."""

    @property
    def companions(self) -> tuple[Process, ...]:
        """Other processes that must follow the rows in lockstep, each with its own cache."""
        return ()


# ---------------------------------------------------------------------------------------------------------- process


class Ability(Enum):
    """What a process may or may not be able to do."""

    FORK = "fork"
    LOG_PROB = "log-prob"
    GRADIENT = "gradient"
    PREVIEW = "preview"


@dataclass(frozen=True)
class Cost:
    """What was spent. Sums with `+`."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    model_calls: int = 0
    reward_calls: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


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
    kl: Tensor | None
    """Sum over steps of the exact KL between the step's law and the base law `[N]`, where it is known."""
    cost: Cost

    def __len__(self) -> int: ...


P = TypeVar("P", bound="Process")


class Process(ABC):
    """A generative process that runs in steps and whose states can be forked."""

    sites: ClassVar[frozenset[Site]] = frozenset()
    abilities: ClassVar[frozenset[Ability]] = frozenset()
    edits: tuple[tuple[Edit, frozenset[int] | None], ...] = ()
    """Mounted edits in order, each with the prompts that asked for it (None: all)."""

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

    @abstractmethod
    def copy(self: P, edits: tuple[tuple[Edit, frozenset[int] | None], ...]) -> P:
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

    def unedited(self: P) -> P:
        """The base process."""
        return self.copy(()) if self.edits else self

    def require(self, ability: Ability, who: str) -> None:
        """Raise `UnsupportedError` unless the process has `ability`."""
        if ability not in self.abilities:
            raise UnsupportedError(f"{who} needs a process that can {ability.value}; {type(self).__name__} cannot")


# ---------------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class Samples:
    """A weighted population of finished (or previewed) rows, grouped by prompt.

    `log_weight` are the population's log-weights, not normalised; equal weights are zeros. `log_z` estimates
    log E[exp(r / beta)] for each prompt where the sampler can tell.
    """

    prompts: list[Any]
    outputs: Any
    """`N` texts, or a tensor `[N, ...]`."""
    group: Tensor
    log_weight: Tensor
    reward: Tensor | None = None
    log_prob: Tensor | None = None
    base_log_prob: Tensor | None = None
    kl_estimate: Callable[[], Tensor] | Tensor | None = field(default=None, repr=False)
    log_z: Tensor | None = None
    lineage: Tensor | None = None
    """Which row of the pool each sample is, or its ancestors, by sampler."""
    tokens: list[list[int]] | None = field(default=None, repr=False)
    """Generated token ids (language models), end-of-sequence included where it was drawn."""
    cost: Cost = field(default_factory=Cost)
    pool: Samples | None = field(default=None, repr=False)
    """Every candidate that was scored, where the sampler returns only some."""

    def __len__(self) -> int:
        return len(self.group)

    @property
    def texts(self) -> list[str]:
        """The outputs of a language model."""
        return list(self.outputs)

    @property
    def kl(self) -> Tensor | None:
        """KL of each row's law to the base process `[N]`, in nats, on the distribution really sampled from.

        Edits of the hidden site need a second pass over the finished text, which runs when this is first read.
        """
        if callable(self.kl_estimate):
            object.__setattr__(self, "kl_estimate", self.kl_estimate())
        return self.kl_estimate  # type: ignore[return-value]

    @property
    def ess(self) -> Tensor:
        """Effective sample size of each prompt's population `[B]`: `1 / sum w^2` of the normalised weights."""
        return torch.stack([1 / torch.softmax(w, 0).square().sum() for w in self._by_prompt(self.log_weight.double())])

    def _by_prompt(self, x: Tensor) -> list[Tensor]:
        return [x[self.group == b] for b in range(len(self.prompts))]

    def mean_reward(self) -> Tensor:
        """Weighted mean reward of each prompt `[B]`."""
        if self.reward is None:
            raise SteerError("these samples carry no reward: pass reward= to generate()")
        return torch.stack(
            [
                (torch.softmax(w, 0) * r).sum()
                for w, r in zip(
                    self._by_prompt(self.log_weight.double()), self._by_prompt(self.reward.double()), strict=True
                )
            ]
        )

    def select(self, index: Tensor) -> Samples:
        """The rows in `index` `[M]`, with everything that belongs to them."""
        at = index.tolist()

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[index.to(x.device)]

        def later() -> Tensor:
            kl = self.kl
            assert kl is not None
            return kl[index.to(kl.device)]

        return replace(
            self,
            outputs=self.outputs[index] if isinstance(self.outputs, Tensor) else [self.outputs[i] for i in at],
            tokens=None if self.tokens is None else [self.tokens[i] for i in at],
            group=self.group[index],
            log_weight=self.log_weight[index],
            reward=pick(self.reward),
            log_prob=pick(self.log_prob),
            base_log_prob=pick(self.base_log_prob),
            lineage=pick(self.lineage),
            kl_estimate=later if callable(self.kl_estimate) else pick(self.kl_estimate),
        )

    @staticmethod
    def join(parts: Sequence[Samples]) -> Samples:
        """The samples of several batches of prompts as one."""
        if len(parts) == 1:
            return parts[0]
        offsets = [sum(len(p.prompts) for p in parts[:i]) for i in range(len(parts))]

        def joined(name: str) -> Tensor | None:
            columns = [getattr(p, name) for p in parts]
            return None if any(c is None for c in columns) else torch.cat(columns)

        # A lineage counts rows of the pool; those of later batches come after.
        before = [sum(len(p.pool or p) for p in parts[:i]) for i in range(len(parts))]
        numbered = [p.lineage + o for p, o in zip(parts, before, strict=True) if p.lineage is not None]
        lineage = torch.cat(numbered) if len(numbered) == len(parts) else None
        lazy = all(p.kl_estimate is not None for p in parts)
        tensors = isinstance(parts[0].outputs, Tensor)
        pools = [p.pool for p in parts]
        return Samples(
            prompts=[prompt for p in parts for prompt in p.prompts],
            outputs=torch.cat([p.outputs for p in parts]) if tensors else [o for p in parts for o in p.outputs],
            tokens=None if any(p.tokens is None for p in parts) else [t for p in parts for t in (p.tokens or [])],
            group=torch.cat([p.group + o for p, o in zip(parts, offsets, strict=True)]),
            log_weight=torch.cat([p.log_weight for p in parts]),
            reward=joined("reward"),
            log_prob=joined("log_prob"),
            base_log_prob=joined("base_log_prob"),
            log_z=joined("log_z"),
            lineage=lineage,
            kl_estimate=(lambda: torch.cat([p.kl for p in parts if p.kl is not None])) if lazy else None,
            cost=sum((p.cost for p in parts), Cost()),
            pool=None if any(p is None for p in pools) else Samples.join([p for p in pools if p is not None]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `{"prompts": [{"prompt", "samples": [{"text", "reward", "log_weight", "kl"}], ...}], "cost"}`."""
        kl = self.kl

        def number(x: Tensor | None, i: int) -> float | None:
            return None if x is None else float(x[i])

        rows: list[list[dict[str, Any]]] = [[] for _ in self.prompts]
        for i, b in enumerate(self.group.tolist()):
            rows[b].append(
                {
                    "text": self.outputs[i] if isinstance(self.outputs[i], str) else None,
                    "reward": number(self.reward, i),
                    "log_weight": number(self.log_weight, i),
                    "kl": number(kl, i),
                }
            )
        prompts = [{"prompt": p, "samples": r} for p, r in zip(self.prompts, rows, strict=True)]
        return {"prompts": prompts, "cost": {k: getattr(self.cost, k) for k in Cost.__dataclass_fields__}}


class Reward(ABC):
    """Scores samples, higher is better. Rewards close under `+ - *`; see `steer.rewards`."""

    @abstractmethod
    def score(self, samples: Samples) -> Tensor:
        """Scores `[N]`."""

    def bind(self, model: Any) -> Reward:
        """The reward for use with `model`; rewards that score under the base model take hold of it here."""
        return self

    def __call__(self, samples: Samples) -> Tensor:
        """Checked scores `[N]` in float64; raises `RewardError` for NaN, a wrong length, or a reward that raised."""
        try:
            scores = torch.as_tensor(self.score(samples)).detach().cpu().double()
        except SteerError:
            raise
        except Exception as error:
            raise RewardError(f"reward {self}: raised {type(error).__name__}: {error}") from error
        if scores.shape != (len(samples),):
            raise RewardError(f"reward {self}: returned shape {tuple(scores.shape)}; allowed: ({len(samples)},)")
        if scores.isnan().any():
            bad = int(scores.isnan().nonzero()[0])
            raise RewardError(f"reward {self}: returned NaN for sample {bad}; allowed: numbers")
        return scores


class Sampler(ABC):
    """Hyper-parameters of one way to draw; owns the loop over a process."""

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
