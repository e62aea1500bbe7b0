"""Parts that need no engine: requests and their refusal, keys of the cache, artifacts as bytes, closed forms, slots."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm_tools import controller

from steer import Gate, SteeringVector
from steer.adapters.vllm.artifacts import PackedArtifact, digest_of, pack
from steer.adapters.vllm.client import Asynchronous, _norms
from steer.adapters.vllm.plugin.blocks import BlockSteering, closed_form
from steer.adapters.vllm.plugin.compiled import Compiled, Spans, SteeringRow, form, merged, stages_of
from steer.adapters.vllm.plugin.registry import Registry
from steer.adapters.vllm.plugin.requests import Inside, Resolved, SteeredRequest
from steer.adapters.vllm.plugin.slots import RowBank
from steer.adapters.vllm.plugin.worker import Worker
from steer.adapters.vllm.settings import Settings
from steer.core import InputError, ModelInfo, Operator, Scope, SteerError, UnsupportedError
from steer.methods.controller import Controller
from steer.methods.operators import Ablate, Add, Clamp, KeepNorm, Probe, Rotate, Where
from steer.methods.value import HeadValue, QHead, ValueGuidance
from steer.serving.wire import EditRequest

WIDTH, DEPTH = 6, 4


def info(norms: Tensor | None = None) -> ModelInfo:
    known = torch.ones(DEPTH) if norms is None else norms
    return ModelInfo("tiny", "f", DEPTH, WIDTH, "llama", lambda: known, lambda: torch.empty(0))


def settings(**more: Any) -> Settings:
    values: dict[str, Any] = {
        "layers": tuple(range(DEPTH)),
        "reads": tuple(range(DEPTH)),
        "stages": 2,
        "slots": 4,
        "requests": 2,
        "artifacts": 3,
        "artifact_bytes": 1 << 20,
        "graphs": False,
        "parallel": (1, 1),
        "speculative": False,
    }
    return Settings(**{**values, **more})


def direction(seed: int) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def vector(strength: float = 1.0, seed: int = 0, layers: tuple[int, ...] = (1, 2), **more: Any) -> SteeringVector:
    return SteeringVector({i: direction(seed + i) for i in layers}, strength, **{"unit": "raw", **more})


def registered(front: Registry, name: str, edit: Any, used: tuple[str, ...] = ()) -> str:
    artifact, gone = front.admit(name, pack(edit), False, used)
    front.add(name, artifact, gone)
    return artifact.digest


@pytest.fixture
def front() -> Registry:
    made = Registry(settings(), info())
    registered(made, "calm", vector())
    return made


# ---------------------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"edits": [{"name": "other"}]}, "steer.edits.name"),
        ({"edits": [{"name": "../calm"}]}, "steer.edits.0.name"),
        ({"edits": [{"name": "calm", "strength": "much"}]}, "steer.edits.0.strength"),
        ({"edits": [{"name": "calm", "strength": float("nan")}]}, "steer.edits.0.strength"),
        ({"edits": [{"name": "calm", "scope": "somewhere"}]}, "scope"),
        ({"edits": [{"name": "calm", "layers": "0-3"}]}, "layers"),
        ({"edits": [{"name": "calm", "operator": "grow"}]}, "operator"),
        ({"edits": [{"name": "calm", "operator": "rotate"}]}, "operator"),
        ({"edits": [{"name": "calm", "operator": "ablate"}] * 3}, "operator"),
        ({"edits": [{"name": "calm", "beta": 1.0}]}, "option of a vector"),
        ({"edits": [], "resolved": True}, "steer.resolved"),
        ({"edits": [], "sampler": "best-of-n"}, "steer.sampler"),
        ({"edits": [{"vector": {"layers": {"0": [1.0]}}}]}, "steer.edits.0.vector"),
        ({"edits": [], "beta": 0}, "steer.beta"),
        ("{", "steer"),
        (7, "steer"),
    ],
)
def test_bad_requests_name_the_field(given: Any, field: str, front: Registry) -> None:
    with pytest.raises(InputError) as caught:
        front.parse(given)
    assert caught.value.field == field


def test_what_the_engine_was_not_armed_for_is_refused(front: Registry) -> None:
    bare = Registry(settings(layers=(1,), reads=(), stages=0), info())
    registered(bare, "one", vector(layers=(1,)))
    registered(bare, "two", vector(layers=(2,)))
    bare.parse({"edits": [{"name": "one"}]})
    for given in ([{"name": "two"}], [{"name": "one", "operator": "ablate"}]):
        with pytest.raises(InputError):
            bare.parse({"edits": given})
    gated = vector(gate=Gate(Probe(direction(9)), 1))
    with pytest.raises(InputError, match="reads"):
        registered(bare, "gated", gated)
    with pytest.raises(UnsupportedError, match="pipeline"):
        registered(Registry(settings(parallel=(1, 2)), info()), "gated", gated)


def test_resolved_requests_have_digests_and_absolute_positions(front: Registry) -> None:
    asked = front.parse({"edits": [{"name": "calm", "scope": "reply"}, {"name": "calm", "scope": "prompt"}]})
    resolved = front.resolve(asked, 10)
    assert [(e.start, e.stop) for e in resolved.hidden] == [(9, None), (0, 10)]
    assert resolved.digests == {front.names["calm"]} and resolved.rewind is None
    assert len({e.key for e in resolved.hidden}) == 2
    longer = front.resolve(Inside(asked.edits, prompt_length=10), 25)
    assert longer.hidden == resolved.hidden  # a continuation counts from its own prompt


@pytest.mark.parametrize(
    ("scope", "rewind", "private"), [("all", 0, True), ("reply", 9, False), ("generated", None, False)]
)
def test_prompts_that_are_read_run_again_from_where_they_are_steered(
    scope: str, rewind: int | None, private: bool, front: Registry
) -> None:
    registered(front, "gated", vector(gate=Gate(Probe(direction(9)), 1), scope=scope))
    resolved = front.resolve(front.parse({"edits": [{"name": "gated"}]}), 10)
    assert (resolved.reads, resolved.rewind, resolved.private) == (True, rewind, private)
    known = front.resolve(Inside((EditRequest(name="gated"),), prompt_length=10, weights=((1.0, 1.0),)), 10)
    assert (known.reads, known.rewind) == (False, None)


def request(resolved: Resolved) -> SteeredRequest:
    edits = resolved.hidden
    return SteeredRequest(
        id="r",
        prompt=resolved.prompt,
        edits=[],
        keys=[edit.key for edit in edits],
        spans=Spans.of(edit.stretches for edit in edits),
        weights=[None] * len(edits),
        reading=False,
        first=None,
        measure=False,
        tag=None,
        params=None,
        length=resolved.length,
        asked=edits,
    )


@pytest.mark.parametrize("seed", range(20))
def test_marks_that_come_in_pieces_are_those_of_the_whole_text(seed: int, front: Registry) -> None:
    """Where edits act after passes of any sizes, some of them run again, is where they act if all is known at first."""
    random = Random(seed)
    front.info = replace(front.info, token_id={"a": 1, "b": 2, "c": 3, ".": 0}.get)
    scopes = ["inside:a,b", "outside:a,b", "inside:c,.", "first:3", "outside:b,c"]
    asked = front.parse({"edits": [{"name": "calm", "scope": scope} for scope in scopes]})
    text = [random.randrange(8) for _ in range(60)]
    prompt, length = 10, random.choice([10, 17])
    asked = Inside(asked.edits, prompt_length=prompt)
    whole = request(front.resolve(asked, len(text), ids=text))
    sent = json.loads(json.dumps(front.resolve(asked, length, ids=text[:length]).pack()))
    told = Resolved.of(SimpleNamespace(extra_args={"steer": sent}))
    assert told is not None
    mine = request(told)
    assert mine.marked
    at = 0
    while at < len(text):
        count = random.randint(1, 7)
        mine.take(at, text[at : at + count])
        at += count if random.random() < 0.8 else -min(at, 3)
    for position in range(len(text)):
        acting = [r.spans.acting(r.spans.segment(position)) for r in (mine, whole)]
        assert acting[0] == acting[1], position
        opened = {pair: last(text[: position + 1], pair) for pair in ((1, 2), (3, 0), (2, 3))}
        by_hand = [
            position >= 9 and opened[1, 2],
            position >= 9 and not opened[1, 2],
            position >= 9 and opened[3, 0],
            9 <= position < 12,
            position >= 9 and not opened[2, 3],
        ]
        assert acting[0] == tuple(i for i, acts in enumerate(by_hand) if acts)


def last(text: list[int], pair: tuple[int, int]) -> bool:
    marks = [token for token in text if token in pair]
    return bool(marks) and marks[-1] == pair[0]


def test_marks_need_tokens_and_an_engine_that_shows_them(front: Registry) -> None:
    front.info = replace(front.info, token_id={"a": 1, "b": 2}.get)
    asked = front.parse({"edits": [{"name": "calm", "scope": "inside:a,b"}, {"name": "calm", "scope": "outside:a,b"}]})
    resolved = front.resolve(asked, 10, ids=[1] * 10)
    assert resolved.rows == 2 and [edit.turns for edit in resolved.hidden] == [(9,), ()]
    with pytest.raises(InputError, match="embeddings"):
        front.resolve(asked, 10)
    for more in ({"parallel": (1, 2)}, {"speculative": True}):
        other = Registry(settings(**more), front.info)
        registered(other, "calm", vector())
        with pytest.raises(UnsupportedError, match="scope=inside:a,b"):
            other.parse({"edits": [{"name": "calm", "scope": "inside:a,b"}]})


# -------------------------------------------------------------------------------------------------- keys of the cache


def keys(
    front: Registry, given: Any, length: int, blocks: int = 4, size: int = 4, request: str = "r"
) -> list[str | None]:
    resolved = front.resolve(front.parse({"edits": given}), length)
    return [resolved.block_key(request, i * size, (i + 1) * size) for i in range(blocks)]


def test_blocks_without_steering_are_shared(front: Registry) -> None:
    reply = keys(front, [{"name": "calm", "scope": "reply"}], 10)
    assert reply[:2] == [None, None] and all(reply[2:])
    prompt = keys(front, [{"name": "calm", "scope": "prompt"}], 10)
    assert prompt[3] is None and all(prompt[:3])


def test_equal_tokens_under_other_edits_have_other_keys(front: Registry) -> None:
    """By content, settings, and every position where an edit begins or ends."""
    registered(front, "loud", vector(seed=5))
    given = [
        ([{"name": "calm"}], 10),
        ([{"name": "loud"}], 10),
        ([{"name": "calm", "strength": 0.5}], 10),
        ([{"name": "calm"}, {"name": "loud"}], 10),
        ([{"name": "calm", "scope": "from:9"}], 10),
        ([{"name": "calm", "scope": "from:10"}], 10),
        ([{"name": "calm", "scope": "prompt"}], 10),
        ([{"name": "calm", "scope": "prompt"}], 11),
    ]
    seen = {keys(front, edits, length)[2] for edits, length in given}
    assert len(seen) == len(given)
    before = keys(front, [{"name": "calm"}], 10)
    registered(front, "calm", vector(seed=6))
    assert not set(keys(front, [{"name": "calm"}], 10)) & set(before)


def test_what_was_read_is_part_of_the_key(front: Registry) -> None:
    registered(front, "gated", vector(gate=Gate(Probe(direction(9)), 1), scope="from:12"))
    one, two = (keys(front, [{"name": "gated"}], length)[3] for length in (9, 10))
    assert one != two
    registered(front, "whole", vector(gate=Gate(Probe(direction(9)), 1)))
    mine, theirs = (keys(front, [{"name": "whole"}], 10, request=r) for r in ("a", "b"))
    assert not set(mine) & set(theirs)


# --------------------------------------------------------------------------------------------------------- artifacts


def test_artifacts_make_room_for_new_ones_but_not_while_needed(front: Registry) -> None:
    digests_ = [front.names["calm"], registered(front, "b", vector(seed=1)), registered(front, "c", vector(seed=2))]
    front.resolve(front.parse({"edits": [{"name": "calm"}]}), 4)  # now the one used last
    _, gone = front.admit("d", pack(vector(seed=3)), False, ())
    assert gone == [digests_[1]]
    _, gone = front.admit("d", pack(vector(seed=3)), False, [digests_[1]])
    assert gone == [digests_[2]]
    with pytest.raises(InputError, match="in use"):
        front.admit("d", pack(vector(seed=3)), False, digests_)
    registered(front, "d", vector(seed=3))
    assert "b" not in front.names and set(front.names) == {"calm", "c", "d"}
    with pytest.raises(InputError, match="in use"):
        Registry(settings(artifact_bytes=100), info()).admit("x", pack(vector()), False, ())


def test_a_file_that_is_no_artifact_is_refused(front: Registry) -> None:
    for data in (b"", b"\x80\x04.", b"PK\x03\x04", pack(vector())[:60]):
        with pytest.raises(InputError):
            front.admit("x", data, False, ())
    other = SteeringVector({1: torch.ones(WIDTH)}, model={"fingerprint": "another"})
    with pytest.raises(InputError, match="made for"):
        front.admit("x", pack(other), False, ())
    front.admit("x", pack(other), True, ())


@pytest.mark.parametrize(
    "edit",
    [
        vector(0.5, unit="norm", operator="clamp", keep_norm=True, scope="from:7"),
        vector(2.0, operator="rotate", references={1: direction(7), 2: direction(8)}),
        vector(gate=Gate(Probe(direction(9), 0.25), 3), token_probes={2: Probe(direction(4), -1.0)}),
    ],
    ids=["clamp", "rotate", "probes"],
)
def test_vectors_come_back_as_they_were(edit: SteeringVector) -> None:
    back = PackedArtifact.parse(pack(edit)).edit(info(), {})
    assert isinstance(back, SteeringVector) and back.scope == edit.scope and back.reads == edit.reads
    hidden = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    for mine, theirs in zip(edit.terms(info()), back.terms(info()), strict=True):
        assert mine.layer == theirs.layer and torch.equal(mine.operator(hidden), theirs.operator(hidden))
    if edit.reads:
        states = {3: hidden}
        assert torch.equal(edit.weights(states), back.weights(states))


def test_controllers_and_heads_come_back_as_they_were() -> None:
    made = controller((0, 2), 0.7, 0.2, scope="generated")
    big = ModelInfo("m", "f", 30, 576, "llama", lambda: torch.ones(30), lambda: torch.empty(0))
    back = PackedArtifact.parse(pack(made)).edit(big, {})
    assert isinstance(back, Controller) and back.scope == Scope.parse("generated") and back.threshold == 0.2
    states = {0: torch.randn(3, 576), 2: torch.randn(3, 576)}
    assert torch.equal(made.weights(states), back.weights(states))
    value = ValueGuidance(HeadValue(QHead(WIDTH, 4), torch.empty(0)), beta=0.3, strength=-2.0, top_k=7, tail="mask")
    again = PackedArtifact.parse(pack(value)).edit(info(), {})
    assert isinstance(again, ValueGuidance)
    assert (again.beta, again.strength, again.top_k, again.tail) == (0.3, -2.0, 7, "mask")


# ------------------------------------------------------------------------------------------------------ closed forms

UNIT = direction(1) / direction(1).norm()
OPERATORS: dict[str, Operator] = {
    "add": Add(direction(2)),
    "ablate": Ablate(UNIT, 0.7),
    "clamp": Clamp(UNIT, -0.3, 0.2),
    "below": Clamp(UNIT, high=0.1),
    "rotate": Rotate(UNIT, direction(3), 35.0),
    "keep-norm": KeepNorm(Add(direction(2))),
    "keep-norm-clamp": KeepNorm(Clamp(UNIT, 1.0, 1.0)),
    "where": Where(Probe(direction(4), 0.2), Ablate(UNIT)),
    "where-keep-norm": Where(Probe(direction(4), -0.2), KeepNorm(Add(direction(2)))),
}


@pytest.mark.parametrize("name", list(OPERATORS))
def test_closed_forms(name: str) -> None:
    """Against the operator itself, at weights 0, 1 and between."""
    hidden = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(5))
    made = form(OPERATORS[name], WIDTH)
    for weight in (0.0, 0.4, 1.0):
        made.scalars[8] = weight
        ours = closed_form(hidden, made.vectors.expand(64, -1, -1), made.scalars.expand(64, -1))
        theirs = hidden + weight * (OPERATORS[name](hidden) - hidden)
        assert torch.allclose(ours, theirs, atol=1e-5)
        if weight == 0:
            assert torch.equal(ours, hidden)


def test_an_operator_without_a_closed_form_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="closed form"):
        form(Rotate(UNIT, direction(3), 35.0, absolute=True), WIDTH)


def test_rows_keep_the_order_of_edits() -> None:
    """Additions before another operator are stages, those after it are merged."""
    add, ablate, late = vector(0.5), vector(1.0, seed=9, operator="ablate"), vector(0.25, seed=3, layers=(2, 3))
    for edits in ([add, late], [add, ablate], [ablate, add], [add, ablate, late, ablate, late]):
        compiled = [Compiled.of(edit, info()) for edit in edits]
        row = merged(compiled, [None] * len(edits), DEPTH, WIDTH)
        hidden = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(2))
        most = 0
        for layer in range(DEPTH):
            ours, theirs = hidden, hidden
            most = max(most, len(row.stages.get(layer, [])))
            for stage in row.stages.get(layer, []):
                ours = closed_form(ours, stage.vectors.expand(8, -1, -1), stage.scalars.expand(8, -1))
            for edit in edits:
                for term in edit.terms(info()):
                    theirs = term.operator(theirs) if term.layer == layer else theirs
            assert torch.allclose(ours + row.add[layer], theirs, atol=1e-5)
        assert stages_of(compiled) == most


# ------------------------------------------------------------------------------------------------------------- slots


def slots(capacity: int, grows: bool) -> tuple[RowBank, dict[int, BlockSteering]]:
    index = torch.zeros(4, dtype=torch.long)
    blocks = {i: BlockSteering(WIDTH, capacity + 1, 0, index, index, None, torch.empty(0)) for i in range(DEPTH)}
    return RowBank(blocks, DEPTH, 1, capacity, grows), blocks


def row(value: float) -> Callable[[], SteeringRow]:
    add = torch.zeros(DEPTH, WIDTH)
    add[1] = value
    return lambda: SteeringRow(add)


def test_slots_hold_what_a_step_needs_and_forget_the_oldest() -> None:
    held, blocks = slots(2, grows=False)
    first = held.ensure({"a": row(1.0), "b": row(2.0)})
    assert sorted(first.values()) == [1, 2]
    held.ensure({"a": row(1.0)})
    second = held.ensure({"c": row(3.0), "a": row(9.0)})
    assert second["a"] == first["a"] and second["c"] == first["b"]
    assert blocks[1].bank[second["a"], 0] == 1.0 and blocks[1].bank[second["c"], 0] == 3.0
    assert np.flatnonzero(held.added[second["c"]]).tolist() == [1]
    with pytest.raises(SteerError, match="slots"):
        held.ensure({"a": row(1.0), "b": row(2.0), "c": row(3.0)})


def test_slots_grow_where_nothing_is_captured() -> None:
    held, blocks = slots(2, grows=True)
    many = held.ensure({i: row(float(i)) for i in range(40)})
    assert len(set(many.values())) == 40 and 0 not in many.values()
    for i, slot in many.items():
        assert blocks[1].bank[slot, 0] == float(i)  # type: ignore[arg-type]
    assert not blocks[1].bank[0].any()


def test_settings_are_checked() -> None:
    from steer.adapters.vllm.settings import need

    need(settings(), reads=(1,), layers=(0,), stages=2)
    with pytest.raises(InputError, match="stages"):
        need(settings(), stages=3)


def test_a_name_that_is_removed_is_unknown(front: Registry) -> None:
    digest = front.names["calm"]
    assert front.remove("calm", [digest]) == []
    registered(front, "calm", vector())
    assert front.remove("calm", ()) == [digest] and SimpleNamespace(**front.names) == SimpleNamespace()
    with pytest.raises(InputError, match="none is registered"):
        front.parse({"edits": [{"name": "calm"}]})


def test_workers_keep_an_artifact_while_any_server_holds_it() -> None:
    """Several API processes serve the same engines: what one evicts another may still need."""
    kept = object.__new__(Worker)
    kept.artifacts, kept._holders, kept._compiled = {}, {}, {}
    data = pack(vector())
    digest = digest_of(data)
    for holder in ("a", "b"):
        kept.register(digest, data, False, holder)
    kept.evict([digest], "a")
    assert digest in kept.artifacts
    kept.evict([digest], "a")
    assert digest in kept.artifacts, "evicting twice takes nothing from others"
    kept.evict([digest, "unknown"], "b")
    assert not kept.artifacts and not kept._holders
    assert Registry(settings(), info()).mark != Registry(settings(), info()).mark


def test_every_engine_is_asked() -> None:
    """vLLM's own call reaches all data-parallel engines, and tells what the first one answers."""

    class Core:
        core_engines = (b"0", b"1")

        async def call_utility_all_async(self, method: str, *given: Any) -> list[Any]:
            assert (method, given) == ("collective_rpc", ("steer_weights", None, (["t"],), None))
            return [[[None]], [[[0.5]]]]

    client = object.__new__(Asynchronous)
    client.engine = SimpleNamespace(engine_core=Core())
    assert asyncio.run(client._everywhere("steer_weights", (["t"],))) == [[None], [[0.5]]]
    assert _norms([{0: [1.0, 3.0]}, {0: [2.0]}], 1) == [2.0] and _norms([{0: [1.0]}], 2) is None
