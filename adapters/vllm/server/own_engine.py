"""An engine of vLLM that `steer serve` owns: its loop, its start and its stop."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from steer.adapters.vllm.client import PATIENCE
from steer.adapters.vllm.lifetime import ending_with_us
from steer.adapters.vllm.model import load_errors
from steer.adapters.vllm.server.engine import T, VLLMEngine
from steer.adapters.vllm.settings import check_version
from steer.core import check_whole

# ------------------------------------------------------------------------------------------------- an engine of its own


class _Owner(VLLMEngine):
    """The same with an engine and a loop of its own, which end with it."""

    def __init__(self, loop: _Loop, client: Any, **settings: Any) -> None:
        self._thread = loop
        super().__init__(client, loop.loop, **settings)
        self.warm()

    def close(self) -> None:
        if self._closed:
            return
        super().close()
        for pool in (self._searches, self._measures):
            pool.shutdown()  # what they wait for was stopped
        children = multiprocessing.active_children()
        self._thread.call(self._end)
        for child in children:
            if child.name.startswith("EngineCore"):
                child.join(PATIENCE)
        self._thread.stop()
        del self._client.engine  # its finalizer wants vLLM's modules, which are gone by the end of the program

    async def _end(self) -> None:
        await asyncio.gather(*(asyncio.wrap_future(call) for call in list(self._jobs)), return_exceptions=True)
        self._client.close()


class _Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True, name="steer-vllm")
        self._thread.start()

    def call(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine there and wait for what it returns."""
        return asyncio.run_coroutine_threadsafe(work(), self.loop).result()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def serving_engine(
    model: str | Path,
    *,
    name: str | None = None,
    dtype: str = "auto",
    max_rows: int = 32,
    searches: int = 4,
    settings: Mapping[str, Any] | None = None,
    split_special_tokens: bool = True,
) -> VLLMEngine:
    """A vLLM engine for `steer serve`, in processes of its own; `close` ends them.

    `settings` are those of vLLM's `AsyncEngineArgs`, over ours. Raises `SteerError` where vLLM is missing, of a version
    that is not supported, or cannot load the model.
    """
    check_version()
    check_whole("max_rows", max_rows)
    from steer.adapters.vllm.plugin.install import register
    from steer.embedded import resolve

    register()
    where = str(resolve(str(model)))
    loop = _Loop()

    async def start() -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(AsyncEngineArgs(**_arguments(where, dtype, max_rows, settings or {})))

    try:
        with load_errors(model), ending_with_us():
            client = loop.call(start)
    except BaseException:
        loop.stop()
        raise
    try:
        return _Owner(
            loop,
            client,
            name=name or str(model),
            max_rows=max_rows,
            searches=searches,
            split_special_tokens=split_special_tokens,
        )
    except BaseException:
        client.shutdown()
        loop.stop()
        raise
    finally:
        del client  # frames live on in tracebacks


def _arguments(model: str, dtype: str, max_rows: int, given: Mapping[str, Any]) -> dict[str, Any]:
    from vllm.platforms import current_platform

    extra = dict(given.get("additional_config") or {})
    # On a CPU compiling takes minutes, and the default block of 128 tokens shares few prefixes.
    slow = {"enforce_eager": True, "block_size": 32} if current_platform.is_cpu() else {}
    return {
        "model": model,
        "dtype": dtype,
        "max_num_seqs": max_rows,
        "enable_prefix_caching": True,
        "logprobs_mode": "raw_logprobs",
        "max_logprobs": 20,
        "disable_log_stats": True,
        **slow,
        **given,
        "additional_config": {"steer": {}, **extra},
    }
