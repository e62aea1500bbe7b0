"""The way from a request to what can run, which the engines behind the server share: artifacts become edits, prompts
become tokens, everything is checked.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from steer.adapters.language.decoding import Decoding
from steer.adapters.language.generation import sampling_settings
from steer.artifacts import read_card
from steer.core import Edit, ModelInfo, PromptEdit, Reward, check
from steer.core.readings import Reading, Readings
from steer.edits import KINDS, load_artifact
from steer.model import Plan, prepare
from steer.readings import reading_of
from steer.rewards.trained import trained
from steer.serving import requests
from steer.serving.engine import NamedEdit, Sampling, Steering, Task
from steer.serving.idle import give_back_memory
from steer.serving.requests import Request, Words, check_card, check_rows, check_search, edit_errors, seed_of, unchanged

__all__ = ["Prepared", "Preparer", "ServedModel"]


_KEPT_READINGS = 64


class ServableModel(Words, Protocol):
    """A language model that takes requests one by one."""

    split_special_tokens: bool
    name: str

    @property
    def info(self) -> ModelInfo: ...

    @property
    def own_settings(self) -> dict[str, Any]: ...

    def forget_prompts(self) -> None: ...


@dataclass(frozen=True)
class Prepared(Request):
    """A task, ready to run."""

    process: Any
    edits: tuple[Any, ...]
    reward: Reward | None
    seed: int
    readings: Readings | None = None
    plan: Plan | None = None
    """For searches."""


P = TypeVar("P", bound=Prepared)


class Preparer(ABC, Generic[P]):
    """Checks tasks against one model, with room for `max_rows` rows and, where it has one of its own, a cache of
    `cache_tokens`. Called in several threads; none of them may be the engine's own.
    """

    kind: type[P]

    def __init__(self, model: ServableModel, max_rows: int, cache_tokens: int | None = None) -> None:
        self.text, self.max_rows, self.cache_tokens = model, max_rows, cache_tokens
        self._readings: dict[Any, Readings] = {}
        self._lock = threading.Lock()

    def __call__(self, task: Task) -> P:
        read = requests.read(task, self.text)
        steering, sampling = read.steering, read.sampling
        self.check_sampling(sampling)
        edits = tuple(self.read_edit(named, steering.beta) for named in steering.edits)
        rewriting = [edit for edit in edits if isinstance(edit, PromptEdit)]
        if rewriting:
            read = requests.rewritten(read, rewriting, self.text, [not isinstance(e, PromptEdit) for e in edits])
            steering, sampling = read.steering, read.sampling
            edits = tuple(edit for edit in edits if not isinstance(edit, PromptEdit))
        reward = None if steering.reward is None else steering.reward.bind(self.text)
        process, readings = self.process(read, edits), self.readings(steering)
        made = self.kind(
            read.task, read.prompts, read.ids, sampling, process, edits, reward, seed_of(sampling), readings
        )
        if steering.sampler is not None:
            return replace(made, plan=self._plan(made))
        self.check_edits(made)
        check_rows(made, self.max_rows, self.cache_tokens)
        return made

    def _plan(self, made: P) -> Plan:
        check_search(made, self.max_rows, self.cache_tokens)
        steering = made.steering
        block = min(steering.block or self.block(steering, made.sampling.max_tokens), made.sampling.max_tokens)
        prompts = [p for p in made.prompts for _ in range(steering.repeats)]
        return prepare(
            replace(self.weighing(made.process, steering.base), block=block),
            prompts,
            edits=[list(made.edits)] * len(prompts),
            sampler=steering.sampler,
            reward=made.reward,
            beta=steering.beta,
            seed=made.seed,
            max_rows=self.max_rows,
            readings=made.readings,
            model=self.text,
        )

    def readings(self, steering: Steering) -> Readings | None:
        """What a request reads, the same object for the same request. Raises `InputError` with `steer.readings`."""
        if not steering.readings:
            return None
        key = (tuple((named.request.name, named.digest) for named in steering.readings), steering.stop)
        with self._lock:
            if key in self._readings:
                return self._readings[key]
        made = Readings(tuple(map(self._reading, steering.readings)), steering.stop)
        with self._lock:
            if len(self._readings) >= _KEPT_READINGS:
                self._readings.clear()
            return self._readings.setdefault(key, made)

    def _reading(self, named: NamedEdit) -> Reading:
        assert named.path is not None
        field = "steer.readings"
        with edit_errors(named.title, {}, field), unchanged(named, field):
            return reading_of(named.request.name, load_artifact(named.path), self.text.info)

    def check_artifact(self, path: Path) -> None:
        """Raise `InputError` where an artifact does not fit the model, or asks for other files."""
        check_card(path)
        card = read_card(path)
        if card.kind == "reward":
            # The heads read the states of the served model: a file never makes the server load another one.
            ours, theirs = self.text.info.entry()["fingerprint"], card.model.get("fingerprint")
            given = f"a reward for {card.model.get('name')} (fingerprint {theirs})"
            check(ours == theirs, "artifact", given, f"one for {self.text.name} (fingerprint {ours})")
            trained(str(path), [], {}, path.name)
            return
        with edit_errors(path.stem, {}):
            self.try_artifact(path)

    # ---- what an engine gives

    @abstractmethod
    def read_edit(self, named: NamedEdit, beta: float) -> Edit:
        """The edit of a request. Raises `InputError` with `steer.edits`."""

    @abstractmethod
    def process(self, read: Request, edits: Sequence[Any]) -> Any:
        """What draws for a request."""

    @abstractmethod
    def try_artifact(self, path: Path) -> None:
        """Raise where an artifact cannot be used."""

    @abstractmethod
    def check_edits(self, made: P) -> None:
        """Raise `InputError` where the edits do not go together."""

    @abstractmethod
    def block(self, steering: Steering, tokens: int) -> int:
        """Tokens in one step of a search, where the request does not say."""

    def weighing(self, process: Any, base: str) -> Any:
        """The process whose weights refer to that base law: see `SteerRequest.base`."""
        return replace(process, base=base)

    def check_sampling(self, sampling: Sampling) -> None:
        """Raise `InputError` for what the engine cannot draw or report."""


def decoding(sampling: Sampling) -> Decoding:
    """How each token is drawn, as processes know it."""
    return Decoding(
        max_new_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        stop=sampling.stop,
    )


class ServedModel(Generic[P]):
    """What every engine behind the server is and does before something runs: `preparer` reads requests for a model that
    is called `name`. See `steer.serving.engine.Engine`.
    """

    name: str
    kind: str
    preparer: Preparer[P]

    def serve(self, preparer: Preparer[P], name: str, split_special_tokens: bool) -> None:
        """Take a model over: requests are read one by one, and control tokens that messages spell are text."""
        self.preparer, self.name = preparer, name
        preparer.text.forget_prompts()
        preparer.text.split_special_tokens = split_special_tokens

    @property
    def context_length(self) -> int | None:
        return self.preparer.text.context_length

    @property
    def info(self) -> ModelInfo:
        return self.preparer.text.info

    def own_sampling(self) -> Sampling:
        """How the checkpoint's own `generation_config.json` draws. Raises `InputError` for what a server does not."""
        return Sampling(**sampling_settings(self.preparer.text.own_settings))

    @property
    def own_edits(self) -> tuple[str, ...]:
        return ()

    @property
    def edit_kinds(self) -> tuple[str, ...]:
        return tuple(sorted(KINDS))

    def check_artifact(self, path: Path) -> None:
        self.preparer.check_artifact(path)

    def prepare(self, task: Task) -> P:
        return self.preparer(task)

    def give_back_memory(self) -> None:
        give_back_memory()
