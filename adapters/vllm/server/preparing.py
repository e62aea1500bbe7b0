"""Preparation of requests for a vLLM engine: registered artifacts, and a process that knows its drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from steer.adapters.language import serving as language
from steer.adapters.language.model import check_lengths
from steer.adapters.vllm.artifacts import Source
from steer.adapters.vllm.model import VLLMModel
from steer.adapters.vllm.plugin.requests import Inside
from steer.adapters.vllm.process import Named, VLLMProcess, VLLMState
from steer.artifacts import read_card
from steer.core import Edit, InputError, Prompt, Samples, UnsupportedError, check
from steer.core.readings import Readings
from steer.edits import PROMPTS, load_edit
from steer.serving.engine import NamedEdit, Sampling, Steering
from steer.serving.requests import AGAIN, Request, edit_errors, token_ids, unchanged

__all__ = ["Prepared", "Preparer", "ServedProcess", "hold"]


_PREFIX = "sha256-"

Drift = Literal["nothing", "estimate"]
"""How far texts drift from the unsteered model: not at all, or as `log q - log p` of each text tells."""


@dataclass(frozen=True)
class ServedProcess(VLLMProcess):
    """A process that knows whether its drift can be told."""

    drift: Drift | None = None

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        ids = token_ids(prompts, self.model)
        check_lengths(ids, self.decoding.max_new_tokens, self.model.context_length)
        return ids

    def decode(self, state: VLLMState) -> Samples:
        samples = super().decode(state)
        return samples if self.drift is not None else replace(samples, kl_estimate=None)


@dataclass(frozen=True)
class Prepared(language.Prepared):
    """A task, ready to run."""

    @property
    def files(self) -> dict[str, Source]:
        """What the edits need, by the name that the engine knows it by."""
        return {name_of(edit): s for edit in self.steering.edits if (s := source_of(edit)) is not None}

    @property
    def drift(self) -> Drift | None:
        """None where it is not wanted, or cannot be told."""
        return self.process.drift

    @property
    def measures(self) -> bool:
        """Whether something is to be computed about its texts once they are written."""
        return self.reward is not None or self.drift == "estimate"


@dataclass(frozen=True)
class _Read(Named):
    """An edit of a request."""

    guides: bool = False
    """Whether it changes the law of the next token."""


class Preparer(language.Preparer[Prepared]):
    """Checks tasks against one model; its methods are for other threads than the engine's loop, and wait for it."""

    kind = Prepared

    def __init__(self, model: VLLMModel, max_rows: int) -> None:
        super().__init__(model, max_rows)
        self.model = model
        self.raw = str(model.config.model_config.logprobs_mode) == "raw_logprobs"

    def readings(self, steering: Steering) -> Readings | None:
        made = super().readings(steering)
        if made is not None:
            allowed = "unset on vLLM, whose tokens are sent before they are read; steer serve on transformers takes it"
            check(made.stop is None, "steer.stop_if", str(made.stop), allowed)
            self.model.client.teach(made)
        return made

    def process(self, read: Request, edits: Sequence[_Read]) -> ServedProcess:
        asked = read.task.steering is not None and read.steering.kl
        drift = self._drift(read, [edit.guides for edit in edits]) if asked else None
        return ServedProcess(self.model, language.decoding(read.sampling), drift=drift, weighs=drift == "estimate")

    def block(self, steering: Steering, tokens: int) -> int:
        """Whole texts for samplers that choose among those alone, otherwise as many as the engine's cache can share."""
        whole = steering.sampler is None or steering.sampler.chooses_whole
        return tokens if whole else 16

    def weighing(self, process: ServedProcess, base: str) -> ServedProcess:
        check(base == "truncated", "steer.base", base, "truncated: this engine knows no other base law")
        return process

    def check_edits(self, made: Prepared) -> None:
        asked = Inside(tuple(edit.request for edit in made.edits))
        self.model.front.parse(asked)
        if made.task.echo and (
            any(e.guides for e in made.edits) or any(e.reads for e in self.model.front.hidden(asked))
        ):
            raise UnsupportedError(
                "echo: edits of hidden states without gates; others have no law of the prompt's tokens"
            )

    def check_sampling(self, sampling: Sampling) -> None:
        if sampling.logprobs is None:
            return
        most = int(self.model.config.model_config.max_logprobs)
        check(
            most < 0 or sampling.logprobs <= most,
            "top_logprobs",
            sampling.logprobs,
            f"at most {most}, max_logprobs of this engine",
        )
        check(self.raw, "logprobs", True, "unset: this engine was not started with logprobs_mode=raw_logprobs")

    def _drift(self, read: Request, guided: Sequence[bool]) -> Drift | None:
        """What is known of the drift from the log-probabilities that the engine reports: those of the model's own law
        at temperature 1 where they are raw, otherwise those of the law that is drawn from.
        """
        s = read.sampling
        greedy = s.temperature == 0
        truncates = not greedy and bool(s.top_k or s.top_p < 1 or s.min_p)
        if not guided and not truncates:
            return "nothing"
        as_drawn = not self.raw or not (truncates or read.penalises or any(guided))
        return "estimate" if s.temperature == 1 and as_drawn else None

    # ---- artifacts

    def try_artifact(self, path: Path) -> None:
        if read_card(path).kind in PROMPTS:
            load_edit(path, model=self.model)
        else:
            self.model.inspect(path)

    def read_edit(self, named: NamedEdit, beta: float) -> _Read | Edit:
        """The edit, registered and checked; one of the prompt acts before the engine. Raises `InputError` with
        `steer.edits`.
        """
        request, name, source = named.request, name_of(named), source_of(named)
        if source is None:
            return _Read(self.model.edit(name, request.strength, **request.options()).request, guides=True)
        with edit_errors(named.title, request.options()):
            if isinstance(source, Path) and read_card(source).kind in PROMPTS:
                with unchanged(named):
                    return load_edit(source, request.strength, model=self.model, **request.options())
        with edit_errors(named.title, request.options()):
            files = {name: source}
            hold(self.model, files)
            try:
                card = self.model.card(name)
                options = request.options()
                if card.kind == "value" and card.settings.get("beta") is None:
                    options.setdefault("beta", beta)
                made = self.model.edit(name, request.strength, **options)
                return _Read(made.request, guides=card.kind == "value")
            finally:
                self.model.release(files)


