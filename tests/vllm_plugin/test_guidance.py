"""RL guidance: tuned models beside the base in one engine, against the transformers adapter's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_tools import MISSING, PROMPTS, SETTINGS, each, greedy, guide, vector

import steer
from steer.adapters.vllm.plugin.tuned import open_tuned
from steer.core import InputError, UnsupportedError
from steer.methods.rlg import RLGuidance

RANK, ALPHA = 4, 8.0
TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
LAYERS = range(4, 24)


def write_lora(folder: Path, base: dict[str, torch.Tensor], seed: int, size: float, **settings: Any) -> Path:
    """A random adapter in PEFT's layout; `size` is that of its deltas beside the weights."""
    generator, held = torch.Generator().manual_seed(seed), {}
    for layer in LAYERS:
        for target in TARGETS:
            name = f"model.layers.{layer}.{target}"
            out, width = base[f"{name}.weight"].shape
            norm = base[f"{name}.weight"].float().norm() * size / (ALPHA / RANK)
            a, b = torch.randn(RANK, width, generator=generator), torch.randn(out, RANK, generator=generator)
            held[f"base_model.model.{name}.lora_A.weight"] = a
            held[f"base_model.model.{name}.lora_B.weight"] = b * norm / (b @ a).norm()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(held, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": [t.split(".")[1] for t in TARGETS],
        "use_rslora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_lora_weights": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    return folder


def write_whole(folder: Path, model: Path, base: dict[str, torch.Tensor], lora: Path) -> Path:
    """The network with an adapter merged into it, in float32."""
    deltas, scale = load_file(lora / "adapter_model.safetensors"), ALPHA / RANK
    merged = {name: w.float() for name, w in base.items()}
    for key, a in deltas.items():
        if "lora_A" in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
            merged[name] = merged[name] + scale * (deltas[key.replace("lora_A", "lora_B")] @ a)
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.glob("*.json*"):
        if file.name != "MODEL_CARD.json":
            shutil.copy(file, folder)
    for file in model.glob("*.jinja"):
        shutil.copy(file, folder)
    save_file(merged, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def base(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="session")
def folders(folder: Path, base: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tuned models: an adapter, and a whole network, with the whole network of the first for the reference."""
    root = tmp_path_factory.mktemp("tuned")
    one, two = (write_lora(root / f"lora{seed}", base, seed, 0.25) for seed in (1, 2))
    return {
        "polite": one,
        "terse": write_whole(root / "terse", folder, base, two),
        "polite-whole": write_whole(root / "polite", folder, base, one),
    }


@pytest.fixture(scope="session")
def paired(folder: Path, folders: dict[str, Path]) -> Iterator[Any]:
    """An engine that runs both tuned models beside the base."""
    if MISSING:
        pytest.skip(MISSING)
    from steer.adapters import vllm

    tuned = {name: str(folders[name]) for name in ("polite", "terse")}
    yield vllm.load("smollm2-135m", steer={"tuned": tuned}, **SETTINGS)


@pytest.fixture(scope="session")
def towards(folders: dict[str, Path]) -> Callable[..., RLGuidance]:
    """The same guidance for the transformers adapter."""
    policies = {
        name: steer.load(folder, dtype="float32", device="cpu").process()
        for name, folder in (("polite", folders["polite-whole"]), ("terse", folders["terse"]))
    }
    return lambda name, w=1.0: RLGuidance(policies[name], w)


# ------------------------------------------------------------------------------------------------------ the same law


def test_every_weight_in_one_batch(paired: Any, reference: Any, towards: Any) -> None:
    """Plain rows between rows of every weight, towards an adapter, a whole network and both; prompts are read in
    chunks, since a step has 64 tokens.
    """
    asked: list[Any] = [
        None,
        ("polite", 1.0),
        ("terse", 2.0),
        ("polite", 0.5),
        ("terse", 0.0),
        ("polite", 2.0),
        ("terse", 1.0),
        ("terse", -0.5),
        ("polite", 1.6),
        None,
        (("polite", 0.5), ("terse", 0.7)),
        (("terse", 1.0), ("polite", 0.0)),
    ]
    prompts = [PROMPTS[i % 4] for i in range(len(asked))]

    def edits(make: Any) -> list[Any]:
        pairs = [() if a is None else (a,) if isinstance(a[0], str) else a for a in asked]
        return [[make(name, w) for name, w in several] for several in pairs]

    ours = greedy(paired, prompts, edits(paired.edit), 10).tokens
    theirs = greedy(reference, prompts, edits(towards), 10).tokens
    assert ours == theirs
    plain = greedy(reference, new=10).tokens
    assert ours[0] == plain[0] and ours[4] == plain[0] and ours[9] == plain[1]
    assert all(ours[i] != plain[i % 4] for i in (1, 2, 3, 5, 6, 7, 8, 10, 11))
    assert greedy(paired, PROMPTS[2:3], paired.edit("terse"), 10).tokens == [ours[6]]  # the weight of one is 1


def test_plain_requests_are_those_of_a_plain_engine(paired: Any, engine: Any) -> None:
    """Token for token, drawn with seeds, also beside guided ones."""
    settings: dict[str, Any] = {"temperature": 0.9, "max_new_tokens": 12, "seed": 4, "n": 2}
    edits = [None, [paired.edit("polite", 2.0)], None, [paired.edit("terse")]]
    mixed_in = paired.generate(PROMPTS, edits=edits, **settings)
    alone = engine.generate(PROMPTS, **settings)
    for i, b in enumerate(alone.group.tolist()):
        assert (mixed_in.tokens[i] == alone.tokens[i]) == (b in (0, 2))


def test_edits_and_heads_beside_guidance(paired: Any, reference: Any, towards: Any) -> None:
    """Hidden edits act on the base alone, and a head chooses its candidates by the base's law."""
    steered, head = vector(0.3), guide(reference.info.unembedding())
    masked = guide(reference.info.unembedding(), 1, tail="mask", top_k=5)

    def edits(make: Any) -> list[Any]:
        return [[steered, make("polite", 1.5)], [make("terse", 1.5), head], [masked, make("polite", 2.0)], [head]]

    ours = greedy(paired, edits=edits(paired.edit), new=14).tokens
    assert ours == greedy(reference, edits=edits(towards), new=14).tokens
    other = [[paired.edit("polite", 1.5)], [paired.edit("terse", 1.5)], [masked], None]
    without = greedy(paired, edits=other, new=14).tokens
    assert all(mine != other for mine, other in zip(ours, without, strict=True))


def law(reference: Any, policy: Any, ids: list[int], w: float) -> torch.Tensor:
    """Log-law of the token after every position `[T, V]`, from the two networks themselves."""
    with torch.inference_mode():
        base, tuned = (model.network(torch.tensor([ids])).logits[0] for model in (reference, policy))
    return torch.log_softmax((1 - w) * base.double() + w * tuned.double(), -1)


def test_what_is_drawn_and_what_is_reported(paired: Any, reference: Any, towards: Any) -> None:
    """The temperature divides the mixture; seeds repeat; drift is measured from the base."""
    settings: dict[str, Any] = {"temperature": 0.7, "max_new_tokens": 8, "eos_token_id": [], "n": 3}
    edit, policy = paired.edit("polite", 1.5), towards("polite").tuned.model
    samples = paired.generate(PROMPTS[:2], edits=edit, seed=1, **settings)
    again = paired.generate(PROMPTS[:2], edits=edit, seed=1, **settings)
    assert samples.tokens == again.tokens and len({tuple(t) for t in samples.tokens}) == 6
    for i, (b, tokens) in enumerate(zip(samples.group.tolist(), samples.tokens, strict=True)):
        prompt = reference.encode(PROMPTS[b])
        at = torch.log_softmax(law(reference, policy, [*prompt, *tokens], 1.5)[len(prompt) - 1 : -1] / 0.7, -1)
        assert abs(float(at.gather(1, torch.tensor(tokens).unsqueeze(1)).sum()) - float(samples.log_prob[i])) < 5e-3
    warm = paired.generate(PROMPTS[:1], edits=edit, seed=1, **{**settings, "temperature": 1.0})
    base = reference.process(max_new_tokens=8).log_likelihood(PROMPTS[:1], warm.group, warm.tokens)
    assert torch.allclose(warm.kl, warm.log_prob - base, atol=1e-2)


def request(engine: Any, prompt: Any, steer_edits: Any, **params: Any) -> Any:
    """One answer of the engine's own interface."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    extra = {"steer": {"edits": steer_edits}} if steer_edits else None
    ids = engine.encode(prompt) if isinstance(prompt, str) else prompt
    asked = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **params}, extra_args=extra)
    return engine.llm.generate(TokensPrompt(prompt_token_ids=ids), asked, use_tqdm=False)[0]


def test_log_probabilities_of_prompts(paired: Any, reference: Any, towards: Any) -> None:
    """They are those of the mixture, in chunks; of a plain request, those of the base."""
    policy, ids = towards("terse").tuned.model, reference.encode(PROMPTS[2])
    assert len(ids) > 64
    for w in (2.0, 0.0):
        edits = [{"name": "terse", "strength": w}] if w else None
        output = request(paired, ids, edits, prompt_logprobs=0, max_tokens=1)
        seen = torch.tensor([output.prompt_logprobs[t][ids[t]].logprob for t in range(1, len(ids))])
        want = law(reference, policy, ids, w)[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
        assert torch.allclose(seen.double(), want, atol=1e-2)


def test_several_continuations_masks_and_bias(paired: Any, reference: Any, towards: Any) -> None:
    """What the sampler does to logits comes after the mixture, at its own strength."""
    edits, policy = [{"name": "polite", "strength": 3.0}], towards("polite").tuned.model
    several = [request(paired, PROMPTS[0], edits, n=3, seed=7, temperature=1.0).outputs for _ in range(2)]
    first, second = ([tuple(o.token_ids) for o in outputs] for outputs in several)
    assert first == second and len(set(first)) == 3
    ids = reference.encode(PROMPTS[1])
    at = law(reference, policy, ids, 3.0)[-1]
    best = at.topk(3).indices.tolist()
    allowed = request(paired, ids, edits, allowed_token_ids=best[1:], max_tokens=1).outputs[0]
    assert list(allowed.token_ids) == [best[1]]
    for gap, winner in ((0.9, 0), (1.1, 2)):  # of what the third lacks
        bias = float(at[best[0]] - at[best[2]]) * gap
        biased = request(paired, ids, edits, logit_bias={best[2]: bias}, max_tokens=1).outputs[0]
        assert list(biased.token_ids) == [best[winner]]


def test_prefix_cache(paired: Any) -> None:
    """A weight changes nothing in the cache: whoever comes next finds the blocks of the prompt, and draws as if not."""
    prompt = PROMPTS[2]
    whole = (len(paired.encode(prompt)) - 1) // 32 * 32
    order = [("polite", 2.0), None, ("terse", 1.0), ("polite", 0.5), None]
    asked = [[{"name": a[0], "strength": a[1]}] if a else None for a in order]
    cold = []
    for edits in asked:
        paired.llm.reset_prefix_cache()
        output = request(paired, prompt, edits, max_tokens=4)
        assert output.num_cached_tokens == 0
        cold.append(output.outputs[0].token_ids)
    paired.llm.reset_prefix_cache()
    warm = [request(paired, prompt, edits, max_tokens=4) for edits in asked]
    assert [output.outputs[0].token_ids for output in warm] == cold
    assert [output.num_cached_tokens for output in warm] == [0, whole, whole, whole, whole] and whole >= 32


def test_what_tuning_left_alone_is_shared(paired: Any) -> None:
    model = paired.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    for tuned in (model.tuned0, model.tuned1):
        assert tuned.lm_head is model.lm_head and tuned.model.embed_tokens is model.model.embed_tokens
        layers, ours = tuned.model.layers, model.model.layers
        assert (
            layers[0].mlp.down_proj is ours[0].mlp.down_proj and layers[4].mlp.gate_up_proj is ours[4].mlp.gate_up_proj
        )
        assert layers[4].mlp.down_proj is not ours[4].mlp.down_proj
        assert all(a.self_attn.attn is not b.self_attn.attn for a, b in zip(layers, ours, strict=True))


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"name": "polite", "layers": "3-4"}, "steer.edits.layers"),
        ({"name": "polite", "scope": "generated"}, "steer.edits.scope"),
        ({"name": "polite", "beta": 0.1}, "steer.edits.beta"),
        ({"name": "polite", "strength": 1e30}, "steer.edits.0.strength"),
        ({"name": "polite", "strength": float("nan")}, "steer.edits.0.strength"),
        ({"name": "rude"}, "steer.edits.name"),
    ],
)
def test_bad_requests(given: dict[str, Any], field: str, paired: Any) -> None:
    with pytest.raises(ValueError, match=field):
        request(paired, PROMPTS[0], [given])


def test_names_of_tuned_models_are_taken(paired: Any) -> None:
    with pytest.raises(InputError, match=r"steer\.tuned"):
        paired.register("polite", vector())
    with pytest.raises(InputError, match="threshold"):
        paired.edit("polite", threshold=0.1)


def test_bad_folders_are_refused_before_anything_is_loaded(folder: Path, folders: Any, tmp_path: Path) -> None:
    if MISSING:
        pytest.skip(MISSING)
    from steer.adapters import vllm

    deltas = load_file(folders["polite"] / "adapter_model.safetensors")
    narrow = shutil.copytree(folders["polite"], tmp_path / "narrow")
    save_file(
        {k: v[..., :96].clone() if "lora_A" in k else v for k, v in deltas.items()},
        narrow / "adapter_model.safetensors",
    )
    other = shutil.copytree(folders["terse"], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    for bad, said in ((tmp_path / "none", "a folder with"), (narrow, "engine's model"), (other, "rms_norm_eps")):
        with pytest.raises(InputError, match=r"steer\.tuned\.a") as refused:
            vllm.load("smollm2-135m", steer={"tuned": {"a": str(bad)}}, **SETTINGS)
        assert said in str(refused.value)
    for settings in ({"tuned": ["a"]}, {"tuned": {"a b": str(other)}}, {"tuned": {"a": 3}}):
        with pytest.raises(InputError, match=r"steer\.tuned"):
            vllm.load("smollm2-135m", steer=settings, **SETTINGS)
    with pytest.raises(UnsupportedError, match="enable_lora"):
        vllm.load("smollm2-135m", steer={"tuned": {"a": str(folders["polite"])}}, enable_lora=True, **SETTINGS)


@pytest.mark.parametrize(
    "setting",
    [
        {"use_dora": True},
        {"fan_in_fan_out": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"alpha_pattern": {"q_proj": 2}},
        {"peft_type": "IA3"},
    ],
)
def test_adapters_of_other_kinds(setting: dict[str, Any], base: Any, tmp_path: Path) -> None:
    write_lora(tmp_path / "lora", base, 0, 0.1, **setting)
    with pytest.raises(InputError, match=next(iter(setting))):
        open_tuned("a", str(tmp_path / "lora"))


def test_adapters_of_other_tensors(base: Any, tmp_path: Path) -> None:
    file = write_lora(tmp_path / "lora", base, 0, 0.1) / "adapter_model.safetensors"
    held = load_file(file)
    gone = next(k for k in held if "lora_B" in k)
    for kept in ({k: v for k, v in held.items() if k != gone}, {**held, "x.weight": held[gone].clone()}, {}):
        save_file(kept, file)
        with pytest.raises(InputError, match="lora_A"):
            open_tuned("a", str(tmp_path / "lora"))


# ------------------------------------------------------------------------------------------------------------- parts


def test_scales_of_adapters(base: Any, tmp_path: Path) -> None:
    """alpha / r, or alpha / sqrt(r) where the rank is made up for; each module's rank is its own."""
    name = "model.layers.4.self_attn.q_proj.weight"
    for stable, scale in ((False, ALPHA / RANK), (True, ALPHA / RANK**0.5)):
        lora = write_lora(tmp_path / f"{stable}", base, 0, 0.1, use_rslora=stable)
        deltas = load_file(lora / "adapter_model.safetensors")
        a, b = (deltas[f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"] for side in "AB")
        merged = dict(open_tuned("a", str(lora)).weights(base.items()))
        assert torch.allclose(merged[name], base[name].float() + scale * (b @ a), atol=1e-6)
        assert merged["model.norm.weight"] is base["model.norm.weight"] and len(merged) == len(base)
        with pytest.raises(InputError, match="no such weight"):
            list(open_tuned("a", str(lora)).weights([]))


def test_mixtures() -> None:
    """Bit for bit where it can be, and what either model excludes stays out."""
    from steer.adapters.vllm.plugin.mixture import mixed

    generator = torch.Generator().manual_seed(0)
    base, one, two = (torch.randn(5, 7, generator=generator) for _ in range(3))
    base[:, 0], one[:, 1] = -torch.inf, -torch.inf
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.5, 0.0], [0.5, 1.0]])
    out = mixed(base, [one, two], weight)
    assert torch.equal(out[0], base[0])
    assert torch.equal(out[1, 1:], one[1, 1:]) and torch.equal(out[2, 1:], two[2, 1:])
    assert bool(out[:, 0].isneginf().all()) and bool(out[[1, 3, 4], 1].isneginf().all())
    assert torch.allclose(out[3, 2:], -1.5 * base[3, 2:] + 2.5 * one[3, 2:], atol=1e-5)
    assert torch.allclose(out[4, 2:], -0.5 * base[4, 2:] + 0.5 * one[4, 2:] + two[4, 2:], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_travel_with_the_states(dtype: torch.dtype) -> None:
    """In any precision, to the last bit, whatever rows are taken."""
    from steer.adapters.vllm.plugin.mixture import Mixture

    def params(request_id: str) -> tuple[Any, int]:
        asked = {"plain": [], "a": [(0, 1.6)], "b": [(0, -0.3), (1, 1 / 3)]}[request_id]
        return SimpleNamespace(extra_args={"steer": {"resolved": True, "tuned": asked}}), 4

    mixture = Mixture(2, 4, 16, torch.device("cpu"))
    mixture.step(["a", "plain", "b"], np.array([3, 1, 2]), params)
    states = [torch.randn(6, 4).to(dtype) for _ in range(3)]
    rows = torch.tensor([5, 3, 0])
    first, others, weight = mixture.split(mixture.joined(states[0], states[1:])[rows])
    assert torch.equal(weight, torch.tensor([[-0.3, 1 / 3], [0.0, 0.0], [1.6, 0.0]]))
    assert all(torch.equal(got, x[rows]) for got, x in zip((first, *others), states, strict=True))
    mixture.finish(["a", "b"])
    mixture.step(["plain"], np.array([1]), params)
    assert not mixture.active


# ----------------------------------------------------------------------------------------------------- other engines


SMALL = {
    "vocab_size": 49152,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}
WIDER = {**SMALL, "intermediate_size": 128, "num_key_value_heads": 1, "head_dim": 32}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gemma3_text": {**WIDER, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen3_moe": {**WIDER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "qwen2": {k: v for k, v in WIDER.items() if k != "head_dim"},
    "opt": {**SMALL, "ffn_dim": 128, "word_embed_proj_dim": 64},
}


WEIGHTS = (None, 2.0, 1.0, 0.5)


def random_networks(kind: str, words: Path, root: Path) -> list[Path]:
    """Folders of a small network and of another near it, with the tokenizer of `words`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **ARCHITECTURES[kind], bos_token_id=1, eos_token_id=2, pad_token_id=2)
    network = AutoModelForCausalLM.from_config(config).float()
    for name, size in (("base", 0.15), ("tuned", 0.1)):
        for key, value in network.named_parameters():
            if value.dim() > 1 and (name == "base" or "embed" not in key):
                value.data += size * torch.randn(value.shape)
        network.save_pretrained(root / name)
        for file in words.glob("tokenizer*"):
            shutil.copy(file, root / name)
    return [root / "base", root / "tuned"]


def guided(base: Any, policy: Any, prompts: Any, new: int) -> list[list[int]]:
    """Tokens of the transformers adapter at each of `WEIGHTS`; plain and guided ones differ."""
    process = policy.process()
    texts = [steer.RawText(p) for p in prompts]
    tokens = greedy(base, texts, each(RLGuidance(process, w) if w else None for w in WEIGHTS), new).tokens
    plain = greedy(base, texts, new=new).tokens
    assert [mine == other for mine, other in zip(tokens, plain, strict=True)][:3] == [True, False, False]
    return tokens


def elsewhere(kind: str, new: int, model: Any, tuned: Path) -> list[list[int]]:
    """Tokens at each of `WEIGHTS` from an engine of another kind, in a process of its own."""
    script = Path(__file__).with_name("guidance_script.py")
    command = [sys.executable, str(script), kind, str(new), str(model), str(tuned)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert found, done.stdout[-2000:] + done.stderr[-4000:]
    return list(json.loads(found[0].removeprefix("RESULT ")))


@pytest.mark.parametrize(
    "kind", ["gemma3_text", *(pytest.param(k, marks=pytest.mark.slow) for k in ("qwen3_moe", "opt"))]
)
def test_other_architectures(kind: str, folder: Path, tmp_path: Path) -> None:
    """Sliding windows with caches of their own, experts, learned positions."""
    if MISSING:
        pytest.skip(MISSING)
    base, tuned = random_networks(kind, folder, tmp_path)
    want = guided(*(steer.load(f, dtype="float32", device="cpu") for f in (base, tuned)), PROMPTS, 12)
    assert elsewhere("eager", 12, base, tuned) == want


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "new"), [("processes", 10), ("server", 10), ("compiled", 10), ("v2", 4)])
def test_other_engines(kind: str, new: int, reference: Any, folders: dict[str, Path]) -> None:
    """Processes of their own, an engine behind a server, a compiled network, the V2 runner (interpreted)."""
    if MISSING:
        pytest.skip(MISSING)
    policy = steer.load(folders["polite-whole"], dtype="float32", device="cpu")
    want = guided(reference, policy, PROMPTS[:2] * 2 if kind == "v2" else PROMPTS, new)
    assert elsewhere(kind, new, "smollm2-135m", folders["polite"]) == want


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
def test_two_ranks(folder: Path, tmp_path: Path) -> None:
    if MISSING:
        pytest.skip(MISSING)
    base, tuned = random_networks("qwen2", folder, tmp_path)
    want = guided(*(steer.load(f, dtype="float32", device="cpu") for f in (base, tuned)), PROMPTS, 12)
    assert elsewhere("ranks", 12, base, tuned) == want
