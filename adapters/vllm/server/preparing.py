"""From a request to what a vLLM engine runs: artifacts are registered, everything is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from steer.adapters.language.decoding import Decoding
from steer.adapters.language.model import check_lengths
from steer.adapters.vllm.model import VLLMModel
from steer.adapters.vllm.plugin.requests import Inside
from steer.adapters.vllm.process import Named, VLLMProcess, VLLMState
from steer.core import InputError, Prompt, Reward, Samples, check
from steer.model import Plan, prepare
from steer.serving import requests
from steer.serving.engine import NamedEdit, Sampling, Steering, Task
from steer.serving.requests import (
    AGAIN,
    Request,
    check_card,
    check_rows,
    check_search,
    edit_errors,
    seed_of,
    token_ids,
)

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
class Prepared(Request):
    """A task, ready to run."""

    edits: tuple[Named, ...]
    files: dict[str, Path]
    """What the edits need, by the name that the engine knows it by."""
    process: ServedProcess
    reward: Reward | None
    drift: Drift | None
    """None where it is not wanted, or cannot be told."""
    plan: Plan | None
    """For searches."""

    @property
    def measures(self) -> bool:
        """Whether something is to be computed about its texts once they are written."""
        return self.reward is not None or self.drift == "estimate"


class Preparer:
    """Checks tasks against one model; its methods are for other threads than the engine's loop, and wait for it."""

    def __init__(self, model: VLLMModel, max_rows: int) -> None:
        self.model, self.max_rows = model, max_rows
        self.raw = str(model.config.model_config.logprobs_mode) == "raw_logprobs"

    def __call__(self, task: Task) -> Prepared:
        read = requests.read(task, self.model)
        steering, sampling = read.steering, read.sampling
        self._check_logprobs(sampling)
        named = [self._named(edit, steering.beta) for edit in steering.edits]
        edits = tuple(edit for edit, _ in named)
        drift = self._drift(read, [guides for _, guides in named]) if task.steering and steering.kl else None
        process = ServedProcess(
            self.model,
            Decoding(
                max_new_tokens=sampling.max_tokens, temperature=sampling.temperature, top_k=sampling.top_k,
                top_p=sampling.top_p, min_p=sampling.min_p, stop=sampling.stop,
            ),
            block=_block(steering, sampling.max_tokens), drift=drift, weighs=drift == "estimate",
        )  # fmt: skip
        prepared = Prepared(
            task, read.prompts, read.ids, sampling, edits,
            {name_of(edit): edit.path for edit in steering.edits if edit.path is not None}, process,
            None if steering.reward is None else steering.reward.bind(self.model), drift, None,
        )  # fmt: skip
        if steering.sampler is None:
            self.model.front.parse(Inside(tuple(edit.request for edit in edits)))  # all of them together
            check_rows(prepared, self.max_rows)
            return prepared
        return replace(prepared, plan=self._plan(prepared))

    def _plan(self, prepared: Prepared) -> Plan:
        check_search(prepared, self.max_rows)
        steering = prepared.steering
        prompts = [p for p in prepared.prompts for _ in range(steering.repeats)]
        return prepare(
            prepared.process, prompts, edits=[list(prepared.edits)] * len(prompts), sampler=steering.sampler,
            reward=prepared.reward, beta=steering.beta, seed=seed_of(prepared.sampling), max_rows=self.max_rows,
            model=self.model,
        )  # fmt: skip

    def _check_logprobs(self, sampling: Sampling) -> None:
        if sampling.logprobs is None:
            return
        most = int(self.model.config.model_config.max_logprobs)
        check(most < 0 or sampling.logprobs <= most, "top_logprobs", sampling.logprobs,
              f"at most {most}, max_logprobs of this engine")  # fmt: skip
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

    def check_artifact(self, path: Path) -> None:
        """Raise `InputError` where an artifact does not fit the model, or asks for other files."""
        check_card(path)
        with edit_errors(path, {}):
            self.model.inspect(path)

    def _named(self, named: NamedEdit, beta: float) -> tuple[Named, bool]:
        """The edit, registered and checked, and whether it changes the law of the next token. Raises `InputError` with
        `steer.edits`.
        """
        request, name = named.request, name_of(named)
        if named.path is None:
            return self.model.edit(name, request.strength, **request.options()), True
        with edit_errors(named.path, request.options()):
            files = {name: named.path}
            hold(self.model, files)
            try:
                card = self.model.card(name)
                options = request.options()
                if card.kind == "value" and card.settings.get("beta") is None:
                    options.setdefault("beta", beta)
                return self.model.edit(name, request.strength, **options), card.kind == "value"
            finally:
                self.model.release(files)


def _block(steering: Steering, tokens: int) -> int:
    """Tokens of a step; where the request does not say, whole texts for samplers that choose among those alone, and
    otherwise as many as the engine's cache can share.
    """
    whole = steering.sampler is None or steering.sampler.chooses_whole
    return min(steering.block or (tokens if whole else 16), tokens)


def name_of(named: NamedEdit) -> str:
    """What the engine knows an artifact by: its content, so that a name that changes hands is no matter."""
    return named.request.name if named.path is None else f"{_PREFIX}{named.digest[:32]}"


def hold(model: VLLMModel, files: Mapping[str, Path]) -> None:
    """Have artifacts registered, and kept until `release`. Raises `InputError` where a file is not what it was."""
    for name, path in files.items():
        there = name in model.registered or path.is_file()
        check(there, "steer.edits.name", f"{path.stem} (its file is gone)", f"an artifact whose file is there; {AGAIN}")
    model.hold(files)
    for name, path in files.items():
        if f"{_PREFIX}{model.registered[name]}" != name:
            model.release(files)
            model.unregister(name)
            given = f"{path.stem} (its file was replaced)"
            raise InputError("steer.edits.name", given, f"an artifact whose file is the one registered; {AGAIN}")


def extra_args(edits: Sequence[Named]) -> dict[str, Any] | None:
    """What a request under these edits carries."""
    return {"steer": Inside(tuple(edit.request for edit in edits))} if edits else None
