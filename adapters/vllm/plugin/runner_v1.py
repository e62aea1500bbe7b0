"""Steering inside vLLM's first model runner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steer.adapters.vllm.plugin.wrapping import worker_of, wrap


def install_runner_v1() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def prepare(original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **more: Any) -> Any:
            result = original(self, scheduler_output, num_scheduled_tokens, *args, **more)
            worker = worker_of(self)
            if worker is not None:
                batch, n = self.input_batch, self.input_batch.num_reqs
                starts = batch.num_computed_tokens_cpu[:n]
                dropped = worker.step(batch.req_ids, starts, num_scheduled_tokens[:n], _params_v1(self.requests))
                if dropped:
                    self.discard_request_mask.np[dropped] = True
                    self.discard_request_mask.copy_to_gpu(n)
            return result

        return prepare_inputs

    def update(original: Callable[..., Any]) -> Callable[..., Any]:
        def update_states(self: Any, scheduler_output: Any) -> Any:
            worker = worker_of(self)
            if worker is not None:  # also in a step that has nothing to run
                worker.finish(scheduler_output.finished_req_ids)
            return original(self, scheduler_output)

        return update_states

    def sample(original: Callable[..., Any]) -> Callable[..., Any]:
        def sample_tokens(self: Any, *args: Any, **more: Any) -> Any:
            worker, state = worker_of(self), self.execute_model_state
            if worker is None or state is None:
                return original(self, *args, **more)
            worker.hidden = state.sample_hidden_states
            kept = _without_generators(self)
            try:
                return original(self, *args, **more)
            finally:
                worker.hidden = None
                self.input_batch.generators.update(kept)

        return sample_tokens

    wrap(GPUModelRunner, "_update_states", update)
    wrap(GPUModelRunner, "_prepare_inputs", prepare)
    wrap(GPUModelRunner, "sample_tokens", sample)


def _params_v1(requests: dict[str, Any]) -> Callable[[str], tuple[Any, int]]:
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
