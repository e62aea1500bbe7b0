"""Checkpoints that are not what they seem: towers beside the text model, weights missing or left over, encoders,
adapters, pointers, tokenizers of another model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import NEW, PROMPTS, TINY, VOCABULARY, Library, network, tokenizer

import steer
from steer.adapters.language.blocks import blocks_of
from steer.cli import main
from steer.core import InputError, SteerError, UnsupportedError
from steer.edits import load_edit
from steer.methods.vector import SteeringVector

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"


def llama(**more: Any) -> Any:
    return network(transformers.LlamaConfig(**TINY | more))


def direction() -> torch.Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(0)) * 3


def saved(net: Any, folder: Path) -> Path:
    net.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------------------- which blocks

TOWER = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
"""As deep as the text model, and heavier."""


def gemma3() -> Any:
    text = {**TINY, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=text,
            vision_config=TOWER,
            mm_tokens_per_image=4,
            image_token_index=310,
            boi_token_index=311,
            eoi_token_index=312,
        )
    )


def llava() -> Any:
    tower = transformers.CLIPVisionConfig(**TOWER, projection_dim=32)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TINY), vision_config=tower, image_token_index=310
    )
    return transformers.LlavaForConditionalGeneration(config)


def idefics3() -> Any:
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**TINY).to_dict(), vision_config=TOWER, image_token_id=310
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def qwen2_audio() -> Any:
    tower = transformers.Qwen2AudioEncoderConfig(
        d_model=64, encoder_layers=4, encoder_attention_heads=4, encoder_ffn_dim=256, num_mel_bins=8
    )
    text = transformers.Qwen2Config(**TINY)
    return transformers.Qwen2AudioForConditionalGeneration(
        transformers.Qwen2AudioConfig(audio_config=tower, text_config=text, audio_token_index=310)
    )


@pytest.mark.parametrize("make", [gemma3, llava, idefics3, qwen2_audio])
def test_the_text_model_is_steered_and_not_the_tower(make: Any) -> None:
    torch.manual_seed(0)
    net, words = make().eval(), tokenizer()
    with torch.no_grad():
        for weight in net.parameters():
            if weight.dim() >= 2:
                weight.mul_(3.0)
    lm = steer.load(net, tokenizer=words)
    text = net.get_decoder()
    assert lm.blocks is text.layers
    handle = text.layers[1].register_forward_hook(
        lambda module, args, out: (out[0] + direction(), *out[1:]) if isinstance(out, tuple) else out + direction()
    )
    want = Library(net, words).texts(PROMPTS)
    handle.remove()
    edit = SteeringVector({1: direction()}, unit="raw")
    got = lm.generate(list(PROMPTS), edits=edit, temperature=0, max_new_tokens=NEW)
    assert [list(t) for t in got.tokens] == want
    assert lm.residual_norms().shape == (4,)


def test_size_does_not_choose_the_stack() -> None:
    """Weights of the text model that are packed count for nothing."""
    net = llava().eval()
    lm = steer.load(net, tokenizer=tokenizer())
    weights = [sum(p.numel() for p in stack.parameters()) for stack in (lm.blocks, net.model.vision_tower)]
    assert weights[0] < weights[1]


@pytest.mark.parametrize("make", [llava, qwen2_audio])
def test_folders_of_models_that_see_and_hear(make: Any, tmp_path: Path) -> None:
    """What no mapping of the library has as a causal language model is read as one all the same."""
    torch.manual_seed(0)
    net = make().eval()
    lm = steer.load(saved(net, tmp_path))
    assert lm.blocks is lm.network.get_decoder().layers
    got = lm.generate(list(PROMPTS), temperature=0, max_new_tokens=NEW)
    assert [list(t) for t in got.tokens] == Library(net, lm.tokenizer).texts(PROMPTS)


def test_a_chat_template_in_a_file_of_its_own(tmp_path: Path) -> None:
    """As processors of 2024 saved it, and no tokenizer reads it."""
    folder = saved(llava().eval(), tmp_path)
    assert not steer.load(folder, check=False).tokenizer.chat_template
    template = "{% for m in messages %}USER: {% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    lm = steer.load(folder, check=False)
    assert lm.tokenizer.decode(lm.encode("Hi")) == "USER: Hi"


def llama4() -> Any:
    """Of which the library loads the text model alone, and leaves the tower's weights over."""
    text = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}
    tower = {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}
    config = transformers.Llama4Config(
        text_config=TINY | text | {"attention_chunk_size": 8}, vision_config=TOWER | tower
    )
    return transformers.Llama4ForConditionalGeneration(config)


