"""How a block of tokens is drawn behind an endpoint: by the endpoint, or here from its top log-probabilities.

A row's noise alone decides what it draws: its seed at the endpoint comes from the first number, a token that is drawn
here inverts its law at one number each. So what other rows do makes no difference to it.

Letters: `N` rows, `U` rows with different texts, `K` candidates, `T` tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer.adapters.openai.connection import Call, EndpointError
from steer.adapters.openai.dialect import Answer, Choice
from steer.adapters.openai.results import Results
from steer.adapters.openai.state import EndpointContext, EndpointState
from steer.core import Cost
from steer.sampling.laws import divergence

if TYPE_CHECKING:
    from steer.adapters.openai.process import EndpointProcess

__all__ = ["draw_block"]


Law = tuple[list[int], tuple[tuple[str | None, float], ...]]
"""Rows that are alike, and the candidates of their next token as in `Choice`."""

_LOOKS = 4
"""Times that an endpoint is asked for a law that it may hide."""


def draw_block(process: EndpointProcess, state: EndpointState, noise: Tensor) -> EndpointState:
    """Every unfinished row after one more block. `noise` `[N, T]` is uniform in [0, 1). Raises `EndpointError` with the
    finished rows where some failed.
    """
    block = _Block(process, state, noise)
    here = [process.drawn_here(b) for b in range(len(state.questions))]
    live = [i for i, over in enumerate(block.finished) if not over]
    groups = state.group.tolist()
    block.by_endpoint([i for i in live if not here[groups[i]]])
    block.by_tokens([i for i in live if here[groups[i]]])
    return block.state()


class _Block:
    """The rows of one state while a block is drawn; `failed` holds the errors of those that stay behind."""

    def __init__(self, process: EndpointProcess, state: EndpointState, noise: Tensor) -> None:
        self.process, self.before, self.noise = process, state, noise
        self.group = state.group.tolist()
        self.texts, self.finished = list(state.texts), state.finished.tolist()
        self.log_prob = state.log_prob.clone()
        self.base = None if state.base_log_prob is None else state.base_log_prob.clone()
        self.kl = None if state.kl is None else state.kl.clone()
        self.cost = state.cost
        self.failed: dict[int, EndpointError] = {}

    def state(self) -> EndpointState:
        before = self.before
        after = replace(
            before, step=before.step + 1, log_prob=self.log_prob, base_log_prob=self.base, kl=self.kl, cost=self.cost,
            finished=torch.tensor(self.finished, dtype=torch.bool), texts=tuple(self.texts),
        )  # fmt: skip
        if not self.failed:
            return after
        first = next((e for e in self.failed.values() if e.status is not None), next(iter(self.failed.values())))
        error = EndpointError(f"{first}; {len(self.failed)} of {len(after)} texts failed", first.status, first.param)
        over = self.process.finished(after).tolist()
        kept = [i for i, done in enumerate(over) if done and i not in self.failed]
        error.samples = self.process.decode(after).select(torch.tensor(kept, dtype=torch.long))
        raise error

    def _alike(self, rows: Sequence[int]) -> list[list[int]]:
        """Rows of one prompt and one text so far, together."""
        groups: dict[Any, list[int]] = {}
        for i in rows:
            groups.setdefault((self.group[i], self.texts[i]), []).append(i)
        return list(groups.values())

    def _seed(self, row: int, token: int = 0, look: int = 0) -> int:
        return (int(self.noise[row, token] * 2**31) + 1_000_003 * look) % 2**31

    def _call(self, row: int, seed: int, tokens: int, top: int | None, **fields: Any) -> tuple[Call, int]:
        dialect, question = self.process.model.dialect, self.before.questions[self.group[row]]
        fields |= dialect.logprobs(question, top)
        return dialect.call(question, self.texts[row], tokens, seed, **fields), seed

    def _asked(self, calls: Sequence[tuple[Call, int]], top: int | None) -> list[Answer | EndpointError]:
        """Answers, from the file of results where they are there. Adds up what was paid."""
        answers = []
        for said, paid in ask(self.process, calls):
            try:
                answer = said if isinstance(said, EndpointError) else self.process.model.dialect.answer(said, top)
            except EndpointError as error:
                answer = error
            if paid and isinstance(answer, Answer):
                self.cost = self.cost + answer.cost
            answers.append(answer)
        return answers

    # ---- whole blocks, by the endpoint

    def by_endpoint(self, rows: Sequence[int]) -> None:
        process, decoding = self.process, self.process.decoding
        most = process.model.dialect.max_choices
        top = 0 if process.logprobs else None
        pending = [alike[i : i + most] for alike in self._alike(rows) for i in range(0, len(alike), most)]
        while pending:
            # Copies of a greedy row are one row.
            sizes = [1 if decoding.greedy else len(alike) for alike in pending]
            size = process.room(self.before.step)
            calls = [
                self._call(alike[0], self._seed(alike[0]), size, top, **self._sampling(), n=n if n > 1 else None)
                for alike, n in zip(pending, sizes, strict=True)
            ]
            left = []
            for alike, answer in zip(pending, self._asked(calls, top), strict=True):
                if isinstance(answer, Answer) and answer.choices and not self._lacks_log_prob(answer):
                    choices = answer.choices * len(alike) if decoding.greedy else answer.choices
                    for i, choice in zip(alike, choices, strict=False):
                        self._take(i, choice)
                    left.append(alike[len(choices) :])  # not every endpoint gives as many choices as it is asked for
                else:
                    self._fail(alike, answer, "it gave no choices, or none of the logprobs that it was asked for")
            pending = [alike for alike in left if alike]

    def _lacks_log_prob(self, answer: Answer) -> bool:
        return self.process.logprobs and any(c.log_prob is None and c.text for c in answer.choices)

    def _sampling(self) -> dict[str, Any]:
        given = self.process.decoding
        return {
            "temperature": given.temperature,
            "top_p": given.top_p if given.top_p < 1 else None,
            "top_k": given.top_k or None,
            "min_p": given.min_p or None,
            "stop": list(given.stop) or None,
        }

    def _take(self, row: int, choice: Choice) -> None:
        before = self.texts[row]
        # Half a character at the end of a block would be read as another one; it is drawn again.
        text = before + (choice.text if choice.ended else choice.text.rstrip("\ufffd"))
        longest = max(map(len, self.process.decoding.stop), default=1)
        self.texts[row], stopped = self.process.cut(text, max(0, len(before) - longest + 1))
        self.finished[row] = choice.ended or stopped
        self.log_prob[row] += choice.log_prob or 0.0
        if self.base is not None:
            self.base[row] += choice.log_prob or 0.0

    def _fail(self, rows: Sequence[int], answer: Answer | EndpointError, why: str) -> None:
        error = (
            answer if isinstance(answer, EndpointError) else EndpointError(f"endpoint {self.process.model.url}: {why}")
        )
        self.failed.update(dict.fromkeys(rows, error))

    # ---- a token at a time, here

    def by_tokens(self, rows: Sequence[int]) -> None:
        for token in range(self.noise.shape[1] if rows else 0):
            live = self._alike([i for i in rows if not self.finished[i] and i not in self.failed])
            if not live:
                break
            laws = self._laws(live, token)
            if laws:
                self._draw(laws, token)

    def _laws(self, live: Sequence[list[int]], token: int) -> list[Law]:
        """The law of the next token of rows that are alike, as far as the endpoint names it.

        Some endpoints show nothing where they drew the end themselves. Asked again, they show the law: where it names
        the end, that is drawn here like any other token; where it does not, the text has ended.
        """
        shown: list[Law] = []
        for look in range(_LOOKS):
            again = []
            for alike, choice in zip(live, self._looked(live, token, look), strict=True):
                hidden = choice is not None and choice.ended and not choice.text
                if choice is None or choice.candidates is None:
                    continue
                if choice.candidates and (look == 0 or any(text is None for text, _ in choice.candidates)):
                    shown.append((alike, choice.candidates))
                elif hidden and not choice.candidates and look + 1 < _LOOKS:
                    again.append(alike)
                else:
                    self._end(alike)
            live = again
            if not live:
                break
        return shown

    def _looked(self, live: Sequence[list[int]], token: int, look: int) -> list[Choice | None]:
        """One choice of a single token for rows that are alike, None where it failed."""
        top = self.process.candidates
        # The law is wanted, whatever is drawn: temperature and truncation act here.
        calls = [self._call(alike[0], self._seed(alike[0], token, look), 1, top, temperature=1.0) for alike in live]
        found: list[Choice | None] = []
        for alike, answer in zip(live, self._asked(calls, top), strict=True):
            choice = answer.choices[0] if isinstance(answer, Answer) and answer.choices else None
            if choice is None or choice.candidates is None:
                self._fail(alike, answer, "it names no likely tokens (top_logprobs), which texts drawn here need")
            found.append(choice)
        return found

    def _end(self, rows: Sequence[int]) -> None:
        for i in rows:
            self.finished[i] = True

    def _draw(self, laws: Sequence[Law], number: int) -> None:
        decoding = self.process.decoding
        width = max(len(candidates) for _, candidates in laws)
        padded = [[x for _, x in row] + [-torch.inf] * (width - len(row)) for _, row in laws]
        base = decoding.tempered(torch.tensor(padded, dtype=torch.float64))
        law = self._guided(base, [rows[0] for rows, _ in laws], [tuple(t for t, _ in row) for _, row in laws])
        law = decoding.truncated(law)
        gap = divergence(law, base)
        for u, (rows, candidates) in enumerate(laws):
            uniform = self.noise[list(rows), number]
            columns = [int(law[u].argmax())] * len(rows) if decoding.greedy else _invert(law[u], uniform)
            for i, k in zip(rows, columns, strict=True):
                self.log_prob[i] += law[u, k]
                if self.base is not None and self.kl is not None:
                    self.base[i] += base[u, k]
                    self.kl[i] += gap[u]
                self._append(i, candidates[k][0])

    def _guided(self, base: Tensor, rows: Sequence[int], tokens: Sequence[tuple[str | None, ...]]) -> Tensor:
        """The log-laws `[U, K]` after every edit, each on the rows that asked for it."""
        law, touched = base.clone(), torch.zeros(len(rows), dtype=torch.bool)
        for edit, wanted in self.process.transitions:
            mine = [u for u, i in enumerate(rows) if wanted is None or self.group[i] in wanted]
            if not mine:
                continue
            context = EndpointContext(
                step=self.before.step,
                process=self.process,
                prompts=self.before.prompts,
                group=torch.tensor([self.group[rows[u]] for u in mine]),
                texts=tuple(self.texts[rows[u]] for u in mine),
                law=base[mine],
                tokens=tuple(tokens[u] for u in mine),
            )
            law[mine] = edit.shift(law[mine], context)
            touched[mine] = True
            self.cost = self.cost + Cost(reward_calls=sum(context.scored))
        return torch.where(touched.unsqueeze(1), torch.log_softmax(law, -1), base)

    def _append(self, row: int, token: str | None) -> None:
        if token is None:
            self.finished[row] = True
            return
        before = self.texts[row]
        longest = max(map(len, self.process.decoding.stop), default=1)
        self.texts[row], self.finished[row] = self.process.cut(before + token, max(0, len(before) - longest + 1))


def _invert(law: Tensor, uniform: Tensor) -> list[int]:
    """Columns at which the CDF of a log-law `[K]` passes each of `uniform` `[N]`."""
    cdf = law.exp().cumsum(0)
    columns = torch.searchsorted(cdf, uniform * cdf[-1], right=True)
    last = int(torch.searchsorted(cdf, cdf[-1:], right=False))
    return columns.clamp(max=last).tolist()


def ask(process: EndpointProcess, calls: Sequence[tuple[Call, int]]) -> list[tuple[Any, bool]]:
    """The answer to every call with its seed, or its `EndpointError`, and whether it was paid for now."""
    connection, results = process.model.connection, process.results
    if results is None:
        return [(answer, True) for answer in connection.post_all([call for call, _ in calls])]
    keys = [Results.key(connection.url, call.path, call.body, seed) for call, seed in calls]
    found = [results.find(key) for key in keys]
    missing = [i for i, answer in enumerate(found) if answer is None]

    def keep(i: int, answer: Any) -> None:
        if isinstance(answer, dict) and answer.get("choices"):
            results.keep(keys[missing[i]], {name: answer.get(name) for name in ("choices", "usage")})

    fresh = dict(zip(missing, connection.post_all([calls[i][0] for i in missing], keep), strict=True))
    return [(fresh.get(i, answer), i in fresh) for i, answer in enumerate(found)]
