"""`TextProcess`: a causal language model as a `Process` whose step is a block of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer.adapters import _track
from steer.adapters._cache import new_cache
from steer.adapters._track import Track
from steer.adapters.decoding import Decoding
from steer.core import (
    Ability,
    Context,
    Cost,
    Edit,
    HiddenEdit,
    Process,
    Prompt,
    PromptEdit,
    Samples,
    Site,
    TransitionEdit,
    UnsupportedError,
    check,
)

if TYPE_CHECKING:
    from steer.adapters.transformers import LanguageModel

Mounted = tuple[tuple[Edit, frozenset[int] | None], ...]


@dataclass(frozen=True)
class TextState:
    """Rows of texts in mid-generation.

    `prefix` `[N, columns]` is filled up to column `filled`; a token stands where `real`, of the same shape, is True. (A
    row that waits for others at the end of its sentence, or is finished, has columns without one.)
    """

    group: Tensor
    step: int
    """Blocks drawn so far."""
    filled: int
    log_prob: Tensor
    base_log_prob: Tensor | None
    tilt: Tensor
    kl: Tensor | None
    cost: Cost
    prompts: list[Prompt] = field(repr=False)
    prefix: Tensor = field(repr=False)
    real: Tensor = field(repr=False)
    length: Tensor
    finished: Tensor
    drawn: Tensor
    """Tokens drawn so far, by every row that ever lived."""
    track: Track = field(repr=False)
    companions: tuple[Track, ...] = field(repr=False)
    processors: tuple[Any, ...] = field(repr=False)
    unread: bool
    """Whether the last column is still to be read by the model."""
    ids: Tensor | None = field(repr=False)
    """Prompt ids `[N, T]`, only kept for processors and criteria that want to see them."""

    def __len__(self) -> int:
        return len(self.group)


_ROWS = ("group", "log_prob", "base_log_prob", "tilt", "kl", "prefix", "real", "length", "finished")


def _tokens(state: TextState) -> list[list[int]]:
    """Generated tokens of every row."""
    if bool((state.real[:, : state.filled].sum(1) == state.length).all()) and not bool(
        (state.real[:, 1:] & ~state.real[:, :-1]).any()
    ):  # no row ever waited
        return [row[:n] for row, n in zip(state.prefix.tolist(), state.length.tolist(), strict=True)]
    pairs = zip(state.prefix.tolist(), state.real.tolist(), strict=True)
    return [[token for token, there in zip(*row, strict=True) if there] for row in pairs]


@dataclass(frozen=True)
class TextContext:
    """What a transition edit sees of a language model's rows."""

    step: int
    prefix: Tensor
    base: Tensor
    track: Track = field(repr=False)
    others: dict[int, Track] = field(repr=False)

    @property
    def hidden(self) -> Tensor:
        assert self.track.hidden is not None
        return self.track.hidden

    def lookahead(self, candidates: Tensor) -> Tensor:
        return _track.look(self.track, candidates)

    def guidance(self, score: Callable[[Samples], Tensor]) -> Tensor:
        raise UnsupportedError("tokens have no gradient: guide text by values (ValueGuidance)")

    def companion(self, process: Process) -> Context:
        assert isinstance(process, TextProcess)
        track = self.others[id(process)]
        return TextContext(self.step, self.prefix, process.decoding.tempered(track.logits), track, self.others)


