"""Contract between the server and an engine: a checked `Task` in, `Event`s out. Engines live in `steer.adapters`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from steer.core import Cost, ModelInfo, Prompt, Reward, Sampler, SteerError
from steer.core.readings import StopIf
from steer.edits import Artifact
from steer.serving.wire import EditRequest

__all__ = [
    "Delta",
    "Ended",
    "Engine",
    "Event",
    "Finished",
    "Load",
    "NamedEdit",
    "Progress",
    "Sampling",
    "Started",
    "Steering",
    "Task",
    "TokenLogprob",
    "TokenPrompt",
    "TooLargeError",
]


class TooLargeError(SteerError):
    """A request that asks for more than the server gives one; `field` names what was too large."""

    def __init__(self, field: str, given: object, allowed: str) -> None:
        self.field = field
        super().__init__(f"{field}: got {given}; allowed: {allowed}")


# ------------------------------------------------------------------------------------------------------------- asked


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt given as token ids."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Sampling:
    """How each token is drawn. `logprobs` is the number of alternatives to report, None for no log-probabilities."""

    max_tokens: int = 256
    trim: bool = False
    """Whether `max_tokens` may be lowered to what the context leaves beside the prompt."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class NamedEdit:
    """A registered artifact with the settings of one request. `digest` is the sha256 of the file."""

    path: Path | None
    """None for an edit of the engine's own, and for a vector that came with the request."""
    digest: str
    request: EditRequest
    inline: Artifact | None = field(default=None, repr=False, compare=False)
    """The vector that came with the request; `digest` is that of the file which it would be."""

    @property
    def title(self) -> str:
        """What errors call it."""
        return "vector" if self.inline is not None else self.request.name


@dataclass(frozen=True)
class Steering:
    """The `steer` field with its names resolved."""

    edits: tuple[NamedEdit, ...] = ()
    sampler: Sampler | None = None
    """What chooses between texts; None draws each choice on its own, token by token."""
    repeats: int = 1
    """Times that the sampler is to be given each prompt (those of its outputs that it does not draw at once)."""
    candidates: int | None = None
    """Texts that the sampler is to draw in all."""
    reward: Reward | None = None
    beta: float = 1.0
    block: int | None = None
    kl: bool = True
    base: str = "truncated"
    readings: tuple[NamedEdit, ...] = ()
    """Artifacts that are read where each token is chosen."""
    stop: StopIf | None = None
    """Which of the readings ends a text."""


@dataclass(frozen=True)
class Task:
    """One request: `n` choices for each prompt, numbered prompt by prompt."""

    prompts: tuple[Prompt | TokenPrompt, ...]
    n: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    steering: Steering | None = None
    stream: bool = False
    """Whether text is wanted as it comes; otherwise a choice's text arrives in one piece."""
    echo: bool = False
    """Whether a choice begins with its prompt."""


# ---------------------------------------------------------------------------------------------------------- answered


@dataclass(frozen=True)
class TokenLogprob:
    """A drawn token under the model's own law (hidden edits included, temperature 1, nothing truncated)."""

    token: str
    logprob: float | None
    """None of the first token of a prompt, which follows nothing."""
    bytes: tuple[int, ...]
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Started:
    """Work has begun."""

    prompt_tokens: int


@dataclass(frozen=True)
class Delta:
    """New text of one choice, and the tokens that it is made of where log-probabilities were asked for."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Progress:
    """How far a search is."""

    step: int
    tokens: int
    round: dict[str, float] | None = None
    """What a sampler that goes in rounds noted of the one that just ended."""


@dataclass(frozen=True)
class Ended:
    """A choice is complete. `reason` is "stop" or "length", `tokens` what was drawn, the end of the text included."""

    choice: int
    reason: Literal["stop", "length"]
    tokens: int
    reward: float | None = None
    kl: float | None = None
    """Nats by which the law of this choice drifted from the unsteered model; None where it was not measured."""
    readings: dict[str, list[float]] | None = None
    """A number for each of the tokens, by name."""
    stopped: bool = False
    """Whether it ended by a reading."""


@dataclass(frozen=True)
class Finished:
    """Nothing follows. `candidates` counts the texts that were drawn."""

    candidates: int
    cost: Cost


Event = Started | Delta | Progress | Ended | Finished


@dataclass(frozen=True)
class Load:
    """What an engine is doing."""

    rows: int = 0
    """Texts that are being written."""
    searches: int = 0
    waiting: int = 0
    cache_bytes: int = 0


class Engine(Protocol):
    """A model that serves many requests at once. Methods but `run` may be called from any thread."""

    @property
    def name(self) -> str:
        """The model's name."""

    @property
    def context_length(self) -> int | None:
        """Tokens of a prompt and its answer at most."""

    @property
    def kind(self) -> str:
        """The library that generates."""

    @property
    def info(self) -> ModelInfo:
        """What edits may ask of the model. Raises `InputError` where there are several."""

    def own_sampling(self) -> Sampling:
        """How the checkpoint's own `generation_config.json` draws. Raises `InputError` for what the engine does not."""

    @property
    def own_edits(self) -> tuple[str, ...]:
        """Names of edits that the engine has without an artifact, such as tuned models that it runs beside its own."""

    @property
    def edit_kinds(self) -> tuple[str, ...]:
        """Kinds of artifacts that it takes as edits."""

    def check_artifact(self, path: Path) -> None:
        """Raise `InputError` where the artifact does not fit the model."""

    def prepare(self, task: Task) -> Any:
        """The task with everything checked that can be, for `run`. Raises `InputError`, `UnsupportedError` and
        `TooLargeError`; nothing has run.
        """

    def run(self, prepared: Any) -> AsyncGenerator[Event]:
        """Do the work. Closing the iterator stops it; so does an exception."""

    def load(self) -> Load:
        """For metrics."""

    def give_back_memory(self) -> None:
        """Return to the system what finished requests have freed. Called by any thread, when there are none."""

    def close(self) -> None:
        """Stop at the next step whatever still runs, with an error for those who wait."""
