"""Quantised models: each is steered as the library runs it, or refused in one line that says why.

Kinds that need a library of their own are tried where it is installed (torchao, optimum-quanto, bitsandbytes).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import PROMPTS, TINY, TRIALS, Library, Trials, network, tokenizer

import steer
from steer.core import SteerError

pytestmark = pytest.mark.filterwarnings("ignore")


def llama() -> Any:
    return network(transformers.LlamaConfig(**TINY | {"hidden_size": 64, "intermediate_size": 128}))


def by_torchao(name: str) -> Any:
    torchao = pytest.importorskip("torchao.quantization")
    net = llama()
    torchao.quantize_(net, getattr(torchao, name)())
    return net


def by_quanto(kind: str) -> Any:
    quanto = pytest.importorskip("optimum.quanto")
    net = llama()
    quanto.quantize(net, weights=getattr(quanto, kind))
    quanto.freeze(net)
    return net


def by_bitsandbytes(bits: int, folder: Path) -> Any:
    pytest.importorskip("bitsandbytes")
    llama().save_pretrained(folder)
    wanted = transformers.BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=wanted, dtype=torch.float32
    ).eval()


KINDS: dict[str, Callable[[Path], Any]] = {
    "torchao int8 weights": lambda folder: by_torchao("Int8WeightOnlyConfig"),
    "torchao float8 weights": lambda folder: by_torchao("Float8WeightOnlyConfig"),
    "torchao int8 activations, int4 weights": lambda folder: by_torchao("Int8DynamicActivationIntxWeightConfig"),
    "quanto int8 weights": lambda folder: by_quanto("qint8"),
    "bitsandbytes 8 bits": lambda folder: by_bitsandbytes(8, folder),
    "bitsandbytes 4 bits": lambda folder: by_bitsandbytes(4, folder),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_that_of_the_quantised_model(kind: str, tmp_path: Path) -> None:
    trials = Trials(KINDS[kind](tmp_path), tokenizer())
    assert dict(trials.results()) == dict.fromkeys(TRIALS, True)


def test_activations_of_eight_bits_round_log_probabilities_alone() -> None:
    """Numbers that differ by float32's rounding may be rounded to different eighths of a bit: texts are the same."""
    pytest.importorskip("torchao.quantization")
    trials = Trials(by_torchao("Int8DynamicActivationInt8WeightConfig"), tokenizer())
    for name in ("single", "batch", "copies", "rows", "served"):
        assert getattr(trials, name)() is True, name


def test_what_runs_only_without_inference_mode_is_refused() -> None:
    quanto = pytest.importorskip("optimum.quanto")
    net = llama()
    quanto.quantize(net, weights=quanto.qint4)
    quanto.freeze(net)
    with pytest.raises(SteerError, match="does not continue a text as a single pass"):
        steer.load(net, tokenizer=tokenizer()).generate("Hi", max_new_tokens=2)


NEEDS = {
    "gptq": "optimum",
    "aqlm": "aqlm",
    "vptq": "vptq",
    "compressed-tensors": "compressed_tensors",
    "awq": "gptqmodel",
}


@pytest.mark.parametrize("method", NEEDS)
def test_a_quantised_checkpoint_without_its_library_is_refused_in_one_line(method: str, tmp_path: Path) -> None:
    try:
        import_module(NEEDS[method])
        pytest.skip(f"{NEEDS[method]} is installed")
    except ImportError:
        pass
    with pytest.raises(SteerError) as caught:
        steer.load(_checkpoint(tmp_path, {"quant_method": method, "bits": 4, "group_size": 32}))
    assert "could not load" in str(caught.value) and "\n" not in str(caught.value)


def test_packed_weights_of_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    """The library passes over a kind that it does not know, and then its weights are no weights of the network."""
    from safetensors.torch import load_file, save_file

    folder = _checkpoint(tmp_path, {"quant_method": "of-tomorrow"})
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    packed = weights.pop(name)
    weights[name.replace(".weight", ".qweight")] = packed.to(torch.int8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SteerError, match=r"lacks weights of the network: model\.layers\.0"):
        steer.load(folder)


def _checkpoint(folder: Path, quantization: dict[str, Any]) -> Path:
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


# ---------------------------------------------------------------------------------------------------------- adapters


def adapted(**more: Any) -> Any:
    peft = pytest.importorskip("peft")
    given = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(llama(), peft.LoraConfig(**given | more)).eval()


def two_adapters() -> Any:
    import peft

    net = adapted()
    net.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    net.set_adapter("other")
    return net


def ia3() -> Any:
    peft = pytest.importorskip("peft")
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    net = peft.get_peft_model(llama(), config).eval()
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if "ia3" in name:
                weight.add_(0.3)
    return net


@pytest.mark.parametrize(
    "make",
    [
        lambda: adapted(use_dora=True),
        lambda: adapted(use_rslora=True),
        lambda: adapted(modules_to_save=["lm_head"]),
        lambda: adapted(layers_to_transform=[1, 2]),
        lambda: adapted(target_modules="all-linear"),
        lambda: adapted().merge_and_unload(),
        two_adapters,
        ia3,
    ],
    ids=["dora", "rslora", "saved head", "some blocks", "all linear", "merged", "second of two", "ia3"],
)
def test_adapters_are_part_of_the_model(make: Callable[[], Any]) -> None:
    trials = Trials(make(), tokenizer())
    for name in ("single", "batch", "rows", "states", "log_probs"):
        assert getattr(trials, name)() is True, name


def test_an_offloaded_adapter() -> None:
    accelerate = pytest.importorskip("accelerate")
    net, words = adapted(), tokenizer()
    want = Library(net, words).texts(PROMPTS)
    accelerate.cpu_offload(net.get_base_model(), execution_device=torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        drawn = steer.load(net, tokenizer=words).generate(list(PROMPTS), temperature=0, max_new_tokens=len(want[0]))
    assert [list(tokens) for tokens in drawn.tokens] == want
