"""Tasks from requests of OpenAI's kind: names are resolved and everything is counted before work starts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from steer.core import InputError, Prompt, RawText, Reward, Sampler, check
from steer.core.names import check_known
from steer.core.readings import StopIf
from steer.critique.critics import Critic
from steer.critique.reading import parse_critic
from steer.methods.samplers import SAMPLERS, sampler_fields, with_preset
from steer.sampling.lookahead import Lookahead, Preview, Rollouts
from steer.serving.artifact_store import Store, UnknownArtifactError
from steer.serving.engine import NamedEdit, Sampling, Steering, Task, TokenPrompt, TooLargeError
from steer.serving.inline import OFF, Inline
from steer.serving.limits import Limits
from steer.serving.protocol import ChatRequest, CompletionRequest
from steer.serving.reward_store import Rewards
from steer.serving.wire import EditRequest, SteerRequest

__all__ = ["Tasks", "sampler_settings"]


_COMPLETION_TOKENS = 16
"""OpenAI's default for `/v1/completions`."""


@dataclass(frozen=True)
class Tasks:
    """Reads requests, with what the server has and allows.

    `default` is the steering of requests that ask for none.
    """

    store: Store
    rewards: Rewards
    limits: Limits
    default: SteerRequest | None = None
    own_edits: tuple[str, ...] = ()
    """Names of edits that are the engine's own."""
    unsaid: Sampling = field(default_factory=Sampling)
    """How tokens are drawn where a request does not say."""
    inline: Inline | None = None
    """What reads vectors that come with a request; None refuses them."""

    def chat(self, request: ChatRequest) -> Task:
        """Raises `InputError` that names the field, and `TooLargeError`."""
        check(
            not request.top_logprobs or bool(request.logprobs),
            "top_logprobs",
            request.top_logprobs,
            "unset, or with logprobs=true",
        )
        messages: Prompt = [message.plain() for message in request.messages]
        wanted = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        return self._task(request, (messages,), wanted, logprobs)

    def completion(self, request: CompletionRequest) -> Task:
        """Raises `InputError` that names the field, and `TooLargeError`."""
        wanted = _COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
        task = self._task(request, _prompts(request.prompt), wanted, request.logprobs)
        searches = task.steering is not None and task.steering.sampler is not None
        check(not (request.echo and searches), "echo", request.echo, "unset with a sampler that chooses")
        return replace(task, echo=bool(request.echo))

    def check_edits(self, asked: SteerRequest, where: str) -> None:
        """Raise `InputError` where an edit is not registered."""
        for edit in [*asked.edits, *(EditRequest(name=name) for name in asked.readings)]:
            self._named(edit, where)

    def _task(
        self, request: Any, prompts: tuple[Prompt | TokenPrompt, ...], wanted: int | None, logprobs: int | None
    ) -> Task:
        check(
            request.stream_options is None or bool(request.stream),
            "stream_options",
            "an object",
            "unset, or with stream=true",
        )
        n, limits = request.n or 1, self.limits
        if len(prompts) * n > limits.choices:
            raise TooLargeError("n", f"{len(prompts) * n} choices in all", f"at most {limits.choices}")
        field = "max_tokens" if getattr(request, "max_completion_tokens", None) is None else "max_completion_tokens"
        if wanted is not None and wanted > limits.tokens:
            raise TooLargeError(field, wanted, f"at most {limits.tokens}")
        sampling = Sampling(
            max_tokens=limits.tokens if wanted is None else wanted,
            trim=wanted is None,
            temperature=_given(request.temperature, self.unsaid.temperature),
            top_p=_given(request.top_p, self.unsaid.top_p),
            top_k=self.unsaid.top_k if request.top_k is None else request.top_k,
            min_p=_given(request.min_p, self.unsaid.min_p),
            stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
            seed=request.seed,
            frequency_penalty=_given(request.frequency_penalty, self.unsaid.frequency_penalty),
            presence_penalty=_given(request.presence_penalty, self.unsaid.presence_penalty),
            logit_bias=_bias(request.logit_bias),
            logprobs=logprobs,
        )
        asked = request.steer or self.default
        steering = None if asked is None else self._steering(asked, sampling, len(prompts), n)
        total = len(prompts) * n * sampling.max_tokens
        if total > limits.total_tokens:
            raise TooLargeError(field, f"{total} tokens in all", f"at most {limits.total_tokens}")
        return Task(prompts, n, sampling, steering, bool(request.stream))

    # ---- steering

    def _steering(self, asked: SteerRequest, sampling: Sampling, prompts: int, n: int) -> Steering:
        if self.inline is not None:
            self.inline.check_all(asked.edits)
        edits = tuple(self._edit(asked, i) for i in range(len(asked.edits)))
        read = self._readings(asked)
        reward = None if asked.reward is None else self._reward(asked.reward)
        named = asked.sampler if asked.sampler in SAMPLERS else None
        takes_critic = named is not None and "critic" in sampler_fields(named)
        check(asked.critic is None or takes_critic, "steer.critic", asked.critic, "unset, or with sampler=critique")
        if asked.token_level:
            check(
                asked.candidates is None, "steer.candidates", asked.candidates, "unset without a sampler that chooses"
            )
            check(asked.base == "truncated", "steer.base", asked.base, "truncated without a sampler that weighs")
            check(not asked.settings, "steer.settings", asked.settings, "unset without a sampler that chooses")
            most = prompts * n * sampling.max_tokens
            _check_budget(asked, most)
            return Steering(edits, reward=reward, beta=asked.beta, kl=asked.kl, readings=read[0], stop=read[1])
        name = str(asked.sampler)
        check_known("steer.sampler", name, SAMPLERS)
        kind = SAMPLERS[name]
        allowed = f"unset with sampler {name}: {', '.join(k for k, other in SAMPLERS.items() if other.reads)} keep them"
        check(kind.reads or not read[0], "steer.readings", asked.readings, allowed)
        check(reward is not None or not kind.needs_reward, "steer.reward", None, f"a reward: {name} chooses by it")
        sampler, candidates = self._sampler(asked, name, sampling, prompts, n)
        repeats = n if kind.population == "n" else 1  # one output from all its candidates
        chosen = Steering(edits, sampler, repeats, candidates, reward, asked.beta, asked.block, asked.kl, asked.base)
        return replace(chosen, readings=read[0], stop=read[1])

    def _edit(self, asked: SteerRequest, i: int) -> NamedEdit:
        request = asked.edits[i]
        if request.vector is not None:
            if self.inline is None:
                layers = len(request.vector.layers)
                raise InputError(f"steer.edits.{i}.vector", f"a vector of {layers} layer{'s'[: layers > 1]}", OFF)
            return self.inline.named(request, f"steer.edits.{i}")
        return self._named(request, f"steer.edits.{i}.name")

    def _readings(self, asked: SteerRequest) -> tuple[tuple[NamedEdit, ...], StopIf | None]:
        """What is read of each text, and what ends it."""
        names, rule = asked.readings, asked.stop_if
        twice = next((name for name in names if names.count(name) > 1), None)
        check(twice is None, "steer.readings", twice, "each name once")
        for name in names:
            given = f"{name}, which is no artifact"
            check(name not in self.own_edits, "steer.readings", given, "registered vectors and probes")
        read = tuple(self._named(EditRequest(name=name), f"steer.readings.{i}") for i, name in enumerate(names))
        return read, None if rule is None else StopIf.parse(rule, names, "steer.stop_if")

    def _named(self, request: EditRequest, field: str) -> NamedEdit:
        if request.name in self.own_edits:
            return NamedEdit(None, "", request)
        try:
            entry = self.store.get(request.name)
        except UnknownArtifactError:
            known = ", ".join([*self.own_edits, *(e.name for e in self.store.entries())]) or "none is registered"
            raise InputError(field, request.name, f"a registered artifact: {known}") from None
        return NamedEdit(entry.path, entry.digest, request)

    def _critic(self, text: str) -> Critic:
        try:
            return parse_critic(text, rewards=self.rewards.parse)
        except InputError as error:
            raise InputError("steer.critic", text, error.allowed) from error

    def _reward(self, text: str) -> Reward:
        return self.rewards.parse(text)

    def _sampler(self, asked: SteerRequest, name: str, sampling: Sampling, prompts: int, n: int) -> tuple[Sampler, int]:
        """The sampler, with as many candidates as were asked for or as the budget allows; and how many in all."""
        kind: Any = SAMPLERS[name]
        population = kind.population
        allowed = sampler_settings(name)
        wanted = dict(asked.settings)
        try:
            settings: dict[str, Any] = with_preset(name, {"preset": wanted.pop("preset", None)})
        except InputError as error:
            raise InputError("steer.settings.preset", error.given, error.allowed) from None
        if asked.critic is not None:
            settings["critic"] = self._critic(asked.critic)
        preset_size = settings.pop(population, None)
        for key, value in wanted.items():
            check(key in allowed, f"steer.settings.{key}", value, f"settings of {name}: {', '.join(allowed) or 'none'}")
            settings[key] = _lookahead(value) if key == "lookahead" else _typed(kind, key, value)
        texts = prompts * (1 if kind.shares else n)
        each = sampling.max_tokens * texts
        candidates = preset_size if asked.candidates is None else asked.candidates
        if asked.budget is not None and candidates is None:
            check(asked.budget >= each, "steer.budget", asked.budget, f"at least {each} tokens, one candidate each")
            candidates = asked.budget // each
        if candidates is None:
            default = kind.__dataclass_fields__[population].default
            candidates = min(default, max(1, self.limits.candidates // texts))
        check(n <= candidates or not kind.shares, "n", n, f"at most {candidates}, the {population} of {name}")
        try:
            made: Sampler = kind.sized(candidates, n, **settings)
        except InputError as error:
            field = "steer.critic" if error.field == "critic" else f"steer.settings.{error.field}"
            raise InputError(field, error.given, error.allowed) from error
        except (TypeError, ValueError) as error:
            raise InputError("steer.settings", asked.settings, f"settings of {name} ({error})") from error
        drawn = candidates * made.passes
        _check_budget(asked, drawn * each)
        self._check_size(drawn * texts, drawn * each * getattr(settings.get("lookahead"), "m", 1))
        return made, candidates * texts

    def _check_size(self, candidates: int, tokens: int) -> None:
        if candidates > self.limits.candidates:
            raise TooLargeError("steer.candidates", f"{candidates} in all", f"at most {self.limits.candidates}")
        if tokens > self.limits.total_tokens:
            raise TooLargeError(
                "steer.candidates", f"up to {tokens} tokens in all", f"at most {self.limits.total_tokens} tokens"
            )


def _check_budget(asked: SteerRequest, most: int) -> None:
    enough = asked.budget is None or asked.budget >= most
    check(enough, "steer.budget", asked.budget, f"at least {most}, what the candidates may take")


@cache
def _reader(kind: type, key: str) -> TypeAdapter[Any]:
    """What reads a setting of a sampler as its class declares it."""
    return TypeAdapter(get_type_hints(kind)[key], config=ConfigDict(strict=True, arbitrary_types_allowed=True))


def _typed(kind: type, key: str, value: Any) -> Any:
    try:
        return _reader(kind, key).validate_python(value)
    except ValidationError as error:
        raise InputError(f"steer.settings.{key}", value, str(error.errors()[0]["msg"])) from None


def _lookahead(value: Any) -> Lookahead:
    """`preview`, or `rollouts:M`."""
    name, _, count = str(value).partition(":")
    if name == "preview" and not count:
        return Preview()
    allowed = "preview, rollouts:M (M completions of every row)"
    check(
        name == "rollouts" and count.isdecimal() and 1 <= int(count) <= 64, "steer.settings.lookahead", value, allowed
    )
    return Rollouts(int(count))


def _prompts(given: Any) -> tuple[Prompt | TokenPrompt, ...]:
    """One or several prompts, each text or token ids."""
    if isinstance(given, str):
        return (RawText(given),)
    if isinstance(given[0], int):
        return (TokenPrompt(tuple(given)),)
    return tuple(RawText(p) if isinstance(p, str) else TokenPrompt(tuple(p)) for p in given)


def _bias(given: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    for token in given or {}:
        check(token.isascii() and token.isdecimal() and len(token) < 10, "logit_bias", token, "token ids")
    return tuple((int(token), float(bias)) for token, bias in (given or {}).items())


def _given(value: Any, default: float) -> float:
    return default if value is None else float(value)


def sampler_settings(name: str) -> list[str]:
    """The settings of a sampler that a request may give."""
    kind: Any = SAMPLERS[name]
    return [f for f in kind.__dataclass_fields__ if f not in {"n", kind.population, *kind.own_settings}]