def test_a_tower_that_is_left_out_is_not_left_over(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = llama4().eval()
    folder = saved(net, tmp_path)
    lm = steer.load(folder)
    ids = torch.tensor([lm.encode(PROMPTS[0])])
    with torch.inference_mode():
        torch.testing.assert_close(lm.network(ids).logits, net.language_model(ids).logits)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": 3, "layer_types": None, "no_rope_layers": None, "moe_layers": None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SteerError, match=r"no place for: \S*layers.3 "):
        steer.load(folder)


# ------------------------------------------------------------------------------------------------------- weights


def classifier(folder: Path) -> Path:
    return saved(transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**TINY, num_labels=3)), folder)


def with_depth(depth: int, folder: Path) -> Path:
    """Weights of four blocks under a configuration of another number."""
    saved(llama(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": depth}))
    return folder


class Part(torch.nn.Module):
    """A module with parts of these names; vLLM's have a configuration, and wrappers name their language model."""

    def __init__(self, config: Any = None, **parts: Any) -> None:
        super().__init__()
        self.config = config
        for name, part in parts.items():
            setattr(self, name, part)


class Wrapper(Part):
    def get_language_model(self) -> Any:
        if not hasattr(self, "language_model"):
            raise NotImplementedError
        return self.language_model


def stack(width: int, depth: int = 4, missing: int = 0) -> torch.nn.ModuleList:
    here = [torch.nn.Linear(width, width) for _ in range(depth - missing)]
    return torch.nn.ModuleList([*(torch.nn.Identity() for _ in range(missing)), *here])


def test_the_text_models_blocks_in_vllms_layouts() -> None:
    """A tower as deep as the text model, wider, and nearer to the top."""
    text = transformers.LlamaConfig(**TINY)
    for missing in (0, 2):  # pipeline parallel: others have the first blocks
        layers = stack(8, missing=missing)
        language = Part(text, model=Part(text, layers=layers))
        owner = Part(None, language=language)
        for model in (
            Wrapper(None, blocks=stack(64), language_model=language),
            Wrapper(None, blocks=stack(64), inner=owner),  # names none; one part has the configuration
            Part(None, vision_tower=Part(None, layers=stack(64)), other=owner),
            Part(text, model=Part(None, layers=layers), steer_tuned_0=Part(None, model=Part(None, layers=stack(8)))),
        ):
            found = blocks_of(model, text)
            assert list(found) == list(range(missing, 4))
            assert all(block is layers[i] for i, block in found.items())
    with pytest.raises(SteerError, match="side by side"):
        blocks_of(Part(None, a=Part(None, x=stack(8)), b=Part(None, y=stack(64))), text)
    with pytest.raises(SteerError, match="no stack of 4"):
        blocks_of(Part(None, layers=stack(8, depth=3)), text)


def test_a_classifier_is_no_language_model(tmp_path: Path) -> None:
    folder = classifier(tmp_path)
    with pytest.raises(SteerError, match=r"lacks weights of the network: lm_head.weight .*partial_weights=True"):
        steer.load(folder)
    lm = steer.load(folder, partial_weights=True)
    assert len(lm.generate("Hi", max_new_tokens=2, seed=0)) == 1


def test_blocks_without_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match=r"lacks weights of the network: model.layers.4, model.layers.5 \(18 in all\)"):
        steer.load(with_depth(6, tmp_path))


def test_weights_without_blocks_are_named(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match=r"no place for: model.layers.3 \(9 in all\)"):
        steer.load(with_depth(3, tmp_path))


def test_weights_of_another_width_are_named(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(SteerError, match=r"size|shape"):
        steer.load(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads_are_not_missing(tied: bool, tmp_path: Path) -> None:
    folder = saved(llama(tie_word_embeddings=tied), tmp_path)
    assert steer.load(folder).vocabulary == VOCABULARY


def test_tables_of_old_checkpoints_are_not_left_over(tmp_path: Path) -> None:
    """GPT-2's files of 2019 hold causal masks, Llama's of 2023 rotary frequencies."""
    from safetensors.torch import load_file, save_file

    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    folder = saved(transformers.GPT2LMHeadModel(config), tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights |= {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64),
        "transformer.h.1.attn.masked_bias": torch.ones(()),
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert len(steer.load(folder).blocks) == 2


# ---------------------------------------------------------------------------------------------------- no causal models


def bart() -> Any:
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=128,
        )
    )


def encoder(kind: str) -> Any:
    """An encoder whose file says that it is a causal model."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def test_an_encoder_with_a_decoder_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    folder = saved(bart(), tmp_path)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedError, match="an encoder with a decoder"):
        steer.load(folder)


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra"])
def test_an_encoder_is_refused(kind: str, tmp_path: Path) -> None:
    net = encoder(kind)
    with pytest.raises(UnsupportedError, match="attends both ways"):
        steer.load(net, tokenizer=tokenizer())
    with pytest.raises(UnsupportedError, match="attends both ways"):
        steer.load(saved(net, tmp_path))


def test_a_masked_model_without_its_head_is_named(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        architectures=["BertForMaskedLM"],
        tie_word_embeddings=False,
    )
    folder = saved(transformers.BertModel(config), tmp_path)
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | {"architectures": ["BertForMaskedLM"]}))
    with pytest.raises(SteerError, match=r"lacks weights of the network: cls\.predictions"):
        steer.load(folder)


# ------------------------------------------------------------------------------------------------------------- PEFT

peft = pytest.importorskip("peft")


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        peft.PromptEncoderConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        peft.CPTConfig(cpt_token_ids=[5, 6], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2], task_type="CAUSAL_LM"),
        peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"),
    ],
)
def test_adapters_of_some_tokens_alone_are_refused(config: Any) -> None:
    net = peft.get_peft_model(llama(), config).eval()
    with pytest.raises(UnsupportedError, match=r"virtual tokens|some tokens were read"):
        steer.load(net, tokenizer=tokenizer())


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("tokens", [True, False], ids=["own tokenizer", "the base's"])
def test_an_adapters_folder_opens_with_its_base(more: dict[str, Any], tokens: bool, tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(saved(llama(), tmp_path / "base"))
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **more
    )
    tuned = peft.get_peft_model(base, config).eval()
    tuned.save_pretrained(tmp_path / "tuned")
    if tokens:
        tokenizer().save_pretrained(tmp_path / "tuned")
    lm = steer.load(tmp_path / "tuned")
    got = lm.generate(list(PROMPTS), temperature=0, max_new_tokens=NEW)
    assert [list(t) for t in got.tokens] == Library(tuned, lm.tokenizer).texts(PROMPTS)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"base_model_name_or_path": None}, "names no base"),
        ({"base_model_name_or_path": "there/is-none"}, "there/is-none"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, "PROMPT_TUNING"),
        ({"alora_invocation_tokens": [5]}, "where some tokens were read"),
        ({"r": 2}, "size mismatch"),
        ({"target_modules": ["q_proj", "v_proj"]}, "missing adapter keys"),
        ({"target_modules": ["c_attn"]}, "c_attn"),
    ],
)
def test_adapters_that_do_not_fit_are_one_line(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(saved(llama(), tmp_path / "base"))
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "tuned")
    file = tmp_path / "tuned" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(SteerError, match=said) as refused:
        steer.load(tmp_path / "tuned")
    assert "\n" not in str(refused.value)


def test_an_adapter_whose_base_is_out_of_reach_asks_the_hub_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(saved(llama(), tmp_path / "base"))
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "tuned")
    file = tmp_path / "tuned" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "there/is-none"}))
    asked = []

    def unreachable(*where: str) -> bool:
        asked.append(where)
        raise OSError("no such host")

    monkeypatch.setattr("huggingface_hub.file_exists", unreachable)
    with pytest.raises(SteerError, match=r"'there/is-none'.*cannot be reached \(no such host\)"):
        steer.load(tmp_path / "tuned")
    assert asked == [("there/is-none", "config.json")]


def test_lora_is_taken_with_its_trunk_and_its_blocks() -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    net, words = peft.get_peft_model(llama(), config).eval(), tokenizer()
    lm = steer.load(net, tokenizer=words)
    assert lm.trunk is net.get_base_model().model
    got = lm.generate(list(PROMPTS), temperature=0, max_new_tokens=NEW)
    assert [list(t) for t in got.tokens] == Library(net, words).texts(PROMPTS)


# ------------------------------------------------------------------------------------------------------- tokenizers


def with_pad(words: Any, past: int) -> Any:
    """A padding token that was added without an embedding, `past` ids after the last one that has one."""
    words.add_tokens([f"x{i}" for i in range(VOCABULARY + past - len(words))])
    words.add_special_tokens({"pad_token": "[PAD]"})
    return words


@pytest.mark.parametrize("past", [0, 7])
def test_a_padding_token_without_an_embedding(past: int) -> None:
    net, words = llama(), with_pad(tokenizer(), past)
    assert words.pad_token_id == VOCABULARY + past
    got = steer.load(net, tokenizer=words).generate(list(PROMPTS), n=2, temperature=0, max_new_tokens=NEW)
    want = Library(net, tokenizer()).texts(PROMPTS)
    assert [list(t) for t in got.tokens] == [row for row in want for _ in range(2)]


def test_no_padding_token_and_no_end() -> None:
    net, words = llama(eos_token_id=None, pad_token_id=None), tokenizer()
    words.pad_token = words.eos_token = None
    net.generation_config.eos_token_id = None
    got = steer.load(net, tokenizer=words).generate(list(PROMPTS), temperature=0, max_new_tokens=NEW)
    assert [list(t) for t in got.tokens] == Library(net, words).texts(PROMPTS)


def test_tokens_without_an_embedding_are_refused() -> None:
    words = tokenizer()
    words.add_tokens([f"q{i}" for i in range(60)])
    with pytest.raises(InputError, match=r"prompts\[1\].*token 336.*below 320"):
        steer.load(llama(), tokenizer=words).generate(["Hi", "Hi q55"], max_new_tokens=2)


# --------------------------------------------------------------------------------------------------------- pointers


def test_a_pointer_in_place_of_weights(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path)
    (folder / "model.safetensors").write_text(POINTER)
    with pytest.raises(SteerError, match=r"model\.safetensors is a Git LFS pointer.*git lfs pull"):
        steer.load(folder)


@pytest.mark.parametrize("name", ["one.gguf", "one.safetensors"])
def test_a_pointer_in_place_of_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(SteerError, match=r"is a Git LFS pointer.*git lfs pull"):
        load_edit(tmp_path / name, 1.0, model=steer.load(llama(), tokenizer=tokenizer()))
    with pytest.raises(SteerError, match=r"is a Git LFS pointer.*git lfs pull"):
        steer.load(tmp_path / name)


def test_on_the_command_line_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What `main` does not catch would be raised here, and a traceback there."""
    assert main(["generate", "--model", str(classifier(tmp_path)), "--prompt", "Hi"]) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said and "lacks weights of the network: lm_head.weight" in said
