"""Everything that runs on a device, run on `shadow` and on the CPU: nothing is mixed up, and the results are equal.

With `STEER_TEST_DEVICE=cuda` the same tests run on a GPU. How the device is told apart is in `shadow_device.py`.
"""

from __future__ import annotations

import asyncio
import copy
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from shadow_device import Shadow, waits
from tiny_pipelines import PIPELINES, ddim, network
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.generation.logits_process import TemperatureLogitsWarper
from transformers.generation.stopping_criteria import MaxLengthCriteria

import steer
from steer import artifacts
from steer.adapters import diffusers
from steer.adapters.diffusers.policy.tuning import load_diffusion_policy, train_diffusion_policy
from steer.adapters.rewards.images import ImageClassifierReward
from steer.adapters.rewards.text import ModelReward
from steer.adapters.transformers import LanguageModel, masked, tracking
from steer.adapters.transformers.serving.batch import Batch, BatchRow
from steer.adapters.transformers.serving.engine import TransformersEngine
from steer.core import Context, RewardError, Samples, TransitionEdit
from steer.edits import load_edit
from steer.masked import MarginalDraws
from steer.methods.best_of_n import Ancestral, BestOfN
from steer.methods.controller import Controller, ControllerNetwork
from steer.methods.dts import DTS, SearchDTS
from steer.methods.fk import FKSteering
from steer.methods.gradient import GradientGuidance
from steer.methods.operators import Probe
from steer.methods.prompt import SystemPrompt
from steer.methods.rlg import RLGuidance
from steer.methods.svdd import SVDD
from steer.methods.value import HeadValue, LogitValue, QHead, ValueGuidance, ValueHead
from steer.methods.vector import Gate, SteeringVector
from steer.rewards import Brightness, as_reward
from steer.sampling.lookahead import Rollouts
from steer.serving.artifact_store import digest
from steer.serving.engine import Delta, NamedEdit, Sampling, Steering, Task
from steer.serving.wire import EditRequest
from steer.train.controller import train_controller
from steer.train.value import train_value
from steer.train.vector import train_vector

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
            torch.testing.assert_close(
                theirs.cpu(), ours, atol=atol, rtol=atol, msg=lambda m, name=name: f"{name}: {m}"
            )
    assert there.cost.nfe == here.cost.nfe


