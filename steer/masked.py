"""Masked diffusion language models as a `Process`: text that starts as masks and is revealed in any order.

A chain of `T` steps starts from `L` masked positions. With `k` steps left each position that is still masked is
revealed with probability `1 / k`, which is the exact posterior of the linear masking schedule (MDLM, Sahoo et al.
2024), and a revealed token is drawn from the network's marginal for its position and stays. Tokens that are revealed
in one step are drawn independently of each other, so the law of this *chain* approaches the model's own only as `T`
grows: with two positions and an exact denoiser it is `(1 - 1/T) joint + 1/T product of marginals`. The chain's law is
what is sampled and what is steered.

The quantity at the TRANSITION site is the log-marginals `[N, L, V]`, after temperature and before truncation. They are
points at positions that were revealed, where edits change nothing.

Which positions are revealed never depends on edits. Its probability is therefore the same under the edited and the
base law, and is left out of both: `log_prob` and `base_log_prob` are of the tokens, given where they were revealed.

Letters: `N` rows, `L` positions, `V` vocabulary, `T` steps, `m` draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor

from steer.core import (
    Ability,
    Context,
    Cost,
    Edit,
    Process,
    Prompt,
    Reward,
    Samples,
    Site,
    TransitionEdit,
    UnsupportedError,
    check,
)
from steer.lookahead import Lookahead
from steer.weights import log_mean_exp

__all__ = ["MarginalDraws", "MaskedContext", "MaskedDenoiser", "MaskedProcess", "MaskedState", "TableDenoiser"]

Mounted = tuple[tuple[Edit, frozenset[int] | None], ...]

_BUDGET = 24_000_000
"""Numbers of positions times vocabulary that are worked on at once beyond the marginals themselves."""


class MaskedDenoiser(Protocol):
    """A network with its conditioning: the part of a masked diffusion model that an adapter supplies."""

    @property
    def mask_id(self) -> int:
        """The token of a masked position."""

    @property
    def vocabulary(self) -> int:
        """V; the mask may be one of the V ids."""

    @property
    def device(self) -> torch.device:
        """Where tokens go."""

    def encode(self, prompts: Sequence[Prompt], length: int) -> Any:
        """What `predict` needs to know of the prompts for texts of `length` tokens. Raises `InputError` for a prompt
        that it cannot take.
        """

    def predict(self, tokens: Tensor, group: Tensor, encoded: Any) -> Tensor:
        """Log-marginals `[N, L, V]` of every position of rows `tokens` `[N, L]` int64, row i after prompt `group[i]`;
        the mask has -infinity. A constant at each position makes no difference (logits), nor does what it says of
        positions that are not masked.
        """

    def show(self, prompt: Prompt) -> Any:
        """The prompt as it appears in results."""

    def decode_text(self, tokens: Sequence[int]) -> str:
        """Text of tokens; masks were left out."""


@dataclass(frozen=True)
class MaskedState:
    """Rows of texts, some of whose positions are masked; `tokens` is `[N, L]` int64."""

    tokens: Tensor
    group: Tensor
    step: int
    log_prob: Tensor
    base_log_prob: Tensor
    kl: Tensor
    cost: Cost
    prompts: list[Prompt] = field(repr=False)
    encoded: Any = field(repr=False)
    noise: Tensor | None = field(default=None, repr=False)
    """Uniform numbers `[N, L]` on the CPU that a sampled preview is made of."""
    base: Tensor | None = field(default=None, repr=False)
    """The network's log-marginals `[N, L, V]`, of the rows in `fresh` where `law` is None."""
    fresh: Tensor | None = field(default=None, repr=False)
    """Rows `[N]` that did not change in the last step, so that `base` still holds for them."""
    law: Tensor | None = field(default=None, repr=False)
    """Log-marginals under the edits and truncated; the same tensor as `base` where nothing changes them."""
    gap: Tensor | None = field(default=None, repr=False)
    """KL of `law` to `base` at every position `[N, L]` float64 on the CPU; None where they are the same."""

    @property
    def tilt(self) -> Tensor:
        """Nothing: masked processes take no edits that aim at another law."""
        return torch.zeros_like(self.log_prob)

    def __len__(self) -> int:
        return len(self.group)


