"""Installation of steering in a stock vLLM, in every process of it: the entry point `vllm.general_plugins`.

Nothing happens to an engine that was started without `additional_config={"steer": {...}}`. With it, a request
carries its edits in `SamplingParams.extra_args["steer"]` (see `steer.serving.wire.SteerRequest`). These methods of vLLM
are wrapped:

| process    | method                                | why |
|------------|---------------------------------------|-----|
| front end  | `InputProcessor.__init__`             | settings are checked before a model is loaded |
| front end  | `InputProcessor.process_inputs`       | a request is checked, and names become digests and positions |
| engine     | `generate_block_hash_extra_keys`      | steered blocks of the prefix cache have keys of their own |
| engine     | `Scheduler._update_after_schedule`    | a prompt that was read runs again where it is steered |
| worker     | `BaseModelLoader.create_model`        | blocks get their buffers before weights, compilation and graphs |
| worker     | V1: `_update_states`, `_prepare_inputs`, `sample_tokens`; V2: their counterparts | buffers are filled |
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

from steer.adapters.vllm.lifetime import watch_parent
from steer.adapters.vllm.plugin import runner_v1, runner_v2
from steer.adapters.vllm.plugin.registry import Registry
from steer.adapters.vllm.plugin.requests import Resolved
from steer.adapters.vllm.plugin.tuned import check_engine
from steer.adapters.vllm.plugin.wrapping import optional, wrap
from steer.adapters.vllm.settings import (
    Settings,
    check_version,
    model_info,
    settings_of,
)
from steer.core import InputError, SteerError, UnsupportedError

__all__ = ["front_end", "register"]


def register() -> None:
    """What vLLM calls when it loads its plug-ins; calling it again does nothing."""
    try:
        check_version()
    except SteerError as error:
        logging.getLogger("vllm.steer").warning("steer is off: %s", error)
        return
    watch_parent()
    _front()
    _engine()
    _worker()


# -------------------------------------------------------------------------------------------------------- front end


def front_end(input_processor: Any) -> Registry:
    """The front end's registry of one engine, kept on its input processor. Raises `UnsupportedError` where steering is
    off.
    """
    held = getattr(input_processor, "steer", None)
    if held is None:
        config = input_processor.vllm_config
        settings = settings_of(config)
        if settings is None:
            raise UnsupportedError('steering is off: start the engine with additional_config={"steer": {}}')
        held = input_processor.steer = Registry(
            settings, model_info(config, "", None, getattr(input_processor, "tokenizer", None))
        )
    return held


def _front() -> None:
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor

    wrap(InputProcessor, "__init__", _init_processor)
    wrap(InputProcessor, "process_inputs", _process_inputs)
    wrap(OutputProcessor, "add_request", _add_output)


def _init_processor(original: Callable[..., Any], processor: Any, vllm_config: Any, *args: Any, **more: Any) -> None:
    settings = settings_of(vllm_config)  # wrong ones are refused before any process loads a model
    if settings is not None and vllm_config.model_config.runner_type == "pooling":
        raise UnsupportedError("steering is for models that generate text: turn it off for a pooling model")
    if settings is not None and settings.tuned:
        check_engine(vllm_config, dict(settings.tuned))
    original(processor, vllm_config, *args, **more)


def _process_inputs(
    original: Callable[..., Any], processor: Any, request_id: str, prompt: Any, params: Any, *args: Any, **more: Any
) -> Any:
    given = _asked(params)
    if given is None:
        return original(processor, request_id, prompt, params, *args, **more)
    bound = signature(original).bind(processor, request_id, prompt, params, *args, **more).arguments
    with _refusing():
        _check_plain(params, bound.get("lora_request"))
        front = front_end(processor)
        asked = front.parse(given)
        reads = any(edit.reads for edit in front.hidden(asked))
        if reads and params.prompt_logprobs is not None:
            raise InputError("prompt_logprobs", params.prompt_logprobs, "unset, with a gate or a controller")
    request = original(processor, request_id, prompt, params, *args, **more)
    own = request.sampling_params
    with _refusing():
        ids = request.prompt_token_ids
        resolved = front.resolve(asked, len(ids or request.prompt_embeds), own.max_tokens, ids)
    own.extra_args = {**own.extra_args, "steer": resolved.pack()}
    return request


def _asked(params: Any) -> Any:
    """What a request says of steering, also one for embeddings, where it would be lost."""
    extra = getattr(params, "extra_args", None) or getattr(params, "extra_kwargs", None)
    return extra.get("steer") if extra else None


def _check_plain(params: Any, lora: Any) -> None:
    """Raise `UnsupportedError` for requests whose steering would not be what it is elsewhere."""
    if not hasattr(params, "extra_args"):
        raise UnsupportedError("steering is for requests that generate text: embeddings and scores are not steered")
    if lora is not None:
        raise UnsupportedError(
            f"steering does not go with vLLM's own LoRA adapter {lora.lora_name!r}: vectors are measured on the base "
            "model; serve the merged model, or name the adapter in additional_config steer.tuned"
        )


@contextmanager
def _refusing() -> Iterator[None]:
    """Errors of a request as vLLM's own: its server answers 400, and callers of the engine see a `ValueError`."""
    from vllm.exceptions import VLLMValidationError

    class Refused(VLLMValidationError, ValueError):
        pass

    try:
        yield
    except (InputError, UnsupportedError) as error:
        raise Refused(str(error), parameter=getattr(error, "field", "steer")) from None  # type: ignore[call-arg]


