"""vLLM behind the server: see `steer.serving`."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from steer.adapters._requests import Emit, relayed
from steer.adapters._vllm_client import PATIENCE, Asynchronous, Stopped
from steer.adapters._vllm_preparing import Prepared, Preparer
from steer.adapters._vllm_settings import check_version
from steer.adapters._vllm_watch import ending_with_us
from steer.adapters._vllm_writing import measured, search, spent, written
from steer.adapters.vllm import VLLMModel, load_errors
from steer.core import Cost, InputError, SteerError, check_whole
from steer.memory import give_back_memory
from steer.serving.engine import Event, Finished, Load, Task

__all__ = ["VLLMEngine", "serving_engine"]

T = TypeVar("T")
log = logging.getLogger("steer.serving")


class VLLMEngine:
    """A vLLM engine that serves many requests at once; requests of others may run beside.

    The drift of a choice (`Ended.kl`) is 0 without edits and truncation, and otherwise `log q(y) - log p(y)` of its
    text y, a one-sample estimate that is negative for some texts: where the engine knows q, which is at temperature 1
    and, while it reports raw log-probabilities, without truncation, penalties and value heads. Elsewhere it is None.

    Args:
        client: the engine, an `AsyncLLM` that was started with the plug-in turned on.
        loop: the event loop that it lives on. This constructor and all methods but `run`, `load` and `close` wait for
            it, and so are for other threads.
        name: what requests call the model; default: the engine's first name.
        max_rows: texts of one request that decode together; default: those of the engine.
        searches: searches that run at once; further ones wait.
    """

    def __init__(
        self,
        client: Any,
        loop: asyncio.AbstractEventLoop,
        *,
        name: str | None = None,
        max_rows: int | None = None,
        searches: int = 4,
    ) -> None:
        rows = int(client.vllm_config.scheduler_config.max_num_seqs) if max_rows is None else max_rows
        for field, value in (("max_rows", rows), ("searches", searches)):
            check_whole(field, value)
        self._client, self._loop = Asynchronous(client, loop), loop
        given = client.vllm_config.model_config.served_model_name
        self._name = name or str(given if isinstance(given, str) else given[0])
        self.model = VLLMModel(self._client, self._name)
        self.model.forget_prompts()
        self._preparer = Preparer(self.model, rows)
        self._searches = ThreadPoolExecutor(searches, "steer-search")
        self._measures = ThreadPoolExecutor(2, "steer-measure")
        self._jobs: set[Future[None]] = set()
        self._asked = 0
        self._searching: set[Asynchronous] = set()
        self._closed = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def context_length(self) -> int | None:
        return self.model.context_length

    @property
    def own_edits(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.model.front.settings.tuned)

    def check_artifact(self, path: Path) -> None:
        self._preparer.check_artifact(path)

    def prepare(self, task: Task) -> Prepared:
        return self._preparer(task)

    def run(self, prepared: Prepared) -> AsyncGenerator[Event]:
        def begin(emit: Emit) -> Callable[[], None]:
            if self._closed:
                raise _stopping()
            call = asyncio.run_coroutine_threadsafe(self._job(prepared, emit), self._loop)
            self._jobs.add(call)
            call.add_done_callback(self._jobs.discard)

            def stop() -> None:
                call.cancel()

            return stop

        return relayed(begin)

    def load(self) -> Load:
        if self._closed:
            return Load()
        unfinished = int(self._client.engine.output_processor.get_num_unfinished_requests())
        rows = min(unfinished, int(self.model.config.scheduler_config.max_num_seqs))
        waiting = unfinished - rows + self._asked - len(self._searching)
        size = self.model.config.cache_config.kv_cache_memory_bytes or 0
        return Load(rows, len(self._searching), max(0, waiting), int(size))

    def give_back_memory(self) -> None:
        give_back_memory()
        with suppress(Stopped):
            if not self._closed:
                self._client.rpc("steer_give_back_memory")

    def close(self) -> None:
        """End what still runs, with an error for those who wait. The engine itself is its owner's to shut down."""
        self._closed = True
        for call in list(self._jobs):
            call.cancel()
        for pool in (self._searches, self._measures):
            pool.shutdown(wait=False, cancel_futures=True)

    # ---- on the engine's loop

    async def _job(self, prepared: Prepared, emit: Emit) -> None:
        try:
            async with self._holding(prepared.files):
                await (self._write if prepared.plan is None else self._search)(prepared, emit)
        except asyncio.CancelledError:
            emit(_stopping())
            raise
        except Exception as error:
            emit(_told(error))

    async def _write(self, prepared: Prepared, emit: Emit) -> None:
        began = time.perf_counter()
        choices = await written(self.model, self._client, prepared, emit)
        cost = spent(prepared, choices)
        if prepared.measures:

            def measure(branch: Asynchronous) -> Cost:
                return measured(self.model.through(branch), prepared, choices, emit)

            cost = cost + await self._apart(self._measures, measure)
        emit(Finished(len(choices), replace(cost, seconds=time.perf_counter() - began)))

    async def _search(self, prepared: Prepared, emit: Emit) -> None:
        def run(branch: Asynchronous) -> Finished:
            self._searching.add(branch)
            try:
                return search(self.model.through(branch), branch, prepared, emit)
            finally:
                self._searching.discard(branch)

        self._asked += 1
        try:
            finished = await self._apart(self._searches, run)
        finally:
            self._asked -= 1
        emit(finished)

    async def _apart(self, pool: ThreadPoolExecutor, work: Callable[[Asynchronous], T]) -> T:
        """Work in a thread, through a client of its own that is stopped where nobody waits any more."""
        branch = self._client.branch()
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, work, branch)
        finally:
            branch.stop()

    @asynccontextmanager
    async def _holding(self, files: Mapping[str, Path]) -> AsyncIterator[None]:
        """Keep artifacts registered meanwhile; those that are gone are registered again, which takes a thread."""
        if not self.model.hold_now(files):
            held = asyncio.get_running_loop().run_in_executor(None, self.model.hold, files)
            try:
                await asyncio.shield(held)
            except asyncio.CancelledError:
                held.add_done_callback(lambda done: None if done.exception() else self.model.release(files))
                raise
        try:
            yield
        finally:
            self.model.release(files)


