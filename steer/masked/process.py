"""Masked diffusion of text as a process: steps that reveal positions, and the account of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steer.core import Ability, Context, Cost, Edit, Mounted, Process, Prompt, Samples, Site, TransitionEdit, check
from steer.core.context import Opaque, shifted, touched
from steer.core.rows import accounted, beginning
from steer.masked.laws import Laws, carried, divergence
from steer.masked.state import MaskedDenoiser, MaskedState
from steer.sampling.laws import check_possible


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers from 0 to 1, on the CPU."""
    double = generator.device.type != "mps"
    kind = torch.float64 if double else torch.float32
    return torch.rand(shape, dtype=kind, generator=generator, device=generator.device).cpu()


def revealed(order: str, base: Tensor, masked: Tensor, at: Tensor, left: int) -> Tensor:
    """Positions that a step reveals `[N, L]`, at uniform numbers of that shape, with `left` steps to go, this one
    included.
    """
    if order == "random":
        return masked & (at < 1 / left).to(masked.device)
    confidence = torch.where(masked, base.amax(-1), -torch.inf)
    rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(1)
    count = -(-masked.sum(1, keepdim=True) // left)
    return masked & (rank < count)


def diverged(order: str, gap: Tensor | None, shown: Tensor, left: int) -> Tensor | None:
    """KL `[N]` of a step: of the positions `shown`, or, where those are random, of as many as are expected. `gap`
    `[N, L]` is that of every position; None where all are 0.
    """
    if gap is None:
        return None
    share = gap / left if order == "random" else torch.where(shown.cpu(), gap, 0.0)
    return share.sum(1)


def gained(count: int, rows: Tensor, law: Tensor, token: Tensor) -> Tensor:
    """Log-probabilities `[N]` of `count` rows, from tokens `[P]` under log-laws `[P, V]`, each of one of the `rows`."""
    zero = torch.zeros(count, dtype=torch.float64)
    return zero.index_add(0, rows.cpu(), law.gather(1, token.unsqueeze(1)).squeeze(1).cpu().double())


@dataclass
class MaskedContext(Opaque):
    """What a transition edit sees of a masked model's rows: `prefix` is `[N, L]` with the mask's id at masked
    positions, `base` the log-marginals `[N, L, V]`.
    """

    no_hidden = "a masked diffusion process shows no hidden states"
    no_lookahead = "a masked diffusion process has no next token to look at"

    process: MaskedProcess
    prefix: Tensor
    step: int
    base: Tensor
    group: Tensor
    prompts: list[Prompt] = field(repr=False)
    spent: Cost = field(default_factory=Cost)
    """What companions' networks cost."""

    def companion(self, process: Process) -> Context:
        """The same rows under another masked process, at its own temperature; calls its network."""
        assert isinstance(process, MaskedProcess)
        self.spent = self.spent + Cost(model_calls=1, nfe=len(self.prefix))
        base = process.marginals(self.prefix, self.group, process.encode(self.prompts))
        return MaskedContext(process, self.prefix, self.step, base, self.group, self.prompts)


@dataclass(frozen=True)
class MaskedProcess(Process):
    """Texts of `length` tokens after a prompt, from one masked diffusion model.

    The base law is the network's at `temperature`; truncation, like edits, counts as a drift from it, but in samplers
    that weigh, where `base` says what their weights refer to.

    Attributes:
        network: what predicts the marginals.
        length: L.
        steps: T, each at most one pass of the network. Rows in which a step revealed nothing need no pass, so that
            more steps than positions cost no more than L passes a row.
        temperature: of the marginals; 0 takes the likeliest token (log-probabilities are then those at 1).
        top_k, top_p: the K likeliest tokens and the smallest set with this mass that tokens are drawn from; 0 and 1
            are off.
        suppress: token ids that are never revealed, under the base law neither.
        order: "random", each masked position with probability 1/k, or "confidence": the same number of positions in
            every step, those first whose likeliest token is likeliest under the base marginals.
        shown: how `preview` completes masked positions: "sample", a draw from the base marginals, made of numbers
            that are drawn with each step, or "argmax", their likeliest tokens.
        max_batch: rows put through the network at once; 0 is no limit.
        base: the base law of samplers that weigh: "truncated", the law that unedited texts are drawn from, so that log
            Z is an expectation under it; or "full", the law before truncation, for which weights correct as far as they
            can: the target is restricted to what truncation keeps.
        proposal: whether weights correct for its edits (`as_proposal`).
    """

    network: MaskedDenoiser
    length: int = 64
    steps: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    suppress: tuple[int, ...] = ()
    order: str = "random"
    shown: str = "sample"
    max_batch: int = 0
    edits: Mounted = ()
    base: str = "truncated"
    proposal: bool = False

    sites = frozenset({Site.PROMPT, Site.TRANSITION})

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("steps", 1), ("top_k", 0), ("max_batch", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            check(whole and value >= least, name, value, f"an integer of {least} or more")
        check(
            _number(self.temperature) and 0 <= self.temperature < float("inf"),
            "temperature",
            self.temperature,
            "a number of 0 (the likeliest token) or more",
        )
        check(_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "0 < top_p <= 1")
        check(self.order in ("random", "confidence"), "order", self.order, "random, confidence")
        check(self.shown in ("sample", "argmax"), "shown", self.shown, "sample, argmax")
        check(self.base in ("truncated", "full"), "base", self.base, "truncated, full")
        object.__setattr__(self, "suppress", tuple(self.suppress))
        vocabulary = self.network.vocabulary
        known = all(isinstance(i, int) and 0 <= i < vocabulary for i in self.suppress)
        check(known, "suppress", self.suppress, f"token ids from 0 to {vocabulary - 1}")

    @property
    def abilities(self) -> frozenset[Ability]:
        always = {Ability.FORK, Ability.LOG_PROB, Ability.PREVIEW}
        return frozenset(always | (set() if self.temperature == 0 else {Ability.BRANCH}))

    def way_out(self, ability: Ability) -> str:
        return "use a temperature above 0" if ability is Ability.BRANCH else ""

    @property
    def num_steps(self) -> int:
        """T; by confidence no more than there are positions."""
        return min(self.steps, self.length) if self.order == "confidence" else self.steps

    def copy(self, edits: Mounted) -> MaskedProcess:
        return replace(self, edits=edits)

    def as_proposal(self) -> MaskedProcess:
        """The process with its edits as a proposal for `base`. Under truncation edited laws are cut to the tokens that
        truncation keeps of the unedited one, since weights cannot bring back what is never drawn.
        """
        return replace(self, proposal=True)

    def validate(self, edit: Edit) -> None:
        if isinstance(edit, TransitionEdit):
            check(edit.power is None, "edit", type(edit).__name__, "one that aims at the base law: aim='base'")
            ours = (self.length, self.network.vocabulary, self.network.mask_id)
            for companion in edit.companions:
                masked = isinstance(companion, MaskedProcess)
                check(masked, "companion", type(companion).__name__, "a masked diffusion process")
                assert isinstance(companion, MaskedProcess)
                theirs = (companion.length, companion.network.vocabulary, companion.network.mask_id)
                check(
                    ours == theirs,
                    "companion",
                    "length {}, vocabulary {}, mask {}".format(*theirs),
                    "length {}, vocabulary {}, mask {}".format(*ours),
                )

    def encode(self, prompts: Sequence[Prompt]) -> Any:
        """What the network needs to know of the prompts, after the prompt edits that each of them asked for."""
        return self.network.encode(self.rewritten(prompts), self.length)

    # ---- state

    def masked(self, state: MaskedState) -> Tensor:
        """Positions that are still masked `[N, L]`."""
        return state.tokens == self.network.mask_id

    def done(self, state: MaskedState) -> bool:
        return state.step >= self.num_steps

    def finished(self, state: MaskedState) -> Tensor:
        return ~self.masked(state).any(1)

    def diverges(self, state: MaskedState) -> bool:
        return not self.done(state) and bool(self.masked(state).any())

    @torch.no_grad()
    def init(self, prompts: Sequence[Prompt], n: int, generator: torch.Generator) -> MaskedState:
        common = beginning(prompts, n)
        rows = len(common["group"])
        tokens = torch.full((rows, self.length), self.network.mask_id, device=self.network.device)
        encoded = self.encode(prompts)
        return MaskedState(tokens=tokens, encoded=encoded, noise=self._noise(rows, generator), **common)

    def _noise(self, rows: int, generator: torch.Generator) -> Tensor | None:
        return uniform((rows, self.length), generator) if self.shown == "sample" else None

    def gather(self, state: MaskedState, index: Tensor) -> MaskedState:
        return state.take(index)

    def stack(self, states: Sequence[MaskedState]) -> MaskedState:
        if len({s.law is None for s in states}) > 1:
            states = [self.read(s) for s in states]
        if len({s.base is None for s in states}) > 1:
            states = [replace(s, base=None, fresh=None) for s in states]
        return MaskedState.join(states)

    def settle(self, state: MaskedState) -> tuple[MaskedState, Cost]:
        return replace(state, cost=Cost()), state.cost

    def pack(self, state: MaskedState) -> dict[str, Tensor]:
        return state.pack()

    def unpack(self, prompts: Sequence[Prompt], step: int, packed: dict[str, Tensor]) -> MaskedState:
        tokens = packed["tokens"].to(self.network.device)
        return MaskedState.unpack(packed, step, prompts, tokens=tokens, encoded=self.encode(prompts))

    def identify(self, state: MaskedState) -> list[Any]:
        return [tuple(row) for row in state.tokens.tolist()]

    # ---- laws

    @property
    def _laws(self) -> Laws:
        return Laws(self.network, self.temperature, self.top_k, self.top_p, self.suppress, self.max_batch)

    @torch.no_grad()
    def marginals(self, tokens: Tensor, group: Tensor, encoded: Any) -> Tensor:
        """Log-marginals `[N, L, V]` of rows `[N, L]` under the base law; points where a token was revealed."""
        return self._laws.marginals(tokens, group, encoded)

    @torch.no_grad()
    def read(self, state: MaskedState) -> MaskedState:
        if self.done(state) or state.law is not None:
            return state
        masked = self.masked(state)
        base, cost = self._seen(state, masked)
        law, gap = base, None
        if bool(masked.any()):
            law, spent = self._shifted(state, base, masked)
            law, gap = self._drawn_from(base, law, masked)
            cost = cost + spent
        return replace(state, base=base, law=law, gap=gap, fresh=None, cost=state.cost + cost)

    def _seen(self, state: MaskedState, masked: Tensor) -> tuple[Tensor, Cost]:
        """The base log-marginals of all rows, from a pass of the network over those that it needs, and its cost."""
        changed = torch.ones_like(masked[:, 0]) if state.fresh is None else ~state.fresh
        rows = (changed & masked.any(1)).nonzero().squeeze(1)
        base, cost = state.base, Cost()
        if len(rows):
            seen = self.marginals(state.tokens[rows], state.group[rows.cpu()], state.encoded)
            cost = Cost(model_calls=1, nfe=len(rows))
        else:
            seen = torch.zeros(0, self.length, self.network.vocabulary, device=state.tokens.device)
        if len(rows) == len(state):
            base = seen
        elif base is None or bool(changed.any()):
            base = seen.new_zeros(len(state), *seen.shape[1:]) if base is None else base
            # Rows that are complete are not put through the network again.
            base = carried(base.index_copy(0, rows, seen.to(base.dtype)), state.tokens, masked)
        return base, cost

    def _drawn_from(self, base: Tensor, edited: Tensor, masked: Tensor) -> tuple[Tensor, Tensor | None]:
        """The log-marginals that tokens are drawn from, and their divergence from the base law of every position."""
        if not self._weighs_truncated:
            law = self._laws.truncated(edited, masked)
            return law, None if law is base else divergence(law, base, masked)
        cut = self._laws.truncated(base, masked)
        if edited is base:
            return cut, None
        law = self._laws.restricted(edited, cut, masked)
        return law, divergence(law, cut, masked)

    @property
    def _weighs_truncated(self) -> bool:
        return self.proposal and self.base == "truncated" and self._laws.truncates

    def _weighed(self, base: Tensor) -> Tensor:
        """The base law `[P, V]` of positions, as it is weighed."""
        return self._laws.cut(base) if self._weighs_truncated else base

    def context(self, state: MaskedState) -> MaskedContext:
        state = self.read(state)
        check(state.base is not None, "state", f"step {state.step}", "rows that are not finished")
        assert state.base is not None
        return MaskedContext(self, state.tokens, state.step, state.base, state.group, self.rewritten(state.prompts))

    def _shifted(self, state: MaskedState, base: Tensor, masked: Tensor) -> tuple[Tensor, Cost]:
        """The log-law under every edit, each for the rows that asked for it, and what companions cost; other rows keep
        their bits.
        """
        edits = tuple((edit, wanted) for edit, wanted in self.edits if isinstance(edit, TransitionEdit))
        if not edits:
            return base, Cost()
        context = MaskedContext(self, state.tokens, state.step, base, state.group, self.rewritten(state.prompts))
        law = self._laws.normalised(shifted(edits, context, state.group))
        asked = touched(edits, state.group).to(base.device).view(-1, 1, 1)
        return torch.where(asked & masked.unsqueeze(-1), law, base), context.spent

    # ---- steps

    @torch.no_grad()
    def propose(self, state: MaskedState, generator: torch.Generator) -> MaskedState:
        state = self.read(state)
        assert state.base is not None and state.law is not None
        masked, left = self.masked(state), self.num_steps - state.step
        # As many numbers at every step, whatever it reveals: runs with one seed stay comparable.
        where, which = uniform((2, *state.tokens.shape), generator)
        shown = revealed(self.order, state.base, masked, where, left)
        i, j = shown.nonzero(as_tuple=True)
        law = state.law[i, j]
        base = law if state.law is state.base else self._weighed(state.base[i, j])
        token = self._laws.drawn(law, which[i.cpu(), j.cpu()].unsqueeze(1)).squeeze(1)
        tokens = state.tokens.clone()
        tokens[i, j] = token
        same = ~shown.any(1)
        reusable = bool(same.any())
        after = state.add(
            check_possible(gained(len(state), i, law, token)),
            None if base is law else gained(len(state), i, base, token),
            kl=diverged(self.order, state.gap, shown, left),
        )
        return replace(
            after,
            tokens=tokens,
            step=state.step + 1,
            law=None,
            gap=None,
            base=state.base if reusable else None,
            fresh=same if reusable else None,
            noise=self._noise(len(state), generator),
            cost=state.cost + Cost(generated_tokens=len(i)),
        )

    # ---- looking

    @torch.no_grad()
    def completions(self, state: MaskedState, m: int, generator: torch.Generator) -> Tensor:
        """Tokens `[N, m, L]`: `m` draws of the masked positions of every row, each independently from its base
        marginal, truncated; reads the rows where they were not read yet, without keeping it.
        """
        numbers = uniform((len(state), m, self.length), generator)
        return self._laws.completed(state.tokens, self.read(state).base, numbers)

    @torch.no_grad()
    def preview(self, state: MaskedState) -> Samples:
        """The rows with their masked positions completed, as `shown` says; reads them where they were not read yet,
        without keeping it.
        """
        if self.done(state):
            return self.decode(state)
        noise = state.noise if self.shown == "sample" else None
        numbers = None if noise is None else noise.unsqueeze(1)
        tokens = self._laws.completed(state.tokens, self.read(state).base, numbers)[:, 0]
        return accounted(self.samples(tokens, state.group, state.prompts), state)

    def decode(self, state: MaskedState) -> Samples:
        """Of unfinished rows, the text of what was revealed; in `tokens` masked positions have the mask's id."""
        return accounted(self.samples(state.tokens, state.group, state.prompts), state)

    def samples(self, tokens: Tensor, group: Tensor, prompts: Sequence[Prompt]) -> Samples:
        """Rows `[N, L]` for the prompts `group` `[N]`, without more."""
        rows, mask = tokens.tolist(), self.network.mask_id
        return Samples(
            prompts=[self.network.show(p) for p in prompts],
            outputs=[self.network.decode_text([t for t in row if t != mask]) for row in rows],
            tokens=rows,
            group=group,
            log_weight=torch.zeros(len(group), dtype=torch.float64),
        )


def _number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)