_ROWS = ("group", "log_prob", "base_log_prob", "kl", "noise", "gap")
"""What lies on the CPU, one row for each row."""


@dataclass
class MaskedContext:
    """What a transition edit sees of a masked model's rows: `prefix` is `[N, L]` with the mask's id at masked
    positions, `base` the log-marginals `[N, L, V]`.
    """

    process: MaskedProcess
    prefix: Tensor
    step: int
    base: Tensor
    group: Tensor
    prompts: list[Prompt] = field(repr=False)
    spent: Cost = field(default_factory=Cost)
    """What companions' networks cost."""

    @property
    def hidden(self) -> Tensor:
        raise UnsupportedError("a masked diffusion process shows no hidden states")

    def lookahead(self, candidates: Tensor) -> Tensor:
        raise UnsupportedError("a masked diffusion process has no next token to look at")

    def companion(self, process: Process) -> Context:
        """The same rows under another masked process, at its own temperature; calls its network."""
        assert isinstance(process, MaskedProcess)
        self.spent = self.spent + Cost(model_calls=1, nfe=len(self.prefix))
        base = process.marginals(self.prefix, self.group, process.encode(self.prompts))
        return MaskedContext(process, self.prefix, self.step, base, self.group, self.prompts)

    def guidance(self, score: Callable[[Samples], Tensor]) -> Tensor:
        raise UnsupportedError("tokens have no gradient")