def _stopping() -> SteerError:
    return SteerError("the server is stopping")


def _told(error: Exception) -> Exception:
    """An error as the server tells it."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, VLLMValidationError):
        field = getattr(error, "parameter", None) or "request"
        return InputError(str(field), "a value that vLLM refuses", str(error))
    if isinstance(error, EngineDeadError):
        return SteerError("vLLM's engine has stopped")
    if not isinstance(error, SteerError):
        log.error("a request failed", exc_info=error)
    return error


# ------------------------------------------------------------------------------------------------- an engine of its own


class _Owner(VLLMEngine):
    """The same with an engine and a loop of its own, which end with it."""

    def __init__(self, loop: _Loop, client: Any, **settings: Any) -> None:
        self._thread = loop
        super().__init__(client, loop.loop, **settings)
        self._warm()

    def _warm(self) -> None:
        """Have the engine compile what it only does once log-probabilities are asked for, which takes seconds."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=2, temperature=0.0, logprobs=1, prompt_logprobs=0)
        self._client.draw([{"prompt_token_ids": [0, 0]}], [params])

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
) -> VLLMEngine:
    """A vLLM engine for `steer serve`, in processes of its own; `close` ends them.

    `settings` are those of vLLM's `AsyncEngineArgs`, over ours. Raises `SteerError` where vLLM is missing, of a version
    that is not supported, or cannot load the model.
    """
    check_version()
    check_whole("max_rows", max_rows)
    from steer.adapters.vllm_plugin import register
    from steer.models import resolve

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
        return _Owner(loop, client, name=name or str(model), max_rows=max_rows, searches=searches)
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
        "model": model, "dtype": dtype, "max_num_seqs": max_rows, "enable_prefix_caching": True,
        "logprobs_mode": "raw_logprobs", "max_logprobs": 20, "disable_log_stats": True, **slow, **given,
        "additional_config": {"steer": {}, **extra},
    }  # fmt: skip
