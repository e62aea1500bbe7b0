"""Preparation of requests for the transformers engine: edits that are kept, and a process that takes turns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from steer.adapters.language import serving as language
from steer.adapters.language.decoding import Decoding
from steer.adapters.language.model import check_ids, check_lengths
from steer.adapters.transformers.process import TextProcess
from steer.adapters.transformers.state import TextState
from steer.core import Edit, HiddenEdit, Prompt, TransitionEdit, UnsupportedError
from steer.edits import load_edit
from steer.methods.value import HeadValue, ValueGuidance
from steer.serving.engine import NamedEdit, Steering
from steer.serving.requests import Request, edit_errors, token_ids, unchanged

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
class Prepared(language.Prepared):
    """A task, ready to run."""

    @property
    def shares(self) -> bool:
        """Whether its rows can decode in one cache with those of others."""
        body = self.process.model.body
        alone = not body.allows("shares") or not body.alike(self.columns)
        return not alone and all(map(_needs_only_its_row, self.guided))

    @property
    def hidden(self) -> tuple[HiddenEdit, ...]:
        return tuple(edit for edit in self.edits if isinstance(edit, HiddenEdit))

    @property
    def guided(self) -> tuple[TransitionEdit, ...]:
        return tuple(edit for edit in self.edits if isinstance(edit, TransitionEdit))


class Preparer(language.Preparer[Prepared]):
    """Checks tasks against one model. Keeps the edits of recent requests; safe to call from several threads."""

    kind = Prepared

    def __init__(self, model: LanguageModel, max_rows: int, cache_tokens: int) -> None:
        super().__init__(model, max_rows, cache_tokens)
        self.model = model
        self._edits: OrderedDict[Any, Edit] = OrderedDict()

    def process(self, read: Request, edits: Sequence[Edit]) -> ServedProcess:
        return ServedProcess(self.model, language.decoding(read.sampling))

    def block(self, steering: Steering, tokens: int) -> int:
        return 8

    def check_edits(self, made: Prepared) -> None:
        for edit in made.edits:
            made.process.edited(edit)
        if made.task.echo and (made.guided or any(edit.reads for edit in made.hidden)):
            allowed = "edits of hidden states without gates; others have no law of the prompt's tokens"
            raise UnsupportedError(f"echo: {allowed}")

    # ---- artifacts

    def try_artifact(self, path: Path) -> None:
        ServedProcess(self.model, Decoding()).edited(load_edit(path, model=self.model))

    def read_edit(self, named: NamedEdit, beta: float) -> Edit:
        """The edit of a request; the same object for the same request. Raises `InputError` with `steer.edits`."""
        asked = named.request
        key = (named.digest, asked.strength, beta, repr(sorted(asked.options().items())))
        with self._lock:
            if key in self._edits:
                self._edits.move_to_end(key)
                return self._edits[key]
        given: dict[str, Any] = {"model": self.model, **asked.options()}
        with unchanged(named), edit_errors(named.title, asked.options()):
            if named.inline is not None:
                made = named.inline(asked.strength, **given).with_beta(beta)
            else:
                assert named.path is not None, "a language model has no edits of its own"
                made = load_edit(named.path, asked.strength, **given).with_beta(beta)
            ServedProcess(self.model, Decoding()).edited(made)  # refused by the edit's own name
        with self._lock:
            made = self._edits.setdefault(key, made)
            while len(self._edits) > _KEPT_EDITS:
                self._edits.popitem(last=False)
        return made


def _needs_only_its_row(edit: TransitionEdit) -> bool:
    """Whether an edit looks at nothing but the law and the hidden state of the row."""
    value = edit.value if isinstance(edit, ValueGuidance) else None
    return isinstance(value, HeadValue) and value.embeddings is not None and value.source is None