@dataclass(frozen=True)
class MaskedProcess(Process):
    """Texts of `length` tokens after a prompt, from one masked diffusion model.

    The base law is the network's at `temperature`; truncation, like edits, counts as a drift from it (in `kl`, and in
    the weights of samplers that correct for edits).

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

    sites = frozenset({Site.TRANSITION})

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("steps", 1), ("top_k", 0), ("max_batch", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            check(whole and value >= least, name, value, f"an integer of {least} or more")
        check(_number(self.temperature) and 0 <= self.temperature < float("inf"), "temperature", self.temperature,
              "a number of 0 (the likeliest token) or more")  # fmt: skip
        check(_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "0 < top_p <= 1")
        check(self.order in ("random", "confidence"), "order", self.order, "random, confidence")
        check(self.shown in ("sample", "argmax"), "shown", self.shown, "sample, argmax")
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

    def validate(self, edit: Edit) -> None:
        if isinstance(edit, TransitionEdit):
            check(edit.power is None, "edit", type(edit).__name__, "one that aims at the base law: aim='base'")
            ours = (self.length, self.network.vocabulary, self.network.mask_id)
            for companion in edit.companions:
                masked = isinstance(companion, MaskedProcess)
                check(masked, "companion", type(companion).__name__, "a masked diffusion process")
                assert isinstance(companion, MaskedProcess)
                theirs = (companion.length, companion.network.vocabulary, companion.network.mask_id)
                check(ours == theirs, "companion", "length {}, vocabulary {}, mask {}".format(*theirs),
                      "length {}, vocabulary {}, mask {}".format(*ours))  # fmt: skip

    def encode(self, prompts: Sequence[Prompt]) -> Any:
        """Checks the prompts."""
        return self.network.encode(prompts, self.length)

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
        check(isinstance(n, int) and n >= 1, "n", n, "an integer of 1 or more")
        check(len(prompts) >= 1, "prompts", prompts, "at least one")
        rows = len(prompts) * n
        zero = torch.zeros(rows, dtype=torch.float64)
        return MaskedState(
            tokens=torch.full((rows, self.length), self.network.mask_id, device=self.network.device),
            group=torch.arange(len(prompts)).repeat_interleave(n), step=0, log_prob=zero, base_log_prob=zero, kl=zero,
            cost=Cost(), prompts=list(prompts), encoded=self.encode(prompts), noise=self._noise(rows, generator),
        )  # fmt: skip

    def _noise(self, rows: int, generator: torch.Generator) -> Tensor | None:
        return _uniform((rows, self.length), generator) if self.shown == "sample" else None

    def gather(self, state: MaskedState, index: Tensor) -> MaskedState:
        at, here = index.to(state.tokens.device), index.cpu()

        def rows(x: Any, i: Tensor) -> Any:
            return None if x is None else x[i]

        base = rows(state.base, at)
        return replace(
            state,
            tokens=state.tokens[at],
            base=base,
            fresh=rows(state.fresh, at),
            law=base if state.law is state.base else rows(state.law, at),
            **{name: rows(getattr(state, name), here) for name in _ROWS},
        )

    def stack(self, states: Sequence[MaskedState]) -> MaskedState:
        check(len({s.step for s in states}) == 1, "states", [s.step for s in states], "rows at one step")
        if len({s.law is None for s in states}) > 1:
            states = [self.read(s) for s in states]
        if len({s.base is None for s in states}) > 1:
            states = [replace(s, base=None, fresh=None) for s in states]

        def joined(name: str) -> Any:
            columns = [getattr(s, name) for s in states]
            return None if any(c is None for c in columns) else torch.cat(columns)

        plain = all(s.law is s.base for s in states)
        base = joined("base")
        return replace(
            states[0], base=base, law=base if plain else joined("law"), cost=sum((s.cost for s in states), Cost()),
            **{name: joined(name) for name in ("tokens", "fresh", *_ROWS)},
        )  # fmt: skip

    def settle(self, state: MaskedState) -> tuple[MaskedState, Cost]:
        return replace(state, cost=Cost()), state.cost

    def pack(self, state: MaskedState) -> dict[str, Tensor]:
        kept = {name: getattr(state, name) for name in ("tokens", "group", "log_prob", "base_log_prob", "kl", "noise")}
        return {name: x.cpu() for name, x in kept.items() if x is not None}

    def unpack(self, prompts: Sequence[Prompt], step: int, packed: dict[str, Tensor]) -> MaskedState:
        tokens = packed["tokens"].to(self.network.device)
        return MaskedState(**{**packed, "tokens": tokens}, step=step, cost=Cost(), prompts=list(prompts),
                           encoded=self.encode(prompts))  # fmt: skip

    def identify(self, state: MaskedState) -> list[Any]:
        return [tuple(row) for row in state.tokens.tolist()]

    # ---- laws

    @torch.no_grad()
    def marginals(self, tokens: Tensor, group: Tensor, encoded: Any) -> Tensor:
        """Log-marginals `[N, L, V]` of rows `[N, L]` under the base law; points where a token was revealed."""
        size = self.max_batch or len(tokens)
        parts = zip(tokens.split(size), group.split(size), strict=True)
        x = torch.cat([self.network.predict(t, g, encoded) for t, g in parts])
        x = x if x.dtype == torch.float64 else x.float()
        x = torch.log_softmax(self._excluded(x) / (self.temperature or 1.0), -1)
        return _carried(x, tokens, tokens == self.network.mask_id)

    def _excluded(self, x: Tensor) -> Tensor:
        """Without the mask and what is suppressed: a revealed mask would never be one."""
        never = [i for i in (self.network.mask_id, *self.suppress) if i < x.shape[-1]]
        return x.index_fill(-1, torch.tensor(never, dtype=torch.long, device=x.device), -torch.inf)

    @torch.no_grad()
    def read(self, state: MaskedState) -> MaskedState:
        if self.done(state) or state.law is not None:
            return state
        masked = self.masked(state)
        changed = torch.ones_like(masked[:, 0]) if state.fresh is None else ~state.fresh
        rows = (changed & masked.any(1)).nonzero().squeeze(1)
        base, cost = state.base, state.cost
        if len(rows):
            seen = self.marginals(state.tokens[rows], state.group[rows.cpu()], state.encoded)
            cost = cost + Cost(model_calls=1, nfe=len(rows))
        else:
            seen = torch.zeros(0, self.length, self.network.vocabulary, device=state.tokens.device)
        if len(rows) == len(state):
            base = seen
        elif base is None or bool(changed.any()):
            base = seen.new_zeros(len(state), *seen.shape[1:]) if base is None else base
            # Rows that are complete are not put through the network again.
            base = _carried(base.index_copy(0, rows, seen.to(base.dtype)), state.tokens, masked)
        law, gap = base, None
        if bool(masked.any()):
            law, cost = self._shifted(state, base, masked, cost)
            law = self._cut(law, masked)
            gap = None if law is base else _divergence(law, base, masked)
        return replace(state, base=base, law=law, gap=gap, fresh=None, cost=cost)

    def context(self, state: MaskedState) -> MaskedContext:
        state = self.read(state)
        check(state.base is not None, "state", f"step {state.step}", "rows that are not finished")
        assert state.base is not None
        return MaskedContext(self, state.tokens, state.step, state.base, state.group, state.prompts)

    def _shifted(self, state: MaskedState, base: Tensor, masked: Tensor, cost: Cost) -> tuple[Tensor, Cost]:
        """The log-law under every edit, each for the rows that asked for it; other rows keep their bits."""
        if not self.edits:
            return base, cost
        context = MaskedContext(self, state.tokens, state.step, base, state.group, state.prompts)
        x, touched = base, torch.zeros(len(state), 1, 1, dtype=torch.bool, device=base.device)
        for edit, wanted in self.edits:
            assert isinstance(edit, TransitionEdit)
            mine = torch.ones_like(touched)
            if wanted is not None:
                mine = torch.tensor([g in wanted for g in state.group.tolist()], device=base.device).view(-1, 1, 1)
            x = torch.where(mine, edit.shift(x, context), x)
            touched |= mine
        law = torch.log_softmax(self._excluded(x), -1)
        return torch.where(touched & masked.unsqueeze(-1), law, base), cost + context.spent

    def _cut(self, law: Tensor, masked: Tensor) -> Tensor:
        """The law `[N, L, V]` with its masked positions truncated."""
        if not self._truncates:
            return law
        cut = law.clone()
        for i, j in _places(masked, law.shape[-1]):
            cut[i, j] = self._truncated(law[i, j])
        return cut

    @property
    def _truncates(self) -> bool:
        return 0 < self.top_k < self.network.vocabulary or self.top_p < 1

    def _truncated(self, law: Tensor) -> Tensor:
        """`[P, V]`, cut by top-k and top-p, normalised again."""
        if not self._truncates:
            return law
        keep = torch.ones_like(law, dtype=torch.bool)
        if 0 < self.top_k < law.shape[-1]:
            keep = law >= law.topk(self.top_k, -1).values[:, -1:]
        if self.top_p < 1:
            ordered, ids = torch.where(keep, law, -torch.inf).log_softmax(-1).sort(-1, descending=True)
            mass = ordered.exp()
            keep &= torch.zeros_like(keep).scatter(-1, ids, mass.cumsum(-1) - mass < self.top_p)
        return torch.where(keep, law, -torch.inf).log_softmax(-1)

    # ---- steps

    @torch.no_grad()
    def propose(self, state: MaskedState, generator: torch.Generator) -> MaskedState:
        state = self.read(state)
        assert state.base is not None and state.law is not None
        masked, left = self.masked(state), self.num_steps - state.step
        # As many numbers at every step, whatever it reveals: runs with one seed stay comparable.
        where, which = _uniform((2, *state.tokens.shape), generator)
        revealed = self._revealed(state.base, masked, where, left)
        i, j = revealed.nonzero(as_tuple=True)
        law = state.law[i, j]
        token = self._drawn(law, which[i.cpu(), j.cpu()].unsqueeze(1)).squeeze(1)
        rows = i.cpu()

        def added(total: Tensor, log_law: Tensor) -> Tensor:
            return total.index_add(0, rows, log_law.gather(1, token.unsqueeze(1)).squeeze(1).cpu().double())

        log_prob = added(state.log_prob, law)
        base_log_prob = added(state.base_log_prob, law if state.law is state.base else state.base[i, j])
        kl = state.kl
        if state.gap is not None:
            share = state.gap / left if self.order == "random" else torch.where(revealed.cpu(), state.gap, 0.0)
            kl = kl + share.sum(1)
        tokens = state.tokens.clone()
        tokens[i, j] = token
        same = ~revealed.any(1)
        reusable = bool(same.any())
        return replace(
            state, tokens=tokens, step=state.step + 1, log_prob=log_prob, base_log_prob=base_log_prob, kl=kl,
            law=None, gap=None, base=state.base if reusable else None, fresh=same if reusable else None,
            noise=self._noise(len(state), generator), cost=state.cost + Cost(generated_tokens=len(i)),
        )  # fmt: skip

    def _revealed(self, base: Tensor, masked: Tensor, uniform: Tensor, left: int) -> Tensor:
        """Positions that a step reveals `[N, L]`, with `left` steps to go, this one included."""
        if self.order == "random":
            return masked & (uniform < 1 / left).to(masked.device)
        confidence = torch.where(masked, base.amax(-1), -torch.inf)
        rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(1)
        count = -(-masked.sum(1, keepdim=True) // left)
        return masked & (rank < count)

    def _drawn(self, law: Tensor, uniform: Tensor) -> Tensor:
        """Tokens `[P, m]` of log-laws `[P, V]` at uniform numbers `[P, m]`, by inverting the CDF."""
        if self.temperature == 0:
            return law.argmax(-1, keepdim=True).expand(uniform.shape)
        cdf = law.exp().cumsum(-1)
        whole = cdf[:, -1:].contiguous()
        point = uniform.to(cdf.dtype).to(cdf.device) * whole
        token = torch.searchsorted(cdf, point, right=True)
        # Rounding can put a point at the very end, where tokens may have no mass.
        return torch.minimum(token, torch.searchsorted(cdf, whole))

    # ---- looking

    @torch.no_grad()
    def completions(self, state: MaskedState, m: int, generator: torch.Generator) -> Tensor:
        """Tokens `[N, m, L]`: `m` draws of the masked positions of every row, each independently from its base
        marginal, truncated; reads the rows where they were not read yet, without keeping it.
        """
        return self._completed(state, _uniform((len(state), m, self.length), generator))

    def _completed(self, state: MaskedState, uniform: Tensor | None) -> Tensor:
        """Tokens `[N, m, L]` at uniform numbers of that shape; the likeliest ones, m = 1, without numbers."""
        m = 1 if uniform is None else uniform.shape[1]
        tokens = state.tokens.unsqueeze(1).repeat(1, m, 1)
        base = self.read(state).base
        if base is None:
            return tokens
        for i, j in _places(self.masked(state), base.shape[-1]):
            law = base[i, j]
            if uniform is None:
                tokens[i, 0, j] = law.argmax(-1)
            else:
                tokens[i, :, j] = self._drawn(self._truncated(law), uniform[i.cpu(), :, j.cpu()])
        return tokens

    @torch.no_grad()
    def preview(self, state: MaskedState) -> Samples:
        """The rows with their masked positions completed, as `shown` says; reads them where they were not read yet,
        without keeping it.
        """
        if self.done(state):
            return self.decode(state)
        noise = state.noise if self.shown == "sample" else None
        return self._accounted(state, self._completed(state, None if noise is None else noise.unsqueeze(1))[:, 0])

    def decode(self, state: MaskedState) -> Samples:
        """Of unfinished rows, the text of what was revealed; in `tokens` masked positions have the mask's id."""
        return self._accounted(state, state.tokens)

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

    def _accounted(self, state: MaskedState, tokens: Tensor) -> Samples:
        return replace(
            self.samples(tokens, state.group, state.prompts),
            log_prob=state.log_prob,
            base_log_prob=state.base_log_prob,
            tilt=state.tilt,
            kl_estimate=state.kl,
            cost=state.cost,
        )


