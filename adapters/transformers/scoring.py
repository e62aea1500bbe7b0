"""Finished texts read again: their log-probabilities, and how far an edited law is from the base along them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from steer.adapters.language.decoding import Decoding
from steer.adapters.transformers import tracking
from steer.adapters.transformers.body import Body
from steer.adapters.transformers.hidden import HiddenProgram
from steer.adapters.transformers.processing import Processing
from steer.core import HiddenEdit, Mounted, Prompt, TransitionEdit
from steer.sampling import laws

_LOGITS = 24_000_000
"""Numbers in one batch of logits, about."""


class Scored(Protocol):
    """What reading a finished text again needs of a process."""

    @property
    def body(self) -> Body: ...

    @property
    def decoding(self) -> Decoding: ...

    @property
    def edits(self) -> Mounted: ...

    def mounted(self, kind: type) -> list[Any]: ...

    def copy(self, edits: Mounted) -> Scored: ...

    def unedited(self) -> Any: ...

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]: ...


@torch.inference_mode()
def sequence_logits(
    process: Scored, ids: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Yields `(rows, logits [n, T, V], targets [n, T], real [n, T])` in batches of similar length: the logits from
    which each row's `tokens` follow its prompt `ids`, under the process's hidden edits and after its logits processors.
    """
    body = process.body
    for rows in _batches(ids, tokens, _LOGITS // body.vocabulary):
        width = max(len(tokens[i]) for i in rows)
        target = torch.tensor([[*tokens[i], *[0] * (width - len(tokens[i]))] for i in rows], device=body.device)
        real = torch.tensor([[j < len(tokens[i]) for j in range(width)] for i in rows], device=body.device)
        edits = _by_row(process.mounted(HiddenEdit), rows)
        track, _ = tracking.start(body, [ids[i] for i in rows], edits, 1, hidden=False, new=width)
        logits = tracking.continuation_logits(track, target)
        yield rows, processed(process, [ids[i] for i in rows], logits, target), target, real


@torch.inference_mode()
def prompt_logits(body: Body, ids: Sequence[int], edits: Sequence[HiddenEdit]) -> Tensor:
    """Logits `[T, V]` after each token of a prompt `ids`, under hidden edits that read nothing of it."""
    tokens = torch.tensor([list(ids)], device=body.device)
    position = torch.arange(len(ids), device=body.device).unsqueeze(0)
    mounted = [(edit, None) for edit in edits]
    plan = HiddenProgram.compile(mounted, body.info, [ids], [None] * len(edits)) if edits else None
    program = plan.prompt(position.cpu()) if plan else {}
    return body.forward(tokens, None, position, body.new_cache(), program, keep=0)[0][0]


def processed(process: Scored, ids: Sequence[Sequence[int]], logits: Tensor, target: Tensor) -> Tensor:
    """Logits `[n, T, V]` of every step of texts `target` `[n, T]` after prompts `ids`, processed as they were when the
    texts were drawn.
    """
    processing = Processing.of(process.decoding, ids, False, logits.device)
    if not processing:
        return logits
    real, group = torch.ones_like(target, dtype=torch.bool), torch.arange(len(ids))
    steps = [
        processing(logits[:, t], processing.padded, target[:, :t], real[:, :t], group) for t in range(target.shape[1])
    ]
    return torch.stack(steps, 1)


def _batches(ids: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]], budget: int) -> Iterator[list[int]]:
    """Numbers of the rows that have tokens, in batches of similar length of up to `budget` tokens, or of one row."""
    order = sorted(range(len(ids)), key=lambda i: (len(tokens[i]), len(ids[i])))
    order = [i for i in order if tokens[i]]
    at = 0
    while at < len(order):
        longest, stop = len(tokens[order[at]]), at
        while stop < len(order) and (stop - at + 1) * len(tokens[order[stop]]) <= max(budget, longest):
            stop += 1
        rows = order[at : max(stop, at + 1)]
        at += len(rows)
        yield rows


