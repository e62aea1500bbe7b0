"""Value-augmented sampling in vLLM: a logits processor for requests that ask for a Q-head, and for no other.

The head reads the final hidden states of the rows that are sampled, which the runner hands over before it samples, so
it costs one small matrix product and the output embeddings of its candidates. vLLM applies processors before the
temperature, and here the tilt acts after it: what is added is multiplied by the temperature. (In the V1 runner they
also come before penalties, which then see tilted logits.)

vLLM imports this module; nothing else does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as ProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as ProcessorV2

from steer.adapters.vllm.plugin.requests import Resolved
from steer.adapters.vllm.plugin.worker import Worker, of_config
from steer.methods.value import HeadValue, QHead, ValueGuidance

__all__ = ["ValueProcessor"]


@dataclass(frozen=True, eq=False)
class _Guided:
    """What one request asks for."""

    heads: tuple[tuple[str, ValueGuidance], ...]
    """Guidances with the digests of their heads."""
    temperature: float
    resolved: Resolved
    drawn: Sequence[int]
    """V1: the tokens that it has drawn, which grow."""


@dataclass(frozen=True, eq=False)
class _Group:
    """Rows `[R]` that share a head, a number of candidates and a tail, with the scale of each row's tilt `[R, 1]` and
    the length at which its text must end `[R]`.
    """

    guidance: ValueGuidance
    rows: Tensor
    scale: Tensor
    ends: Tensor
    every: bool
    """Whether these are all rows, in order."""


class ValueProcessor(ProcessorV1, ProcessorV2):
    """The processor of both model runners: V1 tells it of changes of its batch, V2 of requests in slots."""

    def __init__(self, vllm_config: Any, *args: Any) -> None:
        self._config = vllm_config
        self._worker: Worker | None = None
        self._guided: dict[int, _Guided] = {}
        self._groups: list[_Group] = []
        self._of: tuple[int, ...] = ()
        self._changed = True
        self._embeddings: Tensor | None = None

    def is_argmax_invariant(self) -> bool:
        return False

    # ---- requests

    def _asked(self, params: Any, prompt: Any = None, drawn: Sequence[int] = ()) -> _Guided | None:
        resolved = Resolved.of(params)
        if resolved is None or not resolved.values:
            return None
        self._worker = self._worker or of_config(self._config)
        assert self._worker is not None
        heads = tuple((head.artifact, self._worker.guidance(head, resolved.beta)) for head in resolved.values)
        return _Guided(heads, float(params.temperature) or 1.0, resolved, drawn)

    def update_state(self, batch_update: Any) -> None:
        """V1: rows by their number in the batch."""
        if process_dict_updates(self._guided, batch_update, self._asked):
            self._changed = True

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: requests by their slot."""
        asked = self._asked(sampling_params)
        self._guided.pop(req_idx, None)
        if asked is not None:
            self._guided[req_idx] = asked
        self._changed = True
        return asked is not None

    # ---- steps

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Logits `[N, V]` with those of guided rows tilted, in place."""
        if not self._guided:
            return logits
        slots: Sequence[int] = range(len(logits)) if ctx is None else ctx.expanded_idx_mapping.tolist()
        assert self._worker is not None and self._worker.hidden is not None
        key = tuple(slots)
        if self._changed or key != self._of:
            self._groups, self._of, self._changed = self._grouped(slots, logits.device), key, False
        mixture = self._worker.mixture
        states = self._worker.hidden[:, : self._worker.info.width]  # beside them stand those of tuned models
        # Every guidance of a request chooses its candidates by the law before any of them.
        law = logits if mixture is None else mixture.unmixed(logits)
        seen = self._lengths(slots, logits.device) if ctx is None else ctx.pos + 1
        pushes = [self._push(law, states, seen, group) for group in self._groups]
        for group, (candidates, push) in zip(self._groups, pushes, strict=True):
            _tilt(logits, group, candidates, push)
        return logits

    def _lengths(self, slots: Sequence[int], device: torch.device) -> Tensor:
        """V1: how many tokens of prompt and text each row has read `[N]`; 0 for rows without guidance."""
        asked = [self._guided.get(slot) for slot in slots]
        read = [a.resolved.length + len(a.drawn) if a else 0 for a in asked]
        return torch.tensor(read).to(device, non_blocking=True)

    def _grouped(self, slots: Sequence[int], device: torch.device) -> list[_Group]:
        found: dict[tuple[int, str, int, str], list[tuple[int, float, int, ValueGuidance]]] = {}
        for row, slot in enumerate(slots):
            asked = self._guided.get(slot)
            for order, (digest, g) in enumerate(asked.heads if asked else ()):
                assert asked is not None
                scale = asked.temperature * g.strength / (1.0 if g.beta is None else g.beta)
                found.setdefault((order, digest, g.top_k, g.tail), []).append((row, scale, asked.resolved.ends, g))
        return [
            _Group(
                guidance=members[0][3],
                rows=torch.tensor([row for row, _, _, _ in members], device=device),
                scale=torch.tensor([[scale] for _, scale, _, _ in members], device=device),
                ends=torch.tensor([ends for _, _, ends, _ in members], device=device),
                every=len(members) == len(slots),
            )
            for _, members in sorted(found.items(), key=lambda item: item[0])
        ]

    def _push(self, logits: Tensor, hidden: Tensor, seen: Tensor, group: _Group) -> tuple[Tensor, Tensor]:
        """Candidates of the group's rows `[R, K]` and what is added to their logits; `seen` `[N]` counts the tokens
        that each row has read.
        """
        mine = logits if group.every else logits.index_select(0, group.rows)
        states = hidden if group.every else hidden.index_select(0, group.rows)
        left = group.ends - 1 - (seen if group.every else seen.index_select(0, group.rows))
        guidance, vocabulary = group.guidance, logits.shape[1]
        k = vocabulary if guidance.top_k == 0 else min(guidance.top_k, vocabulary)
        candidates = likeliest(mine, k)
        assert isinstance(guidance.value, HeadValue) and isinstance(guidance.value.head, QHead)
        q = guidance.value.head(states, nn.functional.embedding(candidates, self._embedding()), left)
        return candidates, ((q - q.mean(-1, keepdim=True)) * group.scale).to(logits.dtype)

    def _embedding(self) -> Tensor:
        """The output embedding `[V, D]` of the model itself."""
        if self._embeddings is None:
            assert self._worker is not None
            self._embeddings = output_embedding(self._worker.model)
        return self._embeddings


def likeliest(logits: Tensor, k: int, width: int = 64) -> Tensor:
    """Indices `[N, k]` of the k greatest of each row of logits `[N, V]`. They stand in the k stretches of `width`
    logits with the greatest maxima, and what is after the last whole stretch: so most of a large vocabulary is only
    looked at for its maximum.
    """
    vocabulary = logits.shape[1]
    stretches = vocabulary // width
    if 4 * k > stretches:
        return logits.topk(k, -1).indices
    whole = logits[:, : stretches * width].unflatten(1, (stretches, width))
    first = whole.amax(-1).topk(k, -1, sorted=False).indices
    rest = torch.arange(stretches * width, vocabulary, device=logits.device).expand(len(logits), -1)
    inside = torch.arange(width, device=logits.device)
    places = torch.cat([(first.unsqueeze(-1) * width + inside).flatten(1), rest], 1)
    return places.gather(1, logits.gather(1, places).topk(k, -1).indices)


def _tilt(logits: Tensor, group: _Group, candidates: Tensor, push: Tensor) -> None:
    rows = group.rows.unsqueeze(1)
    tilted = logits[rows, candidates] + push
    if group.guidance.tail == "mask":
        logits.index_fill_(0, group.rows, -torch.inf)
    logits[rows, candidates] = tilted


def output_embedding(model: nn.Module) -> Tensor:
    """The weight of a vLLM model's output head, on one tensor parallel rank."""
    for holder in (model, *(m for m in model.children())):
        head = getattr(holder, "lm_head", None)
        if head is not None and hasattr(head, "weight"):
            return head.weight
    raise AttributeError(f"{type(model).__name__} has no output head to take candidates' embeddings from")
