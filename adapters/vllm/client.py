"""Calls to a vLLM engine, the same for a blocking engine and an asynchronous one."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar
from uuid import uuid4

import torch
from filelock import FileLock

from steer.adapters.language.facts import CALIBRATION, fingerprint
from steer.adapters.vllm.artifacts import PackedArtifact
from steer.adapters.vllm.plugin.reading import check_engine, packed
from steer.adapters.vllm.plugin.registry import Registry
from steer.adapters.vllm.plugin.requests import Inside
from steer.adapters.vllm.settings import model_info
from steer.core import ModelInfo
from steer.core.readings import Readings

__all__ = ["Asynchronous", "Blocking", "Client", "Stopped", "Took", "together"]


T = TypeVar("T")
Took = Callable[[int, Any], None]
"""Called with the number of a request and its output, as soon as it is complete."""


_TAUGHT = 64
"""Sets of readings that are sent once; each worker keeps several times as many."""
PATIENCE = 20.0
"""Seconds that an engine's processes get to end by themselves, and to give back what they share."""


class Stopped(BaseException):
    """Raised in work whose client was stopped. No method's own `except Exception` catches it."""


class Client(ABC):
    """A running engine. Calls block until they are answered."""

    def __init__(self, engine: Any) -> None:
        """`engine` has vLLM's `input_processor` and `output_processor`, which live in this process."""
        from steer.adapters.vllm.plugin.install import front_end

        self.config: Any = engine.vllm_config
        self.tokenizer: Any = engine.get_tokenizer()
        self.front: Registry = front_end(engine.input_processor)
        self._outputs = engine.output_processor

    def used(self) -> set[str]:
        """Digests of artifacts that requests on their way need."""
        from steer.adapters.vllm.plugin.install import used_artifacts

        return used_artifacts(self._outputs)

    # ---- artifacts; whoever calls these sees to it that one thread does at a time

    def introduce(self, norms: bool) -> None:
        """Find the model's fingerprint and, with `norms`, the residual stream's norms; then `front.info` has them."""
        front = self.front
        if front.info.fingerprint and (front.measured or not norms):
            return
        with _one_of_the_servers():
            facts = self.rpc("steer_facts")
            mark, values = _fingerprint(front.info, facts), facts[0]["norms"]
            if norms and any(part["norms"] is None for part in facts):
                self.rpc("steer_measure", True)
                self.draw(*_calibration(self.tokenizer))
                values = _norms(self.rpc("steer_measure", False), front.info.num_layers)
            front.measured = front.measured or norms
            front.info = model_info(self.config, mark, None if values is None else torch.tensor(values), self.tokenizer)
            self.rpc("steer_introduce", mark, values)

    def register(self, name: str, data: bytes, any_model: bool, used: set[str]) -> str:
        """Register `data` (see `Artifact.parse`) under `name`; returns its digest. Digests in `used` make no room for
        it. Raises `InputError`.
        """
        self.introduce(norms=PackedArtifact.parse(data).card.kind != "value")
        artifact, gone = self.front.admit(name, data, any_model, used)
        if artifact.digest not in self.front.artifacts:
            self.rpc("steer_register", artifact.digest, data, any_model, self.front.mark)
        if gone:
            self.rpc("steer_evict", gone, self.front.mark)
        self.front.add(name, artifact, gone)
        return artifact.digest

    def remove(self, name: str, used: set[str]) -> None:
        """Forget a name. Raises `InputError`."""
        gone = self.front.remove(name, used)
        if gone:
            self.rpc("steer_evict", gone, self.front.mark)

    def teach(self, readings: Readings) -> str:
        """Send what requests may read to the workers; returns the digest by which they name it. Raises
        `UnsupportedError` where the engine's passes are not read.
        """
        check_engine(self.front.settings)
        digest, data = packed(readings)
        if digest not in self.front.taught:
            self.rpc("steer_learn", digest, data)
            self.front.taught[digest] = None
            while len(self.front.taught) > _TAUGHT:
                self.front.taught.pop(next(iter(self.front.taught)))
        return digest

    @abstractmethod
    def draw(self, prompts: Sequence[Any], params: Sequence[Any], took: Took | None = None) -> list[Any]:
        """One `RequestOutput` for each prompt under its `SamplingParams`, in their order. They run together; `took`
        sees each when it is complete, while others still run. Whatever ends the call aborts what has not finished.
        """

    @abstractmethod
    def rpc(self, method: str, *args: Any) -> list[Any]:
        """Call a method on every worker of every engine; returns what each of them answers."""

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
        self.drawn = 0
        """Tokens that its requests have drawn, those of requests that were aborted left out."""
        self.on_drawn: Callable[[], None] = lambda: None
        """Called when a request is complete, by the thread that waits for it in `draw`."""
        self._stopped = False
        self._calls: set[Future[Any]] = set()
        self._lock = threading.Lock()

    def branch(self) -> Asynchronous:
        """Another client of this engine."""
        return Asynchronous(self.engine, self.loop)

    def stop(self) -> None:
        """Abort what this client is waiting for; from then on its calls raise `Stopped`. Any thread may call it."""
        with self._lock:
            self._stopped = True
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    async def stream(self, prompt: Any, params: Any) -> AsyncGenerator[Any]:
        """The `RequestOutput`s of one request, on the engine's loop. Closing it aborts the request."""
        async with aclosing(self.engine.generate(rendered(prompt), params, f"steer-{uuid4().hex}")) as outputs:
            async for output in outputs:
                yield output

    def draw(self, prompts: Sequence[Any], params: Sequence[Any], took: Took | None = None) -> list[Any]:
        arrived: SimpleQueue[tuple[int, Any] | None] = SimpleQueue()

        async def one(i: int) -> Any:
            output = None
            async with aclosing(self.stream(prompts[i], params[i])) as outputs:
                async for output in outputs:  # noqa: B007
                    pass
            assert output is not None
            self.drawn += sum(len(completion.token_ids) for completion in output.outputs)
            arrived.put((i, output))
            return output

        with self._calling(together(one(i) for i in range(len(prompts)))) as call:
            call.add_done_callback(lambda _: arrived.put(None))
            while (item := arrived.get()) is not None:
                self.on_drawn()
                if took is not None:
                    took(*item)
            return call.result()

    def rpc(self, method: str, *args: Any) -> list[Any]:
        with self._calling(self._everywhere(method, args)) as call:
            return call.result()

    async def ask(self, method: str, *args: Any) -> list[Any]:
        """`rpc` on the engine's loop."""
        return await self._everywhere(method, args)

    async def _everywhere(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        """vLLM's own `collective_rpc` reaches all data-parallel engines, too, but tells what the first one answers."""
        core = self.engine.engine_core
        if len(getattr(core, "core_engines", ())) < 2:
            return list(await self.engine.collective_rpc(method, args=args))
        parts = await core.call_utility_all_async("collective_rpc", method, None, args, None)
        return [answer for part in parts for answer in part]

    @contextmanager
    def _calling(self, work: Coroutine[Any, Any, T]) -> Iterator[Future[T]]:
        """Work on the engine's loop, which does not outlive the block."""
        with self._lock:
            if self._stopped:
                work.close()
                raise Stopped
            call = asyncio.run_coroutine_threadsafe(work, self.loop)
            self._calls.add(call)
        try:
            yield call
        except BaseException:
            call.cancel()
            if self._stopped:
                raise Stopped from None
            raise
        finally:
            with self._lock:
                self._calls.discard(call)

    def close(self) -> None:
        self.engine.shutdown(timeout=PATIENCE)


@contextmanager
def _one_of_the_servers() -> Iterator[None]:
    """Hold what only one of the processes may do at a time that serve the same engines: they have one parent."""
    with FileLock(Path(tempfile.gettempdir()) / f"steer-{os.getuid()}-{os.getppid()}.lock"):
        yield


async def together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of several coroutines that run at once. Where one fails, or the caller is cancelled, all end."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def rendered(prompt: Any) -> Any:
    """A prompt of token ids as vLLM's own servers pass it on, so that nothing is left to be done in other threads."""
    return prompt if "type" in prompt else {"type": "token", **prompt}


def _fingerprint(info: ModelInfo, parts: Sequence[dict[str, Any]]) -> str:
    sample = dict(sorted({i: v for part in parts for i, v in zip(part["index"], part["value"], strict=True)}.items()))
    numbers = torch.tensor(list(sample.values()))
    return fingerprint(info.model_type, info.num_layers, info.width, parts[0]["shape"], numbers)


def _norms(parts: Sequence[dict[Any, list[float]]], depth: int) -> list[float] | None:
    """The median norm of each block `[L]`, or None where a rank saw nothing."""
    seen: dict[int, list[float]] = {}
    for part in parts:
        for layer, values in part.items():  # of several engines, each has read some of the sentences
            seen.setdefault(int(layer), []).extend(values)
    if any(not seen.get(layer) for layer in range(depth)):
        return None
    return [float(torch.tensor(seen[layer]).median()) for layer in range(depth)]


def _calibration(tokenizer: Any) -> tuple[list[Any], list[Any]]:
    """Requests that read the sentences on which norms are measured."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=list(tokenizer(text)["input_ids"])) for text in CALIBRATION]
    params = SamplingParams(
        max_tokens=1, temperature=0.0, skip_reading_prefix_cache=True, extra_args={"steer": Inside(measure=True)}
    )
    return prompts, [params] * len(prompts)