def log_likelihood(
    process: Scored, prompts: Sequence[Prompt], group: Tensor, tokens: Sequence[Sequence[int]]
) -> Tensor:
    """Summed log-probability `[N]` of each row's `tokens` after its prompt, under the process's hidden and prompt
    edits, after its processors and temperature.
    """
    owner, ids = group.tolist(), process.encode(prompts)
    mine = process.copy(_by_row(process.edits, owner))
    return likelihoods(mine, [ids[b] for b in owner], tokens)[0]


@torch.inference_mode()
def likelihoods(
    process: Scored, ids: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Summed log-probability `[N]` of each row's `tokens` after its prompt `ids`, and whether every token is the
    likeliest at its place `[N]` bool, under the process's hidden edits, numbered by row.
    """
    total = torch.zeros(len(tokens), dtype=torch.float64)
    greedy = torch.ones(len(tokens), dtype=torch.bool)
    for rows, logits, target, real in sequence_logits(process, ids, tokens):
        taken = process.decoding.tempered(logits).gather(2, target.unsqueeze(2)).squeeze(2)
        total[rows] = torch.where(real, taken, 0.0).sum(1).double().cpu()
        greedy[rows] = ((logits.argmax(2) == target) | ~real).all(1).cpu()
    return total, greedy


def divergence(
    process: Scored,
    prompts: Sequence[Prompt],
    group: Tensor,
    tokens: Sequence[Sequence[int]],
    log_prob: Tensor,
) -> Tensor:
    """KL of the edited law to the base along each text `[N]`: the exact KL of every step's law, after processors,
    temperature and truncation, from that of the base after processors and temperature, summed over the tokens that were
    drawn. Two passes over the finished text, for edits of prompts and hidden states. Where transition edits act as
    well, the one-sample estimate `log q(y) - log p(y)` of each text instead, with log q as it was recorded while
    sampling: unbiased, noisier, and negative for some texts.
    """
    if not steps_are_exact(process):
        return log_prob - process.unedited().log_likelihood(prompts, group, tokens)
    total = torch.zeros(len(group), dtype=torch.float64)
    for i, steps in divergence_of_steps(process, prompts, group, tokens):
        total[i] = steps.sum()
    return total


def steps_are_exact(process: Scored) -> bool:
    """Whether the law of every step can be read again from a finished text."""
    return not process.mounted(TransitionEdit)


def token_divergences(
    process: Scored, prompts: Sequence[Prompt], group: Tensor, tokens: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Exact KL of the edited law to the base at each token, `[T]` for each row; see `divergence`."""
    found = [torch.zeros(0, dtype=torch.float64) for _ in tokens]
    for i, steps in divergence_of_steps(process, prompts, group, tokens):
        found[i] = steps
    return found


@torch.inference_mode()
def divergence_of_steps(
    process: Scored, prompts: Sequence[Prompt], group: Tensor, tokens: Sequence[Sequence[int]]
) -> Iterator[tuple[int, Tensor]]:
    """Yields `(row, KL of each of its steps [T])` of rows that have tokens, in no order."""
    owner, base = group.tolist(), process.unedited()
    mine = process.copy(_by_row(process.edits, owner))
    edited_ids, base_ids = process.encode(prompts), base.encode(prompts)
    edited_rows = sequence_logits(mine, [edited_ids[b] for b in owner], tokens)
    for rows, logits, target, real in edited_rows:
        law = process.decoding.truncated(process.decoding.tempered(logits))
        prompts_of = [base_ids[owner[i]] for i in rows]
        track, _ = tracking.start(process.body, prompts_of, (), 1, hidden=False, new=target.shape[1])
        reference = process.decoding.tempered(
            processed(process, prompts_of, tracking.continuation_logits(track, target), target)
        )
        steps = torch.where(real, laws.divergence(law, reference), 0.0).double().cpu()
        yield from ((i, row[: len(tokens[i])].clone()) for i, row in zip(rows, steps, strict=True))


def _by_row(edits: Iterable[tuple[Any, frozenset[int] | None]], owner: Sequence[int]) -> tuple[Any, ...]:
    """Edits numbered by prompt, numbered by row instead."""
    return tuple(
        (edit, None if wanted is None else frozenset(i for i, b in enumerate(owner) if b in wanted))
        for edit, wanted in edits
    )
