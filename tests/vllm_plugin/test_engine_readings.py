"""Readings inside the engine, in one mixed batch with rows that have none: those of the transformers adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from vllm_tools import PROMPTS, WIDTH, controller, directions, each, greedy, vector

from steer import Gate, InputError, UnsupportedError
from steer.adapters.vllm.plugin.reading import check_engine, values_of
from steer.core import SteerError
from steer.methods.operators import Probe
from steer.rewards.text import words

READ = {"up": vector(layers=range(8, 24)), "one": vector(seed=3, layers=[29])}


def odds() -> Gate:
    return Gate(Probe(directions([12], 9)[12] / WIDTH, 0.25), 12)


def same(found: Any, wanted: Any) -> None:
    assert found.tokens == wanted.tokens and found.readings.keys() == wanted.readings.keys()
    for name, rows in wanted.readings.items():
        for mine, theirs in zip(found.readings[name], rows, strict=True):
            assert len(mine) == len(theirs) and (mine - theirs).abs().max() < 1e-4, name


def test_readings_in_one_mixed_batch_are_those_of_transformers(engine: Any, reference: Any) -> None:
    """Plain rows, steered ones and gated ones, prompts in chunks and from the cache."""
    asked = {**READ, "odds": odds()}
    states = reference.hidden_states([reference.encode(p) for p in PROMPTS], [9])[9]
    apart = states[0] - states[1]
    gated = vector(0.4, gate=Gate(Probe(apart, -float((states[0] + states[1]) @ apart / 2)), 9))
    for edits in ([None, vector(0.3), None, vector(0.4, scope="generated")], [gated, gated, controller(), None]):
        ours, theirs = (greedy(m, None, each(edits), 12, readings=asked) for m in (engine, reference))
        same(ours, theirs)
        assert all(len(row) == 12 for row in ours.readings["odds"])
    plain = greedy(engine, None, (), 12)
    assert plain.readings is None and plain.tokens == greedy(engine, None, (), 12, readings=asked).tokens


def test_rows_that_read_run_beside_rows_that_do_not(engine: Any, reference: Any) -> None:
    """Requests with readings of their own, with others and with none, in the same steps of one engine."""
    reads: Sequence[Any] = [{"up": READ["up"]}, None, {"odds": odds(), "one": READ["one"]}, None]
    edits = [vector(0.3), None, None, vector(0.3, seed=1)]
    requests, wanted, tags = [], [], []
    for i, (read, edit) in enumerate(zip(reads, edits, strict=True)):
        mine = () if edit is None else edit
        theirs = greedy(reference, [PROMPTS[i]], mine, 10, readings=read)
        wanted.append(theirs)
        process = engine.process(temperature=0, max_new_tokens=10)
        process = process if edit is None else process.edited(edit)
        if read is None:
            requests.append(process.request(PROMPTS[i], 10))
            tags.append(None)
            continue
        from steer.readings import as_readings

        process = process.watched(as_readings(read, None, engine.info))
        tags.append(f"test-{i}")
        requests.append(process.request(PROMPTS[i], 10, tag=tags[-1]))
    outputs = engine.client.draw([p for p, _ in requests], [s for _, s in requests])
    for i, (output, own) in enumerate(zip(outputs, wanted, strict=True)):
        assert list(output.outputs[0].token_ids) == own.tokens[0]
        if tags[i] is None:
            continue
        told = [part[0] for part in engine.client.rpc("steer_readings", [tags[i]])]
        values = values_of(told, list(own.readings), len(reference.encode(PROMPTS[i])) - 1, 10)
        for k, name in enumerate(own.readings):
            assert (values[:, k] - own.readings[name][0]).abs().max() < 1e-4
        assert engine.client.rpc("steer_readings", [tags[i]]) == [[None]]  # asked for once


def test_what_samplers_keep_in_blocks(engine: Any, reference: Any) -> None:
    """Texts that go on in a second request, and candidates of which one is kept."""
    drawn = engine.generate(PROMPTS[:2], readings=READ, temperature=0, max_new_tokens=9, block=4)
    same(drawn, greedy(reference, PROMPTS[:2], (), 9, readings=READ))
    reward = lambda texts: [len(text) for text in texts]  # noqa: E731
    given = {"sampler": "best-of-n", "n": 3, "reward": reward, "seed": 0}
    best = engine.generate(PROMPTS[:2], readings=READ, max_new_tokens=6, **given)
    for row, tokens in enumerate(best.pool.tokens):
        ids = [*reference.encode(PROMPTS[int(best.pool.group[row])]), *tokens]
        first = len(ids) - len(tokens)
        heads = [ids[:end] for end in range(first, len(ids))]
        seen = reference.hidden_states(heads, [29])[29]
        direction = READ["one"].directions[29]
        values = seen @ (direction / direction.norm()) / reference.residual_norms()[29]
        assert (best.pool.readings["one"][row] - values).abs().max() < 1e-4
    assert torch.equal(best.readings["one"][0], best.pool.readings["one"][int(best.lineage[0])])


def test_a_rule_ends_the_texts_that_it_ends_on_transformers(engine: Any, reference: Any) -> None:
    """Within blocks and across them; what was drawn after the end leaves no trace but its cost."""
    plain = greedy(reference, None, (), 40, readings=READ)
    values = torch.stack([row[3:36].min() for row in plain.readings["up"]])
    rule = f"up < {float(values.median()) + 1e-3:.4f}"
    wanted = greedy(reference, None, (), 40, readings=READ, stop_if=rule)
    lengths = [len(row) for row in wanted.tokens]
    assert min(lengths) < 36 and lengths != [len(row) for row in plain.tokens]
    for more in ({}, {"block": 7}):
        ended = greedy(engine, None, (), 40, readings=READ, stop_if=rule, **more)
        same(ended, wanted)
        assert (ended.log_prob - wanted.log_prob).abs().max() < 2e-3 and ended.texts == wanted.texts
        assert ended.cost.generated_tokens >= sum(lengths)
    best = engine.generate(
        PROMPTS[0], sampler="best-of-n", n=1, reward="length", readings=READ, stop_if=rule, max_new_tokens=24, seed=3
    )
    assert best.pool.reward.tolist() == [float(len(words(text))) for text in best.pool.texts]  # of what was kept
    for row, tokens in enumerate(best.pool.tokens):
        met = (best.pool.readings["up"][row] < float(rule.split()[-1])).tolist()
        assert not any(met[:-1]) and len(met) == len(tokens)


def test_what_the_engine_does_not_read_is_refused(engine: Any) -> None:
    from dataclasses import replace

    for wrong in ({"graphs": True}, {"parallel": (2, 1)}, {"speculative": True}):
        with pytest.raises(UnsupportedError, match="readings do not go with"):
            check_engine(replace(engine.front.settings, **wrong))
    with pytest.raises(SteerError, match="not kept all"):
        values_of([None, ([3], [[1.0]])], ["up"], 3, 2)
    with pytest.raises(InputError, match=r"steer\.readings"):
        engine.front.parse({"readings": ["up"]})
    with pytest.raises(InputError, match=r"steer\.stop_if"):
        engine.front.parse({"stop_if": "up < 1"})
