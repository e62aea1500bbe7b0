"""`VLLMProcess`: a model in vLLM as a `Process` whose step is a block of tokens and whose fork is the prefix cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Protocol
from uuid import uuid4

import torch
from torch import Tensor

from steer.adapters.language.decoding import Decoding
from steer.adapters.language.model import check_lengths
from steer.adapters.language.packing import pack_texts, pack_tokens, unpack_texts, unpack_tokens
from steer.adapters.vllm.client import Client, Took
from steer.adapters.vllm.plugin.reading import check_engine, values_of
from steer.adapters.vllm.plugin.registry import Registry
from steer.adapters.vllm.plugin.requests import Inside
from steer.core import (
    Ability,
    Cost,
    Edit,
    HiddenEdit,
    Mounted,
    Process,
    Prompt,
    PromptEdit,
    Samples,
    Site,
    TransitionEdit,
    UnsupportedError,
    check,
    check_whole,
)
from steer.core.readings import Readings
from steer.core.rows import Rows, beginning
from steer.model import Plan
from steer.rewards.early import Early
from steer.serving.wire import EditRequest

_MISSING = ("no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "logits_processor", "stopping_criteria")
"""Settings of `Decoding` that vLLM has no counterpart of."""


_READ_AFTER = 32
"""Tokens that are drawn before a rule that ends texts by their readings looks at them."""


@dataclass(frozen=True)
class Named(Edit):
    """An artifact that was registered with the engine, under settings."""

    site: ClassVar[Site] = Site.HIDDEN
    request: EditRequest

    def check(self, front: Registry) -> None:
        """Raise `InputError` where the name or a setting is wrong."""
        front.parse(Inside((self.request,)))


@dataclass(frozen=True)
class VLLMState(Rows):
    """Rows of texts in mid-generation; the engine's prefix cache holds what can be held of them."""

    each = ("tokens", "finished", "weights", "readings")
    packed = ("finished",)

    ids: list[list[int]] = field(repr=False)
    """Token ids of every prompt."""
    tokens: list[list[int]] = field(repr=False)
    """Generated tokens of every row."""
    finished: Tensor
    weights: list[tuple[Any, ...]] = field(repr=False)
    """What each row's gates and controllers decided."""
    readings: list[list[list[float]]] | None = field(default=None, repr=False)
    """What was read where each token of every row was chosen."""
    run: str = ""
    """Tells its requests from those of other runs."""

    def __len__(self) -> int:
        return len(self.group)


class EngineModel(Protocol):
    """What a process needs of its model."""

    tokenizer: Any
    client: Client
    front: Registry

    @property
    def context_length(self) -> int: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    def name_of(self, edit: Edit) -> str: ...
    def encode(self, prompt: Prompt) -> list[int]: ...
    def show(self, prompt: Prompt) -> str: ...
    @property
    def vocabulary(self) -> int: ...
    def decode(self, tokens: Sequence[int], stop: Sequence[str] = ()) -> str: ...


