"""Steering inside vLLM's first model runner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steer.adapters.vllm.plugin.wrapping import tokens_of, worker_of, wrap

__all__ = ["install"]


def install(runner: Any) -> None:
    """Wrap what `runner`, the class, calls: a request leaves, a step's inputs are ready, a step is sampled."""
    wrap(runner, "_update_states", _update_states)
    wrap(runner, "_prepare_inputs", _prepare_inputs)
    wrap(runner, "sample_tokens", _sample_tokens)


def _update_states(original: Callable[..., Any], runner: Any, scheduler_output: Any) -> Any:
    worker = worker_of(runner)
    if worker is not None:  # also in a step that has nothing to run
        worker.finish(scheduler_output.finished_req_ids)
    return original(runner, scheduler_output)


def _prepare_inputs(
    original: Callable[..., Any], runner: Any, scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **more: Any
) -> Any:
    result = original(runner, scheduler_output, num_scheduled_tokens, *args, **more)
    worker = worker_of(runner)
    if worker is not None:
        batch, n = runner.input_batch, runner.input_batch.num_reqs
        starts = batch.num_computed_tokens_cpu[:n]
        counts = num_scheduled_tokens[:n]
        tokens = tokens_of(runner.input_ids.gpu, int(counts.sum()))
        dropped = worker.step(batch.req_ids, starts, counts, _params(runner.requests), tokens)
        if dropped:
            runner.discard_request_mask.np[dropped] = True
            runner.discard_request_mask.copy_to_gpu(n)
    return result


def _sample_tokens(original: Callable[..., Any], runner: Any, *args: Any, **more: Any) -> Any:
    worker, state = worker_of(runner), runner.execute_model_state
    if worker is None or state is None:
        return original(runner, *args, **more)
    worker.hidden = state.sample_hidden_states
    kept = _without_generators(runner)
    try:
        return original(runner, *args, **more)
    finally:
        worker.hidden = None
        runner.input_batch.generators.update(kept)


def _params(requests: dict[str, Any]) -> Callable[[str], tuple[Any, int]]:
    def params(request_id: str) -> tuple[Any, int]:
        request = requests[request_id]
        return request.sampling_params, request.num_prompt_tokens

    return params


def _without_generators(runner: Any) -> dict[int, Any]:
    """Take away the generators of requests whose sample is dropped: a generator on the CPU cannot be wound back."""
    if runner.device.type != "cpu" or not runner.input_batch.generators:
        return {}
    dropped = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0].tolist()
    generators = runner.input_batch.generators
    return {i: generators.pop(i) for i in dropped if i in generators}
