"""Everything that runs on a device, run on `shadow` and on the CPU: nothing is mixed up, and the results are equal.

With `STEER_TEST_DEVICE=cuda` the same tests run on a GPU. How the device is told apart is in `shadow_device.py`.
"""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.generation.logits_process import TemperatureLogitsWarper
from transformers.generation.stopping_criteria import MaxLengthCriteria

import steer
from shadow_device import Shadow, waits
from steer.adapters.transformers import LanguageModel
from steer.core import Samples
from steer.lookahead import Rollouts
from steer.methods.best_of_n import Ancestral, BestOfN
from steer.methods.controller import Controller, ControllerNetwork
from steer.methods.dts import DTS, SearchDTS
from steer.methods.fk import FKSteering
from steer.methods.operators import Probe
from steer.methods.prompt import SystemPrompt
from steer.methods.rlg import RLGuidance
from steer.methods.svdd import SVDD
from steer.methods.value import HeadValue, LogitValue, QHead, ValueGuidance, ValueHead
from steer.methods.vector import Gate, SteeringVector

DEVICE = os.environ.get("STEER_TEST_DEVICE", "shadow")
PROMPTS = ["the sun", "a very good dog runs and sings"]
Pair = tuple[LanguageModel, LanguageModel]
"""The same model on the CPU and on the device."""


def good(texts: list[str]) -> list[float]:
    return [float(sum(word in ("good", "happy", "nice", "love") for word in text.split())) for text in texts]


def assert_equal(here: Samples, there: Samples, atol: float = 1e-4) -> None:
    """Samples of the CPU and of the device; `atol` for sums of float32 logits (a hundred units in the last place)."""
    if isinstance(here.outputs, Tensor):
        torch.testing.assert_close(there.outputs.cpu(), here.outputs, atol=atol, rtol=atol)
    else:
        assert there.texts == here.texts and there.tokens == here.tokens
    assert there.group.tolist() == here.group.tolist()
    for name in ("reward", "log_weight", "log_prob", "base_log_prob", "kl", "log_z", "tilt"):
        ours, theirs = getattr(here, name), getattr(there, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(theirs.cpu(), ours, atol=atol, rtol=atol, msg=lambda m, name=name: f"{name}: {m}")
    assert there.cost.nfe == here.cost.nfe


@pytest.fixture(scope="module")
def pair(tiny_lm_dir: Path) -> Pair:
    return tuple(steer.load(tiny_lm_dir, dtype="float32", device=d, attn_implementation="eager") for d in ("cpu", DEVICE))


def test_the_device_makes_mistakes_visible() -> None:
    if DEVICE != "shadow":
        pytest.skip("of the shadow device")
    x, row = torch.arange(6.0, device="shadow").reshape(2, 3), torch.tensor([1]).to("shadow")
    other = torch.zeros(2, 3, device="shadow:1")
    for wrong in (
        lambda: x + torch.ones(3), lambda: torch.arange(3)[row], lambda: x.numpy(), lambda: x + other,
        lambda: torch.zeros(2, 3).add_(x), lambda: torch.cat([x, torch.ones(2, 3)]), lambda: torch.where(x.cpu() > 0, x, x),
        lambda: x.masked_fill(torch.ones(2, 3, dtype=torch.bool), 0.0), lambda: x.index_select(0, torch.tensor([0])),
        lambda: torch.rand(3, device="shadow", generator=torch.Generator()), lambda: x @ torch.ones(3, 1),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, TypeError)):
            wrong()
    assert (x + torch.tensor(1.0)).tolist() == [[1, 2, 3], [4, 5, 6]]  # a number, as on CUDA
    assert x[torch.tensor([1])].tolist() == x[row].tolist() == [[3, 4, 5]] and isinstance(x[0], Shadow)
    with waits() as seen:
        _ = float(x.sum()), x.tolist(), bool(x.any()), x.cpu(), x[x > 3], x.to("shadow:1"), torch.tensor([1], device=DEVICE)
        x[x > 3] = 0.0
        torch.ones(2).to("shadow", non_blocking=True)
    assert seen == {"_local_scalar_dense": 2, "to the CPU": 2, "index by a mask": 1, "upload": 1}


# ---------------------------------------------------------------------------------------------------------------- text


def vector(model: LanguageModel, seed: int, layers: tuple[int, ...] = (0, 1), **settings: Any) -> SteeringVector:
    drawn = torch.Generator().manual_seed(seed)
    made = {layer: torch.randn(model.info.width, generator=drawn) for layer in layers}
    return SteeringVector(made, **{"strength": 1.0, "unit": "raw", **settings})


def probe() -> Probe:
    return Probe(torch.randn(32, generator=torch.Generator().manual_seed(5)), 0.0)


def guided(model: LanguageModel, kind: type[nn.Module], **settings: Any) -> ValueGuidance:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = kind(32, 8)
        nn.init.normal_(head.outer.weight)
    place = head.eval().requires_grad_(False).to(model.device)
    value = HeadValue(place, model.info.unembedding() if kind is QHead else None)
    return ValueGuidance(value, **{"beta": 0.2, **settings})


def controller(model: LanguageModel) -> Controller:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ControllerNetwork(32, 2, 4).eval().requires_grad_(False)
        directions = nn.functional.normalize(torch.randn(2, 32), dim=-1)
    return Controller(network, (1,), directions, strength=0.8)