@dataclass(frozen=True)
class VLLMProcess(Process):
    """Generation by one engine. A step draws up to `block` tokens for every unfinished row. vLLM truncates by min-p
    before top-k and top-p (`steer.sampling.laws` has the order of the others).
    """

    model: EngineModel
    decoding: Decoding
    edits: Mounted = ()
    block: int = 64
    client: Client | None = field(default=None, repr=False, compare=False)
    """What its requests go through; None for the model's own."""
    announce: Callable[[Any, str], None] | None = field(default=None, repr=False, compare=False)
    """Called with the prompt and the text of a row as soon as it is complete, while others are still drawn."""
    weighs: bool = True
    """Whether results tell the log-probability of what was drawn. For one row that wants it, vLLM computes the law of
    all that run with it.
    """
    announces_all: bool = False
    """Whether rows whose text goes on after this step are announced too."""
    proposal: bool = False
    """Whether its weights refer to the law that unedited texts are drawn from (`as_proposal`)."""

    readings: Readings | None = None
    """What is read where each token is chosen."""

    sites = frozenset({Site.PROMPT, Site.HIDDEN, Site.TRANSITION})
    reads = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "decoding", self.decoding.with_eos(self.model.eos_token_ids))
        check_whole("block", self.block)
        for name in _MISSING:
            value = getattr(self.decoding, name)
            check(not value, name, value, "unset: vLLM has no such setting")

    @property
    def _client(self) -> Client:
        return self.client or self.model.client

    @property
    def abilities(self) -> frozenset[Ability]:
        always = {Ability.FORK, Ability.LOG_PROB, Ability.PREVIEW}
        return frozenset(always | (set() if self.decoding.greedy else {Ability.BRANCH}))

    def way_out(self, ability: Ability) -> str:
        return "use a temperature above 0" if ability is Ability.BRANCH else ""

    @property
    def num_steps(self) -> int:
        return -(-self.decoding.max_new_tokens // self.block)

    def watched(self, readings: Readings) -> VLLMProcess:
        """The process that reads every token. vLLM's scheduler sees no reading: where a rule ends texts, at most 32
        tokens are drawn at a time, and what was drawn after the end is dropped, though it is counted as drawn.
        """
        check_engine(self.model.front.settings)
        most = self.block if readings.stop is None else min(self.block, _READ_AFTER)
        return replace(self, readings=readings, block=most)

    def copy(self, edits: Mounted) -> VLLMProcess:
        return replace(self, edits=edits)

    def heated(self, by: float) -> VLLMProcess:
        return replace(self, decoding=self.decoding.heated(by))

    def as_proposal(self) -> VLLMProcess:
        """The process for samplers that weigh. Without edits it draws from its base law, truncated or not."""
        return replace(self, proposal=True)

    def validate(self, edit: Edit) -> None:
        if isinstance(edit, Named):
            edit.check(self.model.front)
        elif isinstance(edit, HiddenEdit | TransitionEdit):
            Named(self._request(edit)).check(self.model.front)

    def _request(self, edit: Edit) -> EditRequest:
        return edit.request if isinstance(edit, Named) else EditRequest(name=self.model.name_of(edit))

    def _inside(self, b: int) -> list[EditRequest]:
        """What the engine is asked to do for prompt `b`."""
        mine = [edit for edit, wanted in self.edits if wanted is None or b in wanted]
        return [self._request(edit) for edit in mine if not isinstance(edit, PromptEdit)]

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of every prompt after the prompt edits that it asked for; checks lengths."""
        ids = [self.model.encode(p) for p in self.rewritten(prompts)]
        check_lengths(ids, self.decoding.max_new_tokens, self.model.context_length)
        return ids

    def init(self, prompts: Sequence[Prompt], n: int, generator: torch.Generator) -> VLLMState:
        common = beginning(prompts, n, exact=not self.edits and (self.proposal or not self._truncates))
        ids, rows = self.encode(prompts), len(common["group"])
        read = sum(map(len, ids))
        return VLLMState(
            **{**common, "cost": Cost(prompt_tokens=read, nfe=read)},
            ids=ids,
            tokens=[[] for _ in range(rows)],
            finished=torch.zeros(rows, dtype=torch.bool),
            weights=[()] * rows,
            readings=None if self.readings is None else [[] for _ in range(rows)],
            run=uuid4().hex,
        )

    @property
    def _truncates(self) -> bool:
        return (self.decoding.truncates and not self.decoding.greedy) or self.decoding.repetition_penalty != 1

    @property
    def ruled(self) -> bool:
        """Whether texts are ended by what is read of them, once it is."""
        return self.readings is not None and self.readings.stop is not None

    def done(self, state: VLLMState) -> bool:
        return bool(state.finished.all())

    def finished(self, state: VLLMState) -> Tensor:
        return state.finished

    def propose(self, state: VLLMState, generator: torch.Generator) -> VLLMState:
        rows = (~state.finished).nonzero().squeeze(1).tolist()
        seeds = torch.randint(2**31, (len(state),), generator=generator).tolist()
        outputs = self._run(state, rows, seeds, partial(self._announced, state, rows) if self.announce else None)
        read = self._read(state, rows, [len(output.outputs[0].token_ids) for output in outputs])
        readings = None if state.readings is None else list(state.readings)
        tokens, finished, gained = list(state.tokens), state.finished.clone(), torch.zeros_like(state.log_prob)
        drawn = 0
        for i, output, values in zip(rows, outputs, read, strict=True):
            completion = output.outputs[0]
            drawn += len(completion.token_ids)
            end = self._end(values)
            taken = completion.token_ids[:end]
            tokens[i] = [*state.tokens[i], *taken]
            gained[i] = float(completion.cumulative_logprob or 0.0)
            finished[i] = self._ended(tokens[i], completion.finish_reason)
            if readings is not None:
                readings[i] = [*readings[i], *values[:end]]
            if end is not None:
                finished[i] = True
                told = zip(completion.logprobs or (), taken, strict=False)
                gained[i] = sum(entry[token].logprob for entry, token in told)
        spent = Cost(generated_tokens=drawn, nfe=drawn, model_calls=1)
        moved = replace(
            state.add(gained),
            step=state.step + 1,
            tokens=tokens,
            finished=finished,
            readings=readings,
            cost=state.cost + spent,
        )
        return moved if self.done(moved) else self._decided(moved, rows)

    def _announced(self, state: VLLMState, rows: Sequence[int], k: int, output: Any) -> None:
        completion = output.outputs[0]
        tokens = [*state.tokens[rows[k]], *completion.token_ids]
        if self.announce is not None and (self.announces_all or self._ended(tokens, completion.finish_reason)):
            prompt = state.prompts[int(state.group[rows[k]])]
            self.announce(self.model.show(prompt), self.model.decode(tokens, self.decoding.stop))

    def _run(self, state: VLLMState, rows: Sequence[int], seeds: Sequence[int], took: Took | None) -> list[Any]:
        asked = {b: self._inside(b) for b in {int(state.group[i]) for i in rows}}
        digest = None if self.readings is None else self._client.teach(self.readings)
        prompts, params = [], []
        for i in rows:
            b, mine = int(state.group[i]), state.tokens[i]
            tag = self._tag(state, i) if self._reads(asked[b]) else None
            inside = Inside(
                tuple(asked[b]),
                prompt_length=len(state.ids[b]),
                weights=state.weights[i],
                tag=tag,
                read=None if digest is None else (digest, self._read_tag(state, i)),
                ends=len(state.ids[b]) + self.decoding.max_new_tokens,
            )
            prompts.append(_tokens_prompt([*state.ids[b], *mine]))
            params.append(self._params(seeds[i], len(mine), inside))
        return self._client.draw(prompts, params, took)

    def _reads(self, asked: Sequence[EditRequest]) -> bool:
        return any(edit.reads for edit in self.model.front.hidden(Inside(tuple(asked))))

    def _read_tag(self, state: VLLMState, row: int) -> str:
        return f"{state.run}-{state.step}-{row}"

    def _read(self, state: VLLMState, rows: Sequence[int], counts: Sequence[int]) -> list[list[list[float]]]:
        """The readings of the tokens that were just drawn, `counts` of each of `rows`; none where nothing is read."""
        if self.readings is None:
            return [[]] * len(rows)
        parts = self._client.rpc("steer_readings", [self._read_tag(state, i) for i in rows])
        found, names = [], self.readings.names
        for i, told, count in zip(rows, zip(*parts, strict=True), counts, strict=True):
            first = len(state.ids[int(state.group[i])]) + len(state.tokens[i]) - 1
            found.append(values_of(told, names, first, count).tolist())
        return found

    def _end(self, values: Sequence[Sequence[float]]) -> int | None:
        """How many of a row's new tokens, with these readings, its text keeps where the rule ends it; else None."""
        if self.readings is None or not self.ruled:
            return None
        return next((k + 1 for k, row in enumerate(values) if self.readings.met(row)), None)

    def _tag(self, state: VLLMState, row: int) -> str | None:
        return None if state.weights[row] else f"{state.run}-{row}"

    def request(
        self, prompt: Prompt | Sequence[int], new: int, seed: int = 0, tag: str | None = None
    ) -> tuple[Any, Any]:
        """A prompt, or its token ids, and the sampling parameters of a request for `new` tokens under the edits of the
        first prompt: what `LLM.generate` and `LLMEngine.add_request` take. Its readings are kept under `tag`.
        """
        given = [token for token in prompt if isinstance(token, int)]
        ids = given or self.encode([prompt])[0]  # type: ignore[list-item]
        read = None if tag is None or self.readings is None else (self._client.teach(self.readings), tag)
        inside = Inside(tuple(self._inside(0)), read=read)
        params = replace(self, block=new)._params(seed, self.decoding.max_new_tokens - new, inside)
        return _tokens_prompt(ids), params

    def _params(self, seed: int, length: int, inside: Inside) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        d = self.decoding
        left = d.max_new_tokens - length
        return SamplingParams(
            max_tokens=min(self.block, left),
            min_tokens=max(0, min(d.min_new_tokens - length, self.block)),
            temperature=d.temperature,
            top_k=d.top_k,
            top_p=d.top_p,
            min_p=d.min_p,
            repetition_penalty=d.repetition_penalty,
            stop=list(d.stop),
            include_stop_str_in_output=True,
            ignore_eos=True,
            stop_token_ids=list(d.eos_token_id or ()),
            logprobs=0 if self.weighs else None,
            seed=None if d.greedy else seed,
            detokenize=bool(d.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"steer": inside} if inside.edits or inside.read else None,
        )

    def _ended(self, tokens: list[int], reason: str | None) -> bool:
        if len(tokens) >= self.decoding.max_new_tokens or reason == "stop":
            return True
        if not self.decoding.stop:
            return False
        text = self.model.tokenizer.decode(tokens)  # a stop string may lie across two blocks
        return any(stop in text for stop in self.decoding.stop)

    def _decided(self, state: VLLMState, rows: Sequence[int]) -> VLLMState:
        """Keep what the edits that read the prompt decided, for the blocks to come."""
        reading = [i for i in rows if not state.weights[i] and self._reads(self._inside(int(state.group[i])))]
        if not reading:
            return state
        tags = [f"{state.run}-{i}" for i in reading]
        parts = self._client.rpc("steer_weights", tags)  # of several engines, one has had the request
        found = [next(w for w in told if w is not None) for told in zip(*parts, strict=True)]
        weights = list(state.weights)
        for i, mine in zip(reading, found, strict=True):
            weights[i] = tuple(None if w is None else tuple(w) for w in mine)
        return replace(state, weights=weights)

    def gather(self, state: VLLMState, index: Tensor) -> VLLMState:
        return state.take(index)

    def stack(self, states: Sequence[VLLMState]) -> VLLMState:
        return replace(VLLMState.join(states), run=uuid4().hex)

    def pack(self, state: VLLMState) -> dict[str, Tensor]:
        """Tokens, and what gates and controllers decided as JSON in bytes."""
        tokens, length = pack_tokens(state.tokens)
        decided, size = pack_texts([json.dumps(row) for row in state.weights])
        return {**state.pack(), "tokens": tokens, "length": length, "decided": decided, "decided_length": size}

    def unpack(self, prompts: Sequence[Prompt], step: int, packed: dict[str, Tensor]) -> VLLMState:
        decided = [json.loads(text) for text in unpack_texts(packed["decided"], packed["decided_length"])]
        return VLLMState.unpack(
            packed,
            step,
            prompts,
            ids=self.encode(prompts),
            run=uuid4().hex,
            tokens=unpack_tokens(packed["tokens"], packed["length"]),
            weights=[tuple(None if w is None else tuple(w) for w in row) for row in decided],
        )

    @property
    def kl_kind(self) -> str:
        return "one-sample"  # of texts without edits and truncation, 0

    def settle(self, state: VLLMState) -> tuple[VLLMState, Cost]:
        return replace(state, cost=Cost()), state.cost

    def identify(self, state: VLLMState) -> list[Any]:
        return [tuple(tokens) for tokens in state.tokens]

    def preview(self, state: VLLMState) -> Samples:
        """The partial texts."""
        return self.decode(state)

    def decode(self, state: VLLMState) -> Samples:
        known = state.kl is not None
        later = partial(self._divergence, state.prompts, state.group, state.tokens, state.log_prob)
        plain = self.decoding.temperature in (0, 1)
        return Samples(
            prompts=[self.model.show(p) for p in state.prompts],
            outputs=[self.model.decode(row, self.decoding.stop) for row in state.tokens],
            tokens=[list(row) for row in state.tokens],
            group=state.group,
            log_weight=torch.zeros(len(state), dtype=torch.float64),
            log_prob=state.log_prob if self.weighs else None,
            base_log_prob=state.base_log_prob if self.weighs else None,
            tilt=state.tilt,
            readings=self._named_readings(state),
            kl_estimate=state.kl if known else later if plain else None,
            cost=state.cost,
        )

    def _named_readings(self, state: VLLMState) -> dict[str, list[Tensor]] | None:
        if self.readings is None or state.readings is None:
            return None
        names = self.readings.names
        rows = [torch.tensor(row).reshape(len(row), len(names)) for row in state.readings]
        return {name: [row[:, k] for row in rows] for k, name in enumerate(names)}

    def _divergence(
        self, prompts: Sequence[Prompt], group: Tensor, tokens: Sequence[Sequence[int]], log_prob: Tensor
    ) -> Tensor:
        """`log q(y) - log p(y)` of each text `[N]`: a one-sample estimate of its KL to the unedited model."""
        return log_prob - replace(self, edits=()).log_likelihood(prompts, group, tokens)

    def log_likelihood(self, prompts: Sequence[Prompt], group: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Summed log-probability `[N]` of each row's `tokens` after its prompt, under the unedited model at temperature
        1.
        """
        from vllm import SamplingParams

        ids = self.encode(prompts)
        rows = [i for i, row in enumerate(tokens) if row]
        whole = [[*ids[int(group[i])], *tokens[i]] for i in rows]
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = self._client.draw([_tokens_prompt(row) for row in whole], [params] * len(whole))
        total = torch.zeros(len(tokens), dtype=torch.float64)
        for i, row, output in zip(rows, whole, outputs, strict=True):
            start = len(ids[int(group[i])])
            total[i] = sum(output.prompt_logprobs[t][row[t]].logprob for t in range(start, len(row)))
        return total

    def score_tokens(self, ids: list[list[int]], tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Summed log-probability `[N]` of each row's `tokens` after its prompt `ids`, and whether every token is the
        likeliest at its place `[N]` bool, at temperature 1 under hidden edits (numbered by row), in one pass.

        Raises `UnsupportedError` for edits that act on the next token, whose law vLLM does not apply to a prompt, and
        for those that have to read the prompt first.
        """
        from vllm import SamplingParams

        asked = [self._inside(i) for i in range(len(ids))]
        transitions = any(isinstance(edit, TransitionEdit) for edit, _ in self.edits)
        allowed = "under vLLM edits of hidden states without gates are scored; use engine=transformers"
        if transitions or any(self._reads(mine) for mine in asked):
            raise UnsupportedError(f"score: {allowed}")
        whole = [[*row, *mine] for row, mine in zip(ids, tokens, strict=True)]
        check_lengths(whole, 1, self.model.context_length)
        params = []
        for row, mine in zip(ids, asked, strict=True):
            inside = Inside(tuple(mine), prompt_length=len(row))
            extra = {"extra_args": {"steer": inside}} if mine else {}
            params.append(SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, **extra))
        outputs = self._client.draw([_tokens_prompt(row) for row in whole], params)
        total, greedy = torch.zeros(len(ids), dtype=torch.float64), torch.ones(len(ids), dtype=torch.bool)
        for i, (row, output) in enumerate(zip(whole, outputs, strict=True)):
            found = [output.prompt_logprobs[t][row[t]] for t in range(len(ids[i]), len(row))]
            total[i] = sum(x.logprob for x in found)
            greedy[i] = all(x.rank == 1 for x in found)
        return total, greedy


@contextmanager
def scored_early(plan: Plan) -> Iterator[Plan]:
    """The plan of a `VLLMProcess` with rewards computed as texts are completed, while others are still drawn; itself
    where the reward does not stand alone (see `Reward.alone`).
    """
    process, reward, sampler = plan.process, plan.reward, plan.sampler
    if reward is None or not reward.alone or not isinstance(process, VLLMProcess) or process.ruled:
        yield plan
        return
    with Early(reward) as early:
        announcing = replace(process, announce=early.announce, announces_all=sampler.scores_steps)
        yield replace(plan, process=announcing, reward=early)


def _tokens_prompt(ids: Sequence[int]) -> Any:
    from vllm.inputs import TokensPrompt

    return TokensPrompt(prompt_token_ids=list(ids))