def both(load: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What `load` makes on the CPU and on the device."""
    return tuple(load(*args, device=device, **options) for device in ("cpu", DEVICE))


def compare(
    models: Any, prompts: Any, edit: Callable[[Any], Any] | None = None, atol: float = 1e-4, **how: Any
) -> None:
    """The samples of both models under an edit that is made for each are equal."""
    assert_equal(*(m.generate(prompts, edits=() if edit is None else edit(m), **how) for m in models), atol=atol)


@pytest.fixture(scope="module")
def pair(tiny_lm_dir: Path) -> Pair:
    return both(steer.load, tiny_lm_dir, dtype="float32", attn_implementation="eager")


def test_the_device_makes_mistakes_visible() -> None:
    if DEVICE != "shadow":
        pytest.skip("of the shadow device")
    x, row = torch.arange(6.0, device="shadow").reshape(2, 3), torch.tensor([1]).to("shadow")
    other = torch.zeros(2, 3, device="shadow:1")
    for wrong in (
        lambda: x + torch.ones(3),
        lambda: torch.arange(3)[row],
        lambda: x.numpy(),
        lambda: x + other,
        lambda: torch.zeros(2, 3).add_(x),
        lambda: torch.cat([x, torch.ones(2, 3)]),
        lambda: torch.where(x.cpu() > 0, x, x),
        lambda: x.masked_fill(torch.ones(2, 3, dtype=torch.bool), 0.0),
        lambda: x.index_select(0, torch.tensor([0])),
        lambda: torch.rand(3, device="shadow", generator=torch.Generator()),
        lambda: x @ torch.ones(3, 1),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            wrong()
    assert (x + torch.tensor(1.0)).tolist() == [[1, 2, 3], [4, 5, 6]]  # a number, as on CUDA
    assert x[torch.tensor([1])].tolist() == x[row].tolist() == [[3, 4, 5]] and isinstance(x[0], Shadow)
    with waits() as seen:
        _ = (
            float(x.sum()),
            x.tolist(),
            bool(x.any()),
            x.cpu(),
            x[x > 3],
            x.to("shadow:1"),
            torch.tensor([1], device=DEVICE),
        )
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
    "ablate": lambda m: vector(m, 4, operator="ablate"),
    "two": lambda m: [[vector(m, 4, operator="ablate"), vector(m, 1, layers=(1,))]] * 2,
    "clamp": lambda m: vector(m, 7, operator="clamp"),
    "rotate": lambda m: vector(m, 7, operator="rotate", strength=40.0, references=vector(m, 8).directions),
    "keep norm": lambda m: vector(m, 5, keep_norm=True),
    "probe a token": lambda m: vector(m, 5, token_probes={0: probe()}),
    "gate": lambda m: vector(m, 6, gate=Gate(probe(), 0)),
    "controller": controller,
    "Q-head": lambda m: guided(m, QHead),
    "Q-head, top 5": lambda m: guided(m, QHead, top_k=5),
    "Q-head, all tokens": lambda m: guided(m, QHead, top_k=0),
    "value head": lambda m: guided(m, ValueHead, top_k=3),
    "logits of another": lambda m: ValueGuidance(LogitValue(tuned(m).process(max_new_tokens=6)), beta=3.0),
    "rlg": lambda m: RLGuidance(tuned(m).process(max_new_tokens=6), 1.5),
    "prompt": lambda m: SystemPrompt("you are a dog"),
    "of one prompt": lambda m: [[vector(m, 1), guided(m, QHead)], None],
    "of each prompt": lambda m: [[vector(m, 1)], [vector(m, 2, scope="reply")]],
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits(edit: str, pair: Pair) -> None:
    compare(pair, PROMPTS, EDITS[edit], n=2, max_new_tokens=6, seed=0)


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
        "logits_processor": [TemperatureLogitsWarper(0.8)],
        "stopping_criteria": [MaxLengthCriteria(16)],
    },
}


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
PROPOSALS = ("vector", "Q-head, top 5", "rlg")


def sampled(*more: str) -> list[Any]:
    """Pairs of a sampler and one of `more` in turn for each sampler, the others slow."""
    pairs: list[Any] = []
    for i, sampler in enumerate(SAMPLERS):
        for j, other in enumerate(more):
            marks = () if i % len(more) == j else (pytest.mark.slow,)
            pairs.append(pytest.param(sampler, other, marks=marks))
    return pairs


@pytest.mark.parametrize(("sampler", "proposal"), [*((sampler, "plain") for sampler in SAMPLERS), *sampled(*PROPOSALS)])
def test_samplers(sampler: str, proposal: str, pair: Pair) -> None:
    made = SAMPLERS[sampler]
    if proposal == "vector" and hasattr(made, "correct"):
        made = replace(made, correct=False)  # the weight of a hidden edit is not known
    compare(pair, PROMPTS, EDITS.get(proposal), sampler=made, reward=good, beta=0.5, max_new_tokens=5, seed=2)


# ------------------------------------------------------------------------------------------------------------- serving


SAMPLING = [
    Sampling(temperature=0),
    Sampling(top_k=5),
    Sampling(top_p=0.7, min_p=0.02),
    Sampling(logit_bias=((5, 4.0),)),
    Sampling(frequency_penalty=1.0, presence_penalty=0.5),
    Sampling(temperature=1.5),
]


def served(model: LanguageModel, path: Path) -> list[dict[int, str]]:
    """Texts of requests of all kinds, answered at once, with what was drawn of each."""
    engine = TransformersEngine(model)
    edit = NamedEdit(path, digest(path), EditRequest(name="v", strength=1.0))
    steered = Steering(edits=(edit,))

    async def one(task: Task) -> dict[int, str]:
        texts: dict[int, str] = {}
        async for event in engine.run(engine.prepare(task)):
            if isinstance(event, Delta):
                texts[event.choice] = texts.get(event.choice, "") + event.text
        return texts

    async def all_of_them() -> list[dict[int, str]]:
        tasks = []
        for i, sampling in enumerate(SAMPLING):
            settings = replace(sampling, max_tokens=5 + i, seed=i, logprobs=2 if i % 2 else None)
            tasks.append(Task((PROMPTS[i % 2],), 2, settings, steered if i % 3 else None))
        return await asyncio.gather(*(one(task) for task in tasks))

    try:
        return asyncio.run(all_of_them())
    finally:
        engine.close()


def test_rows_of_a_server(pair: Pair, tmp_path: Path) -> None:
    """In the engine's own thread. Each request has its seed, so that the company it is in does not matter."""
    path = tmp_path / "v.safetensors"
    tensors = {f"direction.{layer}": v for layer, v in vector(pair[0], 1).directions.items()}
    artifacts.save(path, tensors, train_vector(pair[0], PAIRS, pool="last")[1])
    here, there = (served(model, path) for model in pair)
    assert here == there and len({text for texts in here for text in texts.values()}) > 6


def test_rows_that_come_and_go(pair: Pair) -> None:
    """Of a running batch, under edits of all kinds."""
    kinds = ["vector", "generated", "from:12", "ablate", "keep norm", "gate", "Q-head", "clamp"]

    def run(model: LanguageModel) -> list[list[int]]:
        batch, rows = Batch(model), []
        for i, kind in enumerate(kinds):
            made = EDITS[kind](model)
            edits = made if isinstance(made, list) else [made]
            guided = tuple(e for e in edits if isinstance(e, ValueGuidance))
            hidden = [(e, None) for e in edits if e not in guided]
            track, _ = tracking.start(model.body, [model.encode(PROMPTS[i % 2])], hidden, 1, hidden=bool(guided))
            settings = Sampling(max_tokens=3 + i % 4)
            rows.append(BatchRow(model, settings, i, i, edits=guided, measured=True, taken=lambda *new: None))
            with torch.inference_mode():
                batch.join([rows[-1]], track, [0])
            batch.drop(lambda row, i=i: row.choice == 3 and i > 4)
            batch.step()
        while batch.rows:
            batch.step()
        return [row.tokens for row in rows]

    here, there = map(run, pair)
    assert here == there


# ------------------------------------------------------------------------------------------------------------ training


PAIRS = [
    {"positive": f"the {thing} is {up} .", "negative": f"the {thing} is {down} ."}
    for thing in ("sun", "rain", "day", "dog")
    for up, down in (("good", "bad"), ("happy", "sad"))
]


def assert_alike(here: Any, there: Any) -> None:
    """Trained tensors of both devices, which are saved on the CPU."""
    assert here.keys() == there.keys() and all(x.device.type == "cpu" for x in there.values())
    for name, x in here.items():
        torch.testing.assert_close(there[name], x, atol=1e-3, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("method", ["mean", "pca", "probe"])
def test_vectors_are_trained(method: str, pair: Pair) -> None:
    here, there = (train_vector(m, PAIRS, method=method, pool="last") for m in pair)
    assert_alike(here[0], there[0])
    assert here[1].model == there[1].model  # the fingerprint too


@pytest.mark.parametrize("head", ["q", "v"])
def test_values_are_trained(head: str, pair: Pair, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"samples": 4, "max_new_tokens": 4, "hidden": 8, "epochs": 2, "seed": 0}
    here, there = (train_value(m, PROMPTS, good, head=head, **settings) for m in pair)
    assert_alike(here.tensors, there.tensors)
    artifacts.save(tmp_path / "q.safetensors", *there)
    compare(pair, PROMPTS, lambda m: load_edit(tmp_path / "q.safetensors", model=m), seed=0, max_new_tokens=4)


def test_controllers_are_trained(pair: Pair, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"openings": ["I love it ."], "answers": ["it is sad ."], "seed": 0, "epochs": 2}
    positive, negative = [r["negative"] for r in PAIRS], [r["positive"] for r in PAIRS]
    here, there = (train_controller(m, positive, negative, batch_size=4, **settings) for m in pair)
    assert_alike(here.tensors, there.tensors)
    artifacts.save(tmp_path / "c.safetensors", *there)
    compare(pair, PROMPTS, lambda m: load_edit(tmp_path / "c.safetensors"), seed=0, max_new_tokens=4)


# -------------------------------------------------------------------------------------------------------------- masked


@dataclass(frozen=True)
class Pull(TransitionEdit):
    """Moves the quantity along a fixed slope."""

    by: float

    def shift(self, x: Tensor, context: Context) -> Tensor:
        return x + self.by * torch.arange(x.shape[-1], dtype=x.dtype, device=x.device) / x.shape[-1]


@pytest.fixture(scope="module")
def masked_pair(tiny_bert_dir: Path) -> Any:
    return both(masked.load, tiny_bert_dir, dtype="float32", attn_implementation="eager")


@pytest.mark.parametrize("sampler", ["ancestral", "fk", "fk, marginal", "svdd", "dts", "dts*"])
def test_masked_models(sampler: str, masked_pair: Any) -> None:
    made = {**SAMPLERS, "fk, marginal": FKSteering(num_particles=4, lookahead=MarginalDraws(2))}[sampler]
    settings: dict[str, Any] = {"length": 6, "steps": 4, "reward": good, "beta": 0.5, "seed": 3}
    if sampler == "svdd":
        settings |= {"temperature": 0.8, "top_k": 8, "suppress": (0, 1), "order": "confidence"}
    compare(masked_pair, ["the sun", "a dog"], lambda m: Pull(0.3), sampler=made, **settings)


# ----------------------------------------------------------------------------------------------------------- diffusion


@cache
def fashion(device: str) -> Any:
    return steer.load("fashion-ddpm", device=device)


def weaker(model: Any) -> Any:
    """RL guidance towards another network."""
    other = copy.deepcopy(model.source.network)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.01)
    return RLGuidance(model.tuned(other).process(steps=4), 1.5)


GUIDANCE: dict[str, Any] = {"gradient": lambda m: GradientGuidance(Brightness(), strength=0.02), "rlg": weaker}


@pytest.mark.parametrize(("sampler", "edit"), sampled("plain", *GUIDANCE))
def test_the_fashion_model(sampler: str, edit: str) -> None:
    """Each sampler under one of them in the quick suite: what a sampler does on a device it does to texts, too."""
    reward = "class:bag" if edit == "plain" else "brightness"
    settings: dict[str, Any] = {"reward": reward, "beta": 0.5, "steps": 4, "seed": 4}
    models = [fashion(device) for device in ("cpu", DEVICE)]
    compare(models, ["bag", ""], GUIDANCE.get(edit), 1e-3, sampler=SAMPLERS[sampler], **settings)


SIZES: dict[str, dict[str, Any]] = {
    "sd15": {},
    "sdxl": {"height": 16, "width": 16},
    "sd3": {"height": 16, "width": 16, "max_sequence_length": 12},
    "flux": {"height": 16, "width": 16, "max_sequence_length": 12},
}


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
@pytest.mark.parametrize("name", SIZES)
def test_pipelines(name: str) -> None:
    models = both(lambda device: steer.load(PIPELINES[name](), device=device))
    for sampler in (Ancestral(2), FKSteering(num_particles=3, n=1), DTS(n=1, rollouts=4, batch=2)):
        noise = {} if name == "sd15" else {"eta": 1.0}
        if isinstance(sampler, DTS) and name != "sd15":
            continue
        settings = {**SIZES[name], **noise, "steps": 3, "reward": "brightness", "beta": 0.1, "seed": 5}
        compare(models, ["a cat", "the sun"], atol=1e-3, sampler=sampler, **settings)


# ------------------------------------------------------------------------------------------------------------ policies


def test_text_policies(pair: Pair, tmp_path: Path) -> None:
    """A LoRA adapter by PEFT, merged and beside the base's weights, alone and under RL guidance."""
    pytest.importorskip("peft")
    pytest.importorskip("trl")
    from steer.adapters.transformers.policy.folder import load_policy
    from steer.adapters.transformers.policy.tuning import train_policy

    rows = [{"prompt": p, "completion": "you love it ."} for p in PROMPTS]
    train_policy(pair[0], rows, method="sft", out=tmp_path / "p", steps=3, learning_rate=1e-2, lora_rank=4)
    for merge in (True, False):
        drawn = []
        for model in pair:
            policy = load_policy(model, tmp_path / "p", merge=merge)
            edits = [None, [RLGuidance(policy.process(max_new_tokens=5), 2.0)]]
            drawn.append(policy.generate(PROMPTS, n=2, seed=0, max_new_tokens=5))
            drawn.append(model.generate(PROMPTS, edits=edits, n=2, seed=0, max_new_tokens=5))
        assert_equal(drawn[0], drawn[2])
        assert_equal(drawn[1], drawn[3])


@pytest.mark.parametrize("method", ["pg", "dpo", "seppo"])
def test_diffusion_policies_are_trained(method: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_steps": 3, "measured": 8, "group_size": 4, "steps": 2, "reward": "brightness"}
    settings |= {"rounds": 2, "lora_rank": 2} if method == "pg" else {}
    weights, drawn = [], []
    for device in ("cpu", DEVICE):
        made = network(num_class_embeds=4, in_channels=1, out_channels=1).to(device).requires_grad_(False)
        model = diffusers.load(made, scheduler=ddim(num_train_timesteps=20), classes=["a", "b", "c"])
        out = train_diffusion_policy(model, ["a", "b"], method=method, out=tmp_path / device, seed=0, **settings)
        policy = load_diffusion_policy(model, out)
        weights.append({k: v.cpu() for k, v in policy.source.network.state_dict().items()})
        guided = RLGuidance(policy.process(steps=3), 1.5)
        drawn.append(model.generate(["a", "b"], edits=guided, n=2, seed=0, steps=3))
    assert_alike(*weights)
    assert_equal(*drawn, atol=1e-2)


# ----------------------------------------------------------------------------------------------- where the weights are


def test_blocks_on_two_devices(tiny_lm_dir: Path, pair: Pair, tmp_path: Path) -> None:
    second = {"shadow": "shadow:1", "cuda": "cuda:1"}[DEVICE]
    if DEVICE == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    first = f"{DEVICE}:0"
    where = {
        "model.embed_tokens": first,
        "model.rotary_emb": first,
        "model.layers.0": first,
        "model.layers.1": second,
        "model.norm": second,
        "lm_head": second,
    }
    network = dispatch_model(copy.deepcopy(pair[0].network), where, main_device=first)
    split = LanguageModel(network, pair[0].tokenizer, pair[0].name)
    assert split.info.fingerprint == pair[0].info.fingerprint
    assert [str(next(block.parameters()).device) for block in split.blocks] == [first, second]
    for edit in ("vector", "ablate", "gate", "controller", "Q-head, top 5", "value head", "of one prompt"):
        compare((pair[0], split), PROMPTS, EDITS[edit], n=2, max_new_tokens=5, seed=0)
    for sampler in ("fk", "dts"):
        compare((pair[0], split), PROMPTS, sampler=SAMPLERS[sampler], reward=good, max_new_tokens=5, seed=2)
    assert_alike(*(train_vector(m, PAIRS, pool="last")[0] for m in (pair[0], split)))


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_weights(place: str, pair: Pair, tmp_path: Path) -> None:
    """Weights are on the device only while their block runs; between passes they are on `meta`."""
    network = copy.deepcopy(pair[0].network)
    network.tie_weights()
    if place == "cpu":
        cpu_offload(network, execution_device=torch.device(DEVICE, 0))
    else:
        disk_offload(network, str(tmp_path / "weights"), execution_device=torch.device(DEVICE, 0))
    away = LanguageModel(network, pair[0].tokenizer, pair[0].name)
    assert next(away.blocks[0].parameters()).device.type == "meta" and away.device.type == DEVICE
    assert away.info.fingerprint == pair[0].info.fingerprint
    for edit in ("vector", "ablate", "keep norm", "gate", "Q-head", "of each prompt"):
        compare((pair[0], away), PROMPTS, EDITS[edit], n=2, max_new_tokens=4, seed=0)
    compare((pair[0], away), PROMPTS, sampler=SAMPLERS["fk"], reward=good, max_new_tokens=4, seed=2)
    assert_alike(*(train_vector(m, PAIRS, pool="last")[0] for m in (pair[0], away)))


# ------------------------------------------------------------------------------------------------------------- rewards


def test_reward_models(tiny_lm_dir: Path, pair: Pair, tmp_path: Path) -> None:
    """A reward model of texts, and the likelihood under the model itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = LlamaForSequenceClassification.from_pretrained(tiny_lm_dir, num_labels=1, pad_token_id=1)
    judge.save_pretrained(tmp_path)
    pair[0].tokenizer.save_pretrained(tmp_path)
    samples = pair[0].generate(PROMPTS, n=3, seed=0, max_new_tokens=6)
    here, there = both(lambda device: ModelReward(tmp_path, device=device)(samples))
    assert there.device.type == "cpu" and torch.allclose(here, there, atol=1e-4) and float(here.std()) > 0
    for name in ("fluency", "perplexity"):
        here, there = (as_reward(name).bind(model)(samples) for model in pair)
        assert there.device.type == "cpu" and torch.allclose(here, there, atol=1e-4)


def test_classifiers_of_images(tmp_path: Path) -> None:
    """Of images that are on the device, as pipelines make them, and of images that are not."""
    shape: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **shape)).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def scores(device: str, place: str) -> Tensor:
        made = Samples([""], images.to(place), torch.zeros(5, dtype=torch.long), torch.zeros(5))
        return ImageClassifierReward(tmp_path, 0, device=device)(made)

    here, *others = scores("cpu", "cpu"), scores(DEVICE, "cpu"), scores(DEVICE, DEVICE), scores("cpu", DEVICE)
    assert all(torch.allclose(here, there, atol=1e-5) for there in others) and float(here.std()) > 0


# ------------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("edit", ["vector", "ablate", "gate", "Q-head", "rlg", "controller"])
def test_half_precision(dtype: str, edit: str, tiny_lm_dir: Path) -> None:
    """The same on both devices, and of the same law as in float32."""
    models = both(steer.load, tiny_lm_dir, dtype=dtype, attn_implementation="eager")
    here, there = (m.generate(PROMPTS, edits=EDITS[edit](m), n=2, max_new_tokens=4, seed=0) for m in models)
    if DEVICE == "shadow":
        assert_equal(here, there)
    assert there.log_prob.dtype == torch.float64 and bool(torch.isfinite(there.log_prob).all())
    assert bool(torch.isfinite(there.kl).all())


@pytest.mark.filterwarnings("error:.*not right where")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_deep_models_in_half_precision_take_rows_of_unequal_length(dtype: str, pair: Pair) -> None:
    """What is tried at load does not itself overflow in float16, and so take good padding for bad."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            **{**pair[0].config.to_dict(), "num_hidden_layers": 24, "initializer_range": 0.02, "dtype": dtype}
        )
        network = LlamaForCausalLM(config).to(DEVICE, getattr(torch, dtype))
    model = LanguageModel(network, pair[0].tokenizer, "deep")
    assert bool(torch.isfinite(model.generate(PROMPTS, seed=0, max_new_tokens=3).log_prob).all())
    assert model.body.layout.known["pads"]


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 1e30), ("bfloat16", 1e30), ("bfloat16", 60.0), ("float16", 60.0), ("float16", 7e4)]
)
@pytest.mark.parametrize("sampler", ["best-of-n", "fk", "fk, sum", "fk, outputs", "svdd", "dts", "dts*"])
def test_rewards_beyond_half_precision(dtype: str, size: float, sampler: str, pair: Pair) -> None:
    """A reward model in half precision returns its own numbers, which differ by more than exp can take, and weights
    become neither NaN nor all zero; rewards that overflowed in the reward itself are refused by name.
    """

    def score(texts: list[str]) -> Tensor:
        words = torch.tensor([len(set(text.split())) for text in texts], dtype=torch.float32, device=DEVICE)
        return (words * size).to(getattr(torch, dtype))

    def run() -> Samples:
        return pair[1].generate(PROMPTS, sampler=SAMPLERS[sampler], reward=score, beta=0.01, max_new_tokens=4, seed=0)

    if dtype == "float16" and size > 1e4:
        with pytest.raises(RewardError, match="returned inf"):
            run()
        return
    samples = run()
    for name in ("reward", "log_weight", "log_z"):
        value = getattr(samples, name)
        assert value is None or (value.dtype == torch.float64 and not bool(value.isnan().any())), name
    assert bool(torch.isfinite(samples.reward).all()) and float(samples.reward.max()) >= size
    weights = (samples if samples.pool is None else samples.pool).log_weight
    assert bool(torch.isfinite(weights.max())) and not bool(weights.isnan().any())


