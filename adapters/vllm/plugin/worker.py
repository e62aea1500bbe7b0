"""One worker's side: which row every token of a step gets, and what gates and controllers read.

A `Worker` belongs to one model on one rank. Before each pass the runner says which requests are in the batch, where
each one's tokens begin and how many there are; everything is decided by absolute position against the request's own
prompt, so chunks, cached prefixes, preemption and resumption need no case of their own. While nothing changes but the
positions, a step costs a few comparisons of arrays.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn

from steer.adapters.language.blocks import blocks_of
from steer.adapters.vllm.artifacts import PackedArtifact
from steer.adapters.vllm.plugin.blocks import BlockSteering, Host, Live, eager_hook, graph_hook, measuring_hook
from steer.adapters.vllm.plugin.compiled import NEVER, Compiled, Spans, SteeringRow
from steer.adapters.vllm.plugin.mixture import Mixture
from steer.adapters.vllm.plugin.reading import Readers
from steer.adapters.vllm.plugin.requests import Resolved, ResolvedEdit, SteeredRequest
from steer.adapters.vllm.plugin.slots import RowBank
from steer.adapters.vllm.settings import Settings, model_info
from steer.core import HiddenEdit, ModelInfo, SteerError
from steer.methods.value import ValueGuidance
from steer.serving.idle import give_back_memory

__all__ = ["Worker", "of_config"]


Params = Callable[[str], tuple[Any, int]]
"""Sampling parameters and prompt length of a request by its id."""
Tokens = Callable[[], Sequence[int]]
"""Token ids of a pass, one request after another."""

_WORKERS: list[ref[Worker]] = []
"""Workers that are alive; each is kept by its model."""


def of_config(config: Any) -> Worker | None:
    """The worker that was armed under this `VllmConfig`."""
    alive = (held() for held in reversed(_WORKERS))
    return next((worker for worker in alive if worker is not None and worker.config is config), None)


class Worker:
    """Steering of one model on one rank; `step` fills the buffers for a pass."""

    def __init__(self, model: nn.Module, config: Any, settings: Settings, mixture: Mixture | None = None) -> None:
        self.config, self.settings, self.model, self.mixture = config, settings, model, mixture
        self.info: ModelInfo = model_info(config, "", None)
        self.artifacts: dict[str, PackedArtifact] = {}
        self._holders: dict[str, set[str]] = {}
        self._norms: list[float] | None = None
        self.requests: dict[str, SteeredRequest] = {}
        self.live = Live(self.info.num_layers)
        self.hidden: Tensor | None = None
        """Final hidden states of the rows that are sampled in this step `[N, D]`."""
        self.entered: dict[str, tuple[Any, int]] = {}
        """Sampling parameters and prompt lengths, where the runner keeps none."""
        self.dropped: list[tuple[int, int, SteeredRequest]] = []
        """Requests whose sample is dropped in this step: number, end, request."""
        self._compiled: dict[str, Compiled] = {}
        self._reads: list[tuple[SteeredRequest, int]] = []
        self._decided: OrderedDict[str, list[list[float] | None]] = OrderedDict()
        self._undo: list[Callable[[], None]] = []
        self._arm()
        self.readers = Readers(self._slot.device)
        self._forget_batch()
        _WORKERS[:] = [*(held for held in _WORKERS if held() is not None), ref(self)]

    # ---- arming

    def _arm(self) -> None:
        scheduler = self.config.scheduler_config
        tokens = max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs) + 1024  # captured sizes are padded
        blocks = self._stack = blocks_of(self.model, self.config.model_config.hf_text_config)
        first = next(p for block in blocks.values() for p in block.parameters())
        like = torch.empty(0, dtype=self.config.model_config.dtype, device=first.device)
        graphs, reads = self.settings.graphs, set(self.settings.reads)
        self._slot = like.new_zeros(tokens, dtype=torch.long)
        self._stage_slot = like.new_zeros(tokens, dtype=torch.long)
        self._rows = like.new_zeros(scheduler.max_num_seqs, dtype=torch.long)
        self._slot_host, self._stage_host = Host(self._slot), Host(self._stage_slot)
        self.blocks: dict[int, BlockSteering] = {}
        for layer, block in blocks.items():
            if not graphs:
                block.register_forward_hook(eager_hook(layer, self.live))
            elif layer in self.settings.layers or layer in reads:
                block.register_forward_hook(graph_hook)
            else:
                continue
            own = BlockSteering(
                self.info.width,
                self.settings.slots + 1,
                self.settings.stages if graphs else 0,
                self._slot,
                self._stage_slot,
                self._rows if graphs and layer in reads else None,
                like,
            )
            block.steering = own
            self.blocks[layer] = own
        self.slots = RowBank(self.blocks, self.info.num_layers, self.settings.stages, self.settings.slots, not graphs)

    # ---- what the front end calls, by name, on every worker

    def register(self, digest: str, data: bytes, any_model: bool, holder: str) -> None:
        """Keep an artifact for a front end until it evicts it."""
        artifact = PackedArtifact.parse(data)
        self.artifacts[digest] = artifact.for_any_model() if any_model else artifact
        self._holders.setdefault(digest, set()).add(holder)

    def evict(self, gone: Sequence[str], holder: str) -> None:
        """Drop what no other front end holds."""
        for digest in gone:
            holders = self._holders.get(digest, set())
            holders.discard(holder)
            if not holders:
                self.artifacts.pop(digest, None)
                self._holders.pop(digest, None)
        self._compiled.clear()

    def facts(self) -> dict[str, Any]:
        """This rank's part of the sample of the embedding that makes the model's fingerprint, and the norms of the
        residual stream where they are known.
        """
        return {**embedding_sample(self.model, self.config), "norms": self._norms}

    def introduce(self, fingerprint: str, norms: Sequence[float] | None) -> None:
        """Facts about the whole model that the front end has put together."""
        self._norms = None if norms is None else list(norms)
        known = None if norms is None else torch.tensor(list(norms))
        self.info = model_info(self.config, fingerprint, known)
        self._compiled.clear()

    def measure(self, on: bool) -> dict[int, list[float]]:
        """Begin to measure norms, or end and return them, by block."""
        if on:
            self.live.measured = {}
            self._undo = _uncompiled(self.model, self._stack, self.live) if self.settings.graphs else []
            return {}
        for undo in self._undo:
            undo()
        measured, self.live.measured, self.live.measuring = self.live.measured or {}, None, None
        self._forget_batch()
        return {layer: torch.cat(parts).tolist() for layer, parts in measured.items()}

    def weights(self, tags: Sequence[str]) -> list[list[list[float] | None] | None]:
        """What the edits of tagged requests decided when they read their prompts; each can be asked for once."""
        return [self._decided.pop(tag, None) for tag in tags]

    def learn(self, digest: str, data: bytes) -> None:
        """Keep what requests may read."""
        self.readers.learn(digest, data)

    def readings(self, tags: Sequence[str]) -> list[tuple[list[int], list[list[float]]] | None]:
        """Positions and readings of tagged requests; each can be asked for once."""
        told = self.readers.tell(tags)
        self.live.taps = {}
        return told

    def give_back_memory(self) -> None:
        """Return to the system what finished requests have freed."""
        give_back_memory()

    # ---- requests

    def guidance(self, head: ResolvedEdit, beta: float) -> ValueGuidance:
        """A value head with the settings that a request gave it."""
        made = self._artifact(head.artifact).edit(self.info, head.options, self._slot.device)
        assert isinstance(made, ValueGuidance)
        return made.with_beta(beta)

    def _artifact(self, digest: str) -> PackedArtifact:
        if digest not in self.artifacts:
            raise SteerError(f"artifact {digest} is not registered with this worker")
        return self.artifacts[digest]

    def _request(self, request_id: str, params_of: Params) -> SteeredRequest | None:
        params, prompt = params_of(request_id)
        known = self.requests.get(request_id)
        if known is not None and known.params is params:
            return known
        resolved = Resolved.of(params)
        if resolved is None or not (resolved.hidden or resolved.measure or resolved.read):
            return None
        edits = resolved.hidden
        made = SteeredRequest(
            id=request_id,
            prompt=resolved.prompt or prompt,
            edits=[self._compile(edit) for edit in edits],
            keys=[edit.key for edit in edits],
            spans=Spans.of(edit.stretches for edit in edits),
            weights=[None if edit.weights is None else torch.tensor(edit.weights) for edit in edits],
            reading=resolved.reads,
            first=resolved.rewind,
            measure=resolved.measure,
            tag=resolved.tag,
            params=params,
            length=resolved.length,
            read=resolved.read,
            asked=edits,
        )
        if known is not None:  # the same request, come back with a copy of its parameters
            made.come_back(known)
        self.requests[request_id] = made
        return made

    def _compile(self, asked: ResolvedEdit) -> Compiled:
        key = asked.key.partition("@")[0]
        if key not in self._compiled:
            edit = self._artifact(asked.artifact).edit(self.info, asked.options)
            assert isinstance(edit, HiddenEdit)
            if len(self._compiled) > 4096:
                self._compiled.clear()
            self._compiled[key] = Compiled.of(edit, self.info)
        return self._compiled[key]

    def finish(self, ids: Iterable[str]) -> None:
        """Drop what belongs to requests that have ended. Rows that others may use stay until the room is needed."""
        for request_id in ids:
            self.entered.pop(request_id, None)
            ended = self.requests.pop(request_id, None)
            if ended is not None:
                self.slots.forget(ended.own_keys())
        if self.mixture is not None:
            self.mixture.finish(ids)

    # ---- steps

    def _forget_batch(self) -> None:
        self._ids: list[str] = []
        self._batch: list[tuple[int, SteeredRequest]] = []
        self._watching: list[tuple[int, SteeredRequest]] = []
        self._marked: list[tuple[int, SteeredRequest]] = []
        self._current = self._since = self._until = np.zeros(0, dtype=np.int64)
        self._counts = np.zeros(0, dtype=np.int64)
        self._stale = True

    def step(
        self,
        ids: Sequence[str],
        starts: np.ndarray,
        counts: np.ndarray,
        params_of: Params,
        tokens: Tokens | None = None,
    ) -> list[int]:
        """Fill the buffers for a pass: request `ids[i]` has `counts[i]` tokens from position `starts[i]` on; `tokens`
        gives those of the whole pass, and is called only where an edit goes by them. Returns the requests, by number,
        whose sample must be dropped because they read their prompt in this pass.
        """
        self._settle()
        if self.mixture is not None:
            self.mixture.step(ids, counts, params_of)
        n = len(ids)
        if not self._stale and len(self._ids) == n and self._ids == ids:
            if not self._batch:
                return []
            moved = bool(self._marked) and self._read_marks(starts, counts, tokens)
            if not moved and bool((starts >= self._since).all()) and bool((starts + counts <= self._until).all()):
                if not np.array_equal(counts, self._counts):
                    self._fill(counts)
                self._watch(starts, counts)
                return []
        dropped = self._rebuild(list(ids), starts.astype(np.int64), counts.astype(np.int64), params_of, tokens)
        self._watch(starts, counts)
        return dropped

    def _watch(self, starts: np.ndarray, counts: np.ndarray) -> None:
        """Have the coming pass read the last tokens of the requests that want it."""
        if self._watching:
            self.readers.watch(self._watching, starts + counts, np.cumsum(counts) - 1)
            self.live.taps = self.readers.taps

    def _read_marks(self, starts: np.ndarray, counts: np.ndarray, tokens: Tokens | None) -> bool:
        """Have the requests whose edits go by the tokens of the pass read theirs; whether any edit begins or ends."""
        assert tokens is not None
        read, offsets = tokens(), np.cumsum(counts) - counts
        moved = [
            request.take(int(starts[i]), read[int(offsets[i]) : int(offsets[i] + counts[i])])
            for i, request in self._marked
        ]
        return any(moved)

    def _rebuild(
        self, ids: list[str], starts: np.ndarray, counts: np.ndarray, params_of: Params, tokens: Tokens | None
    ) -> list[int]:
        self._ids, self._stale, n = ids, False, len(ids)
        found = [(i, self._request(request_id, params_of)) for i, request_id in enumerate(ids)]
        self._batch = [(i, request) for i, request in found if request is not None]
        self._watching = [(i, request) for i, request in self._batch if request.read is not None]
        self._marked = [(i, request) for i, request in self._batch if request.marked]
        if self._marked:
            self._read_marks(starts, counts, tokens)
        self._current = np.zeros(n, dtype=np.int64)
        self._since, self._until = np.zeros(n, dtype=np.int64), np.full(n, NEVER, dtype=np.int64)
        offsets = np.cumsum(counts) - counts
        needed: dict[Hashable, Callable[[], SteeringRow]] = {}
        for i, request in self._batch:
            if request.reading:
                continue
            for segment in request.spans.within(int(starts[i]), int(counts[i])):
                key = request.key(segment)
                if key is not None:
                    needed[key] = partial(request.row, segment, self.info.num_layers, self.info.width)
        slots = self.slots.ensure(needed)
        crossing: list[tuple[int, SteeredRequest]] = []
        for i, request in self._batch:
            start, end = int(starts[i]), int(starts[i] + counts[i])
            if request.reading:
                self._until[i] = request.prompt - 1
                continue
            segment = request.spans.segment(start)
            self._since[i], self._until[i] = request.spans.bounds[segment], request.spans.end(segment)
            self._current[i] = slots.get(request.key(segment), 0)
            if end > self._until[i]:
                crossing.append((i, request))
        self._fill(counts, [(i, request, int(starts[i]), int(offsets[i])) for i, request in crossing], slots)
        return self._read(starts, counts, offsets)

    def _fill(
        self,
        counts: np.ndarray,
        crossing: Sequence[tuple[int, SteeredRequest, int, int]] = (),
        slots: Mapping[Hashable, int] | None = None,
    ) -> None:
        """Write every token's slot; requests in `crossing` (number, request, start, offset) change on the way."""
        self._counts = np.array(counts, dtype=np.int64)
        slot = np.repeat(self._current, self._counts)
        for i, request, start, offset in crossing:
            end, spans = start + int(counts[i]), request.spans
            for segment in spans.within(start, int(counts[i])):
                low, high = max(spans.bounds[segment], start), min(spans.end(segment), end)
                slot[offset + low - start : offset + high - start] = (slots or {}).get(request.key(segment), 0)
        self._slot_host.write(slot)
        used = np.unique(slot)
        staged = self.slots.staged[used].max(0) if len(used) else np.zeros(self.info.num_layers, dtype=np.int64)
        stage = np.where(self.slots.staged[slot].any(1), slot, 0) if staged.any() else np.zeros_like(slot)
        if self.settings.graphs:
            if self.settings.stages:
                self._stage_host.write(stage)
            return
        self.live.added = np.any(self.slots.added[used], axis=0).tolist()
        self.live.rows, self.live.keeps = {}, len(slot) == len(counts)  # texts that grow by one token stay as they are
        self.live.staged = staged.tolist()
        if staged.any():
            rows = np.flatnonzero(stage)
            self.live.token = torch.from_numpy(rows).to(self._slot.device)
            self.live.token_slot = torch.from_numpy(stage[rows]).to(self._slot.device)

    def _read(self, starts: np.ndarray, counts: np.ndarray, offsets: np.ndarray) -> list[int]:
        """Arrange for what is read in this pass; the numbers of requests that will run their last token again."""
        self._reads, self.live.reading, self.live.measuring = [], None, None
        rows: list[int] = []
        dropped: list[int] = []
        measured: list[int] = []
        for i, request in self._batch:
            last = request.prompt - 1 - int(starts[i])
            if request.reading and 0 <= last < counts[i]:
                self._reads.append((request, len(rows)))
                rows.append(int(offsets[i]) + last)
                if request.first is not None:
                    dropped.append(i)
            if request.measure and self.live.measured is not None:
                skipped = 1 if starts[i] == 0 else 0  # an attention sink with a norm of its own
                measured += range(int(offsets[i]) + skipped, int(offsets[i] + counts[i]))
        if measured:
            self.live.measuring, self._stale = torch.tensor(measured, device=self._slot.device), True
        if rows:
            self._stale = True
            index = torch.tensor(rows, device=self._slot.device)
            if self.settings.graphs:
                self._rows[: len(rows)] = index
            else:
                self.live.reading = index
                self.live.reads = frozenset(
                    layer for request, _ in self._reads for edit in request.edits for layer in edit.edit.reads
                )
        return dropped

    def _settle(self) -> None:
        """Keep what was read in the last pass, and let the edits of requests that read in it decide."""
        if self.live.taps:
            self.readers.settle()
            self.live.taps = {}
        if not self._reads:
            return
        reads, self._reads = self._reads, []
        self.live.reading = None
        for request, k in reads:
            for i, compiled in enumerate(request.edits):
                if compiled.edit.reads and request.weights[i] is None:
                    states = {layer: self._state(layer, k) for layer in compiled.edit.reads}
                    request.weights[i] = compiled.edit.weights(states)[0].float().cpu()
            request.reading = False
            if request.tag is not None:
                self._decided[request.tag] = [None if w is None else w.tolist() for w in request.weights]
                if len(self._decided) > 16384:
                    self._decided.popitem(last=False)
        self.live.seen = {}
        self._stale = True

    def _state(self, layer: int, k: int) -> Tensor:
        seen = self.blocks[layer].seen if self.settings.graphs else self.live.seen[layer]
        return seen[k : k + 1].float().cpu()