def _add_output(original: Callable[..., Any], processor: Any, request: Any, *args: Any, **more: Any) -> Any:
    result = original(processor, request, *args, **more)
    resolved = Resolved.of(request.sampling_params)
    if resolved is not None and request.request_id in processor.request_states:
        processor.request_states[request.request_id].steer = resolved.digests
    return result


def used_artifacts(output_processor: Any) -> set[str]:
    """Digests that requests on their way need."""
    states = output_processor.request_states.values()
    return {digest for state in list(states) for digest in getattr(state, "steer", ())}


# ----------------------------------------------------------------------------------------------------------- engine


def _engine() -> None:
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap(kv_cache_utils, "generate_block_hash_extra_keys", _block_keys)
    for module in (block_pool, optional("vllm.v1.simple_kv_offload.manager")):
        if module is not None and hasattr(module, "generate_block_hash_extra_keys"):
            module.generate_block_hash_extra_keys = kv_cache_utils.generate_block_hash_extra_keys
    wrap(Scheduler, "add_request", _add_request)
    wrap(Scheduler, "_update_after_schedule", _update_after_schedule)


def _block_keys(original: Callable[..., Any], request: Any, start: int, end: int, start_mm_idx: int) -> Any:
    extra, next_mm = original(request, start, end, start_mm_idx)
    resolved = Resolved.of(request.sampling_params)
    key = None if resolved is None else resolved.block_key(request.request_id, start, end)
    return (extra if key is None else (*(extra or ()), ("steer", key))), next_mm


def _add_request(original: Callable[..., Any], scheduler: Any, request: Any, *args: Any, **more: Any) -> Any:
    resolved = Resolved.of(request.sampling_params)
    if resolved is not None and resolved.rewind is not None:
        scheduler.__dict__.setdefault("steer_reading", {})[request.request_id] = resolved
    return original(scheduler, request, *args, **more)


def _update_after_schedule(original: Callable[..., Any], scheduler: Any, scheduler_output: Any) -> Any:
    result = original(scheduler, scheduler_output)
    reading = scheduler.__dict__.get("steer_reading")
    if reading:
        _rewind(scheduler, reading, scheduler_output)
    return result


def _rewind(scheduler: Any, reading: dict[str, Resolved], scheduler_output: Any) -> None:
    """Send requests whose whole prompt runs in this step back to where their steering begins: the worker drops this
    step's sample, and the next one runs those positions again, in place.
    """
    for request_id, resolved in list(reading.items()):
        request = scheduler.requests.get(request_id)
        if request is None:
            del reading[request_id]
        elif request_id in scheduler_output.num_scheduled_tokens and request.num_computed_tokens >= resolved.prompt:
            request.num_computed_tokens = resolved.rewind
            request.is_prefill_chunk = True
            if resolved.private:  # its cached blocks may hold what was there before it was steered
                request.skip_reading_prefix_cache = True
            del reading[request_id]


# ----------------------------------------------------------------------------------------------------------- worker


def _worker() -> None:
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.v1.worker.worker_base import WorkerBase

    wrap(BaseModelLoader, "create_model", _create_model)
    artifacts, readings = ("register", "evict"), ("learn", "readings")
    for name in (*artifacts, *readings, "facts", "introduce", "measure", "weights", "give_back_memory"):
        setattr(WorkerBase, f"steer_{name}", _forwarded(name))


def _create_model(
    original: Callable[..., Any], loader: Any, vllm_config: Any, model_config: Any, *args: Any, **more: Any
) -> Any:
    settings = settings_of(vllm_config)
    if model_config is not vllm_config.model_config:  # a draft model
        settings = None
    if settings is not None and settings.tuned:
        check_engine(vllm_config, dict(settings.tuned))
    model = original(loader, vllm_config, model_config, *args, **more)
    if settings is not None:
        _arm(loader, model, vllm_config, settings)
    return model


def _arm(loader: Any, model: Any, vllm_config: Any, settings: Settings) -> None:
    """Give a network its `Worker`, before its weights are loaded."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from steer.adapters.vllm.plugin.mixture import pair
    from steer.adapters.vllm.plugin.worker import Worker

    runner_v1.install(GPUModelRunner)
    second = optional("vllm.v1.worker.gpu.model_runner")
    if second is not None:
        runner_v2.install(second.GPUModelRunner)
    tuned = dict(settings.tuned)
    mixture = pair(loader, model, vllm_config, tuned) if tuned else None
    model.steer = Worker(model, vllm_config, settings, mixture)


def _forwarded(name: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any) -> Any:
        from steer.adapters.vllm.plugin.worker import of_config

        worker = of_config(self.vllm_config)
        if worker is None:
            raise SteerError("this worker was not armed")
        return getattr(worker, name)(*args)

    return call