def _number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    double = generator.device.type != "mps"
    kind = torch.float64 if double else torch.float32
    return torch.rand(shape, dtype=kind, generator=generator, device=generator.device).cpu()


def _places(masked: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and positions `[P]` of what is masked, a part at a time."""
    for part in masked.nonzero().split(max(1, _BUDGET // vocabulary)):
        if len(part):
            yield part[:, 0], part[:, 1]


def _carried(x: Tensor, tokens: Tensor, masked: Tensor) -> Tensor:
    """Log-marginals `[N, L, V]` that are points where a token was revealed; changes `x`."""
    i, j = (~masked).nonzero(as_tuple=True)
    x[i, j] = -torch.inf
    x[i, j, tokens[i, j]] = 0.0
    return x


def _divergence(law: Tensor, base: Tensor, masked: Tensor) -> Tensor:
    """KL of `law` to `base` at every masked position `[N, L]`, 0 elsewhere; float64 on the CPU."""
    gap = torch.zeros(masked.shape, dtype=torch.float64)
    for i, j in _places(masked, law.shape[-1]):
        p, q = law[i, j], base[i, j]
        gap[i.cpu(), j.cpu()] = torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1).cpu().double()
    return gap


# ------------------------------------------------------------------------------------------------------------ values


@dataclass(frozen=True)
class MarginalDraws(Lookahead):
    """The reward of `m` completions of every row from the network's marginals, at no further pass of the network.

    Tokens of a completion are independent of each other given the row, so this is the soft value only of rows that
    would be revealed in one step; FK steering stays right with it, as with any value.

    Attributes:
        m: completions of an unfinished row; finished ones are scored once.
        combine: "soft", `beta log mean exp(r / beta)`; "mean"; or "released", `log mean exp(r)` without beta, as the
            code of the FK paper (Singhal et al. 2025) has it, whose rewards are log-probabilities.
    """

    m: int = 4
    combine: str = "soft"

    def __post_init__(self) -> None:
        check(isinstance(self.m, int) and self.m >= 1, "m", self.m, "an integer of 1 or more")
        allowed = ("soft", "mean", "released")
        check(self.combine in allowed, "combine", self.combine, ", ".join(allowed))

    def check(self, process: Process) -> None:
        if not isinstance(process, MaskedProcess):
            raise UnsupportedError(
                f"draws from marginals need a masked diffusion process; {type(process).__name__} has none: "
                "use Preview() or Rollouts(m)"
            )

    def __call__(
        self, process: Process, state: Any, reward: Reward, beta: float, generator: torch.Generator
    ) -> tuple[Tensor, Cost]:
        self.check(process)
        assert isinstance(process, MaskedProcess)
        drawn = process.completions(state, self.m, generator)
        count = torch.where(process.finished(state).cpu(), 1, self.m)
        row = torch.arange(len(state)).repeat_interleave(count)
        first = count.cumsum(0) - count
        which = torch.arange(len(row)) - first[row]
        shown = process.samples(drawn[row.to(drawn.device), which.to(drawn.device)], state.group[row], state.prompts)
        scores = reward(shown)
        # A finished row's one score stands for all of its completions.
        table = scores[first.unsqueeze(1) + torch.arange(self.m) % count.unsqueeze(1)]
        if self.combine == "mean":
            value = table.mean(1)
        else:
            scale = beta if self.combine == "soft" else 1.0
            value = scale * log_mean_exp(table / scale)
        return value, Cost(reward_calls=len(row))


# -------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True, eq=False)
class TableDenoiser:
    """The exact denoiser of a law small enough to be written down, in float64; prompts play no part.

    Attributes:
        table: probability of every text, one axis of size K for each of the L positions. Tokens are 0 to K - 1 and the
            mask is K, so that V = K + 1.
    """

    table: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.table.shape)
        check(len(shape) >= 1 and len(set(shape)) == 1, "table", shape, "axes of one size, one for each position")
        mass = float(self.table.sum())
        good = bool((self.table >= 0).all()) and abs(mass - 1) < 1e-6
        check(good, "table", f"numbers that add up to {mass:g}", "probabilities that add up to 1")

    @property
    def mask_id(self) -> int:
        return self.table.shape[0]

    @property
    def vocabulary(self) -> int:
        return self.table.shape[0] + 1

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @cached_property
    def texts(self) -> Tensor:
        """Every text `[K^L, L]` in lexicographic order, as in `table.flatten()`."""
        return torch.tensor(list(product(range(self.mask_id), repeat=self.table.dim())))

    def encode(self, prompts: Sequence[Prompt], length: int) -> None:
        """Checks the length."""
        check(length == self.table.dim(), "length", length, f"{self.table.dim()}, the positions of the table")

    def predict(self, tokens: Tensor, group: Tensor, encoded: None) -> Tensor:
        """The law of every position given the revealed ones `[N, L, V]`; given nothing where those are impossible."""
        seen = (tokens.unsqueeze(1) == self.texts) | (tokens.unsqueeze(1) == self.mask_id)
        law = self.table.double().flatten()
        weight = seen.all(-1).double() * law
        weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, law)
        which = torch.nn.functional.one_hot(self.texts, self.vocabulary).double()
        return torch.einsum("ns,slv->nlv", weight / weight.sum(1, keepdim=True), which).log()

    def show(self, prompt: Prompt) -> Prompt:
        return prompt

    def decode_text(self, tokens: Sequence[int]) -> str:
        return " ".join(str(token) for token in tokens)
