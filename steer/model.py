"""Models and generation: edits are mounted, and a sampler is run in batches of prompts."""

from __future__ import annotations

import inspect
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from steer.core import Edit, Process, Prompt, Reward, Sampler, Samples, UnsupportedError, check, check_whole
from steer.core.edit import Prompts
from steer.core.errors import check_unicode
from steer.core.names import check_known, check_meant, meant, our_names
from steer.core.notebook import facts_html
from steer.edits import as_edits
from steer.methods.prompt import SystemPrompt
from steer.methods.samplers import SAMPLERS, make_sampler, sampler_fields, sampler_name
from steer.progress import ticking
from steer.readings import as_readings
from steer.rewards import as_reward

__all__ = ["Model", "Plan", "execute", "generate", "prepare"]


@dataclass(frozen=True)
class Plan:
    """A checked request, ready to run."""

    process: Process
    prompts: list[Prompt]
    sampler: Sampler
    reward: Reward | None
    beta: float
    seed: int
    rows: int
    progress: bool
    edits: list[tuple[Edit, frozenset[int] | None]] = field(default_factory=list)


def _watched(process: Process, sampler: Sampler, readings: Any, stop_if: Any, model: Any) -> Process:
    """The process with what it is to read on its way. Raises `InputError` and `UnsupportedError`."""
    if readings is None and stop_if is None:
        return process
    if not process.reads:
        allowed = "language models through transformers and vLLM do"
        raise UnsupportedError(f"readings: {type(process).__name__} gives none; {allowed}")
    owner: Any = process if model is None else model
    wanted = as_readings(readings, stop_if, (owner.model if model is None else owner).info)
    if wanted is None:
        return process
    if not sampler.reads:
        able = ", ".join(name for name, kind in SAMPLERS.items() if kind.reads)
        raise UnsupportedError(f"readings: {sampler.title} keeps none of its texts; {able} do")
    return process.watched(wanted)


