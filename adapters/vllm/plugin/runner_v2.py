"""The V2 model runner's side of the plug-in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["install"]


def install(wrap: Callable[..., None], worker_of: Callable[[Any], Any], runner: Any) -> None:
    """Wrap what the V2 runner calls: a request enters, a step's inputs are ready, a step is sampled."""
    wrap(runner, "add_requests", lambda original: _adding(original, worker_of))
    wrap(runner, "finish_requests", lambda original: _finishing(original, worker_of))
    wrap(runner, "prepare_inputs", lambda original: _preparing(original, worker_of))
    wrap(runner, "sample", lambda original: _sampling(original, worker_of))


def _adding(original: Callable[..., Any], worker_of: Callable[[Any], Any]) -> Callable[..., Any]:
    def add_requests(self: Any, scheduler_output: Any) -> Any:
        worker = worker_of(self)
        if worker is not None:
            # This runner keeps no sampling parameters after the step in which a request enters.
            for new in scheduler_output.scheduled_new_reqs:
                worker.entered[new.req_id] = (new.sampling_params, new.prompt_len)
        return original(self, scheduler_output)

    return add_requests


def _finishing(original: Callable[..., Any], worker_of: Callable[[Any], Any]) -> Callable[..., Any]:
    def finish_requests(self: Any, scheduler_output: Any) -> Any:
        worker = worker_of(self)
        if worker is not None:
            worker.finish(scheduler_output.finished_req_ids)
        return original(self, scheduler_output)

    return finish_requests


def _preparing(original: Callable[..., Any], worker_of: Callable[[Any], Any]) -> Callable[..., Any]:
    def prepare_inputs(self: Any, *args: Any, **more: Any) -> Any:
        batch = original(self, *args, **more)
        worker = worker_of(self)
        if worker is not None:
            n = len(batch.req_ids)
            counts = np.diff(batch.query_start_loc_np[: n + 1])
            starts = batch.num_computed_tokens_np[:n]
            dropped = worker.step(batch.req_ids, starts, counts, worker.entered.__getitem__)
            worker.dropped = [(i, int(starts[i] + counts[i]), worker.requests[batch.req_ids[i]]) for i in dropped]
        return batch

    return prepare_inputs


def _sampling(original: Callable[..., Any], worker_of: Callable[[Any], Any]) -> Callable[..., Any]:
    def sample(self: Any, hidden_states: Any, input_batch: Any, *args: Any, **more: Any) -> Any:
        worker = worker_of(self)
        if worker is None:
            return original(self, hidden_states, input_batch, *args, **more)
        worker.hidden = hidden_states[input_batch.logits_indices]
        try:
            output, num_sampled, num_rejected = original(self, hidden_states, input_batch, *args, **more)
        finally:
            worker.hidden = None
        # A request that read its prompt samples nothing, and goes back as if it had drafted what it will run again.
        for i, end, request in worker.dropped:
            num_sampled[i], num_rejected[i] = 0, end - request.first
        worker.dropped = []
        return output, num_sampled, num_rejected

    return sample
