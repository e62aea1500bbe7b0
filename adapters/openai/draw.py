"""Drawing of a block of tokens behind an endpoint: by the endpoint, or here from its top log-probabilities.

A row's noise alone decides what it draws: its seed at the endpoint comes from the first number, a token that is drawn
here inverts its law at one number each. So what other rows do makes no difference to it.

Letters: `N` rows, `U` rows with different texts, `K` candidates, `T` tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steer.adapters.language.decoding import Decoding
from steer.adapters.openai.connection import Call, EndpointError
from steer.adapters.openai.dialect import Reply, ReplyChoice
from steer.adapters.openai.endpoint import Endpoint
from steer.adapters.openai.state import EndpointContext, EndpointState, cut
from steer.core import Cost, TransitionEdit
from steer.core.context import among
from steer.sampling import laws

__all__ = ["Drawing", "draw_block"]

Shown = tuple[list[int], tuple[tuple[str | None, float], ...]]
"""Rows that are alike, and the candidates of their next token as in `ReplyChoice`."""

_LOOKS = 4
"""Times that an endpoint is asked for a law that it may hide."""


@dataclass(frozen=True)
class Drawing:
    """How the tokens of a run are drawn."""

    decoding: Decoding
    transitions: Sequence[tuple[TransitionEdit, frozenset[int] | None]]
    candidates: int
    """K, as many as are asked for where tokens are drawn here."""
    everywhere: bool
    """Whether all tokens are drawn here, edited or not."""
    logprobs: bool
    """Whether log-probabilities are wanted of texts that the endpoint draws."""
    weighs_truncated: bool
    """Whether edited laws are a proposal for the truncated base law."""

    def here(self, group: int) -> bool:
        """Whether tokens of this prompt are drawn here rather than by the endpoint."""
        return self.everywhere or any(w is None or group in w for _, w in self.transitions)


@dataclass
class _Block:
    """The rows of a state while a block is drawn, and what that adds to their sums `[N]`."""

    endpoint: Endpoint
    how: Drawing
    before: EndpointState
    noise: Tensor
    group: list[int]
    texts: list[str]
    finished: list[bool]
    log_prob: Tensor
    base: Tensor
    kl: Tensor
    cost: Cost = field(default_factory=Cost)
    failed: dict[int, EndpointError] = field(default_factory=dict)
    """Errors of rows that stay behind."""


def draw_block(
    endpoint: Endpoint, how: Drawing, state: EndpointState, noise: Tensor
) -> tuple[EndpointState, dict[int, EndpointError]]:
    """Every unfinished row after one more block, and the errors of those that failed and stay as they were. `noise`
    `[N, T]` is uniform in [0, 1).
    """
    zero = torch.zeros(len(state), dtype=torch.float64)
    block = _Block(
        endpoint,
        how,
        state,
        noise,
        state.group.tolist(),
        list(state.texts),
        state.finished.tolist(),
        zero,
        zero.clone(),
        zero.clone(),
    )
    live = [i for i, over in enumerate(block.finished) if not over]
    _by_endpoint(block, [i for i in live if not how.here(block.group[i])])
    _by_tokens(block, [i for i in live if how.here(block.group[i])])
    after = replace(
        state.add(block.log_prob, block.base, kl=block.kl),
        step=state.step + 1,
        cost=state.cost + block.cost,
        finished=torch.tensor(block.finished, dtype=torch.bool),
        texts=tuple(block.texts),
    )
    return after, block.failed


def _alike(block: _Block, rows: Sequence[int]) -> list[list[int]]:
    """Rows of one prompt and one text so far, together."""
    groups: dict[Any, list[int]] = {}
    for i in rows:
        groups.setdefault((block.group[i], block.texts[i]), []).append(i)
    return list(groups.values())


def _call(
    block: _Block, row: int, tokens: int, top: int | None, at: int = 0, look: int = 0, **fields: Any
) -> tuple[Call, int]:
    """The request for a row's next tokens, and its seed, from the row's number `at`."""
    dialect, question = block.endpoint.dialect, block.before.questions[block.group[row]]
    seed = (int(block.noise[row, at] * 2**31) + 1_000_003 * look) % 2**31
    fields |= dialect.logprobs(question, top)
    return dialect.call(question, block.texts[row], tokens, seed, **fields), seed


def _answers(block: _Block, calls: Sequence[tuple[Call, int]], top: int | None) -> list[Reply | EndpointError]:
    answers, cost = block.endpoint.answers(calls, top)
    block.cost = block.cost + cost
    return answers


def _fail(block: _Block, rows: Sequence[int], answer: Reply | EndpointError, why: str) -> None:
    error = answer if isinstance(answer, EndpointError) else EndpointError(f"endpoint {block.endpoint.url}: {why}")
    block.failed.update(dict.fromkeys(rows, error))


def _append(block: _Block, row: int, text: str) -> bool:
    """Add text to a row, up to a stop string, which may begin in what was there; whether there was one."""
    before, stops = block.texts[row], block.how.decoding.stop
    longest = max(map(len, stops), default=1)
    block.texts[row], stopped = cut(before + text, stops, max(0, len(before) - longest + 1))
    return stopped


# ---------------------------------------------------------------------------------------- whole blocks, by the endpoint


def _by_endpoint(block: _Block, rows: Sequence[int]) -> None:
    decoding, most = block.how.decoding, block.endpoint.dialect.max_choices
    top = 0 if block.how.logprobs else None
    pending = [alike[i : i + most] for alike in _alike(block, rows) for i in range(0, len(alike), most)]
    while pending:
        # Copies of a greedy row are one row.
        sizes = [1 if decoding.greedy else len(alike) for alike in pending]
        calls = [
            _call(block, alike[0], block.noise.shape[1], top, **_sampling(decoding), n=n if n > 1 else None)
            for alike, n in zip(pending, sizes, strict=True)
        ]
        answers = _answers(block, calls, top)
        left = [_take(block, alike, answer) for alike, answer in zip(pending, answers, strict=True)]
        pending = [alike for alike in left if alike]


def _sampling(given: Decoding) -> dict[str, Any]:
    return {
        "temperature": given.temperature,
        "top_p": given.top_p if given.top_p < 1 else None,
        "top_k": given.top_k or None,
        "min_p": given.min_p or None,
        "stop": list(given.stop) or None,
    }


def _take(block: _Block, alike: list[int], answer: Reply | EndpointError) -> list[int]:
    """Give rows that are alike a choice each; returns those that are left over."""
    wanting = block.how.logprobs
    if isinstance(answer, EndpointError) or not answer.choices or (wanting and any(map(_unweighed, answer.choices))):
        _fail(block, alike, answer, "it gave no choices, or none of the logprobs that it was asked for")
        return []
    choices = answer.choices * len(alike) if block.how.decoding.greedy else answer.choices
    for i, choice in zip(alike, choices, strict=False):
        if choice.missing:
            _fail(block, [i], answer, choice.missing)
            continue
        # Half a character at the end of a block would be read as another one; it is drawn again.
        stopped = _append(block, i, choice.text if choice.ended else choice.text.rstrip("\ufffd"))
        block.finished[i] = choice.ended or stopped
        block.log_prob[i] += choice.log_prob or 0.0
        block.base[i] += choice.log_prob or 0.0
    return alike[len(choices) :]  # not every endpoint gives as many choices as it is asked for


def _unweighed(choice: ReplyChoice) -> bool:
    return choice.log_prob is None and bool(choice.text)


# ---------------------------------------------------------------------------------------- a token at a time, here


def _by_tokens(block: _Block, rows: Sequence[int]) -> None:
    for token in range(block.noise.shape[1] if rows else 0):
        live = _alike(block, [i for i in rows if not block.finished[i] and i not in block.failed])
        if not live:
            break
        shown = _laws(block, live, token)
        if shown:
            _draw(block, shown, token)


def _laws(block: _Block, live: Sequence[list[int]], token: int) -> list[Shown]:
    """The law of the next token of rows that are alike, as far as the endpoint names it.

    Some endpoints show nothing where they drew the end themselves. Asked again, they show the law: where it names the
    end, that is drawn here like any other token; where it does not, the text has ended.
    """
    shown: list[Shown] = []
    for look in range(_LOOKS):
        again = []
        for alike, choice in zip(live, _looked(block, live, token, look), strict=True):
            hidden = choice is not None and choice.ended and not choice.text
            if choice is None or choice.candidates is None:
                continue
            if choice.candidates and (look == 0 or any(text is None for text, _ in choice.candidates)):
                shown.append((alike, choice.candidates))
            elif hidden and not choice.candidates and look + 1 < _LOOKS:
                again.append(alike)
            else:
                for i in alike:
                    block.finished[i] = True
        live = again
        if not live:
            break
    return shown


def _looked(block: _Block, live: Sequence[list[int]], token: int, look: int) -> list[ReplyChoice | None]:
    """One choice of a single token for rows that are alike, None where it failed."""
    top = block.how.candidates
    # The law is wanted, whatever is drawn: temperature and truncation act here.
    calls = [_call(block, alike[0], 1, top, token, look, temperature=1.0) for alike in live]
    found: list[ReplyChoice | None] = []
    for alike, answer in zip(live, _answers(block, calls, top), strict=True):
        choice = answer.choices[0] if isinstance(answer, Reply) and answer.choices else None
        if choice is not None and choice.missing:
            _fail(block, alike, answer, choice.missing)
            choice = None
        elif choice is None or choice.candidates is None:
            _fail(block, alike, answer, "it names no likely tokens (top_logprobs), which texts drawn here need")
        found.append(choice)
    return found


def _draw(block: _Block, shown: Sequence[Shown], number: int) -> None:
    decoding = block.how.decoding
    width = max(len(candidates) for _, candidates in shown)
    padded = [[x for _, x in row] + [-torch.inf] * (width - len(row)) for _, row in shown]
    base = decoding.tempered(torch.tensor(padded, dtype=torch.float64))
    law = _guided(block, base, [rows[0] for rows, _ in shown], [tuple(t for t, _ in row) for _, row in shown])
    if block.how.weighs_truncated:
        base, law = laws.proposal(base, law, decoding.truncated)
    else:
        law = decoding.truncated(law)
    gap = laws.divergence(law, base)
    for u, (rows, candidates) in enumerate(shown):
        uniform = block.noise[list(rows), number].unsqueeze(0)
        greedy = [int(law[u].argmax())] * len(rows)
        columns = greedy if decoding.greedy else laws.draw(law[u : u + 1], uniform)[0].tolist()
        for i, k in zip(rows, columns, strict=True):
            block.log_prob[i] += law[u, k]
            block.base[i] += base[u, k]
            block.kl[i] += gap[u]
            token = candidates[k][0]
            block.finished[i] = token is None or _append(block, i, token)


def _guided(block: _Block, base: Tensor, rows: Sequence[int], tokens: Sequence[tuple[str | None, ...]]) -> Tensor:
    """The log-laws `[U, K]` after every edit, each on the rows that asked for it."""
    law, touched = base.clone(), torch.zeros(len(rows), dtype=torch.bool)
    group = torch.tensor([block.group[i] for i in rows])
    for edit, wanted in block.how.transitions:
        mine = torch.ones_like(touched) if wanted is None else among(group, wanted)
        asking = mine.nonzero().squeeze(1).tolist()
        if not asking:
            continue
        context = EndpointContext(
            step=block.before.step,
            prompts=block.before.prompts,
            group=group[mine],
            texts=tuple(block.texts[rows[u]] for u in asking),
            stop=block.how.decoding.stop,
            limit=block.how.decoding.max_new_tokens,
            law=base[mine],
            tokens=tuple(tokens[u] for u in asking),
        )
        law[mine] = edit.shift(law[mine], context)
        touched |= mine
        block.cost = block.cost + Cost(reward_calls=sum(context.scored))
    return torch.where(touched.unsqueeze(1), torch.log_softmax(law, -1), base)