def prepare(
    process: Process,
    prompts: Prompts,
    *,
    edits: Any = (),
    sampler: Sampler | str | None = None,
    reward: Reward | str | Callable[..., Any] | None = None,
    beta: float = 1.0,
    n: int | None = None,
    seed: int | None = None,
    max_rows: int = 64,
    progress: bool = False,
    readings: Any = None,
    stop_if: str | None = None,
    model: Any = None,
) -> Plan:
    """Check everything that can be checked before work starts; see `generate`."""
    several = as_prompts(prompts)
    check(isinstance(beta, int | float) and 0 < beta < float("inf"), "beta", beta, "a number above 0")
    check_whole("max_rows", max_rows)
    check(seed is None or isinstance(seed, int), "seed", seed, "an integer")
    chosen = make_sampler(sampler, n)
    scored = as_reward(reward)
    check(
        scored is not None or not chosen.needs_reward, "reward", None, f"a reward: {sampler_name(chosen)} chooses by it"
    )
    if scored is not None and model is not None:
        scored = scored.bind(model)
    if model is not None:
        chosen = chosen.bind(model)
    process = _watched(process, chosen, readings, stop_if, model)
    mounted = [(edit.with_beta(float(beta)), wanted) for edit, wanted in as_edits(edits, len(several), model)]
    for edit, wanted in mounted:
        process.edited(edit, None if wanted is None else sorted(wanted))  # refused here, not in the middle of a run
    if hasattr(process, "encode"):
        process.encode(several)
    return Plan(
        process,
        several,
        chosen,
        scored,
        float(beta),
        secrets.randbits(31) if seed is None else seed,
        max(1, max_rows // chosen.rows),
        progress,
        mounted,
    )


def execute(
    plan: Plan,
    on_step: Callable[[int, Any], None] | None = None,
    on_trace: Callable[[int, Any], None] | None = None,
) -> Samples:
    """Run a plan in batches of prompts. `on_step(first_prompt, state)` sees every step, `on_trace(first_prompt, entry)`
    every entry of the samples' `trace` as it comes (see `Sampler.run`).
    """
    parts = []
    batches = -(-len(plan.prompts) // plan.rows)
    with ticking(plan.progress, "generating", batches * plan.sampler.updates(plan.process)) as tick:
        for first in range(0, len(plan.prompts), plan.rows):
            prompts = plan.prompts[first : first + plan.rows]
            process = _mounted(plan, first, len(prompts))
            generator = torch.Generator().manual_seed((plan.seed * 1_000_003 + first) % 2**63)

            def step(state: Any, first: int = first) -> None:
                tick(1)
                if on_step is not None:
                    on_step(first, state)

            with process.session():
                drawn = plan.sampler.run(
                    process,
                    prompts,
                    generator=generator,
                    reward=plan.reward,
                    beta=plan.beta,
                    on_step=step,
                    on_trace=None if on_trace is None else partial(on_trace, first),
                )
                parts.append(drawn)
    return _kl_named(plan, Samples.join(parts))


def _kl_named(plan: Plan, samples: Samples) -> Samples:
    """The samples with what their KL is."""
    kind = plan.sampler.kl_kind or _mounted(plan, 0, len(plan.prompts)).kl_kind
    if samples.kl_estimate is None and not kind.startswith("none"):
        kind = "none: under these settings neither the sampler nor the process knows it"
    return replace(samples, kl_kind=kind, pool=samples.pool and replace(samples.pool, kl_kind=kind))


class Model(ABC):
    """What every adapter loads: a `process` of its own kind, and `generate` over it."""

    name: str
    max_rows = 64
    """Rows generated at once by default."""
    images: ClassVar[bool] = False
    """Whether it draws images rather than writing texts."""
    rows_engine: Callable[[int], Any] | None = None
    """Makes the engine in which so many rows of any length decode together; `steer.load` gives language models one."""

    @abstractmethod
    def process(self, **settings: Any) -> Process:
        """The model as a `Process`."""

    def facts(self) -> dict[str, Any]:
        """What a notebook shows of the model, by name."""
        return {}

    def _repr_html_(self) -> str:
        return facts_html(f"{type(self).__name__} {self.name}", self.facts())

    def generate(
        self,
        prompts: Prompts = "",
        *,
        edits: Any = (),
        sampler: Sampler | str | None = None,
        reward: Reward | str | Callable[..., Any] | None = None,
        beta: float = 1.0,
        n: int | None = None,
        seed: int | None = None,
        max_rows: int | None = None,
        progress: bool = False,
        stream: bool | Any = False,
        readings: Any = None,
        stop_if: str | None = None,
        **settings: Any,
    ) -> Any:
        """Generate for every prompt: `Samples`. See `steer.generate` for what the arguments mean; `settings` are those
        of `process`, of a sampler that is named, and `system`, a system prompt for every chat. Other libraries' names
        are taken where they mean the same: `max_tokens`, `num_return_sequences`, `num_inference_steps`, `do_sample`.

        Args:
            stream: of language models through transformers: True returns an iterator of pieces of text, whose `samples`
                are there when it has ended; a transformers streamer is fed with tokens.

        Raises:
            InputError: a field is out of range; nothing has run.
            UnsupportedError: the model cannot do what an edit, the sampler or `stream` needs.
        """
        several = as_prompts(prompts)
        given = our_names({"n": n, "seed": seed, **settings})
        n, seed = given.pop("n", None), given.pop("seed", None)
        if (system := given.pop("system", None)) is not None:
            edits = _with_system(edits, SystemPrompt(system), len(several))
        given, chosen = self._sampler(sampler, n, given)
        check_meant(given)
        plan = prepare(
            self.process(**self.fit(given, several, edits)),
            several,
            edits=edits,
            sampler=chosen,
            reward=reward,
            beta=beta,
            seed=seed,
            progress=progress,
            readings=readings,
            stop_if=stop_if,
            model=self,
            max_rows=self.max_rows if max_rows is None else max_rows,
        )
        return self.run(plan) if stream is False else self.stream(plan, stream)

    def map(
        self,
        rows: Any,
        *,
        edits: Any = (),
        sampler: str | None = None,
        reward: Reward | str | Callable[..., Any] | None = None,
        beta: float = 1.0,
        n: int | None = None,
        system: str | None = None,
        artifacts: Path | str | None = None,
        out: Path | str | None = None,
        **settings: Any,
    ) -> list[dict[str, Any]]:
        """Answer every row, as `steer batch` does: a list of records in the order of the rows.

        A row's seed follows from `seed` and its id, so that its record depends on neither its place nor the rows
        beside it, but for rounding. A row that fails has a record with its `error`. Rows of a language model through
        transformers decode together where `edits`, `sampler` and `reward` are names, artifacts or texts; what a
        request cannot say, and other models, take one call of `generate` a row.

        Args:
            rows: texts, messages, or dicts with `prompt` or `messages`, perhaps an `id`, and fields of a request
                where they differ (`temperature`, `max_tokens`, `n`, `seed`, `steer`); a `datasets.Dataset` is such a
                sequence. Or the path of a file of them.
            artifacts: a folder of artifacts that a row's `steer` may name.
            out: records are appended to this file of JSON lines as they are done; the same call goes on where one
                was stopped.
            settings: of `generate`; beside them `seed` (0), `keep` (columns that records carry), `max_rows`, and with
                `out` also `max_failures`, `retry_failed`, `overwrite` and `progress` (see `steer.bulk.run_job`).

        Raises:
            InputError: a bad setting, two rows with one id, or a file of another job; nothing is drawn.
        """
        from steer.bulk.mapping import Wanted, mapped

        given = our_names(settings)
        own = {name: given.pop(name) for name in ("seed", "max_rows") if name in given}
        run = {
            name: given.pop(name) for name in ("max_failures", "retry_failed", "overwrite", "progress") if name in given
        }
        check(out is not None or not run, ", ".join(run), list(run.values()), "unset without out")
        keep = frozenset(given.pop("keep", ()))
        there = None if artifacts is None else Path(artifacts)
        return mapped(
            self,
            str(rows) if isinstance(rows, str | Path) else rows if isinstance(rows, Sequence) else list(rows),
            Wanted(edits, sampler, reward, beta, n, system, there, given),
            make_engine=self.rows_engine,
            out=None if out is None else str(out),
            keep=keep,
            **own,
            **run,
        )

    def _sampler(
        self, sampler: Sampler | str | None, n: int | None, given: dict[str, Any]
    ) -> tuple[dict[str, Any], Sampler]:
        """Settings of `process` and the sampler, which takes what of `given` are its own where only its name is."""
        named = isinstance(sampler, str) and sampler in SAMPLERS
        fields = sampler_fields(str(sampler)) if named else []
        fields += ["preset"] if named and SAMPLERS[str(sampler)].presets else []
        own = {k: given.pop(k) for k in list(given) if k in fields and k not in self.settings}
        for name in given:
            close = meant(name, fields, 0.85) if name not in self.settings else ""
            where = f"sampler {sampler}" if named else "generate()"
            check(not close, where, name, f"{', '.join(fields or sorted(self.settings))}{close}")
        size = self.default_n(given) if n is None else n
        return given, make_sampler(sampler, size, **own)

    @property
    def settings(self) -> frozenset[str]:
        """Names of the settings of `process`."""
        return frozenset(inspect.signature(self.process).parameters)

    def fit(self, settings: Mapping[str, Any], prompts: list[Prompt], edits: Any) -> dict[str, Any]:
        """`settings` of `process` with what depends on the prompts filled in."""
        return dict(settings)

    def default_n(self, settings: Mapping[str, Any]) -> int | None:
        """`n` of a request that names none, by its `settings`."""
        return None

    def run(self, plan: Plan) -> Samples:
        """Run a plan of this model's."""
        return execute(plan)

    def stream(self, plan: Plan, how: Any) -> Any:
        """Run a plan and show text as it comes. Raises `UnsupportedError`."""
        raise UnsupportedError(f"stream: {type(self).__name__} gives results when they are whole")


def generate(source: Model | Process, prompts: Prompts = "", **settings: Any) -> Samples:
    """Draw from a model or a process under edits, with a sampler and a reward.

    Args:
        source: what generates: a model, whose `generate` this is, with further settings of its own; or a `Process`.
        prompts: one prompt or several; a chat is a list of messages.
        edits: an edit, or a list of edits, for all prompts; or one list of edits (or None) for each prompt, as in
            `[[a], [a, b], None]`: one batch, different edits. An edit may also be an artifact or a text such as
            "calm.safetensors:0.15".
        sampler: a `Sampler`, or its name; default: independent samples.
        reward: a `Reward`, an expression such as "sentiment - 0.3*profanity", or a callable on texts.
        beta: KL coefficient of the target `p exp(reward / beta)`, for samplers that weigh.
        n: population for each prompt: outputs, best-of-n's candidates, particles.
        seed: same seed, same result on the same machine, of the same call: rows of a batch share one stream of random
            numbers, so that other prompts beside a prompt, another `n` or another `max_rows` change its outputs. None
            draws one. (Rows of `steer serve` repeat in any company.)
        max_rows: rows generated at once; it belongs to the seed.
        readings: of language models (transformers, vLLM): what to read where each token is chosen, into
            `samples.readings`, by name: `{"calm": vector, "asked": "probe.safetensors"}`, or a list of them. A vector
            reads the component of the residual stream along its direction, after edits, in units of the layer's median
            residual norm, as the mean over its layers; a vector fitted with `method="probe"` its log-odds. A token's
            number is read at the position that it was predicted from: that of the token before it, for the first one
            the end of the prompt. (`model.readings` reads given texts at their own tokens.)
        stop_if: one comparison of a reading with a number, such as "calm < -1.5": a text ends with the first token
            whose reading fulfils it.
        progress: show a bar on standard error.

    Raises:
        InputError: a field is out of range; nothing has run.
        UnsupportedError: the process cannot do what the edit or sampler needs.
    """
    if isinstance(source, Model):
        drawn: Samples = source.generate(prompts, **settings)
        return drawn
    check(isinstance(source, Process), "source", source, "a model, as steer.load gives it, or a process")
    known = frozenset(inspect.signature(prepare).parameters) - {"process", "prompts"}
    for name in settings:
        check_known("generate()", name, known)
    return execute(prepare(source, prompts, **settings))


def _with_system(edits: Any, system: Edit, count: int) -> list[list[Any]]:
    """`edits` and a system prompt for each of `count` prompts."""
    if isinstance(edits, list | tuple) and any(e is None or type(e) in (list, tuple) for e in edits):
        check(len(edits) == count, "edits", f"{len(edits)} entries", f"one for each of {count} prompts")
        return [[*(mine or ()), system] for mine in edits]
    shared = [] if edits is None else list(edits) if type(edits) in (list, tuple) else [edits]
    as_edits(shared, count)
    return [[*shared, system] for _ in range(count)]


def as_prompts(prompts: Any) -> list[Prompt]:
    """One prompt or several as a list. Raises `InputError`."""
    if isinstance(prompts, str):
        check_unicode("prompt", prompts)
        return [prompts]
    check(isinstance(prompts, Sequence) and len(prompts) > 0, "prompts", prompts, "a prompt or a list of prompts")
    check_unicode("prompts", list(prompts))
    if all(isinstance(m, dict) for m in prompts):
        return [prompts]
    return list(prompts)


def _mounted(plan: Plan, first: int, count: int) -> Process:
    process = plan.process
    for edit, wanted in plan.edits:
        mine = None if wanted is None else [b - first for b in wanted if first <= b < first + count]
        if mine is None or mine:
            process = process.edited(edit, mine)
    return process
