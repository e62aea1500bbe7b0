"""vLLM behind the server: the events of `TransformersEngine`, from an engine in processes of its own."""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_tools import MISSING, controller, guide, vector

import steer
from steer.core import InputError, RawText, RewardError, SteerError
from steer.core.readings import StopIf
from steer.methods.best_of_n import BestOfN
from steer.methods.fk import FKSteering
from steer.rewards import as_reward
from steer.serving.engine import (
    Delta,
    Ended,
    Event,
    Finished,
    NamedEdit,
    Progress,
    Sampling,
    Started,
    Steering,
    Task,
    TokenPrompt,
)
from steer.serving.inline import Inline
from steer.serving.wire import EditRequest

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING or "vLLM is there")

CHAT = [{"role": "user", "content": "How was your day?"}]
RAW = RawText("In the morning the two of them walked along the river, past the mill and the old")
GREEDY = Sampling(max_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def ours(folder: Any) -> Iterator[Any]:
    from steer.adapters.vllm.server.own_engine import serving_engine

    # Room for two artifacts, so that they come and go all the time.
    settings = {"max_model_len": 256, "max_num_batched_tokens": 64, "additional_config": {"steer": {"artifacts": 2}}}
    engine = serving_engine("smollm2-135m", dtype="float32", max_rows=16, searches=2, settings=settings)
    children = multiprocessing.active_children()
    yield engine
    engine.close()
    engine.close()
    assert children and not any(child.is_alive() for child in children)
    with pytest.raises(SteerError, match="stopping"):
        events(engine, Task((CHAT,), 1, GREEDY), prepared=object())


@pytest.fixture(scope="module")
def theirs(folder: Any) -> Iterator[Any]:
    from steer.adapters.transformers.serving.engine import TransformersEngine

    model = steer.load("smollm2-135m", dtype="float32", device="cpu")
    engine = TransformersEngine(model, max_rows=16)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artifacts of every kind."""
    from steer.adapters.vllm.artifacts import pack

    edits = {
        "vector": vector(1.0),
        "other": vector(1.0, seed=1),
        "clamp": vector(2.0, operator="clamp"),
        "controller": controller(strength=2.0),
        "value": guide(beta=None),
    }
    folder = tmp_path_factory.mktemp("artifacts")
    for name, edit in edits.items():
        (folder / f"{name}.safetensors").write_bytes(pack(edit))
    return {name: folder / f"{name}.safetensors" for name in edits}


def named(path: Path, **settings: Any) -> NamedEdit:
    return NamedEdit(path, hashlib.sha256(path.read_bytes()).hexdigest(), EditRequest(name=path.stem, **settings))


async def collected(engine: Any, task: Task, prepared: Any = None) -> list[Event]:
    found = []
    given = prepared or await asyncio.to_thread(engine.prepare, task)
    async with aclosing(engine.run(given)) as stream:
        async for event in stream:
            found.append(event)
    return found


def events(engine: Any, task: Task, prepared: Any = None) -> list[Event]:
    return asyncio.run(collected(engine, task, prepared))


def texts(found: list[Event]) -> list[str]:
    """By choice."""
    made: dict[int, str] = {}
    for event in found:
        if isinstance(event, Delta):
            made[event.choice] = made.get(event.choice, "") + event.text
    return [made[choice] for choice in sorted(made)]


def ended(found: list[Event]) -> list[Ended]:
    return sorted((e for e in found if isinstance(e, Ended)), key=lambda e: e.choice)


def same(ours: list[Event], theirs: list[Event]) -> None:
    """The same events: kinds in order, texts, reasons, counts and log-probabilities."""
    assert [type(e) for e in ours] == [type(e) for e in theirs]
    assert texts(ours) == texts(theirs)
    for mine, other in zip(ended(ours), ended(theirs), strict=True):
        assert (mine.choice, mine.reason, mine.tokens) == (other.choice, other.reason, other.tokens)
        assert mine.reward == pytest.approx(other.reward)
    assert ours[0] == theirs[0]
    assert isinstance(ours[-1], Finished) and isinstance(theirs[-1], Finished)
    assert ours[-1].candidates == theirs[-1].candidates
    assert ours[-1].cost.generated_tokens == theirs[-1].cost.generated_tokens
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(mine, Delta) and isinstance(other, Delta):
            same_logprobs(mine.logprobs, other.logprobs)


def same_logprobs(ours: Any, theirs: Any) -> None:
    assert [(t.token, t.bytes) for t in ours] == [(t.token, t.bytes) for t in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.logprob == pytest.approx(other.logprob, abs=1e-3)
        same_logprobs(mine.top, other.top)


# ------------------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("kind", ["plain", "vector", "scoped", "clamp", "controller", "value", "two"])
def test_greedy_events_are_those_of_the_other_engine(kind: str, ours: Any, theirs: Any, files: Any) -> None:
    edits = {
        "plain": (),
        "vector": (named(files["vector"]),),
        "clamp": (named(files["clamp"]),),
        "scoped": (named(files["vector"], strength=1.5, layers="12-14", scope="generated"),),
        "controller": (named(files["controller"]),),
        "value": (named(files["value"]),),
        "two": (named(files["vector"]), named(files["other"], strength=-0.2)),
    }[kind]
    steering = Steering(edits, reward=as_reward("sentiment"), beta=0.02, kl=False)
    changed = []
    for prompt in (CHAT, RAW):
        task = Task((prompt,), 1, Sampling(max_tokens=12, temperature=0, logprobs=3), steering)
        found = events(ours, task)
        same(found, events(theirs, task))
        changed.append(texts(found) != texts(events(theirs, Task((prompt,), 1, GREEDY))))
    assert any(changed) == bool(edits)


def test_a_vector_of_the_request_is_the_one_of_the_file(ours: Any, theirs: Any, files: Any) -> None:
    """On both engines, also where it was evicted meanwhile (there is room for two)."""
    tensors, _ = steer.load_artifact(files["vector"])
    layers = {k.removeprefix("direction."): v.tolist() for k, v in tensors.items()}
    settings = {"strength": 2.0, "operator": "clamp"}
    request = EditRequest.parse({"vector": {"layers": layers}, **settings})
    for engine in (ours, theirs):
        inline = Inline(lambda engine=engine: engine.info, 1 << 20).named(request, "steer.edits.0")
        edits = (inline, named(files["vector"], **settings))
        found = [texts(events(engine, Task((CHAT,), 1, GREEDY, Steering((edit,), kl=False)))) for edit in edits]
        prepared = engine.prepare(Task((CHAT,), 1, GREEDY, Steering((inline,), kl=False)))
        for other in ("other", "clamp"):
            events(engine, Task((CHAT,), 1, Sampling(max_tokens=1), Steering((named(files[other]),), kl=False)))
        again = texts(events(engine, prepared.task, prepared))
        assert found[0] == found[1] == again != texts(events(engine, Task((CHAT,), 1, GREEDY)))


def test_readings_are_those_of_the_other_engine(ours: Any, theirs: Any, files: Any) -> None:
    """Beside requests without, in streams and in a search; what cannot be done is refused by name."""
    read, edits = (named(files["other"]), named(files["clamp"])), (named(files["vector"], strength=0.3),)
    tasks = [
        Task((CHAT,), 2, GREEDY, Steering(edits, readings=read)),
        Task((RAW, RawText("The sun was")), 1, GREEDY, Steering(readings=read[:1]), stream=True),
        Task((CHAT,), 1, GREEDY, Steering(edits)),
        Task((CHAT,), 1, GREEDY, Steering(readings=read, sampler=BestOfN(1), repeats=1, reward=as_reward("length"))),
    ]

    async def together(engine: Any) -> list[list[Event]]:
        return list(await asyncio.gather(*(collected(engine, task) for task in tasks)))

    mine, other = asyncio.run(together(ours)), asyncio.run(together(theirs))
    for told, wanted in zip(mine, other, strict=True):
        ends = [sorted((e for e in found if isinstance(e, Ended)), key=lambda e: e.choice) for found in (told, wanted)]
        for a, b in zip(*ends, strict=True):
            assert (a.choice, a.reason, a.tokens, a.stopped) == (b.choice, b.reason, b.tokens, b.stopped)
            assert (a.readings or {}).keys() == (b.readings or {}).keys()
            for name, values in (b.readings or {}).items():
                assert len(values) == b.tokens and a.readings[name] == pytest.approx(values, abs=1e-4)
    firsts = [next(e for e in found if isinstance(e, Ended)) for found in mine]
    assert [bool(first.readings) for first in firsts] == [True, True, False, True]
    with pytest.raises(InputError, match=r"steer\.stop_if: got 'other < 1'; allowed: unset on vLLM"):
        ours.prepare(Task((CHAT,), 1, GREEDY, Steering(readings=read, stop=StopIf.parse("other < 1", ["other"]))))
    with pytest.raises(InputError, match=r"steer\.readings: got 'a controller'"):
        ours.prepare(Task((CHAT,), 1, GREEDY, Steering(readings=(named(files["controller"]),))))


def test_settings_mean_the_same(ours: Any, theirs: Any) -> None:
    token = theirs.preparer.model.tokenizer(" the", add_special_tokens=False)["input_ids"][0]
    settings: list[dict[str, Any]] = [
        {"temperature": 2.0, "top_k": 1, "seed": 3},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 0, "logit_bias": ((token, 4.0),)},
        {"temperature": 0, "logit_bias": ((token, 6.0),), "frequency_penalty": 1.5, "presence_penalty": 0.5},
        {"temperature": 0, "stop": ("ical Mon",)},
        {"temperature": 0, "stop": ("zz", " but")},
        {"temperature": 0, "stop": ("It",)},
        {"temperature": 0, "logit_bias": ((theirs.preparer.model.eos_token_ids[0], 100.0),), "logprobs": 1},
    ]
    for given in settings:
        task = Task((CHAT,), 1, Sampling(max_tokens=12, **given))
        same(events(ours, task), events(theirs, task))


def test_several_prompts_also_as_tokens(ours: Any, theirs: Any) -> None:
    ids = tuple(theirs.preparer.model.encode(RawText("The sun was")))
    task = Task((RAW, TokenPrompt(ids)), 2, GREEDY)
    found = events(ours, task)
    assert texts(found) == texts(events(theirs, task))
    assert found[0] == Started(len(ids) + len(theirs.preparer.model.encode(RAW)))


def test_streams_and_seeds(ours: Any, files: Any) -> None:
    def drawn(n: int, seed: int | None, stream: bool = False, **settings: Any) -> list[Event]:
        sampling = Sampling(max_tokens=16, seed=seed, logprobs=1, **settings)
        return events(ours, Task((CHAT,), n, sampling, Steering((named(files["vector"], strength=0.1),)), stream))

    whole, stream = drawn(3, 5), drawn(3, 5, stream=True)
    assert texts(stream) == texts(whole) and len(set(texts(whole))) == 3
    assert texts(drawn(1, 5)) == texts(whole)[:1] != texts(drawn(1, 6))
    assert texts(drawn(1, None)) != texts(drawn(1, None))
    assert sum(isinstance(e, Delta) for e in whole) == 3
    assert sum(isinstance(e, Delta) for e in stream) > 20
    for choice in range(3):
        pieces = [
            [t for e in found if isinstance(e, Delta) and e.choice == choice for t in e.logprobs]
            for found in (whole, stream)
        ]
        same_logprobs(*pieces)
        assert "".join(t.token for t in pieces[0]) == texts(whole)[choice]
    stops = drawn(1, 5, stream=True, stop=(texts(whole)[0][9:14],))
    assert texts(stops) == [texts(whole)[0][:9]] and ended(stops)[0].reason == "stop"


def test_a_crowd_writes_what_each_writes_alone(ours: Any, files: Any) -> None:
    kinds = [
        Steering(),
        Steering((named(files["vector"]),)),
        Steering((named(files["controller"]),)),
        Steering((named(files["vector"], strength=-1.5, scope="reply"),)),
    ]
    tasks = [Task((CHAT,), 1, GREEDY, kind) for kind in kinds]
    alone = [texts(events(ours, task)) for task in tasks]

    async def together() -> list[list[Event]]:
        return await asyncio.gather(*(collected(ours, tasks[i % 4]) for i in range(12)))

    assert [texts(found) for found in asyncio.run(together())] == alone * 3
    assert len({text for (text,) in alone}) == 4


# ------------------------------------------------------------------------------------------------------------- drift


def test_drift_is_log_q_minus_log_p(ours: Any, theirs: Any, files: Any) -> None:
    edit = named(files["vector"], strength=0.5)
    task = Task((CHAT,), 2, Sampling(max_tokens=10, seed=2, logprobs=0), Steering((edit,)))
    found = events(ours, task)
    model = theirs.preparer.model
    for choice in ended(found):
        pieces = [t for e in found if isinstance(e, Delta) and e.choice == choice.choice for t in e.logprobs]
        tokens = [model.tokenizer(t.token, add_special_tokens=False)["input_ids"] for t in pieces]
        assert all(len(ids) == 1 for ids in tokens)
        drawn = [ids[0] for ids in tokens]
        base = model.process(max_new_tokens=16).log_likelihood([CHAT], torch.zeros(1, dtype=torch.long), [drawn])
        assert choice.kl == pytest.approx(sum(t.logprob for t in pieces) - float(base[0]), abs=1e-2)


def test_drift_is_none_where_it_is_not_known(ours: Any, files: Any) -> None:
    edits, head = (named(files["vector"]),), (named(files["value"]),)
    known = [({}, Steering()), ({"temperature": 0.5}, Steering()), ({"temperature": 0}, Steering())]
    for given, steering in known:
        (choice,) = ended(events(ours, Task((CHAT,), 1, Sampling(max_tokens=4, **given), steering)))
        assert choice.kl == 0
    unknown: list[tuple[dict[str, Any], Steering | None]] = [
        ({}, None),
        ({}, Steering(kl=False)),
        ({"top_p": 0.9}, Steering()),
        ({"temperature": 0.5}, Steering(edits)),
        ({"top_k": 5}, Steering(edits)),
        ({}, Steering(head)),
        ({"temperature": 0}, Steering(edits)),
        ({"presence_penalty": 1.0}, Steering(edits)),
    ]
    for given, asked in unknown:
        (choice,) = ended(events(ours, Task((CHAT,), 1, Sampling(max_tokens=4, **given), asked)))
        assert choice.kl is None


def test_drift_of_a_text_that_fills_the_context(ours: Any, files: Any) -> None:
    prompt = TokenPrompt((504,) * 250)
    for new, known in ((5, True), (6, False)):
        task = Task((prompt,), 1, Sampling(max_tokens=new, seed=1), Steering((named(files["vector"]),)))
        (choice,) = ended(events(ours, task))
        assert (choice.reason, choice.tokens) == ("length", new)
        assert (choice.kl is not None) == known


# ---------------------------------------------------------------------------------------------------------- searches


def searching(sampler: Any, candidates: int, reward: Any = "sentiment", **more: Any) -> Task:
    steering = Steering(more.pop("edits", ()), sampler, 1, candidates, as_reward(reward), 0.5, block=4)
    return Task((CHAT,), 1, Sampling(max_tokens=12, seed=3), steering, **more)


def test_best_of_n(ours: Any, files: Any) -> None:
    edits = (named(files["vector"], strength=0.1),)
    task = searching(BestOfN(n=8), 8, edits=edits, stream=True)
    found, again = events(ours, task), events(ours, task)
    assert texts(found) == texts(again)
    assert isinstance(found[0], Started) and isinstance(found[1], Progress) and found[1].tokens > 0
    (choice,) = ended(found)
    assert choice.reward == float(as_reward("sentiment")(sample(texts(found)[0]))[0])
    assert choice.kl is None  # the vector leaves log p of what was drawn unknown: no bound is known
    finished = found[-1]
    assert isinstance(finished, Finished)
    assert (finished.candidates, finished.cost.reward_calls) == (8, 8)
    assert 12 < finished.cost.generated_tokens <= 96


def sample(text: str) -> Any:
    from steer.core import Samples

    return Samples(
        prompts=[CHAT],
        outputs=[text],
        group=torch.zeros(1, dtype=torch.long),
        log_weight=torch.zeros(1, dtype=torch.float64),
    )


def test_fk_and_a_reward_of_the_model(ours: Any) -> None:
    found = events(ours, searching(FKSteering(num_particles=6, n=2), 6, "fluency"))
    assert len(ended(found)) == 2 and all(e.reward is not None and e.reward < 0 for e in ended(found))
    assert isinstance(found[-1], Finished) and found[-1].candidates == 6


def test_searches_wait_for_each_other_and_for_nobody_else(ours: Any) -> None:
    go = threading.Event()

    def slow(found: list[str]) -> list[float]:
        assert go.wait(60)
        return [float(len(text)) for text in found]

    async def crowd() -> None:
        task = searching(BestOfN(n=2), 2, slow)
        running = [asyncio.ensure_future(collected(ours, task)) for _ in range(3)]
        try:
            while ours.load().searches < 2:
                await asyncio.sleep(0.01)
            assert texts(await collected(ours, Task((CHAT,), 1, GREEDY)))
            load = ours.load()
            assert (load.searches, load.waiting) == (2, 1)
        finally:
            go.set()
        assert all(ended(found) for found in await asyncio.gather(*running))

    asyncio.run(crowd())
    assert settled(ours)


@pytest.mark.parametrize("what", ["tokens", "search", "waiting"])
def test_leaving_aborts(what: str, ours: Any) -> None:
    """Whoever closes the iterator leaves nothing behind in the engine."""
    long = Sampling(max_tokens=200, seed=1)
    steering = Steering((), BestOfN(n=8), 1, 8, as_reward("sentiment"), block=200)
    task = Task((CHAT,), 4, long, None if what == "tokens" else steering, stream=True)

    async def leave() -> None:
        prepared = await asyncio.to_thread(ours.prepare, task)
        streams = [ours.run(prepared) for _ in range(3 if what == "waiting" else 1)]
        tasks = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        while ours.load().rows == 0:
            await asyncio.sleep(0.01)
        for waiting in tasks:
            waiting.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in streams:
            await stream.aclose()

    began = time.monotonic()
    asyncio.run(leave())
    assert settled(ours)
    assert time.monotonic() - began < 10
    assert texts(events(ours, Task((CHAT,), 1, GREEDY)))


def settled(engine: Any, seconds: float = 5) -> bool:
    """Whether nothing is left in the engine after a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        load = engine.load()
        if (load.rows, load.searches, load.waiting) == (0, 0, 0):
            return True
        time.sleep(0.02)
    return False


def test_a_reward_that_raises_ends_its_request_alone(ours: Any) -> None:
    def wrong(found: list[str]) -> list[float]:
        raise ZeroDivisionError("no")

    for task in (searching(BestOfN(n=2), 2, wrong), Task((CHAT,), 1, GREEDY, Steering(reward=as_reward(wrong)))):
        with pytest.raises(RewardError, match="no"):
            events(ours, task)
    assert settled(ours)


# --------------------------------------------------------------------------------------------------------- artifacts


def test_an_artifact_that_had_to_go_comes_back(ours: Any, files: Any) -> None:
    task = Task((CHAT,), 1, GREEDY, Steering((named(files["vector"]),)))
    before = texts(events(ours, task))
    prepared = ours.prepare(task)
    for name in ("other", "clamp", "controller"):
        ours.prepare(Task((CHAT,), 1, GREEDY, Steering((named(files[name]),))))
    digest = named(files["vector"]).digest[:32]
    assert digest not in ours.model.front.artifacts
    assert texts(events(ours, task, prepared)) == before


def test_artifacts_are_checked(ours: Any, files: Any, tmp_path: Path) -> None:
    from steer import artifacts
    from steer.artifacts import Card

    for path in files.values():
        ours.check_artifact(path)
    narrow = tmp_path / "narrow.safetensors"
    artifacts.save(narrow, {"direction.1": torch.ones(32)}, Card("vector", {"width": 32}, [1], {}))
    gated = tmp_path / "gated.safetensors"
    artifacts.save(gated, {"direction.1": torch.ones(576)}, Card("vector", {}, [1], {"gate": "probe.safetensors"}))
    deep = tmp_path / "deep.safetensors"
    artifacts.save(deep, {"direction.99": torch.ones(576)}, Card("vector", {"width": 576}, [99], {"unit": "raw"}))
    for path, field in ((narrow, "steer.edits"), (gated, "artifact"), (deep, "steer.edits")):
        with pytest.raises(InputError) as caught:
            ours.check_artifact(path)
        assert caught.value.field == field
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(InputError):
        ours.check_artifact(tmp_path / "text.safetensors")


def test_what_is_wrong_is_named_as_the_other_engine_names_it(ours: Any, theirs: Any, files: Any) -> None:
    edit = files["vector"]
    search = Steering((), BestOfN(n=4), 1, 4, as_reward("sentiment"))
    wrong: list[Task] = [
        Task((TokenPrompt((1, 99_999_999)),), 1, GREEDY),
        Task((TokenPrompt(()),), 1, GREEDY),
        Task((RawText(" "),), 1, GREEDY),
        Task(([{"role": "user"}],), 1, GREEDY),
        Task((CHAT,), 1, Sampling(logit_bias=((99_999_999, 1.0),))),
        Task((CHAT,), 17, GREEDY),
        Task((CHAT,), 1, GREEDY, Steering((named(edit, layers="98"),))),
        Task((CHAT,), 1, GREEDY, Steering((named(edit, operator="shout"),))),
        Task((CHAT,), 1, GREEDY, Steering((named(edit, threshold=0.5),))),
        Task((CHAT,), 1, Sampling(max_tokens=12, presence_penalty=1.0), search),
        Task((CHAT,), 1, Sampling(max_tokens=12, logprobs=1), search),
        Task((CHAT,), 1, Sampling(max_tokens=12), Steering((), BestOfN(n=40), 1, 40, as_reward("sentiment"))),
    ]
    for task in wrong:
        found = []
        for engine in (ours, theirs):
            with pytest.raises(SteerError) as caught:
                engine.prepare(task)
            found.append((type(caught.value), getattr(caught.value, "field", None)))
        assert found[0] == found[1], task
    for sampling, field in ((Sampling(max_tokens=300), "messages"), (Sampling(max_tokens=230), "messages")):
        with pytest.raises(InputError, match="256 tokens") as refused:
            ours.prepare(Task((CHAT,), 1, sampling))
        assert refused.value.field == field
    assert ours.prepare(Task((CHAT,), 1, Sampling(max_tokens=300, trim=True))).columns == 256


# ------------------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize(
    ("model", "engine", "field"),
    [("smollm2-135m", "magic", "engine"), ("fashion-ddpm", "vllm", "model"), ("openai:http://x/v1#m", "vllm", "model")],
)
def test_what_cannot_be_loaded(model: str, engine: str, field: str) -> None:
    with pytest.raises(InputError) as caught:
        steer.load(model, engine=engine)
    assert caught.value.field == field


# ------------------------------------------------------------------------------------------------------------- ending

_ORPHANS = """
import os
import signal

import psutil

from steer.adapters.vllm_serving import serving_engine

if __name__ == "__main__":
    engine = serving_engine("smollm2-135m", max_rows=2, settings={"max_model_len": 64})
    print("PIDS", *(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_an_engine_ends_with_a_server_that_was_killed(folder: Any, tmp_path: Path) -> None:
    import psutil

    script = tmp_path / "orphans.py"
    script.write_text(_ORPHANS)
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("PIDS ")]
    pids = [int(pid) for pid in line.split()[1:]]
    assert done.returncode == -signal.SIGKILL and len(pids) >= 2

    def alive(pid: int) -> bool:
        try:
            return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    end = time.monotonic() + 60
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.2)
    assert not any(map(alive, pids))
