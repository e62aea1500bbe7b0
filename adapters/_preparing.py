"""From a request to what can run: artifacts become edits, prompts become tokens, everything is checked."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer import artifacts, engine
from steer.adapters import _track
from steer.adapters._cache import full_attention, new_cache
from steer.adapters.decoding import Decoding
from steer.adapters.text import TextProcess, TextState
from steer.core import Edit, HiddenEdit, InputError, Prompt, RawText, Reward, SteerError, TransitionEdit, check
from steer.methods.value import HeadValue, ValueGuidance
from steer.mount import load_edit
from steer.serving.engine import NamedEdit, Sampling, Steering, Task, TokenPrompt, TooLargeError

if TYPE_CHECKING:
    from steer.adapters.transformers import LanguageModel

__all__ = ["Encoded", "Prepared", "Preparer", "ServedProcess"]

_KEPT_EDITS = 64


class Encoded(RawText):
    """Text that came as token ids, which stay what they are."""

    ids: tuple[int, ...]

    @classmethod
    def of(cls, text: str, ids: tuple[int, ...]) -> Encoded:
        made = cls(text)
        made.ids = ids
        return made


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class ServedProcess(TextProcess):
    """A process that calls `turn` before each token, so that whoever waits can compute or stop it."""

    turn: Callable[[], None] = field(default=_nothing, repr=False, compare=False)

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        ids = [list(p.ids) if isinstance(p, Encoded) else self.model.encode(p) for p in prompts]
        _track.check_lengths(ids, self.decoding.max_new_tokens, self.model.context_length)
        return ids

    def _token(self, state: TextState, generator: torch.Generator, waiting: Tensor | None) -> TextState:
        self.turn()
        return super()._token(state, generator, waiting)


@dataclass(frozen=True)
class Prepared:
    """A task, ready to run."""

    task: Task
    prompts: tuple[Prompt, ...]
    ids: tuple[tuple[int, ...], ...]
    sampling: Sampling
    process: ServedProcess
    hidden: tuple[HiddenEdit, ...]
    guided: tuple[TransitionEdit, ...]
    reward: Reward | None
    seed: int
    plan: engine.Plan | None
    """For searches."""
    shares: bool
    """Whether its rows can decode in one cache with those of others."""

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.task.n

    @property
    def columns(self) -> int:
        """Positions that its longest row has at most."""
        return max(map(len, self.ids)) + self.sampling.max_tokens

    @property
    def penalises(self) -> bool:
        """Whether the law depends on more than the model, its edits and its truncation."""
        s = self.sampling
        return bool(s.frequency_penalty or s.presence_penalty or s.logit_bias)


class Preparer:
    """Checks tasks against one model. Keeps the edits of recent requests; safe to call from several threads."""

    def __init__(self, model: LanguageModel, max_rows: int, cache_tokens: int) -> None:
        self.model, self.max_rows, self.cache_tokens = model, max_rows, cache_tokens
        self.full_attention = full_attention(new_cache(model.config))
        self._edits: OrderedDict[Any, Edit] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, task: Task) -> Prepared:
        steering = task.steering or Steering()
        prompts = tuple(self._prompt(p) for p in task.prompts)
        ids = tuple(tuple(self._encode(p)) for p in prompts)
        sampling = self._sized(task, ids)
        edits = [self.edit(named, steering.beta) for named in steering.edits]
        process = ServedProcess(
            self.model,
            Decoding(
                max_new_tokens=sampling.max_tokens, temperature=sampling.temperature, top_k=sampling.top_k,
                top_p=sampling.top_p, min_p=sampling.min_p, stop=sampling.stop,
            ),
        )  # fmt: skip
        guided = tuple(e for e in edits if isinstance(e, TransitionEdit))
        prepared = Prepared(
            task, prompts, ids, sampling, process, tuple(e for e in edits if isinstance(e, HiddenEdit)), guided,
            None if steering.reward is None else steering.reward.bind(self.model),
            secrets.randbits(31) if sampling.seed is None else sampling.seed, None,
            self.full_attention and all(map(_needs_only_its_row, guided)),
        )  # fmt: skip
        if steering.sampler is not None:
            return replace(prepared, plan=self._plan(prepared, steering, edits))
        for edit in edits:
            process.edited(edit)
        self._check_room(prepared)
        return prepared

    # ---- prompts

    def _prompt(self, prompt: Prompt | TokenPrompt) -> Prompt:
        if not isinstance(prompt, TokenPrompt):
            return prompt
        top = self.model.vocabulary
        for token in prompt.ids:
            check(0 <= token < top, "prompt", token, f"token ids from 0 to {top - 1}")
        check(len(prompt.ids) > 0, "prompt", [], "at least one token")
        return Encoded.of(self.model.decode(prompt.ids), prompt.ids)

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, Encoded):
            return list(prompt.ids)
        name = "prompt" if isinstance(prompt, str) else "messages"
        try:
            ids = self.model.encode(prompt)
        except InputError as error:
            raise InputError(name, error.given, error.allowed) from error
        except Exception as error:  # a chat template is a program of its own, and refuses what it does not know
            raise InputError(name, f"messages that the chat template refuses ({error})", "others") from error
        check(bool(ids), name, "", "a prompt with at least one token")
        return ids

    def _sized(self, task: Task, ids: Sequence[Sequence[int]]) -> Sampling:
        """The sampling with as many tokens as the context leaves."""
        sampling, limit = task.sampling, self.model.context_length
        for token, _ in sampling.logit_bias:
            check(0 <= token < self.model.vocabulary, "logit_bias", token, f"0 to {self.model.vocabulary - 1}")
        if limit is None:
            return sampling
        longest = max(map(len, ids))
        name = "prompt" if isinstance(task.prompts[0], str | TokenPrompt) else "messages"
        if longest >= limit:
            raise InputError(name, f"{longest} tokens", f"fewer than {limit} tokens, the model's context")
        if sampling.trim:
            return replace(sampling, max_tokens=min(sampling.max_tokens, limit - longest))
        if longest + sampling.max_tokens > limit:
            raise InputError(
                name, f"{longest} tokens and max_tokens={sampling.max_tokens}",
                f"at most {limit} tokens in all, the model's context",
            )  # fmt: skip
        return sampling

    def _check_room(self, prepared: Prepared) -> None:
        rows = prepared.choices
        if rows > self.max_rows:
            raise TooLargeError("n", f"{rows} choices", f"at most {self.max_rows} rows that decode together")
        if rows * prepared.columns > self.cache_tokens:
            raise TooLargeError(
                "max_tokens", f"{rows} choices of up to {prepared.columns} tokens with their prompt",
                f"at most {self.cache_tokens} tokens in all, the room of the cache",
            )  # fmt: skip

    # ---- searches

    def _plan(self, prepared: Prepared, steering: Steering, edits: Sequence[Edit]) -> engine.Plan:
        sampling, sampler = prepared.sampling, steering.sampler
        assert sampler is not None
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            check(not getattr(sampling, name), name, getattr(sampling, name), "unset: a search draws without it")
        check(sampling.logprobs is None, "logprobs", True, "unset: a search reports rewards, not log-probabilities")
        rows = sampler.rows
        if rows > self.max_rows or rows * prepared.columns > self.cache_tokens:
            raise TooLargeError(
                "steer.candidates", f"{rows} rows of up to {prepared.columns} tokens at once",
                f"at most {self.max_rows} rows and {self.cache_tokens} tokens",
            )  # fmt: skip
        block = min(steering.block or 8, sampling.max_tokens)
        prompts = [p for p in prepared.prompts for _ in range(steering.repeats)]
        return engine.prepare(
            replace(prepared.process, block=block), prompts, edits=edits, sampler=sampler, reward=prepared.reward,
            beta=steering.beta, seed=prepared.seed, max_rows=self.max_rows, model=self.model,
        )  # fmt: skip

    # ---- artifacts

    def check_artifact(self, path: Path) -> None:
        """Raise `InputError` where an artifact does not fit the model, or asks for other files."""
        card = artifacts.read_card(path)
        for name in ("gate", "tokens"):
            check(not card.settings.get(name), "artifact", f"a card that names a file ({name})", "a card without")
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
        made = self._loaded(named.path, asked.strength, asked.options()).with_beta(beta)
        with self._lock:
            made = self._edits.setdefault(key, made)
            while len(self._edits) > _KEPT_EDITS:
                self._edits.popitem(last=False)
        return made

    def _loaded(self, path: Path, strength: float | None, options: dict[str, Any]) -> Edit:
        try:
            return load_edit(path, strength, model=self.model, **options)
        except SteerError as error:
            given, allowed = (error.given, error.allowed) if isinstance(error, InputError) else (path.stem, str(error))
            where = f"steer.edits.{error.field}" if isinstance(error, InputError) and options else "steer.edits"
            raise InputError(where, given, allowed) from error
        except (KeyError, ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
            why = f"{path.stem} (cannot be used: {type(error).__name__}: {error})"
            raise InputError("steer.edits", why, "an artifact as steer writes it") from error


def _needs_only_its_row(edit: TransitionEdit) -> bool:
    """Whether an edit looks at nothing but the law and the hidden state of the row."""
    value = edit.value if isinstance(edit, ValueGuidance) else None
    return isinstance(value, HeadValue) and value.embeddings is not None and value.source is None
