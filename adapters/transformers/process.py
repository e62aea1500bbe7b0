"""`TextProcess`: a causal language model as a `Process` whose step is a block of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from steer.adapters.language.decoding import Decoding
from steer.adapters.language.model import check_ids, check_lengths
from steer.adapters.language.texts import pieces_of
from steer.adapters.transformers import endings, tracking
from steer.adapters.transformers.body import Body
from steer.adapters.transformers.processing import Processing
from steer.adapters.transformers.reader import Reader
from steer.adapters.transformers.scoring import (
    divergence,
    likelihoods,
    log_likelihood,
    steps_are_exact,
    token_divergences,
)
from steer.adapters.transformers.state import (
    TextContext,
    TextState,
    begin,
    read_at,
    reread,
    tokens_of,
    without_rows,
)
from steer.adapters.transformers.tracking import AnyTrack
from steer.core import (
    Ability,
    Cost,
    Edit,
    HiddenEdit,
    ModelInfo,
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
from steer.core.context import aimed, among
from steer.core.readings import Readings
from steer.core.samples import TokenDrift
from steer.sampling import laws

__all__ = ["TextProcess", "TokenModel"]


class TokenModel(Protocol):
    """What a process needs of a language model: its network, and the way from prompts to tokens and back."""

    tokenizer: Any
    body: Body

    @property
    def info(self) -> ModelInfo: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def context_length(self) -> int | None: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    def encode(self, prompt: Prompt) -> list[int]: ...

    def decode(self, tokens: Sequence[int], stop: Sequence[str] = ()) -> str: ...

    def show(self, prompt: Prompt) -> Any: ...


@dataclass(frozen=True)
class _Account:
    """Log-laws `[N, V]` of a next token: the base law that weights and drift refer to, as in `context`, and the one
    that is drawn from.
    """

    context: TextContext
    base: Tensor
    law: Tensor


@dataclass(frozen=True)
class TextProcess(Process):
    """Generation by one language model. A step draws `block` tokens for every row, or fewer: a row waits for the others
    once it has drawn a token that holds one of the strings in `until` (sentence ends).
    """

    model: TokenModel
    decoding: Decoding
    edits: Mounted = ()
    block: int = 1
    until: tuple[str, ...] = ()
    base: str = "truncated"
    """The base law of samplers that weigh, where top-k, top-p or min-p truncate: "truncated", the law that unedited
    texts are drawn from, so that log Z is an expectation under it; or "full", the law before truncation, which then
    counts as a drift that weights correct for, as far as it can be: the target is restricted to what truncation keeps.
    Other samplers report their drift from the full law.
    """
    proposal: bool = False
    """Whether weights correct for its edits (`as_proposal`)."""
    observe: bool = False
    """Whether `context` shows hidden states although no edit asks for them."""
    readings: Readings | None = None
    """What is read where each token is chosen."""

    consumes = True
    reads = True

    sites = frozenset({Site.PROMPT, Site.HIDDEN, Site.TRANSITION})

    @property
    def abilities(self) -> frozenset[Ability]:
        always = {Ability.FORK, Ability.LOG_PROB, Ability.PREVIEW}
        return frozenset(always | (set() if self.decoding.temperature == 0 else {Ability.BRANCH}))

    def way_out(self, ability: Ability) -> str:
        return "use a temperature above 0" if ability is Ability.BRANCH else ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "decoding", self.decoding.with_eos(self.model.eos_token_ids))
        check_whole("block", self.block)
        check(self.base in ("truncated", "full"), "base", self.base, "truncated, full")

    @property
    def body(self) -> Body:
        """The network that is run."""
        return self.model.body

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

    def watched(self, readings: Readings) -> TextProcess:
        return replace(self, readings=readings)

    def copy(self, edits: Mounted) -> TextProcess:
        return replace(self, edits=edits)

    def heated(self, by: float) -> TextProcess:
        return replace(self, decoding=self.decoding.heated(by))

    def as_proposal(self) -> TextProcess:
        """The process with its edits as a proposal for `base`. Under truncation edited laws are cut to the tokens that
        truncation keeps of the unedited one, since weights cannot bring back what is never drawn.
        """
        return replace(self, proposal=True)

    def validate(self, edit: Edit) -> None:
        if isinstance(edit, HiddenEdit):
            edit.scope.marks(self.model.info.token_id)
            depth = self.model.info.num_layers
            for layer in (*(term.layer for term in edit.terms(self.model.info)), *edit.reads):
                check(0 <= layer < depth, "layer", layer, f"0 to {depth - 1}, the blocks of {self.model.info.name}")
        if isinstance(edit, TransitionEdit):
            for companion in edit.companions:
                self._check_companion(companion)

    def _check_companion(self, other: Process) -> None:
        """Raise unless another process can follow the rows of this one under this one's settings."""
        check(isinstance(other, TextProcess), "companion", type(other).__name__, "a process of a language model")
        assert isinstance(other, TextProcess)
        ours, theirs = self.model.vocabulary, other.model.vocabulary
        check(ours == theirs, "companion", f"a vocabulary of {theirs}", f"the same vocabulary, {ours}")
        if any(not isinstance(edit, HiddenEdit) for edit, _ in other.edits):
            raise UnsupportedError(
                "a companion follows this model's rows under hidden edits of its own, not under others"
            )
        for name in other.decoding.of_laws():
            given, own = getattr(other.decoding, name), getattr(self.decoding, name)
            check(given == own, f"companion's {name}", given, f"{own}, this run's, which holds for both, or none")

    def mounted(self, kind: type) -> list[Any]:
        """Its edits of one kind, each with the prompts that asked for it."""
        return [(edit, wanted) for edit, wanted in self.edits if isinstance(edit, kind)]

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of every prompt after the prompt edits that it asked for; checks lengths."""
        ids = [self.model.encode(p) for p in self.rewritten(prompts)]
        check_ids(ids, self.body.vocabulary)
        check_lengths(ids, self.decoding.max_new_tokens, self.model.context_length)
        return ids

    @torch.inference_mode()
    def init(self, prompts: Sequence[Prompt], n: int, generator: torch.Generator) -> TextState:
        check_whole("n", n)
        check(len(prompts) >= 1, "prompts", prompts, "at least one")
        return self.begin_tokens(prompts, self.encode(prompts), n)

    def begin_tokens(self, prompts: Sequence[Prompt], ids: list[list[int]], n: int) -> TextState:
        """The state after prompts that are tokens already; prompt edits do nothing to them."""
        tracks, cost = self._tracks(ids, n)
        exact = not (self.mounted(HiddenEdit) or self.mounted(PromptEdit))
        state = begin(prompts, n, self.columns, tracks, cost, exact)
        device = state.prefix.device
        processing = Processing.of(self.decoding, ids, bool(self.until), device)
        watched = bool(processing or self.decoding.stopping_criteria)
        seen = processing.padded.repeat_interleave(n, 0) if watched else None
        room = None if self.readings is None else torch.zeros(*state.prefix.shape, len(self.readings.items))
        kept = None if room is None else room.to(device)
        return replace(state, processing=processing if processing else None, ids=seen, readings=kept)

    def _tracks(self, ids: Sequence[Sequence[int]], n: int) -> tuple[list[AnyTrack], Cost]:
        """This model's rows and those of every companion, `n` for each prompt."""
        shown = self.observe or bool(self.mounted(TransitionEdit))
        new = self.columns
        reader = None if self.readings is None else Reader(self.readings, self.body.stream)
        track, cost = tracking.start(self.body, ids, self.mounted(HiddenEdit), n, hidden=shown, new=new, reader=reader)
        tracks = [track]
        for process in self.companions():
            other, spent = tracking.start(process.body, ids, process.mounted(HiddenEdit), n, hidden=True, new=new)
            tracks.append(other)
            cost = cost + spent
        return tracks, cost

    def companions(self) -> list[TextProcess]:
        """Other models' processes that transition edits look at."""
        found: dict[int, Any] = {}
        for edit, _ in self.mounted(TransitionEdit):
            found.update({id(process): process for process in edit.companions})
        return list(found.values())

    @contextmanager
    def session(self) -> Iterator[None]:
        """Keeps the hooks on the blocks that this process and its companions steer."""
        with ExitStack() as stack:
            for process in (self, *self.companions()):
                terms = [term for edit, _ in process.mounted(HiddenEdit) for term in edit.terms(process.model.info)]
                read = set() if process.readings is None else process.readings.layers
                stack.enter_context(process.body.hooks.installed({term.layer for term in terms} | read))
            yield

    def done(self, state: TextState) -> bool:
        return state.filled >= self.columns or state.all_finished()

    def finished(self, state: TextState) -> Tensor:
        return state.finished.cpu() | (state.filled >= self.columns)

    def propose(self, state: TextState, generator: torch.Generator) -> TextState:
        if self.until:
            state = replace(state, waiting=torch.zeros_like(state.finished))
        for _ in range(self.block):
            if self.done(state) or state.resting:
                break
            state = self._token(state, generator)
        return replace(state, step=state.step + 1, waiting=None, resting=False)

    @torch.inference_mode()
    def _token(self, state: TextState, generator: torch.Generator) -> TextState:
        # The model reads a token when the next one is wanted, so that the last one costs no pass.
        state = self.read(state)
        account = self._account(state)
        token = self.decoding.draw(account.law, generator)
        alive = ~state.finished if state.waiting is None else ~(state.finished | state.waiting)
        token = torch.where(alive, token, self.body.pad_token_id)
        return self._taken(state, token, alive, account)

    def _taken(self, state: TextState, token: Tensor, alive: Tensor, account: _Account) -> TextState:
        """The state after the rows `alive` `[N]` have taken these tokens `[N]`."""
        state = self._counted(state, token, alive, account)
        state.prefix[:, state.filled] = token
        state.real[:, state.filled] = alive
        length = state.length + alive
        filled = state.filled + 1
        finished = state.finished | (alive & endings.ended(state, token, filled, self.decoding))
        if self.readings is not None and state.readings is not None and state.track.readings is not None:
            state.readings[:, state.filled] = state.track.readings
            finished |= alive & self.readings.met(state.track.readings)
        if self.until:
            finished |= length >= self.decoding.max_new_tokens
        state = replace(
            state,
            filled=filled,
            length=length,
            finished=finished,
            over=None,
            unread=True,
            drawn=state.drawn + alive.sum(),
        )
        if not (self.until or self.decoding.stop):
            return state
        return endings.spelled(state, alive, self.decoding.stop, self.until, self.model.tokenizer.decode)

    # ---- laws

    def laws(self, state: TextState) -> tuple[Tensor, Tensor]:
        """Log-laws `[N, V]` of the next token of rows that were read: the base law, which weights and drift refer to,
        and the one that is drawn from; the same tensor where nothing changes it.
        """
        account = self._account(state)
        return account.base, account.law

    def _account(self, state: TextState) -> _Account:
        context = self.context(state)
        guided = self._guided(state, context)
        if not (self.proposal and self.base == "truncated" and self.decoding.cuts):
            return _Account(context, context.base, self.decoding.truncated(guided))
        cut = self.decoding.truncated
        base, law = laws.proposal(context.base, guided, cut, reach=self._aims)
        return _Account(replace(context, base=base, law=lambda logits: cut(context.law(logits)), seen={}), base, law)

    def _guided(self, state: TextState, context: TextContext) -> Tensor:
        """The law after transition edits; the base itself where there are none."""
        edits, base = self.mounted(TransitionEdit), context.base
        if not edits:
            return base
        law, touched = base, torch.zeros(len(state), 1, dtype=torch.bool, device=base.device)
        for edit, wanted in edits:
            mine = torch.ones_like(touched)
            if wanted is not None:
                mine = among(state.group, wanted).to(base.device).unsqueeze(1)
            law = torch.where(mine, edit.shift(law, context), law)
            touched |= mine
        return torch.where(touched, torch.log_softmax(law, -1), base)  # other rows keep their bits

    @property
    def _aims(self) -> bool:
        """Whether weights aim at another law than the base."""
        return any(edit.power is not None for edit, _ in self.mounted(TransitionEdit))

    def _counted(self, state: TextState, token: Tensor, alive: Tensor, account: _Account) -> TextState:
        """The state with the log-probabilities and KL of the tokens `[N]` that the rows `alive` `[N]` drew."""
        base, law, at = account.base, account.law, token.unsqueeze(1)

        def summed(value: Tensor) -> Tensor:
            return torch.where(alive, value, 0.0).to(state.log_prob.dtype)

        drawn = summed(law.gather(1, at).squeeze(1))
        if law is base or state.base_log_prob is None:
            return state.add(drawn)
        before = summed(base.gather(1, at).squeeze(1))
        aim = aimed(self.edits, account.context, state.group, at) if self._aims else None
        return state.add(drawn, before, None if aim is None else summed(aim), summed(laws.divergence(law, base)))

    @torch.inference_mode()
    def read(self, state: TextState) -> TextState:
        if not state.unread or self.done(state):
            return state
        token = state.prefix[:, state.filled - 1]
        # Without waiting rows, those that are finished read on: their positions matter to nobody.
        real = state.real[:, state.filled - 1] if self.until else None
        tracks, calls = [], 0
        for track in state.tracks:
            moved, more = tracking.advance(track, token, real)
            tracks.append(moved)
            calls += more
        return replace(
            state,
            track=tracks[0],
            companions=tuple(tracks[1:]),
            unread=False,
            cost=state.cost + Cost(model_calls=calls),
        )

    def context(self, state: TextState) -> TextContext:
        state = self.read(state)
        prefix, real = state.prefix[:, : state.filled], state.real[:, : state.filled]

        def law(logits: Tensor) -> Tensor:
            if state.processing is not None:
                assert state.ids is not None
                logits = state.processing(logits, state.ids, prefix, real, state.group)
            return self.decoding.tempered(logits)

        others = {id(p): t for p, t in zip(self.companions(), state.companions, strict=True)}
        left = self.decoding.max_new_tokens - 1 - state.length
        return TextContext(state.filled, prefix, law(state.track.logits), left, state.track, others, law)

    @torch.inference_mode()
    def gather(self, state: TextState, index: Tensor) -> TextState:
        return state.take(index)

    @torch.inference_mode()
    def stack(self, states: Sequence[TextState]) -> TextState:
        return TextState.join([self.read(s) for s in states])

    def settle(self, state: TextState) -> tuple[TextState, Cost]:
        return replace(state, cost=Cost(), drawn=torch.zeros_like(state.drawn)), self._spent(state)

    def _spent(self, state: TextState) -> Cost:
        drawn = int(state.drawn)
        return state.cost + Cost(generated_tokens=drawn, nfe=drawn * (1 + len(state.companions)))

    def nbytes(self, state: TextState) -> int:
        return sum(tracking.nbytes(track) for track in state.tracks)

    def identify(self, state: TextState) -> list[Any]:
        return [tuple(tokens) for tokens in tokens_of(state)]

    def pack(self, state: TextState) -> dict[str, Tensor]:
        return state.pack()

    @torch.inference_mode()
    def unpack(self, prompts: Sequence[Prompt], step: int, packed: dict[str, Tensor]) -> TextState:
        """Rows that are all finished hold no cache. Others read their prompts, once each, and their tokens again."""
        over = bool(packed["finished"].all()) or step >= self.num_steps
        start = without_rows(self.body, prompts) if over else self.init(prompts, 1, torch.Generator())
        rows = TextState.unpacked(packed, start.prefix.device)
        state = replace(start, **rows, step=step, over=None)
        return replace(state, filled=self.columns) if over else reread(state)

    @property
    def kl_kind(self) -> str:
        recorded = not (self.mounted(HiddenEdit) or self.mounted(PromptEdit))
        return "exact" if recorded or steps_are_exact(self) else "one-sample"

    def log_likelihood(self, prompts: Sequence[Prompt], group: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Summed log-probability `[N]` of each row's `tokens` after its prompt, after this process's logits processors
        and temperature, under its hidden and prompt edits (transition edits and truncation are left out).
        """
        return log_likelihood(self, prompts, group, tokens)

    @torch.inference_mode()
    def take(self, state: TextState, token: Tensor) -> TextState:
        """The state after every row has taken its token `[N]`."""
        state = self.read(state)
        return self._taken(state, token, torch.ones_like(state.finished), self._account(state))

    @torch.inference_mode()
    def score_tokens(self, ids: list[list[int]], tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Summed log-probability `[N]` of each row's `tokens` after its prompt `ids`, and whether every token is the
        likeliest at its place `[N]` bool, under all edits (numbered by row) but those of prompts, after processors and
        temperature. Exact: in one pass, or token by token where transition edits act.
        """
        if not self.mounted(TransitionEdit):
            return likelihoods(self, ids, tokens)
        width = max(1, max(map(len, tokens)))
        own = replace(self, decoding=replace(self.decoding, max_new_tokens=width, eos_token_id=(), stop=()), until=())
        state = own.begin_tokens([""] * len(ids), ids, 1)
        greedy = torch.ones(len(ids), dtype=torch.bool)
        with own.session():
            for t in range(width):
                state = own.read(state)
                account = own._account(state)
                alive = torch.tensor([t < len(row) for row in tokens], device=account.law.device)
                token = torch.tensor([row[t] if t < len(row) else 0 for row in tokens], device=account.law.device)
                greedy &= ((account.law.argmax(-1) == token) | ~alive).cpu()
                state = own._taken(state, torch.where(alive, token, own.body.pad_token_id), alive, account)
        return state.log_prob.double().cpu(), greedy

    def preview(self, state: TextState) -> Samples:
        """The partial texts."""
        return self.decode(state)

    def decode(self, state: TextState) -> Samples:
        tokens = tokens_of(state)
        log_prob = laws.check_possible(state.log_prob.double().cpu())
        prompts, group = state.prompts, state.group  # and not the state's cache

        def later() -> Tensor:
            return divergence(self, prompts, group, tokens, log_prob)

        def drift() -> TokenDrift:
            texts = [pieces_of(row, self.model.decode, self.decoding.stop) for row in tokens]
            return TokenDrift(token_divergences(self, prompts, group, tokens), texts)

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
            token_drift=drift if steps_are_exact(self) else None,
            readings=None if self.readings is None else read_at(state, self.readings.names),
            cost=self._spent(state),
        )