# ---------------------------------------------------------------------------------------------------------------- waits

PER_TOKEN = {
    **dict.fromkeys(("greedy", "top-k", "top-p", "min-p", "repetition", "least", "words", "stop", "blocks"), 1.0),
    **dict.fromkeys(("vector", "ablate", "gate", "controller", "Q-head, top 5", "rlg", "of one prompt"), 1.0),
    "sentences": 2.0,  # which leave columns without a token
    # A value that looks ahead asks whether the token was among the candidates.
    "value head": 2.0,
}
"""Waits of a token under each setting and edit: whether any row goes on."""
UPLOADS = {"stop": 1, "sentences": 5, "value head": 1, "of one prompt": 1}
"""Copies to the device that wait for it: what is known of a token's text, which rows asked for an edit."""


@pytest.mark.parametrize("case", PER_TOKEN)
def test_waits_of_a_token(case: str, pair: Pair) -> None:
    """The slope of waits in the number of tokens: what a token costs, without what a run costs."""
    model = pair[1]
    settings = DECODING[case](model) if case in DECODING else {}
    edits = EDITS[case](model) if case in EDITS else ()

    def count(tokens: int) -> Counter[str]:
        with waits() as seen:
            model.generate(PROMPTS, edits=edits, n=2, max_new_tokens=tokens, eos_token_id=[], seed=0, **settings)
        return seen

    few, many = count(4), count(10)
    grown = {name: (many[name] - few[name]) / 6 for name in many}
    uploads = grown.pop("upload", 0)
    assert sum(grown.values()) <= PER_TOKEN[case] and uploads <= UPLOADS.get(case, 0), (grown, uploads)
