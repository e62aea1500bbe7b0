"""How the rest of steer talks to a vLLM engine: the same calls to a blocking engine and to an asynchronous one."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar
from uuid import uuid4

from steer.adapters._vllm_front import FrontEnd

__all__ = ["Asynchronous", "Blocking", "Client", "Stopped"]

T = TypeVar("T")
Took = Callable[[int, Any], None]
"""Called with the number of a request and its output, as soon as it is complete."""


class Stopped(BaseException):
    """Raised in work whose client was stopped. No method's own `except Exception` catches it."""


class Client(ABC):
    """A running engine. Calls block until they are answered."""

    def __init__(self, engine: Any) -> None:
        """`engine` has vLLM's `input_processor` and `output_processor`, which live in this process."""
        from steer.adapters.vllm_plugin import front_end

        self.config: Any = engine.vllm_config
        self.tokenizer: Any = engine.get_tokenizer()
        self.front: FrontEnd = front_end(engine.input_processor)
        self._outputs = engine.output_processor

    def used(self) -> set[str]:
        """Digests of artifacts that requests on their way need."""
        from steer.adapters.vllm_plugin import used_artifacts

        return used_artifacts(self._outputs)

    @abstractmethod
    def draw(self, prompts: Sequence[Any], params: Sequence[Any], took: Took | None = None) -> list[Any]:
        """One `RequestOutput` for each prompt under its `SamplingParams`, in their order. They run together; `took`
        sees each when it is complete, while others still run. Whatever ends the call aborts what has not finished.
        """

    @abstractmethod
    def rpc(self, method: str, *args: Any) -> list[Any]:
        """Call a method on every worker; returns what each of them answers."""

    @abstractmethod
    def close(self) -> None:
        """Shut the engine down."""


class Blocking(Client):
    """A `vllm.LLM`. One thread may use it at a time."""

    def __init__(self, llm: Any) -> None:
        super().__init__(llm.llm_engine)
        self.llm = llm

    def draw(self, prompts: Sequence[Any], params: Sequence[Any], took: Took | None = None) -> list[Any]:
        engine, run = self.llm.llm_engine, uuid4().hex
        number = {f"{run}-{i}": i for i in range(len(prompts))}
        waiting = dict.fromkeys(number)
        outputs: list[Any] = [None] * len(prompts)
        try:
            for id, prompt, mine in zip(number, prompts, params, strict=True):
                engine.add_request(id, prompt, mine)
            while waiting:
                for output in engine.step():
                    if output.finished and output.request_id in waiting:
                        i = number[output.request_id]
                        del waiting[output.request_id]
                        outputs[i] = output
                        if took is not None:
                            took(i, output)
        finally:
            if waiting:
                engine.abort_request(list(waiting))
        return outputs

    def rpc(self, method: str, *args: Any) -> list[Any]:
        return list(self.llm.collective_rpc(method, args=args))

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


class Asynchronous(Client):
    """An `AsyncLLM` on the event loop `loop`, for other threads than that loop's own; any number of them at once.

    `branch` gives a client of the same engine that can be stopped on its own.
    """

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(engine)
        self.engine, self.loop = engine, loop
        self._stopped = False
        self._calls: set[Future[Any]] = set()
        self._lock = threading.Lock()

    def branch(self) -> Asynchronous:
        """Another client of this engine."""
        return Asynchronous(self.engine, self.loop)

    def stop(self) -> None:
        """Abort what this client is waiting for; from then on its calls raise `Stopped`."""
        with self._lock:
            self._stopped = True
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    def draw(self, prompts: Sequence[Any], params: Sequence[Any], took: Took | None = None) -> list[Any]:
        async def one(i: int) -> Any:
            output = None
            async for output in self.engine.generate(prompts[i], params[i], f"steer-{uuid4().hex}"):  # noqa: B007
                pass
            if took is not None:
                took(i, output)
            return output

        async def every() -> list[Any]:
            tasks = [asyncio.ensure_future(one(i)) for i in range(len(prompts))]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()

        return self._wait(every())

    def rpc(self, method: str, *args: Any) -> list[Any]:
        return list(self._wait(self.engine.collective_rpc(method, args=args)))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if self._stopped:
                work.close()
                raise Stopped
            call = asyncio.run_coroutine_threadsafe(work, self.loop)
            self._calls.add(call)
        try:
            return call.result()
        except BaseException:
            call.cancel()
            if self._stopped:
                raise Stopped from None
            raise
        finally:
            with self._lock:
                self._calls.discard(call)

    def close(self) -> None:
        self.engine.shutdown()