def _uncompiled(model: nn.Module, blocks: dict[int, nn.Module], live: Live) -> list[Callable[[], None]]:
    """Run the network uncompiled, with hooks that measure; returns what undoes it."""
    undo: list[Callable[[], None]] = []
    for module in model.modules():
        if getattr(module, "do_not_compile", None) is False:
            setattr(module, "do_not_compile", True)  # noqa: B010  # a plain attribute, not a parameter or a buffer
            undo.append(partial(setattr, module, "do_not_compile", False))
    for layer, block in blocks.items():
        undo.append(block.register_forward_hook(measuring_hook(layer, live)).remove)
    return undo


def embedding_sample(model: nn.Module, config: Any) -> dict[str, Any]:
    """Shape of the input embedding and, of about 256 of its numbers taken at equal distances, those that this rank has:
    `{"shape", "index", "value"}`, values in bfloat16's precision; empty lists on a rank without it.
    """
    text = config.model_config.hf_text_config
    rows, width = int(text.vocab_size), int(text.hidden_size)
    step = max(1, rows * width // 256)
    table: Any = next(
        (
            m
            for m in model.modules()
            if hasattr(m, "org_vocab_size")
            and hasattr(m, "shard_indices")
            and type(m).__name__ == "VocabParallelEmbedding"
        ),
        None,
    )
    if table is None:
        return {"shape": [rows, width], "index": [], "value": []}
    low, high = table.shard_indices.org_vocab_start_index, table.shard_indices.org_vocab_end_index
    flat = torch.arange(0, rows * width, step)
    mine = flat[(flat // width >= low) & (flat // width < high)]
    weight = table.weight.detach()
    value = weight[(mine // width - low).to(weight.device), (mine % width).to(weight.device)]
    return {"shape": [rows, width], "index": mine.tolist(), "value": value.to(torch.bfloat16).float().cpu().tolist()}