@dataclass(frozen=True)
class TextProcess(Process):
    """Generation by one language model. A step draws `block` tokens for every row, or fewer: a row waits for the others
    once it has drawn a token that holds one of the strings in `until` (sentence ends).
    """

    model: LanguageModel
    decoding: Decoding
    edits: Mounted = ()
    block: int = 1
    until: tuple[str, ...] = ()
    observe: bool = False
    """Whether `context` shows hidden states although no edit asks for them."""

    consumes = True

    sites = frozenset({Site.PROMPT, Site.HIDDEN, Site.TRANSITION})

    @property
    def abilities(self) -> frozenset[Ability]:
        always = {Ability.FORK, Ability.LOG_PROB, Ability.PREVIEW}
        return frozenset(always | (set() if self.decoding.temperature == 0 else {Ability.BRANCH}))

    def way_out(self, ability: Ability) -> str:
        return "use a temperature above 0" if ability is Ability.BRANCH else ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "decoding", self.decoding.with_eos(self.model.eos_token_ids))
        check(isinstance(self.block, int) and self.block >= 1, "block", self.block, "an integer of 1 or more")

    @property
    def num_steps(self) -> int:
        """Blocks; twice as many where rows stop early for sentence ends, after which a text is cut."""
        return -(-self.decoding.max_new_tokens // self.block) * (2 if self.until else 1)

    @property
    def columns(self) -> int:
        """Tokens drawn at most, those that a waiting row sits out included."""
        return self.num_steps * self.block if self.until else self.decoding.max_new_tokens

    def observed(self) -> TextProcess:
        return replace(self, observe=True)

    def copy(self, edits: Mounted) -> TextProcess:
        return replace(self, edits=edits)

    def validate(self, edit: Edit) -> None:
        if isinstance(edit, HiddenEdit):
            depth = self.model.info.num_layers
            for layer in (*(term.layer for term in edit.terms(self.model.info)), *edit.reads):
                check(0 <= layer < depth, "layer", layer, f"0 to {depth - 1}, the blocks of {self.model.info.name}")
        if isinstance(edit, TransitionEdit):
            for companion in edit.companions:
                ours, theirs = self.model.info.unembedding().shape[0], companion.model.vocabulary  # type: ignore[attr-defined]
                check(ours == theirs, "companion", f"a vocabulary of {theirs}", f"the same vocabulary, {ours}")

    def _mounted(self, kind: type) -> list[Any]:
        return [(edit, wanted) for edit, wanted in self.edits if isinstance(edit, kind)]

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of every prompt after the prompt edits that it asked for; checks lengths."""
        ids = [self.model.encode(p) for p in self.rewritten(prompts)]
        _track.check_lengths(ids, self.decoding.max_new_tokens, self.model.context_length)
        return ids

    @torch.inference_mode()
    def init(self, prompts: Sequence[Prompt], n: int, generator: torch.Generator) -> TextState:
        check(isinstance(n, int) and n >= 1, "n", n, "an integer of 1 or more")
        check(len(prompts) >= 1, "prompts", prompts, "at least one")
        ids = self.encode(prompts)
        tracks, cost = self._tracks(ids, n)
        track, companions = tracks[0], tracks[1:]
        rows = len(prompts) * n
        device = track.logits.device
        exact = not (self._mounted(HiddenEdit) or self._mounted(PromptEdit))
        # Sums stay on the device until the end: a step waits for it once, to know whether any row goes on.
        zero = torch.zeros(rows, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        seen = _track.left_padded(ids, self.model.pad_token_id, device)[0].repeat_interleave(n, 0)
        processors = self.decoding.processors(seen.shape[1], self.decoding.eos_token_id or (), device)
        watched = bool(processors or self.decoding.stopping_criteria)
        return TextState(
            group=torch.arange(len(prompts)).repeat_interleave(n),
            step=0,
            log_prob=zero,
            base_log_prob=zero if exact else None,
            tilt=zero,
            kl=zero if exact else None,
            cost=cost,
            prompts=list(prompts),
            filled=0,
            prefix=torch.full((rows, self.columns), self.model.pad_token_id, device=device),
            real=torch.zeros(rows, self.columns, dtype=torch.bool, device=device),
            length=torch.zeros(rows, dtype=torch.long, device=device),
            finished=torch.zeros(rows, dtype=torch.bool, device=device),
            drawn=torch.zeros((), dtype=torch.long, device=device),
            track=track,
            companions=tuple(companions),
            processors=tuple(processors),
            unread=False,
            ids=seen if watched else None,
        )

    def _tracks(self, ids: Sequence[Sequence[int]], n: int) -> tuple[list[Track], Cost]:
        """This model's rows and those of every companion, `n` for each prompt."""
        shown = self.observe or bool(self._mounted(TransitionEdit))
        track, cost = _track.start(self.model, ids, self._mounted(HiddenEdit), n, hidden=shown)
        tracks = [track]
        for process in self._companions():
            other, spent = _track.start(process.model, ids, process._mounted(HiddenEdit), n, hidden=True)
            tracks.append(other)
            cost = cost + spent
        return tracks, cost

    def _companions(self) -> list[TextProcess]:
        found: dict[int, Any] = {}
        for edit, _ in self._mounted(TransitionEdit):
            found.update({id(process): process for process in edit.companions})
        return list(found.values())

    @contextmanager
    def session(self) -> Iterator[None]:
        """Keeps the hooks on the blocks that this process and its companions steer."""
        with ExitStack() as stack:
            for process in (self, *self._companions()):
                terms = [term for edit, _ in process._mounted(HiddenEdit) for term in edit.terms(process.model.info)]
                stack.enter_context(process.model.hooks.installed({term.layer for term in terms}))
            yield

    def done(self, state: TextState) -> bool:
        return state.filled >= self.columns or bool(state.finished.all())

    def finished(self, state: TextState) -> Tensor:
        return state.finished.cpu() | (state.filled >= self.columns)

    def propose(self, state: TextState, generator: torch.Generator) -> TextState:
        waiting = torch.zeros_like(state.finished) if self.until else None
        for _ in range(self.block):
            if self.done(state) or (waiting is not None and bool((state.finished | waiting).all())):
                break
            state = self._token(state, generator, waiting)
            if waiting is not None:
                waiting = waiting | self._sentence_ended(state)
        return replace(state, step=state.step + 1)

    def _sentence_ended(self, state: TextState) -> Tensor:
        last = state.prefix[:, state.filled - 1].tolist()
        ends = [any(end in self.model.tokenizer.decode([token]) for end in self.until) for token in last]
        return torch.tensor(ends, device=state.finished.device) & state.real[:, state.filled - 1]

    @torch.inference_mode()
    def _token(self, state: TextState, generator: torch.Generator, waiting: Tensor | None) -> TextState:
        # The model reads a token when the next one is wanted, so that the last one costs no pass.
        state = self.read(state)
        base, law = self._laws(state)
        token = self.decoding.draw(law, generator)
        alive = ~state.finished if waiting is None else ~(state.finished | waiting)
        token = torch.where(alive, token, self.model.pad_token_id)

        def taken(log_law: Tensor) -> Tensor:
            value = log_law.gather(1, token.unsqueeze(1)).squeeze(1)
            return torch.where(alive, value, 0.0).to(state.log_prob.dtype)

        base_log_prob, kl = state.base_log_prob, state.kl
        log_prob = state.log_prob + taken(law)
        if base_log_prob is not None and kl is not None:
            if law is base:
                base_log_prob = base_log_prob + (log_prob - state.log_prob)
            else:
                gap = torch.where(law.isneginf(), 0.0, law.exp() * (law - base)).sum(-1)
                base_log_prob = base_log_prob + taken(base)
                kl = kl + torch.where(alive, gap, 0.0).to(kl.dtype)
        tilt = state.tilt
        for edit, _ in self._mounted(TransitionEdit):
            if edit.power is not None:
                other = self._context(state, base).companion(edit.power[0]).base
                tilt = tilt + edit.power[1] * (taken(other) - taken(base))
        prefix, real = state.prefix, state.real
        prefix[:, state.filled] = token
        real[:, state.filled] = alive
        length = state.length + alive
        filled = state.filled + 1
        finished = state.finished | (alive & self._ended(token, state, prefix, filled))
        if self.until:
            finished |= length >= self.decoding.max_new_tokens
        return replace(
            state, filled=filled, log_prob=log_prob, base_log_prob=base_log_prob, tilt=tilt, kl=kl, prefix=prefix,
            real=real, length=length, finished=finished, drawn=state.drawn + alive.sum(), unread=True,
        )  # fmt: skip

    @torch.inference_mode()
    def read(self, state: TextState) -> TextState:
        if not state.unread or self.done(state):
            return state
        token = state.prefix[:, state.filled - 1]
        # Without waiting rows, those that are finished read on: their positions matter to nobody.
        real = state.real[:, state.filled - 1] if self.until else None
        tracks, calls = [], 0
        for track in (state.track, *state.companions):
            moved, more = _track.advance(track, token, real)
            tracks.append(moved)
            calls += more
        return replace(
            state, track=tracks[0], companions=tuple(tracks[1:]), unread=False,
            cost=state.cost + Cost(model_calls=calls),
        )  # fmt: skip

    def context(self, state: TextState) -> TextContext:
        state = self.read(state)
        return self._context(state, self.decoding.tempered(state.track.logits))

    def _context(self, state: TextState, base: Tensor) -> TextContext:
        others = {id(p): t for p, t in zip(self._companions(), state.companions, strict=True)}
        return TextContext(state.filled, state.prefix[:, : state.filled], base, state.track, others)

    def _laws(self, state: TextState) -> tuple[Tensor, Tensor]:
        """Log-law of the next token before and after transition edits and truncation, both `[N, V]`; the same tensor
        where nothing changes it.
        """
        logits = state.track.logits
        if state.ids is not None:
            ids = torch.cat([state.ids, state.prefix[:, : state.filled]], 1)
            for processor in state.processors:
                logits = processor(ids, logits)
        base = law = self.decoding.tempered(logits)
        guided = self._mounted(TransitionEdit)
        if guided:
            context = self._context(state, base)
            touched = torch.zeros(len(state), 1, dtype=torch.bool, device=law.device)
            for edit, wanted in guided:
                mine = torch.ones_like(touched)
                if wanted is not None:
                    mine = torch.tensor([[g in wanted] for g in state.group.tolist()], device=law.device)
                law = torch.where(mine, edit.shift(law, context), law)
                touched |= mine
            law = torch.where(touched, torch.log_softmax(law, -1), base)  # other rows keep their bits
        return base, self.decoding.truncated(law)

    def _ended(self, token: Tensor, state: TextState, prefix: Tensor, step: int) -> Tensor:
        eos = self.decoding.eos_token_id or ()
        ended = torch.zeros_like(state.finished)
        for end in eos:
            ended |= token == end
        if self.decoding.stop:
            # A stop string lies within the last tokens: as many as it has bytes, and one that it ends inside of.
            tail = max(len(s.encode()) for s in self.decoding.stop) + 1
            texts = [self.model.tokenizer.decode(row) for row in prefix[:, max(0, step - tail) : step].tolist()]
            ended |= torch.tensor([any(s in t for s in self.decoding.stop) for t in texts], device=ended.device)
        if state.ids is not None:
            ids = torch.cat([state.ids, prefix[:, :step]], 1)
            for criterion in self.decoding.stopping_criteria:
                ended |= torch.as_tensor(criterion(ids, None), device=ended.device)
        return ended

    @torch.inference_mode()
    def gather(self, state: TextState, index: Tensor) -> TextState:
        at = index.to(state.prefix.device)
        return replace(
            state,
            group=state.group[index.cpu()],
            log_prob=state.log_prob[at],
            base_log_prob=None if state.base_log_prob is None else state.base_log_prob[at],
            tilt=state.tilt[at],
            kl=None if state.kl is None else state.kl[at],
            prefix=state.prefix[at],
            real=state.real[at],
            length=state.length[at],
            finished=state.finished[at],
            track=_track.fork(state.track, index),
            companions=tuple(_track.fork(c, index) for c in state.companions),
            ids=None if state.ids is None else state.ids[at],
        )

    @torch.inference_mode()
    def stack(self, states: Sequence[TextState]) -> TextState:
        check(len({s.step for s in states}) == 1, "states", [s.step for s in states], "rows at one step")
        states = [self.read(s) for s in states]

        def joined(name: str) -> Any:
            columns = [getattr(s, name) for s in states]
            return None if any(c is None for c in columns) else torch.cat(columns)

        tracks = [_track.stack(rows) for rows in zip(*((s.track, *s.companions) for s in states), strict=True)]
        return replace(
            states[0], filled=max(s.filled for s in states), track=tracks[0], companions=tuple(tracks[1:]),
            unread=any(s.unread for s in states), cost=sum((s.cost for s in states), Cost()),
            drawn=torch.stack([s.drawn for s in states]).sum(),
            **{name: joined(name) for name in (*_ROWS, "ids")},
        )  # fmt: skip

    def settle(self, state: TextState) -> tuple[TextState, Cost]:
        return replace(state, cost=Cost(), drawn=torch.zeros_like(state.drawn)), self._spent(state)

    def _spent(self, state: TextState) -> Cost:
        drawn = int(state.drawn)
        return state.cost + Cost(generated_tokens=drawn, nfe=drawn * (1 + len(state.companions)))

    def nbytes(self, state: TextState) -> int:
        return sum(_track.nbytes(track) for track in (state.track, *state.companions))

    def identify(self, state: TextState) -> list[Any]:
        return [tuple(tokens) for tokens in _tokens(state)]

    def pack(self, state: TextState) -> dict[str, Tensor]:
        rows = {name: getattr(state, name) for name in _ROWS}
        return {name: x.cpu() for name, x in rows.items() if x is not None}

    @torch.inference_mode()
    def unpack(self, prompts: Sequence[Prompt], step: int, packed: dict[str, Tensor]) -> TextState:
        """Rows that are all finished hold no cache. Others read their prompts, once each, and their tokens again."""
        group = packed["group"]
        over = bool(packed["finished"].all()) or step >= self.num_steps
        start = self._ended_state(prompts) if over else self.init(prompts, 1, torch.Generator())
        device = start.prefix.device
        real, prefix = packed["real"].to(device), packed["prefix"].to(device)
        rows: dict[str, Any] = {
            name: packed[name].to(device) if name != "group" else group for name in _ROWS if name in packed
        }
        fields_: dict[str, Any] = {**dict.fromkeys(("base_log_prob", "kl")), **rows}
        state = replace(start, **fields_, step=step)
        if over:
            return replace(state, filled=self.columns, ids=None)
        filled = int(real.any(0).nonzero().max()) + 1 if bool(real.any()) else 0
        # Aligned on the right, so that one pass ends with every row's last token.
        order = real[:, :filled].long().argsort(dim=1, stable=True)
        tokens, there = prefix[:, :filled].gather(1, order), real[:, :filled].gather(1, order)
        prefix, real = prefix.clone(), real.clone()
        prefix[:, :filled], real[:, :filled] = tokens, there
        tracks = [_track.fork(track, group) for track in (start.track, *start.companions)]
        if filled:
            tracks = [_track.replay(track, tokens, there) for track in tracks]
        read = int(there.sum())
        cost = start.cost + Cost(prompt_tokens=read, model_calls=1, nfe=read * len(tracks))
        ids = None if start.ids is None else start.ids[group.to(device)]
        return replace(
            state, filled=filled, prefix=prefix, real=real, track=tracks[0], companions=tuple(tracks[1:]), cost=cost,
            ids=ids, unread=False,
        )  # fmt: skip

    def _ended_state(self, prompts: Sequence[Prompt]) -> TextState:
        """A state without rows or caches, to be filled with finished rows."""
        device = self.model.device
        none = torch.zeros(0, device=device)
        mask = torch.zeros(0, 0, dtype=torch.long, device=device)
        track = Track(self.model, new_cache(self.model.config), mask, False, none.long(), none, None, None)
        return TextState(
            group=none.long().cpu(), step=self.num_steps, filled=self.columns, log_prob=none, base_log_prob=None,
            tilt=none, kl=None, cost=Cost(), prompts=list(prompts), prefix=mask, real=mask.bool(), length=none.long(),
            finished=none.bool(), drawn=torch.zeros((), dtype=torch.long, device=device), track=track, companions=(),
            processors=(), unread=False, ids=None,
        )  # fmt: skip

    @torch.inference_mode()
    def log_likelihood(self, prompts: Sequence[Prompt], group: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Summed log-probability `[N]` of each row's `tokens` after its prompt, at this process's temperature, under
        its hidden and prompt edits (transition edits and truncation are left out).
        """
        owner, ids = group.tolist(), self.encode(prompts)
        mine = replace(self, edits=_by_row(self.edits, owner))
        total = torch.zeros(len(owner), dtype=torch.float64)
        for rows, logits, target, real in sequence_logits(mine, [ids[b] for b in owner], tokens):
            taken = self.decoding.tempered(logits).gather(2, target.unsqueeze(2)).squeeze(2)
            total[rows] = torch.where(real, taken, 0.0).sum(1).double().cpu()
        return total

    def preview(self, state: TextState) -> Samples:
        """The partial texts."""
        return self.decode(state)

    def decode(self, state: TextState) -> Samples:
        tokens = _tokens(state)
        group, log_prob = state.group, state.log_prob.double().cpu()

        def later() -> Tensor:
            return divergence(self, state.prompts, group, tokens, log_prob)

        return Samples(
            prompts=[self.model.show(p) for p in state.prompts],
            outputs=[self.model.decode(row, self.decoding.stop) for row in tokens],
            tokens=tokens,
            group=group,
            log_weight=torch.zeros(len(state), dtype=torch.float64),
            log_prob=log_prob,
            base_log_prob=None if state.base_log_prob is None else state.base_log_prob.double().cpu(),
            tilt=state.tilt.double().cpu(),
            kl_estimate=later if state.kl is None else state.kl.double().cpu(),
            cost=self._spent(state),
        )


# ---------------------------------------------------------------------------------------------------------- scoring


@torch.inference_mode()
def sequence_logits(
    process: TextProcess, ids: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Yields `(rows, logits [n, T, V], targets [n, T], real [n, T])` in batches of similar length: the logits from
    which each row's `tokens` follow its prompt `ids`, under the process's hidden edits.
    """
    model = process.model
    order = sorted(range(len(ids)), key=lambda i: (len(tokens[i]), len(ids[i])))
    order = [i for i in order if tokens[i]]
    budget = 24_000_000 // model.vocabulary
    at = 0
    while at < len(order):
        longest, stop = len(tokens[order[at]]), at
        while stop < len(order) and (stop - at + 1) * len(tokens[order[stop]]) <= max(budget, longest):
            stop += 1
        rows = order[at : max(stop, at + 1)]
        at += len(rows)
        width = max(len(tokens[i]) for i in rows)
        target = torch.tensor([[*tokens[i], *[0] * (width - len(tokens[i]))] for i in rows], device=model.device)
        real = torch.tensor([[j < len(tokens[i]) for j in range(width)] for i in rows], device=model.device)
        edits = [
            (edit, None if wanted is None else frozenset(j for j, i in enumerate(rows) if i in wanted))
            for edit, wanted in process._mounted(HiddenEdit)
        ]
        track, _ = _track.start(model, [ids[i] for i in rows], edits, 1, hidden=False)
        yield rows, _track.continuation_logits(track, target), target, real


def divergence(
    process: TextProcess,
    prompts: Sequence[Prompt],
    group: Tensor,
    tokens: Sequence[Sequence[int]],
    log_prob: Tensor,
) -> Tensor:
    """KL of the edited law to the base along each text `[N]`: the exact KL of every step's law, after temperature and
    truncation, summed over the tokens that were drawn. Two passes over the finished text, for edits of prompts and
    hidden states. Where transition edits or processors act as well, the one-sample estimate `log q(y) - log p(y)` of
    each text instead, with log q as it was recorded while sampling: unbiased, noisier, and negative for some texts.
    """
    owner = group.tolist()
    base = process.unedited()
    mine = replace(process, edits=_by_row(process.edits, owner))
    edited_ids, base_ids = process.encode(prompts), base.encode(prompts)
    total = torch.zeros(len(owner), dtype=torch.float64)
    if process._mounted(TransitionEdit) or process.decoding.processors(0, (), process.model.device):
        return log_prob - base.log_likelihood(prompts, group, tokens)
    edited_rows = sequence_logits(mine, [edited_ids[b] for b in owner], tokens)
    for rows, logits, target, real in edited_rows:
        law = process.decoding.truncated(process.decoding.tempered(logits))
        track, _ = _track.start(base.model, [base_ids[owner[i]] for i in rows], (), 1, hidden=False)
        reference = process.decoding.tempered(_track.continuation_logits(track, target))
        gap = torch.where(law.isneginf(), 0.0, law.exp() * (law - reference)).sum(-1)
        total[rows] = torch.where(real, gap, 0.0).sum(1).double().cpu()
    return total


def _by_row(edits: Mounted, owner: Sequence[int]) -> Mounted:
    """Edits numbered by prompt, numbered by row instead."""
    return tuple(
        (edit, None if wanted is None else frozenset(i for i, b in enumerate(owner) if b in wanted))
        for edit, wanted in edits
    )
