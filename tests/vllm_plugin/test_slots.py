"""Rows of a fixed number of slots: what is admitted always fits, every token gets its own row, and none is kept for a
request that has ended.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_requests import DEPTH, WIDTH, direction, registered, settings, vector
from torch import Tensor, nn
from vllm_tools import PROMPTS, controller
from vllm_tools import vector as real_vector

from steer import Gate
from steer.adapters.vllm.artifacts import pack
from steer.adapters.vllm.plugin.registry import Registry
from steer.adapters.vllm.plugin.requests import Resolved
from steer.adapters.vllm.plugin.worker import Worker
from steer.adapters.vllm.settings import model_info, settings_of
from steer.core import InputError, SteerError
from steer.methods.operators import Probe

REQUESTS, EACH, BUDGET = 4, 3, 24
SCOPES = ("all", "prompt", "last", "generated", "reply", "from:3", "from:9", "from:20")


class Block(nn.Module):
    """Returns its input, as a vLLM block does: what is still to be added to the residual, and the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, residual


class Stack(nn.Module):
    """Blocks between which nothing happens: its output less its input is what was added."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, hidden: Tensor) -> Tensor:
        added = torch.zeros_like(hidden)
        for layer in self.layers:
            added, hidden = layer(added, hidden)
        return added


def config() -> Any:
    text = SimpleNamespace(num_hidden_layers=DEPTH, hidden_size=WIDTH, model_type="llama")
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=BUDGET, max_num_seqs=REQUESTS),
        model_config=SimpleNamespace(hf_text_config=text, dtype=torch.float32, served_model_name=None, model="tiny"),
    )


@dataclass(eq=False)
class Running:
    """A request of the simulated scheduler."""

    id: str
    length: int
    prompt: int
    params: Any
    at: int = 0

    @property
    def resolved(self) -> Resolved:
        found = Resolved.of(self.params)
        assert found is not None
        return found


class Simulation:
    """A scheduler that takes, preempts and aborts requests at random, in front of a `Worker` without an engine."""

    def __init__(self, graphs: bool, slots: int, seed: int) -> None:
        self.random = random.Random(seed)
        own = settings(graphs=graphs, slots=slots, requests=REQUESTS, artifacts=64)
        self.model = Stack()
        self.worker = Worker(self.model, config(), own)
        self.front = Registry(own, model_info(self.worker.config, "", None))
        self.constants: dict[str, Tensor] = {}
        gate = Gate(Probe(direction(50)), 0)
        for i in range(6):
            made = vector(1.0, seed=10 * i, layers=(i % DEPTH, 3), gate=gate if i >= 4 else None)
            digest = registered(self.front, str(i), made)
            self.worker.register(digest, pack(made), False, "front")
            added = [torch.zeros(2, WIDTH) for _ in range(2)]
            for k, term in enumerate(made.terms(self.front.info)):
                constant = term.operator.constant
                assert constant is not None
                added[k][k] = constant
            self.constants[digest] = torch.stack([part.sum(0) for part in added])
        self.waiting: list[Running] = []
        self.running: list[Running] = []
        self.finished: list[str] = []
        self.refused = self.served = 0

    def request(self, edits: Sequence[tuple[str, str]], prompt: int, length: int, name: str) -> Running:
        given = {"edits": [{"name": edit, "scope": scope} for edit, scope in edits]}
        resolved = self.front.resolve(self.front.parse(given), prompt)
        return Running(name, length, prompt, SimpleNamespace(extra_args={"steer": resolved.pack()}))

    def arrive(self) -> None:
        taken = {request.id for request in (*self.waiting, *self.running)} | set(self.finished)
        name = next(name for name in map(str, range(99)) if name not in taken)  # names come back soon
        number = self.random.randrange(4)
        edits = [(str(self.random.randrange(6)), self.random.choice(SCOPES)) for _ in range(number)]
        prompt = self.random.randrange(1, 30)
        try:
            self.waiting.append(self.request(edits, prompt, prompt + self.random.randrange(1, 10), name))
        except InputError as error:
            assert error.field == "steer.edits" and "slots" in error.allowed
            self.refused += 1

    def disturb(self) -> None:
        """Preempt a request, or abort one."""
        if self.running and self.random.random() < 0.2:
            gone = self.running.pop(self.random.randrange(len(self.running)))
            if self.random.random() < 0.5:
                gone.at = 0
                self.waiting.insert(0, gone)
            else:
                self.finished.append(gone.id)

    def step(self) -> None:
        while self.waiting and len(self.running) < REQUESTS:
            self.running.append(self.waiting.pop(0))
        budget, batch = BUDGET, []
        for request in self.running:
            known = max(request.prompt, request.at + 1)
            count = min(known - request.at, budget, self.random.choice([1, 5, BUDGET]))
            if count:
                batch.append((request, count))
                budget -= count
        self.worker.finish(self.finished)
        self.finished = []
        self.run(batch)
        done = [request for request in self.running if request.at >= request.length]
        self.finished += [request.id for request in done]
        self.served += len(done)
        self.running = [request for request in self.running if request not in done]

    def run(self, batch: Sequence[tuple[Running, int]]) -> None:
        """One pass over `(request, tokens)`: what is added to every token must be what acts on it."""
        starts = np.array([request.at for request, _ in batch], dtype=np.int32)
        counts = np.array([count for _, count in batch], dtype=np.int32)
        known = {request.id: (request.params, request.prompt) for request, _ in batch}
        dropped = self.worker.step([request.id for request, _ in batch], starts, counts, known.__getitem__)
        tokens = torch.randn(int(counts.sum()), WIDTH)
        want = [self.expected(request, at) for request, n in batch for at in range(request.at, request.at + n)]
        assert torch.allclose(self.model(tokens), torch.stack(want), atol=1e-5)
        slots = self.worker.slots
        assert slots.used + len(slots._free) == slots.capacity
        for i, (request, count) in enumerate(batch):
            request.at = request.resolved.rewind if i in dropped else request.at + count

    def expected(self, request: Running, at: int) -> Tensor:
        held = self.worker.requests.get(request.id)
        total = torch.zeros(WIDTH)
        if held is None or held.reading:
            return total
        for entry, weight in zip(request.resolved.hidden, held.weights, strict=True):
            if entry.start <= at and (entry.stop is None or at < entry.stop):
                constants = self.constants[entry.artifact]
                total += constants.sum(0) if weight is None else weight @ constants
        return total


@pytest.mark.parametrize(("graphs", "slots"), [(True, REQUESTS * EACH), (False, 1)], ids=["fixed", "growing"])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_admitted_fits(graphs: bool, slots: int, seed: int) -> None:
    """Some hundred requests with random edits, scopes and chunks, preempted and aborted at random."""
    simulation = Simulation(graphs, slots, seed)
    for _ in range(600):
        if len(simulation.waiting) < 4:
            simulation.arrive()
        simulation.disturb()
        simulation.step()
    assert simulation.served >= 100
    assert (simulation.refused > 0) == graphs
    worker = simulation.worker
    assert (worker.slots.capacity == slots) == graphs
    worker.finish([request.id for request in (*simulation.running, *simulation.waiting)] + simulation.finished)
    assert not worker.requests and all(own is None for own, _ in worker.slots._slot)


def test_the_bound_is_reached_and_not_passed() -> None:
    """Four requests with three rows each fill twelve slots in one step; one row more would not fit."""
    simulation = Simulation(True, REQUESTS * EACH, 0)
    edits = [[(str(i), "all"), (str((i + 1) % 4), "from:2"), (str((i + 2) % 4), "from:4")] for i in range(4)]
    batch = [(simulation.request(mine, 6, 9, str(i)), 6) for i, mine in enumerate(edits)]
    assert [request.resolved.rows for request, _ in batch] == [EACH] * 4
    simulation.run(batch)
    assert simulation.worker.slots.used == REQUESTS * EACH
    with pytest.raises(InputError, match=r"slots of 16 or more"):
        simulation.request([*edits[0], ("0", "from:5")], 6, 9, "more")
    simulation.front.settings = settings(slots=99, requests=1)
    simulation.worker.finish([request.id for request, _ in batch])
    over = [(simulation.request([*mine, (str(i), "from:5")], 6, 9, str(i)), 6) for i, mine in enumerate(edits)]
    with pytest.raises(SteerError, match="slots"):
        simulation.run(over)


def test_rows_are_counted_by_what_acts_together() -> None:
    front = Simulation(False, 1, 0).front

    def count(*edits: tuple[str, str]) -> int:
        given = {"edits": [{"name": name, "scope": scope} for name, scope in edits]}
        return front.resolve(front.parse(given), 10).rows

    assert count() == 0
    assert count(("0", "all")) == count(("0", "from:5")) == count(("0", "all"), ("1", "all")) == 1
    assert count(("0", "prompt"), ("1", "generated")) == 2
    assert count(("0", "all"), ("1", "last")) == 2  # three segments, of which the outer two share a row
    assert count(("0", "prompt"), ("1", "last"), ("2", "generated")) == 3
    assert count(("4", "all"), ("1", "from:5"), ("2", "from:20")) == 3


def test_too_few_slots_are_refused_before_the_model_is_loaded() -> None:
    pytest.importorskip("vllm")
    from vllm.config import CompilationMode, CUDAGraphMode

    def given(mode: Any, slots: int) -> Any:
        made = config()
        made.additional_config = {"steer": {"slots": slots}}
        made.compilation_config = SimpleNamespace(mode=mode, cudagraph_mode=CUDAGraphMode.NONE)
        made.parallel_config = SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1)
        made.speculative_config = None
        return made

    for mode in (CompilationMode.NONE, CompilationMode.DYNAMO_TRACE_ONCE):
        held = settings_of(given(mode, REQUESTS))
        assert held is not None and held.requests == REQUESTS
    settings_of(given(CompilationMode.NONE, 1))
    with pytest.raises(InputError, match=f"{REQUESTS} or more"):
        settings_of(given(CompilationMode.DYNAMO_TRACE_ONCE, REQUESTS - 1))


def test_many_short_requests_leave_nothing_behind(engine: Any) -> None:
    """Through a real engine: two hundred requests with different edits, a third of them aborted on their way."""
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    worker = runner.model.steer
    llm, process = engine.llm.llm_engine, engine.process(temperature=0, max_new_tokens=4)
    before, name = worker.slots.capacity, engine.name_of(real_vector(0.2))
    for i in range(200):
        edit = controller(strength=0.1 + i / 1000) if i % 5 == 0 else engine.edit(name, 0.1 + i / 1000)
        held = llm.add_request(f"short-{i}", *process.edited(edit).request(PROMPTS[i % 2], 2 + i % 3))
        if i % 3 == 0:
            llm.step()
            llm.abort_request([held or f"short-{i}"], internal=held is not None)
    while llm.has_unfinished_requests():
        llm.step()
    llm.step()
    assert not worker.requests and worker.slots.capacity == before
    assert worker.slots.used + len(worker.slots._free) == before
    assert all(own is None for own, _ in worker.slots._slot)