def source_of(named: NamedEdit) -> Source | None:
    """What an edit is registered from; None for one of the engine's own."""
    return named.inline or named.path


def name_of(named: NamedEdit) -> str:
    """What the engine knows an artifact by: its content, so that a name that changes hands is no matter."""
    return named.request.name if source_of(named) is None else f"{_PREFIX}{named.digest[:32]}"


def hold(model: VLLMModel, files: Mapping[str, Source]) -> None:
    """Have artifacts registered, and kept until `release`. Raises `InputError` where a file is not what it was."""
    for name, source in files.items():
        if isinstance(source, Path):
            there = name in model.registered or source.is_file()
            given, allowed = f"{source.stem} (its file is gone)", f"an artifact whose file is there; {AGAIN}"
            check(there, "steer.edits.name", given, allowed)
    model.hold(files)
    for name, source in files.items():
        if f"{_PREFIX}{model.registered[name]}" != name:
            model.release(files)
            model.unregister(name)
            given = f"{source.stem if isinstance(source, Path) else name} (its file was replaced)"
            raise InputError("steer.edits.name", given, f"an artifact whose file is the one registered; {AGAIN}")


def extra_args(edits: Sequence[Named], read: tuple[str, str] | None = None) -> dict[str, Any] | None:
    """What a request under these edits carries; `read` is what is read, and the tag under which it is kept."""
    return {"steer": Inside(tuple(edit.request for edit in edits), read=read)} if edits or read else None
