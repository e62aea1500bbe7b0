"""Turns steering on inside a stock vLLM, in every process of it: the entry point `vllm.general_plugins`.

Nothing happens to an engine that was started without `additional_config={"steer": {...}}`. With it, a request carries
its edits in `SamplingParams.extra_args["steer"]` (see `steer.wire.SteerRequest`). These methods of vLLM are wrapped:

| process    | method                                | why |
|------------|---------------------------------------|-----|
| front end  | `EngineArgs.create_engine_config`     | several API processes are refused before they start |
| front end  | `InputProcessor.__init__`             | settings are checked before a model is loaded |
| front end  | `InputProcessor.process_inputs`       | a request is checked, and names become digests and positions |
| engine     | `generate_block_hash_extra_keys`      | steered blocks of the prefix cache have keys of their own |
| engine     | `Scheduler._update_after_schedule`    | a prompt that was read runs again where it is steered |
| worker     | `BaseModelLoader.create_model`        | blocks get their buffers before weights, compilation and graphs |
| worker     | V1: `_update_states`, `_prepare_inputs`, `sample_tokens`; V2: their counterparts | buffers are filled |
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from inspect import signature
from typing import Any

from steer.adapters.vllm.lifetime import watch_parent
from steer.adapters.vllm.plugin.registry import FrontEnd
from steer.adapters.vllm.plugin.requests import block_key, digests, resolved_of
from steer.adapters.vllm.plugin.runner_v1 import install_runner_v1
from steer.adapters.vllm.plugin.tuned import check_engine
from steer.adapters.vllm.plugin.wrapping import optional, worker_of, wrap
from steer.adapters.vllm.settings import SERVER_PLUGIN, check_processes, check_version, model_info, settings_of
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


def front_end(input_processor: Any) -> FrontEnd:
    """The front end's registry of one engine, kept on its input processor. Raises `UnsupportedError` where steering is
    off.
    """
    held = getattr(input_processor, "steer", None)
    if held is None:
        config = input_processor.vllm_config
        settings = settings_of(config)
        if settings is None:
            raise UnsupportedError('steering is off: start the engine with additional_config={"steer": {}}')
        held = input_processor.steer = FrontEnd(settings, model_info(config, "", None))
    return held


def _front() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor

    class Refused(VLLMValidationError, ValueError):
        """Answered with 400 by vLLM's server; a `ValueError` for who calls the engine."""

    def process(original: Callable[..., Any]) -> Callable[..., Any]:
        def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **more: Any) -> Any:
            given = _asked(params)
            if given is None:
                return original(self, request_id, prompt, params, *args, **more)
            bound = signature(original).bind(self, request_id, prompt, params, *args, **more).arguments
            try:
                _check_plain(params, bound.get("lora_request"))
                front = front_end(self)
                asked = front.parse(given)
                reads = any(edit.reads for edit in front.hidden(asked))
                if reads and params.prompt_logprobs is not None:
                    raise InputError("prompt_logprobs", params.prompt_logprobs, "unset, with a gate or a controller")
            except (InputError, UnsupportedError) as error:
                raise Refused(str(error), parameter=getattr(error, "field", "steer")) from None  # type: ignore[call-arg]
            request = original(self, request_id, prompt, params, *args, **more)
            length = len(request.prompt_token_ids or request.prompt_embeds)
            own = request.sampling_params
            try:
                resolved = front.resolve(asked, length)
            except InputError as error:
                raise Refused(str(error), parameter=error.field) from None  # type: ignore[call-arg]
            own.extra_args = {**own.extra_args, "steer": resolved}
            return request

        return process_inputs

    def init(original: Callable[..., Any]) -> Callable[..., Any]:
        def init_processor(self: Any, vllm_config: Any, *args: Any, **more: Any) -> None:
            settings = settings_of(vllm_config)  # wrong ones are refused before any process loads a model
            if settings is not None and vllm_config.model_config.runner_type == "pooling":
                raise UnsupportedError("steering is for models that generate text: turn it off for a pooling model")
            if settings is not None and settings.tuned:
                check_engine(vllm_config, dict(settings.tuned))
            original(self, vllm_config, *args, **more)

        return init_processor

    def add(original: Callable[..., Any]) -> Callable[..., Any]:
        def add_request(self: Any, request: Any, *args: Any, **more: Any) -> Any:
            result = original(self, request, *args, **more)
            resolved = resolved_of(request.sampling_params)
            if resolved is not None and request.request_id in self.request_states:
                self.request_states[request.request_id].steer = digests(resolved)
            return result

        return add_request

    def create(original: Callable[..., Any]) -> Callable[..., Any]:
        def create_engine_config(self: Any, *args: Any, **more: Any) -> Any:
            config = original(self, *args, **more)
            _check_processes(config)
            return config

        return create_engine_config

    wrap(EngineArgs, "create_engine_config", create)
    wrap(InputProcessor, "__init__", init)
    wrap(InputProcessor, "process_inputs", process)
    wrap(OutputProcessor, "add_request", add)


