"""vLLM behind the server: see `steer.serving`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

from steer.adapters.language.serving import ServedModel
from steer.adapters.vllm.artifacts import INNER, Source
from steer.adapters.vllm.client import Asynchronous, Stopped
from steer.adapters.vllm.model import VLLMModel
from steer.adapters.vllm.server.preparing import Prepared, Preparer, hold
from steer.adapters.vllm.server.writing import measured, search, spent, written
from steer.core import Cost, InputError, SteerError, check_whole
from steer.edits import PROMPTS
from steer.serving.engine import Event, Finished, Load
from steer.serving.requests import Emit, relayed

__all__ = ["VLLMEngine"]


T = TypeVar("T")
log = logging.getLogger("steer.serving")


class VLLMEngine(ServedModel[Prepared]):
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
        split_special_tokens: control tokens that messages spell are text (see `TextModel.split_special_tokens`).
    """

    kind = "vllm"

    def __init__(
        self,
        client: Any,
        loop: asyncio.AbstractEventLoop,
        *,
        name: str | None = None,
        max_rows: int | None = None,
        searches: int = 4,
        split_special_tokens: bool = True,
    ) -> None:
        rows = int(client.vllm_config.scheduler_config.max_num_seqs) if max_rows is None else max_rows
        for field, value in (("max_rows", rows), ("searches", searches)):
            check_whole(field, value)
        self._client, self._loop = Asynchronous(client, loop), loop
        given = client.vllm_config.model_config.served_model_name
        called = name or str(given if isinstance(given, str) else given[0])
        self.model = VLLMModel(self._client, called)
        self.serve(Preparer(self.model, rows), called, split_special_tokens)
        self._searches = ThreadPoolExecutor(searches, "steer-search")
        self._measures = ThreadPoolExecutor(2, "steer-measure")
        self._jobs: set[Future[None]] = set()
        self._asked = 0
        self._searching: set[Asynchronous] = set()
        self._closed = False

    @property
    def own_edits(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.model.front.settings.tuned)

    @property
    def edit_kinds(self) -> tuple[str, ...]:
        return tuple(sorted((*INNER, *PROMPTS)))

    def warm(self) -> None:
        """Have the engine compile what it only does once log-probabilities are asked for: it takes seconds, in which
        nobody else is answered. Blocks: not for the engine's loop.
        """
        from vllm import SamplingParams

        most = int(self.model.config.model_config.max_logprobs)
        if most != 0:
            params = SamplingParams(max_tokens=2, temperature=0.0, logprobs=1, prompt_logprobs=0)
            self._client.draw([{"prompt_token_ids": [0, 0]}], [params])

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
        super().give_back_memory()
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
    async def _holding(self, files: Mapping[str, Source]) -> AsyncIterator[None]:
        """Keep artifacts registered meanwhile; those that are gone are registered again, which takes a thread."""
        if not self.model.hold_now(files):
            held = asyncio.get_running_loop().run_in_executor(None, hold, self.model, files)
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
