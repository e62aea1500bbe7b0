"""From a request to what can run: artifacts become edits, prompts become tokens, everything is checked."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from steer.adapters.language.decoding import Decoding
from steer.adapters.language.model import check_ids, check_lengths
from steer.adapters.transformers.process import TextProcess
from steer.adapters.transformers.state import TextState
from steer.core import Edit, HiddenEdit, Prompt, Reward, TransitionEdit
from steer.edits import load_edit
from steer.methods.value import HeadValue, ValueGuidance
from steer.model import Plan, prepare
from steer.serving import requests
from steer.serving.engine import NamedEdit, Steering, Task
from steer.serving.requests import (
    Request,
    check_card,
    check_rows,
    check_search,
    edit_errors,
    seed_of,
    token_ids,
    unchanged,
)

if TYPE_CHECKING:
    from steer.adapters.transformers.model import LanguageModel

__all__ = ["Prepared", "Preparer", "ServedProcess"]


_KEPT_EDITS = 64


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class ServedProcess(TextProcess):
    """A process that calls `turn` before each token, so that whoever waits can compute or stop it."""

    turn: Callable[[], None] = field(default=_nothing, repr=False, compare=False)

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        ids = token_ids(prompts, self.model)
        check_ids(ids, self.model.body.vocabulary)
        check_lengths(ids, self.decoding.max_new_tokens, self.model.context_length)
        return ids

    def _token(self, state: TextState, generator: torch.Generator) -> TextState:
        self.turn()
        return super()._token(state, generator)


@dataclass(frozen=True)
class Prepared(Request):
    """A task, ready to run."""

    process: ServedProcess
    hidden: tuple[HiddenEdit, ...]
    guided: tuple[TransitionEdit, ...]
    reward: Reward | None
    seed: int
    plan: Plan | None
    """For searches."""
    shares: bool
    """Whether its rows can decode in one cache with those of others."""


class Preparer:
    """Checks tasks against one model. Keeps the edits of recent requests; safe to call from several threads."""

    def __init__(self, model: LanguageModel, max_rows: int, cache_tokens: int) -> None:
        self.model, self.max_rows, self.cache_tokens = model, max_rows, cache_tokens
        self.shares = model.body.allows("shares")
        self._edits: OrderedDict[Any, Edit] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, task: Task) -> Prepared:
        read = requests.read(task, self.model)
        steering, sampling = read.steering, read.sampling
        edits = [self.edit(named, steering.beta) for named in steering.edits]
        process = ServedProcess(
            self.model,
            Decoding(
                max_new_tokens=sampling.max_tokens, temperature=sampling.temperature, top_k=sampling.top_k,
                top_p=sampling.top_p, min_p=sampling.min_p, stop=sampling.stop,
            ),
        )  # fmt: skip
        guided = tuple(e for e in edits if isinstance(e, TransitionEdit))
        columns = max(map(len, read.ids)) + sampling.max_tokens
        prepared = Prepared(
            task, read.prompts, read.ids, sampling, process,
            tuple(e for e in edits if isinstance(e, HiddenEdit)), guided,
            None if steering.reward is None else steering.reward.bind(self.model), seed_of(sampling), None,
            self.shares and self.model.body.alike(columns) and all(map(_needs_only_its_row, guided)),
        )  # fmt: skip
        if steering.sampler is not None:
            return replace(prepared, plan=self._plan(prepared, steering, edits))
        for edit in edits:
            process.edited(edit)
        check_rows(prepared, self.max_rows, self.cache_tokens)
        return prepared

    # ---- searches

    def _plan(self, prepared: Prepared, steering: Steering, edits: Sequence[Edit]) -> Plan:
        check_search(prepared, self.max_rows, self.cache_tokens)
        block = min(steering.block or 8, prepared.sampling.max_tokens)
        prompts = [p for p in prepared.prompts for _ in range(steering.repeats)]
        return prepare(
            replace(prepared.process, block=block), prompts, edits=[list(edits)] * len(prompts),
            sampler=steering.sampler, reward=prepared.reward, beta=steering.beta, seed=prepared.seed,
            max_rows=self.max_rows, model=self.model,
        )  # fmt: skip

    # ---- artifacts

    def check_artifact(self, path: Path) -> None:
        """Raise `InputError` where an artifact does not fit the model, or asks for other files."""
        check_card(path)
        edit = self._loaded(path, None, {})
        ServedProcess(self.model, Decoding()).edited(edit)

    def edit(self, named: NamedEdit, beta: float) -> Edit:
        """The edit of a request; the same object for the same request. Raises `InputError` with `steer.edits`."""
        asked = named.request
        key = (named.digest, asked.strength, beta, repr(sorted(asked.options().items())))
        with self._lock:
            if key in self._edits:
                self._edits.move_to_end(key)
                return self._edits[key]
        assert named.path is not None, "a language model has no edits of its own"
        with unchanged(named):
            made = self._loaded(named.path, asked.strength, asked.options()).with_beta(beta)
        with self._lock:
            made = self._edits.setdefault(key, made)
            while len(self._edits) > _KEPT_EDITS:
                self._edits.popitem(last=False)
        return made

    def _loaded(self, path: Path, strength: float | None, options: dict[str, Any]) -> Edit:
        with edit_errors(path, options):
            return load_edit(path, strength, model=self.model, **options)


def _needs_only_its_row(edit: TransitionEdit) -> bool:
    """Whether an edit looks at nothing but the law and the hidden state of the row."""
    value = edit.value if isinstance(edit, ValueGuidance) else None
    return isinstance(value, HeadValue) and value.embeddings is not None and value.source is None