def _check_processes(config: Any) -> None:
    """End a server of several API processes with one line, in the process that would start them."""
    from vllm import envs

    named = SERVER_PLUGIN in (envs.VLLM_PLUGINS or ())
    if named and config.parallel_config._api_process_count > 1 and settings_of(config) is not None:
        try:
            check_processes(config)
        except InputError as error:
            raise SystemExit(f"steer: {error}") from None


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


def used_artifacts(output_processor: Any) -> set[str]:
    """Digests that requests on their way need."""
    states = output_processor.request_states.values()
    return {digest for state in list(states) for digest in getattr(state, "steer", ())}


# ----------------------------------------------------------------------------------------------------------- engine


def _engine() -> None:
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.core.sched.scheduler import Scheduler

    def keys(original: Callable[..., Any]) -> Callable[..., Any]:
        def generate_block_hash_extra_keys(request: Any, start: int, end: int, start_mm_idx: int) -> Any:
            extra, next_mm = original(request, start, end, start_mm_idx)
            resolved = resolved_of(request.sampling_params)
            key = None if resolved is None else block_key(resolved, request.request_id, start, end)
            return (extra if key is None else (*(extra or ()), ("steer", key))), next_mm

        return generate_block_hash_extra_keys

    wrap(kv_cache_utils, "generate_block_hash_extra_keys", keys)
    for module in (block_pool, optional("vllm.v1.simple_kv_offload.manager")):
        if module is not None and hasattr(module, "generate_block_hash_extra_keys"):
            module.generate_block_hash_extra_keys = kv_cache_utils.generate_block_hash_extra_keys

    def added(original: Callable[..., Any]) -> Callable[..., Any]:
        def add_request(self: Any, request: Any, *args: Any, **more: Any) -> Any:
            resolved = resolved_of(request.sampling_params)
            if resolved is not None and resolved["rewind"] is not None:
                self.__dict__.setdefault("steer_reading", {})[request.request_id] = resolved
            return original(self, request, *args, **more)

        return add_request

    def after(original: Callable[..., Any]) -> Callable[..., Any]:
        def update_after_schedule(self: Any, scheduler_output: Any) -> Any:
            result = original(self, scheduler_output)
            reading = self.__dict__.get("steer_reading")
            if reading:
                _rewind(self, reading, scheduler_output)
            return result

        return update_after_schedule

    wrap(Scheduler, "add_request", added)
    wrap(Scheduler, "_update_after_schedule", after)


def _rewind(scheduler: Any, reading: dict[str, dict[str, Any]], scheduler_output: Any) -> None:
    """Send requests whose whole prompt runs in this step back to where their steering begins: the worker drops this
    step's sample, and the next one runs those positions again, in place.
    """
    for request_id, resolved in list(reading.items()):
        request = scheduler.requests.get(request_id)
        if request is None:
            del reading[request_id]
        elif request_id in scheduler_output.num_scheduled_tokens and request.num_computed_tokens >= resolved["prompt"]:
            request.num_computed_tokens = resolved["rewind"]
            request.is_prefill_chunk = True
            if resolved["private"]:  # its cached blocks may hold what was there before it was steered
                request.skip_reading_prefix_cache = True
            del reading[request_id]


# ----------------------------------------------------------------------------------------------------------- worker


def _worker() -> None:
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.v1.worker.worker_base import WorkerBase

    from steer.adapters.vllm.plugin.mixture import pair
    from steer.adapters.vllm.plugin.worker import Worker, of_config

    def create(original: Callable[..., Any]) -> Callable[..., Any]:
        def create_model(self: Any, vllm_config: Any, model_config: Any, *args: Any, **more: Any) -> Any:
            settings = settings_of(vllm_config)
            if model_config is not vllm_config.model_config:  # a draft model
                settings = None
            if settings is not None and settings.tuned:
                check_engine(vllm_config, dict(settings.tuned))
            model = original(self, vllm_config, model_config, *args, **more)
            if settings is not None:
                install_runner_v1()
                _runner_v2()
                tuned = dict(settings.tuned)
                mixture = pair(self, model, vllm_config, tuned) if tuned else None
                model.steer = Worker(model, vllm_config, settings, mixture)
            return model

        return create_model

    wrap(BaseModelLoader, "create_model", create)
    for name in ("register", "evict", "facts", "introduce", "measure", "weights", "give_back_memory"):
        setattr(WorkerBase, f"steer_{name}", _forwarded(name, of_config))


def _forwarded(name: str, worker_of: Callable[[Any], Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any) -> Any:
        worker = worker_of(self.vllm_config)
        if worker is None:
            raise SteerError("this worker was not armed")
        return getattr(worker, name)(*args)

    return call


def _runner_v2() -> None:
    runner = optional("vllm.v1.worker.gpu.model_runner")
    if runner is not None:
        from steer.adapters.vllm.plugin import runner_v2

        runner_v2.install(wrap, worker_of, runner.GPUModelRunner)
