"""`EndpointProcess`: a model behind an OpenAI-compatible endpoint as a `Process` whose step is a block of tokens.

Letters: `N` rows, `K` candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steer.adapters.language.decoding import Decoding
from steer.adapters.language.packing import pack_texts, unpack_texts
from steer.adapters.openai.connection import EndpointError
from steer.adapters.openai.dialect import Question
from steer.adapters.openai.draw import Drawing, draw_block
from steer.adapters.openai.endpoint import Endpoint
from steer.adapters.openai.state import EndpointContext, EndpointState, samples_of
from steer.core import (
    Ability,
    Cost,
    Edit,
    Mounted,
    Process,
    Prompt,
    PromptEdit,
    Samples,
    Site,
    TransitionEdit,
    UnsupportedError,
    check,
)
from steer.core.rows import beginning
from steer.methods.value import HeadValue

__all__ = ["EndpointProcess"]


@dataclass(frozen=True)
class EndpointProcess(Process):
    """Generation behind an endpoint. A step draws `block` tokens for every row, or whole texts (None).

    Rows without transition edits are drawn by the endpoint: one request for each prompt with as many choices as rows
    that are alike, all requests at once. Later blocks send the text so far back to be continued.

    Rows with transition edits, or all of them where `top_logprobs` is set, are drawn here, a token a request: the
    endpoint names its K likeliest tokens, edits re-weigh them, one is drawn and appended. Rows that are alike share a
    request; each sends prompt and text again, so that prompt tokens are most of the cost. What is approximate about it:

    - The base law is cut to the K likeliest tokens (at most 20, often 5) and normalised over them; `log_prob`,
      `base_log_prob` and `kl` are of these laws. Temperature, truncation and stop strings act here.
    - Tokens are known as text. The endpoint reads the text so far anew, and may read it as other tokens than were
      drawn; tokens that are part of a character cannot be sent back and are left out; tokens of equal text count as
      one.
    - An end is recognised by its name (`end_tokens`), or because the endpoint stopped there. Where the endpoint never
      names it, texts end at its own rate, at temperature 1, whatever edits say, and rows that are alike together.
    """

    endpoint: Endpoint
    decoding: Decoding
    edits: Mounted = ()
    block: int | None = None
    top_logprobs: int | None = None
    """Candidates of every token; None draws here only where edits ask for it."""
    candidates: int = 20
    """K, where `top_logprobs` does not say so."""
    logprobs: bool = False
    """Whether log-probabilities are wanted of texts that the endpoint draws."""
    base: str = "truncated"
    """The base law of samplers that weigh, of tokens that are drawn here: "truncated" or "full", that before truncation
    (see `steer.adapters.transformers.process.TextProcess`).
    """
    proposal: bool = False
    """Whether weights correct for its edits (`as_proposal`)."""

    sites = frozenset({Site.PROMPT, Site.TRANSITION})

    def __post_init__(self) -> None:
        check(
            self.block is None or (isinstance(self.block, int) and self.block >= 1),
            "block",
            self.block,
            "an integer of 1 or more, None for whole texts",
        )
        top = self.top_logprobs
        check(top is None or (isinstance(top, int) and 1 <= top <= 20), "top_logprobs", top, "1 to 20, or None")
        check(self.base in ("truncated", "full"), "base", self.base, "truncated, full")
        whole = self.decoding.temperature in (0, 1) and replace(self.decoding, temperature=1.0).truncates is False
        check(
            whole or not self.logprobs or top is not None,
            "logprobs",
            self.logprobs,
            "False, but at temperature 0 or 1 without truncation: endpoints report log-probabilities of that law",
        )

    @property
    def abilities(self) -> frozenset[Ability]:
        found = {Ability.FORK, Ability.PREVIEW}
        if self.decoding.temperature > 0:
            found.add(Ability.BRANCH)
        everywhere = any(wanted is None for _, wanted in self.transitions)
        if self.logprobs or self.top_logprobs is not None or everywhere:
            found.add(Ability.LOG_PROB)
        return frozenset(found)

    def way_out(self, ability: Ability) -> str:
        ways = {Ability.BRANCH: "use a temperature above 0", Ability.LOG_PROB: "ask for them with logprobs=True"}
        return ways.get(ability, "")

    @property
    def num_steps(self) -> int:
        return 1 if self.block is None else -(-self.decoding.max_new_tokens // self.block)

    @property
    def transitions(self) -> list[tuple[TransitionEdit, frozenset[int] | None]]:
        return [(edit, wanted) for edit, wanted in self.edits if isinstance(edit, TransitionEdit)]

    @property
    def drawing(self) -> Drawing:
        """How its tokens are drawn."""
        return Drawing(
            self.decoding,
            self.transitions,
            self.top_logprobs or self.candidates,
            self.top_logprobs is not None,
            self.logprobs,
            self.proposal and self.base == "truncated" and self.decoding.cuts,
        )

    def room(self, step: int) -> int:
        """Tokens of the block after `step` blocks."""
        size = self.block or self.decoding.max_new_tokens
        return min(size, self.decoding.max_new_tokens - step * size)

    def copy(self, edits: Mounted) -> EndpointProcess:
        return replace(self, edits=edits)

    def heated(self, by: float) -> EndpointProcess:
        return replace(self, decoding=self.decoding.heated(by))

    def as_proposal(self) -> EndpointProcess:
        return replace(self, proposal=True)

    def validate(self, edit: Edit) -> None:
        if isinstance(edit, TransitionEdit):
            reads_states = isinstance(getattr(edit, "value", None), HeadValue)
            if edit.companions or edit.gradient or reads_states:
                raise UnsupportedError(
                    f"{type(edit).__name__} looks at token ids or hidden states, which an endpoint does not show; "
                    "values of texts can guide it (steer.adapters.openai.TextValue)"
                )

    def encode(self, prompts: Sequence[Prompt]) -> list[Question]:
        """What the endpoint is to see of every prompt, after the prompt edits that it asked for."""
        how = self.drawing
        return [
            self.endpoint.dialect.encode(p, continued=self.num_steps > 1 or how.here(b))
            for b, p in enumerate(self.rewritten(prompts))
        ]

    def init(self, prompts: Sequence[Prompt], n: int, generator: torch.Generator) -> EndpointState:
        exact = not any(isinstance(edit, PromptEdit) for edit, _ in self.edits)
        common = beginning(prompts, n, exact=exact)
        rows = len(common["group"])
        return EndpointState(
            **common,
            finished=torch.zeros(rows, dtype=torch.bool),
            texts=("",) * rows,
            questions=tuple(self.encode(prompts)),
        )

    def done(self, state: EndpointState) -> bool:
        return state.step >= self.num_steps or bool(state.finished.all())

    def finished(self, state: EndpointState) -> Tensor:
        return state.finished | (state.step >= self.num_steps)

    def propose(self, state: EndpointState, generator: torch.Generator) -> EndpointState:
        """One block of every unfinished row. Raises `EndpointError` where the endpoint fails for some of them, after
        the others have been drawn; it carries those that are finished.
        """
        noise = torch.rand(len(state), self.room(state.step), dtype=torch.float64, generator=generator)
        after, failed = draw_block(self.endpoint, self.drawing, state, noise)
        if failed:
            raise self._failure(after, failed)
        return after

    def _failure(self, after: EndpointState, failed: dict[int, EndpointError]) -> EndpointError:
        first = next((e for e in failed.values() if e.status is not None), next(iter(failed.values())))
        error = EndpointError(f"{first}; {len(failed)} of {len(after)} texts failed", first.status, first.param)
        kept = [i for i, over in enumerate(self.finished(after).tolist()) if over and i not in failed]
        error.samples = self.decode(after).select(torch.tensor(kept, dtype=torch.long))
        return error

    def context(self, state: EndpointState) -> EndpointContext:
        limit = self.decoding.max_new_tokens
        return EndpointContext(state.step, state.prompts, state.group, state.texts, self.decoding.stop, limit)

    def gather(self, state: EndpointState, index: Tensor) -> EndpointState:
        return state.take(index)

    def stack(self, states: Sequence[EndpointState]) -> EndpointState:
        return EndpointState.join(states)

    def settle(self, state: EndpointState) -> tuple[EndpointState, Cost]:
        return replace(state, cost=Cost()), state.cost

    def identify(self, state: EndpointState) -> list[Any]:
        return list(zip(state.texts, state.finished.tolist(), strict=True))

    def pack(self, state: EndpointState) -> dict[str, Tensor]:
        """Texts are kept as UTF-8, `[N, bytes]` uint8, with their lengths."""
        text, length = pack_texts(state.texts)
        return {**state.pack(), "text": text, "length": length}

    def unpack(self, prompts: Sequence[Prompt], step: int, packed: dict[str, Tensor]) -> EndpointState:
        texts = tuple(unpack_texts(packed["text"], packed["length"]))
        return EndpointState.unpack(packed, step, prompts, texts=texts, questions=tuple(self.encode(prompts)))

    def preview(self, state: EndpointState) -> Samples:
        """The partial texts."""
        return self.decode(state)

    def decode(self, state: EndpointState) -> Samples:
        known = Ability.LOG_PROB in self.abilities
        return replace(
            samples_of(state.prompts, state.group, state.texts),
            log_prob=state.log_prob if known else None,
            base_log_prob=state.base_log_prob if known else None,
            tilt=state.tilt,
            kl_estimate=state.kl,
            cost=state.cost,
        )
