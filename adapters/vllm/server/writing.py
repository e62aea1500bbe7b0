"""Tasks on a vLLM engine: tokens as they come, and searches beside them. Coroutines here run on the engine's loop."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal
from uuid import uuid4

import torch

from steer.adapters.language.texts import token_text
from steer.adapters.vllm.client import Asynchronous, together
from steer.adapters.vllm.model import VLLMModel
from steer.adapters.vllm.plugin.reading import packed, values_of
from steer.adapters.vllm.process import scored_early
from steer.adapters.vllm.server.preparing import Prepared, extra_args
from steer.core import Cost, InputError, SteerError
from steer.critique.rounds import Round
from steer.model import execute
from steer.serving.engine import Delta, Ended, Finished, Progress, Sampling, Started, TokenLogprob
from steer.serving.requests import Emit, choice_events, scored

__all__ = ["Choice", "measured", "search", "written"]


class Choice:
    """One text in the making, by one request to the engine."""

    def __init__(self, model: VLLMModel, prepared: Prepared, number: int, emit: Emit) -> None:
        self.number, self.tokens, self.text = number, list[int](), ""
        self.reason: Literal["stop", "length"] = "stop"
        self.log_prob = 0.0
        """Of its tokens, where they were asked for."""
        self._model, self._prepared, self._emit = model, prepared, emit
        self.readings: dict[str, list[float]] | None = None
        self._read = None if prepared.readings is None else (packed(prepared.readings)[0], f"read-{uuid4().hex}")
        self._held: list[str] = []
        self._named: list[TokenLogprob] = []

    async def write(self, client: Asynchronous) -> Choice:
        """Draw it to its end, emitting text as it comes where the task streams, and whole in the end where not."""
        prepared = self._prepared
        prompt = {"prompt_token_ids": list(prepared.ids[self.number // prepared.task.n])}
        reason, echoed = None, False
        async with aclosing(client.stream(prompt, self._params())) as outputs:
            async for output in outputs:
                if prepared.task.echo and not echoed:
                    echoed = True
                    self._echo(output)
                completion = output.outputs[0]
                reason = completion.finish_reason
                self._take(completion)
        if reason not in ("stop", "length"):
            raise SteerError(f"the engine ended a request ({reason})")
        self.reason = "length" if reason == "length" else "stop"
        if self._read is not None and prepared.readings is not None:
            parts = await client.ask("steer_readings", [self._read[1]])
            first = len(prompt["prompt_token_ids"]) - 1
            names = prepared.readings.names
            values = values_of([part[0] for part in parts], names, first, len(self.tokens)).unbind(1)
            self.readings = {name: column.tolist() for name, column in zip(names, values, strict=True)}
        return self

    def ended(self, reward: float | None, kl: float | None) -> Ended:
        """Its last event."""
        return Ended(self.number, self.reason, len(self.tokens), reward, kl, self.readings)

    def _echo(self, output: Any) -> None:
        """Show the prompt, with what the engine says of its tokens."""
        ids, wanted = list(output.prompt_token_ids), self._prepared.sampling.logprobs
        named: list[TokenLogprob] = []
        if wanted is not None:
            named = [TokenLogprob(*_spelled(self._model.tokenizer, ids[0], None))]
            steps = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
            named += [named_logprob(self._model.tokenizer, t, s, wanted) for t, s in steps]
        self._emit(Delta(self.number, self._model.tokenizer.decode(ids), tuple(named)))

    def _take(self, completion: Any) -> None:
        over = completion.finish_reason is not None
        self.tokens += completion.token_ids
        self.text += completion.text
        self.log_prob = float(completion.cumulative_logprob or 0.0)
        if math.isnan(self.log_prob):
            raise InputError("steer.edits", "edits under which the model's numbers overflow", "smaller strengths")
        self._held.append(completion.text)
        wanted = self._prepared.sampling.logprobs
        if wanted is not None:
            steps = completion.logprobs
            if isinstance(completion.stop_reason, int):  # the token that ends the text is no part of it
                steps = steps[:-1]
            shown = completion.token_ids[: len(steps)]
            self._named += [
                named_logprob(self._model.tokenizer, t, s, wanted) for t, s in zip(shown, steps, strict=True)
            ]
        if over or any(self._held):
            self._emit(Delta(self.number, "".join(self._held), tuple(self._named)))
            self._held, self._named = [], []

    def _params(self) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prepared, s = self._prepared, self._prepared.sampling
        kind = RequestOutputKind.DELTA if prepared.task.stream else RequestOutputKind.FINAL_ONLY
        known = 0 if prepared.drift == "estimate" else None
        return SamplingParams(
            max_tokens=s.max_tokens,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            frequency_penalty=s.frequency_penalty,
            presence_penalty=s.presence_penalty,
            logit_bias=dict(s.logit_bias) or None,
            logprobs=known if s.logprobs is None else s.logprobs,
            prompt_logprobs=s.logprobs if prepared.task.echo else None,
            stop=list(s.stop),
            ignore_eos=True,
            stop_token_ids=list(self._model.eos_token_ids),
            seed=choice_seed(s, self.number),
            output_kind=kind,
            extra_args=extra_args(prepared.edits, self._read),
        )


def choice_seed(sampling: Sampling, choice: int) -> int | None:
    """Each choice has a seed of its own, whatever the number of choices; None draws one in the engine."""
    greedy = sampling.temperature == 0
    return None if sampling.seed is None or greedy else (sampling.seed * 1_000_003 + choice) % 2**63


def named_logprob(tokenizer: Any, token: int, step: Any, count: int) -> TokenLogprob:
    """A drawn token with its `count` likeliest rivals, from vLLM's dictionary of one step."""

    def named(token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        return TokenLogprob(*_spelled(tokenizer, token, max(logprob, -9999.0)), top)  # JSON has no -infinity

    rivals = sorted(step.items(), key=lambda item: item[1].rank)[:count]
    return named(token, step[token].logprob, tuple(named(t, entry.logprob) for t, entry in rivals))


def _spelled(tokenizer: Any, token: int, logprob: float | None) -> tuple[str, float | None, tuple[int, ...]]:
    text, raw = token_text(tokenizer, token)
    return text, logprob, raw


async def written(model: VLLMModel, client: Asynchronous, prepared: Prepared, emit: Emit) -> list[Choice]:
    """Write all choices at once; those of which nothing is to be computed end as they are complete."""

    async def one(number: int) -> Choice:
        choice = await Choice(model, prepared, number, emit).write(client)
        if not prepared.measures:
            emit(choice.ended(None, None if prepared.drift is None else 0.0))
        return choice

    emit(Started(sum(map(len, prepared.ids))))
    return await together(one(number) for number in range(prepared.choices))


def spent(prepared: Prepared, choices: Sequence[Choice]) -> Cost:
    """What writing took."""
    drawn, read = sum(len(c.tokens) for c in choices), sum(map(len, prepared.ids))
    return Cost(
        prompt_tokens=read,
        generated_tokens=drawn,
        nfe=read + drawn,
        model_calls=max((len(c.tokens) for c in choices), default=0),
    )


def measured(model: VLLMModel, prepared: Prepared, choices: Sequence[Choice], emit: Emit) -> Cost:
    """Rewards and drifts of finished choices, which are emitted; what it took. Blocks: for a thread of its own."""
    cost = Cost()
    rewards: list[float | None] = [None] * len(choices)
    kls: list[float | None] = [None if prepared.drift is None else 0.0] * len(choices)
    tokens = [choice.tokens for choice in choices]
    if prepared.reward is not None:
        reward = prepared.reward.bind(model)
        rewards = [*scored(prepared, model, reward, [choice.text for choice in choices], tokens)]
        cost = Cost(reward_calls=len(choices))
    if prepared.drift == "estimate":
        kls = _drifts(model, prepared, choices)
        cost = cost + Cost(model_calls=1, nfe=sum(map(len, tokens)))
    for choice, reward_of, kl in zip(choices, rewards, kls, strict=True):
        emit(choice.ended(reward_of, kl))
    return cost


def _drifts(model: VLLMModel, prepared: Prepared, choices: Sequence[Choice]) -> list[float | None]:
    """`log q(y) - log p(y)` of every choice; None for one that fills the context, which leaves no room to read it."""
    room = model.context_length
    fits = [len(prepared.ids[c.number // prepared.task.n]) + len(c.tokens) < room for c in choices]
    tokens = [c.tokens if ok else [] for c, ok in zip(choices, fits, strict=True)]
    group = torch.tensor([c.number // prepared.task.n for c in choices])
    base = replace(prepared.process, model=model).log_likelihood(prepared.prompts, group, tokens).tolist()
    return [c.log_prob - log_p if ok else None for c, log_p, ok in zip(choices, base, fits, strict=True)]


def search(model: VLLMModel, client: Asynchronous, prepared: Prepared, emit: Emit) -> Finished:
    """Run a sampler to its end; returns the last event. `model` goes through `client`, whose `stop` ends the search.
    Blocks.
    """
    plan, steering = prepared.plan, prepared.steering
    assert plan is not None
    began = time.perf_counter()
    process: Any = plan.process
    process = replace(process, model=model)
    plan = replace(plan, process=process, reward=None if plan.reward is None else plan.reward.bind(model))
    emit(Started(sum(map(len, prepared.ids))))
    steps, told = 0, 0.0

    def tell() -> None:
        nonlocal told
        now = time.perf_counter()
        if prepared.task.stream and now - told > 0.25:
            told = now
            emit(Progress(steps, client.drawn))

    def step(first: int, state: Any) -> None:
        nonlocal steps
        steps += 1
        tell()

    def note(first: int, entry: Any) -> None:
        if isinstance(entry, Round):
            emit(Progress(steps, client.drawn, entry.told()))

    client.on_drawn = tell
    with scored_early(plan) as early:
        samples = execute(early, step, note if prepared.task.stream else None)
    kl = samples.kl if prepared.drift is not None else None
    for event in choice_events(prepared, model, samples, kl):
        emit(event)
    drawn = len(samples) if steering.candidates is None else steering.candidates
    return Finished(drawn, replace(samples.cost, seconds=time.perf_counter() - began))
