"""Models and generation: edits are mounted, and a sampler is run in batches of prompts."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from steer.core import Edit, Process, Prompt, Reward, Sampler, Samples, UnsupportedError, check, check_whole
from steer.core.errors import check_unicode
from steer.edits import as_edits
from steer.methods.samplers import make_sampler, sampler_name
from steer.progress import ticking
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


def prepare(
    process: Process,
    prompts: Prompt | Sequence[Prompt],
    *,
    edits: Any = (),
    sampler: Sampler | str | None = None,
    reward: Reward | str | Callable[..., Any] | None = None,
    beta: float = 1.0,
    n: int | None = None,
    seed: int | None = None,
    max_rows: int = 64,
    progress: bool = False,
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
    mounted = [(edit.with_beta(float(beta)), wanted) for edit, wanted in as_edits(edits, len(several), model)]
    for edit, wanted in mounted:
        process.edited(edit, None if wanted is None else sorted(wanted))  # refused here, not in the middle of a run
    if hasattr(process, "encode"):
        process.encode(several)
    return Plan(
        process, several, chosen, scored, float(beta), secrets.randbits(31) if seed is None else seed,
        max(1, max_rows // chosen.rows), progress, mounted,
    )  # fmt: skip


def execute(plan: Plan, on_step: Callable[[int, Any], None] | None = None) -> Samples:
    """Run a plan in batches of prompts. `on_step(first_prompt, state)` sees every step."""
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
                parts.append(
                    plan.sampler.run(
                        process, prompts, generator=generator, reward=plan.reward, beta=plan.beta, on_step=step
                    )
                )
    return Samples.join(parts)


class Model(ABC):
    """What every adapter loads: a `process` of its own kind, and `generate` over it."""

    name: str
    max_rows = 64
    """Rows generated at once by default."""

    @abstractmethod
    def process(self, **settings: Any) -> Process:
        """The model as a `Process`."""

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] = "",
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
        **settings: Any,
    ) -> Any:
        """Generate for every prompt: `Samples`. See `steer.generate` for what the arguments mean; `settings` are those
        of `process`.

        Args:
            stream: of language models through transformers: True returns an iterator of pieces of text, whose `samples`
                are there when it has ended; a transformers streamer is fed with tokens.

        Raises:
            InputError: a field is out of range; nothing has run.
            UnsupportedError: the model cannot do what an edit, the sampler or `stream` needs.
        """
        several = as_prompts(prompts)
        plan = prepare(
            self.process(**self.fit(settings, several, edits)), several, edits=edits, sampler=sampler, reward=reward,
            beta=beta, n=self.default_n(settings) if n is None else n, seed=seed, progress=progress, model=self,
            max_rows=self.max_rows if max_rows is None else max_rows,
        )  # fmt: skip
        return self.run(plan) if stream is False else self.stream(plan, stream)

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


def generate(process: Process, prompts: Prompt | Sequence[Prompt], **settings: Any) -> Samples:
    """Draw from a process under edits, with a sampler and a reward.

    Args:
        process: what generates. `LanguageModel.generate` is this function with the model's own process.
        prompts: one prompt or several; a chat is a list of messages.
        edits: an edit, or a list of edits, for all prompts; or one list of edits (or None) for each prompt, as in
            `[[a], [a, b], None]`: one batch, different edits. An edit may also be an artifact or a text such as
            "calm.safetensors:0.15".
        sampler: a `Sampler`, or its name; default: independent samples.
        reward: a `Reward`, an expression such as "sentiment - 0.3*profanity", or a callable on texts.
        beta: KL coefficient of the target `p exp(reward / beta)`, for samplers that weigh.
        n: population for each prompt: outputs, best-of-n's candidates, particles.
        seed: same seed, same result on the same machine; None draws one.
        max_rows: rows generated at once.
        progress: show a bar on standard error.

    Raises:
        InputError: a field is out of range; nothing has run.
        UnsupportedError: the process cannot do what the edit or sampler needs.
    """
    return execute(prepare(process, prompts, **settings))


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