def tuned(model: LanguageModel) -> LanguageModel:
    """Another model with the same words."""
    network = copy.deepcopy(model.network)
    with torch.no_grad():
        network.lm_head.weight.mul_(1.2)
    return LanguageModel(network, model.tokenizer, "tuned")


EDITS: dict[str, Callable[[LanguageModel], Any]] = {
    "vector": lambda m: vector(m, 1),
    "generated": lambda m: vector(m, 2, scope="generated"),
    "from:12": lambda m: vector(m, 3, scope="from:12"),
    "ablate": lambda m: [vector(m, 4, operator="ablate"), vector(m, 1, layers=(1,))],
    "clamp": lambda m: vector(m, 7, operator="clamp"),
    "rotate": lambda m: vector(m, 7, operator="rotate", strength=40.0, references=vector(m, 8).directions),
    "keep norm": lambda m: vector(m, 5, keep_norm=True),
    "probe a token": lambda m: vector(m, 5, token_probes={0: probe()}),
    "gate": lambda m: vector(m, 6, gate=Gate(probe(), 0)),
    "controller": controller,
    "Q-head": lambda m: guided(m, QHead),
    "Q-head, top 5": lambda m: guided(m, QHead, top_k=5),
    "value head": lambda m: guided(m, ValueHead, top_k=3),
    "logits of another": lambda m: ValueGuidance(LogitValue(tuned(m).process(max_new_tokens=6)), beta=3.0),
    "rlg": lambda m: RLGuidance(tuned(m).process(max_new_tokens=6), 1.5),
    "prompt": lambda m: SystemPrompt("you are a dog"),
    "of one prompt": lambda m: [[vector(m, 1), guided(m, QHead)], None],
    "of each prompt": lambda m: [[vector(m, 1)], [vector(m, 2, scope="reply")]],
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits(edit: str, pair: Pair) -> None:
    here, there = (m.generate(PROMPTS, edits=EDITS[edit](m), n=2, max_new_tokens=6, seed=0) for m in pair)
    assert_equal(here, there)


DECODING: dict[str, Callable[[LanguageModel], dict[str, Any]]] = {
    "greedy": lambda m: {"temperature": 0},
    "temperature": lambda m: {"temperature": 0.7},
    "top-k": lambda m: {"top_k": 5},
    "top-p": lambda m: {"top_p": 0.8},
    "min-p": lambda m: {"min_p": 0.1, "top_p": 0.9},
    "repetition": lambda m: {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "least": lambda m: {"min_new_tokens": 4},
    "words": lambda m: {"bad_words_ids": [[5], [6, 7]], "suppress_tokens": [8, 9]},
    "stop": lambda m: {"stop": ["sun", "dog"]},
    "blocks": lambda m: {"block": 3},
    "sentences": lambda m: {"block": 3, "until": ("s", "o")},
    "own": lambda m: {
        "logits_processor": [TemperatureLogitsWarper(0.8)], "stopping_criteria": [MaxLengthCriteria(16)],
    },
}  # fmt: skip


@pytest.mark.parametrize("setting", DECODING)
def test_decoding(setting: str, pair: Pair) -> None:
    here, there = (m.generate(PROMPTS, n=3, max_new_tokens=6, seed=1, **DECODING[setting](m)) for m in pair)
    assert_equal(here, there)


SAMPLERS: dict[str, Any] = {
    "ancestral": Ancestral(3),
    "best-of-n": BestOfN(4),
    "rejection": BestOfN(4, reject=0.3),
    "fk": FKSteering(num_particles=4),
    "fk, drawn": FKSteering(num_particles=3, n=2, ess_threshold=None, resampler="systematic"),
    "fk, outputs": FKSteering(num_particles=3, n=2, per_output=True, potential="max", resampler="multinomial"),
    "fk, sum": FKSteering(num_particles=4, potential="sum", every=2, tempering=0.5, resampler="stratified"),
    "fk, best": FKSteering(num_particles=4, n=1, select="best", lookahead=Rollouts(2)),
    "svdd": SVDD(n=2, num_candidates=3),
    "svdd, argmax": SVDD(n=1, num_candidates=2, choose="argmax"),
    "dts": DTS(n=2, rollouts=6, batch=3),
    "dts, published": DTS(n=2, rollouts=6, batch=3, estimator="published", max_bytes=1),
    "dts, apart": DTS(n=1, rollouts=6, batch=2, merge=False, explore=0.1),
    "dts*": SearchDTS(n=2, rollouts=6, batch=3),
}
PROPOSALS = ("plain", "vector", "Q-head, top 5", "rlg")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_samplers(sampler: str, proposal: str, pair: Pair) -> None:
    """Of a third of the pairs of sampler and proposal; all in the slow suite."""
    made = SAMPLERS[sampler]
    if proposal == "vector" and hasattr(made, "correct"):
        made = replace(made, correct=False)  # the weight of a hidden edit is not known

    def run(model: LanguageModel) -> Samples:
        edits = EDITS[proposal](model) if proposal in EDITS else ()
        return model.generate(PROMPTS, edits=edits, sampler=made, reward=good, beta=0.5, max_new_tokens=5, seed=2)

    here, there = map(run, pair)
    assert_equal(here, there)
