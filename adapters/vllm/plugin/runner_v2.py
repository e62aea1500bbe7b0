"""Steering inside vLLM's second model runner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from steer.adapters.vllm.plugin.wrapping import tokens_of, worker_of, wrap

__all__ = ["install"]


def install(runner: Any) -> None:
    """Wrap what `runner`, the class, calls when requests enter or leave and when a step is prepared or sampled."""
    wrap(runner, "add_requests", _add_requests)
    wrap(runner, "finish_requests", _finish_requests)
    wrap(runner, "prepare_inputs", _prepare_inputs)
    wrap(runner, "sample", _sample)


def _add_requests(original: Callable[..., Any], runner: Any, scheduler_output: Any) -> Any:
    worker = worker_of(runner)
    if worker is not None:
        # This runner keeps no sampling parameters after the step in which a request enters.
        for new in scheduler_output.scheduled_new_reqs:
            worker.entered[new.req_id] = (new.sampling_params, new.prompt_len)
    return original(runner, scheduler_output)


def _finish_requests(original: Callable[..., Any], runner: Any, scheduler_output: Any) -> Any:
    worker = worker_of(runner)
    if worker is not None:
        worker.finish(scheduler_output.finished_req_ids)
    return original(runner, scheduler_output)


def _prepare_inputs(original: Callable[..., Any], runner: Any, *args: Any, **more: Any) -> Any:
    batch = original(runner, *args, **more)
    worker = worker_of(runner)
    if worker is not None:
        n = len(batch.req_ids)
        counts = np.diff(batch.query_start_loc_np[: n + 1])
        starts = batch.num_computed_tokens_np[:n]
        tokens = tokens_of(batch.input_ids, int(counts.sum()))
        dropped = worker.step(batch.req_ids, starts, counts, worker.entered.__getitem__, tokens)
        worker.dropped = [(i, int(starts[i] + counts[i]), worker.requests[batch.req_ids[i]]) for i in dropped]
    return batch


def _sample(
    original: Callable[..., Any], runner: Any, hidden_states: Any, input_batch: Any, *args: Any, **more: Any
) -> Any:
    worker = worker_of(runner)
    if worker is None:
        return original(runner, hidden_states, input_batch, *args, **more)
    worker.hidden = hidden_states[input_batch.logits_indices]
    try:
        output, num_sampled, num_rejected = original(runner, hidden_states, input_batch, *args, **more)
    finally:
        worker.hidden = None
    # A request that read its prompt samples nothing, and goes back as if it had drafted what it will run again.
    for i, end, request in worker.dropped:
        num_sampled[i], num_rejected[i] = 0, end - request.first
    worker.dropped = []
    return output, num_sampled, num_rejected
