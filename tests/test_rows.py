"""Rows of a process: sums, copies, joins, packing; of fields that are tensors, lists and tuples."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steer.core import Cost, InputError
from steer.core.rows import Rows, accounted, beginning
from steer.sampling.weights import gained
from steer.toy import TabularProcess


@dataclass(frozen=True)
class Words(Rows):
    each = ("x", "seen", "shown", "words", "names")
    packed = ("x",)

    x: Tensor
    seen: Tensor | None
    shown: Tensor | None
    words: list[Any]
    names: tuple[str, ...]


def words(rows: int, **changed: Any) -> Words:
    x = torch.arange(rows * 2.0).reshape(rows, 2)
    seen = x + 0.5
    made = Words(x, seen, seen, [[i] for i in range(rows)], tuple("abcdefgh"[:rows]), **beginning(["p"], rows))
    return replace(made, **changed)


@pytest.mark.parametrize("index", [[0, 2, 2], [], [3, 1, 0, 0, 3, 2]])
def test_copies_are_of_every_field(index: list[int]) -> None:
    state = words(4).add(torch.arange(4.0).double())
    taken = state.take(torch.tensor(index, dtype=torch.long))
    assert taken.x.tolist() == [[2.0 * i, 2.0 * i + 1] for i in index]
    assert taken.words == [[i] for i in index] and taken.names == tuple("abcd"[i] for i in index)
    assert taken.log_prob.tolist() == index and len(taken) == len(index)
    assert taken.seen is taken.shown is not None and taken.aim_log_prob is taken.base_log_prob
    assert words(4, shown=None).take(torch.tensor([1])).shown is None


def test_rows_of_several_states_in_order_without_what_one_lacks() -> None:
    a, b = words(2), words(3, shown=None, kl=None)
    joined = Words.join([replace(a, cost=Cost(nfe=2)), replace(b, cost=Cost(nfe=5)), a])
    assert joined.names == ("a", "b", "a", "b", "c", "a", "b") and joined.words == [[0], [1], [0], [1], [2], [0], [1]]
    assert joined.x.shape == (7, 2) and joined.cost.nfe == 7 and joined.shown is None and joined.kl is None
    again = Words.join([a, a])
    assert again.seen is again.shown and again.aim_log_prob is again.base_log_prob
    with pytest.raises(InputError, match="rows at one step"):
        Words.join([a, replace(b, step=1)])


def test_packed_rows_are_the_same_rows() -> None:
    state = words(3).add(torch.ones(3).double(), torch.zeros(3).double(), torch.full((3,), 2.0).double())
    packed = state.pack()
    assert set(packed) == {"group", "log_prob", "base_log_prob", "aim_log_prob", "kl", "x"}
    again = Words.unpack(packed, 5, ["p"], seen=None, shown=None, words=[], names=())
    assert again.step == 5 and torch.equal(again.x, state.x) and torch.equal(again.tilt, state.tilt)
    # What was packed before weights knew what they aim at.
    del packed["aim_log_prob"]
    old = Words.unpack(packed, 5, ["p"], seen=None, shown=None, words=[], names=())
    assert old.tilt.tolist() == [0, 0, 0]
    unknown = replace(state, base_log_prob=None, aim_log_prob=None, kl=None)
    assert "kl" not in unknown.pack() and Words.unpack(unknown.pack(), 1, [], **vars_of(state)).kl is None


def vars_of(state: Words) -> dict[str, Any]:
    return {name: getattr(state, name) for name in ("seen", "shown", "words", "names")}


def test_sums_of_what_is_known() -> None:
    one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    plain = words(2).add(one).add(one, kl=one)
    assert plain.base_log_prob.tolist() == plain.log_prob.tolist() == [2, 2] and plain.kl.tolist() == [1, 1]
    assert plain.aim_log_prob is plain.base_log_prob and plain.tilt.tolist() == [0, 0]
    aimed = plain.add(one, zero, 3 * one).add(one)
    assert aimed.base_log_prob.tolist() == [3, 3] and aimed.aim_log_prob.tolist() == [6, 6] == (aimed.tilt + 3).tolist()
    blind = words(2, base_log_prob=None, aim_log_prob=None, kl=None).add(one, zero, one, one)
    assert blind.log_prob.tolist() == [1, 1]
    assert blind.base_log_prob is blind.aim_log_prob is blind.kl is None and blind.tilt.tolist() == [0, 0]


def test_what_the_base_excludes_keeps_its_weight() -> None:
    """-infinity is a sum like any other: no NaN of the tilt, nor of the gain of a weight that is 0."""
    never = torch.tensor([-math.inf, -1.0, -math.inf], dtype=torch.float64)
    aim = torch.tensor([-2.0, -3.0, -math.inf], dtype=torch.float64)
    state = words(3).add(torch.full((3,), -0.5, dtype=torch.float64), never, aim)
    for step in (state, state.add(never), state.add(aim, never, aim)):
        assert not bool(step.tilt.isnan().any())
    assert state.tilt.tolist() == [math.inf, -2.0, 0.0]
    ratio = state.aim_log_prob - state.log_prob
    after = state.add(torch.zeros(3, dtype=torch.float64), never, aim)
    assert gained(after.aim_log_prob - after.log_prob, ratio).tolist() == [-2.0, -3.0, -math.inf]


def test_samples_show_the_account() -> None:
    process = TabularProcess(torch.tensor([0.5, 0.5]), torch.eye(2), 2)
    state = process.init(["p", "q"], 3, torch.Generator())
    samples = accounted(process.decode(state), state)
    assert samples.tilt is not None and samples.tilt.shape == (6,) and state.group.tolist() == [0, 0, 0, 1, 1, 1]
