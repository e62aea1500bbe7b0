"""Every causal architecture of the installed transformers, small and random, put through what steer does with a model.

`python tests/architectures.py [NAME ...]` prints the table of `adapters/ARCHITECTURES.md`. Each trial compares with the
library alone: `generate` on one prompt at a time, a forward hook, or one pass over the whole text.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import steer
from steer.adapters.language.blocks import decoder_blocks
from steer.adapters.transformers import LanguageModel
from steer.core import SteerError, UnsupportedError
from steer.methods.fk import FKSteering
from steer.methods.vector import SteeringVector

VOCABULARY, WIDTH = 320, 32
PROMPTS = ("The day at the lake", "Tell me of your flat. The boat went on the water and the day was good", "Hi")
NEW = 12

TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""The names that most configurations have."""

_MORE = {
    "head_dim": 8,
    "sliding_window": 8,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 256,
    "n_ctx": 256,
    "n_inner": 64,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 4,
    "num_layers": 4,
    "num_heads": 4,
    "max_seq_len": 256,
    "ffn_dim": 64,
    "decoder_layers": 4,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "encoder_layers": 4,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "d_inner": 64,
    "dim": 32,
    "dff": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "state_size": 8,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "embedding_size": 32,
    "attention_window_size": 8,
    "window_size": 8,
    "d_kv": 8,
    "attention_head_dim": 8,
    "rotary_dim": 4,
    "num_kv_heads": 2,
    "conv_kernel": 4,
    "word_embed_proj_dim": 32,
    "d_embed": 32,
    "attn_head_size": 8,
    "emb_dim": 32,
    "attention_hidden_size": 32,
    "attention_chunk_size": 8,
}
"""What others call them, and further sizes; each configuration takes those that it has."""

_LATENT = {"num_key_value_heads": 4}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2}
_LINEAR = {
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}

SPECIAL: dict[str, dict[str, Any]] = {
    "CohereCompassTextConfig": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "DbrxConfig": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "FuyuConfig": {"text_config": {**TINY, "model_type": "persimmon"}, "patch_size": 4, "image_token_id": 310},
    "Gemma4UnifiedConfig": {
        "text_config": {
            **TINY,
            "head_dim": 8,
            "global_head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "vision_config": {"mm_embed_dim": 32, "output_proj_dims": 32, "patch_size": 4},
        "audio_config": {"audio_embed_dim": 32},
        "image_token_id": 310,
        "video_token_id": 311,
        "audio_token_id": 312,
    },
    "GotOcr2Config": {
        "text_config": {**TINY, "model_type": "qwen2"},
        "vision_config": {
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "mlp_dim": 64,
            "global_attn_indexes": [1],
        },
        "image_token_index": 310,
    },
    "MoshiConfig": {
        "audio_vocab_size": 64,
        "audio_encoder_config": {
            "model_type": "mimi",
            "hidden_size": 32,
            "num_filters": 4,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "intermediate_size": 64,
            "codebook_size": 64,
            "codebook_dim": 16,
            "vector_quantization_hidden_dimension": 16,
        },
        "depth_decoder_config": {
            "hidden_size": 32,
            "input_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "vocab_size": VOCABULARY,
            "audio_vocab_size": 64,
        },
        "num_codebooks": 8,
    },
    "Qwen4ExpTextConfig": {
        **_LINEAR,
        "layer_types": ["linear_attention"] * 3 + ["indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_count": 2,
        "hc_lowrank": 8,
        "output_gate_type": "sigmoid",
        "ngram_vocab_size_base": 100,
        "split_ngram_parts": 1,
    },
    "BailingHybridConfig": {"layer_types": ["linear_attention", "full_attention"] * 2, "num_key_value_heads": 4},
    "BambaConfig": {**_MAMBA, "attn_layer_indices": [1]},
    "GraniteMoeHybridConfig": {**_MAMBA, "layer_types": ["mamba", "attention"] * 2},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 2]]},
    "Gemma3nTextConfig": {
        **_ALTERNATING,
        "intermediate_size": [64] * 4,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "Gemma4TextConfig": {
        **_ALTERNATING,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 8,
    },
    "JambaConfig": {
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_dt_rank": 4,
        "num_experts": 2,
        "num_experts_per_tok": 1,
    },
    "KimiLinearConfig": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_heads": 4,
        "linear_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "Lfm2Config": {"layer_types": ["conv", "full_attention"] * 2},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "Mamba2Config": {"num_heads": 8, "expand": 2, "n_groups": 1},
    "MiniMaxConfig": {"layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 8},
    "Qwen3NextConfig": _LINEAR,
    "Qwen3_5TextConfig": _LINEAR,
    "Qwen3_5MoeTextConfig": _LINEAR,
    "OlmoHybridConfig": {**_LINEAR},
    "RecurrentGemmaConfig": {
        "num_key_value_heads": 1,
        "lru_width": 32,
        "block_types": ("recurrent", "recurrent", "attention"),
    },
    "ReformerConfig": {"is_decoder": True, "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (16, 16)},
    "RoCBertConfig": {"pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY},
    "Zamba2Config": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 8,
        "use_mamba_kernels": False,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "ZambaConfig": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 2,
        "use_mamba_kernels": False,
        "mamba_dt_rank": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "ZayaConfig": {"num_experts_per_tok": 1},
    "xLSTMConfig": {"hidden_size": 128, "num_heads": 2},
    "XmodConfig": {"default_language": "en_XX"},
    "Gemma3Config": {
        "text_config": {**TINY, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 310,
        "boi_token_index": 311,
        "eoi_token_index": 312,
    },
    **dict.fromkeys(
        (
            "AXK1Config",
            "AXK2Config",
            "DeepseekV2Config",
            "DeepseekV3Config",
            "DeepseekV32Config",
            "Dots3NoteTextConfig",
            "Glm4MoeLiteConfig",
            "GlmMoeDsaConfig",
            "LongcatFlashConfig",
            "MiniCPM3Config",
            "SarvamMLAConfig",
            "YoutuConfig",
        ),
        _LATENT,
    ),
}
"""What single configurations want beside."""

_LARGEST = 12_000_000
"""Weights above which a configuration is not small: its defaults decide its size, and it is left out."""


def tokenizer(template: str | None = None) -> Any:
    """Byte pairs learnt from one sentence, with special tokens."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(["The day at the lake was good."] * 3, trainer)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.chat_template = template
    return made


def configuration(kind: Any, **more: Any) -> Any:
    """A small configuration of a class."""
    known, names = _defaults(kind), kind.attribute_map
    sizes = {names.get(name, name): size for name, size in {**TINY, **_MORE}.items()}
    parts = {
        name: configuration(part).to_dict()
        for name, part in kind.sub_configs.items()
        if name not in SPECIAL.get(kind.__name__, {}) and part is not transformers.AutoConfig
    }
    given = {name: size for name, size in sizes.items() if name in known}
    return kind(**given | parts | SPECIAL.get(kind.__name__, {}) | more)


def _defaults(kind: Any) -> Any:
    """Names of a configuration's fields; some want others before they can be made."""
    try:
        return kind().to_dict()
    except Exception:
        return inspect.signature(kind).parameters


def network(config: Any, seed: int = 0) -> Any:
    """A random network; its weights are scaled up so that texts differ."""
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    made.generation_config.forced_eos_token_id = None  # what BART's kin write last is not the network's
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() >= 2:
                weight.mul_(3.0)
    return made


def names() -> dict[str, str]:
    """Model types by the names of their configurations, of all causal language models; nothing is imported for it."""
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found = {name: kind for kind, name in CONFIG_MAPPING_NAMES.items() if kind in causal}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def kind_of(name: str) -> Any:
    """The configuration of this name."""
    return CONFIG_MAPPING[names()[name]]


def kinds() -> list[Any]:
    """The configurations of all causal language models."""
    return [kind_of(name) for name in names()]


class Library:
    """What the library makes of one network, one prompt at a time."""

    def __init__(self, net: Any, words: Any) -> None:
        self.net, self.words = net, words

    def texts(self, prompts: Any) -> list[list[int]]:
        """Greedy tokens of each prompt."""
        return [self.text(prompt) for prompt in prompts]

    def text(self, prompt: str, new: int = NEW) -> list[int]:
        ids = torch.tensor([self.words(prompt)["input_ids"]])
        out = self.net.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, pad_token_id=0
        )
        return out[0, ids.shape[1] :].tolist()

    def log_prob(self, prompt: str, tokens: list[int]) -> float:
        """Of tokens after a prompt, in one pass."""
        ids = self.words(prompt)["input_ids"]
        with torch.no_grad():
            logits = self.net(input_ids=torch.tensor([[*ids, *tokens]]), use_cache=False).logits[0, len(ids) - 1 : -1]
        return float(logits.double().log_softmax(-1).gather(1, torch.tensor(tokens).unsqueeze(1)).sum())


@dataclass
class Trials:
    """Everything that is tried on one network. Each method yields whether something was right."""

    net: Any
    words: Any

    def __post_init__(self) -> None:
        self.alone = Library(self.net, self.words)
        self.wanted = self.alone.texts(PROMPTS)
        width = self.net.config.get_text_config(decoder=True).hidden_size
        self.vector = torch.randn(width, generator=torch.Generator().manual_seed(0)) * 3
        self.edit = SteeringVector({1: self.vector}, unit="raw")
        self.steered = [self._steered(prompt) for prompt in PROMPTS]

    @cached_property
    def lm(self) -> LanguageModel:
        return steer.load(self.net, tokenizer=self.words)

    def _block(self) -> Any:
        return decoder_blocks(self.net)[1]

    def _steered(self, prompt: str) -> list[int]:
        def add(module: Any, args: Any, out: Any) -> Any:
            return (out[0] + self.vector, *out[1:]) if isinstance(out, tuple) else out + self.vector

        handle = self._block().register_forward_hook(add)
        try:
            return self.alone.text(prompt)
        finally:
            handle.remove()

    def _got(self, prompts: Any, **more: Any) -> list[list[int]]:
        drawn = self.lm.generate(prompts, temperature=0, max_new_tokens=NEW, **more)
        return [list(row) for row in drawn.tokens]

    def single(self) -> bool:
        return all(self._got([p]) == [want] for p, want in zip(PROMPTS, self.wanted, strict=True))

    def batch(self) -> bool:
        return self._got(list(PROMPTS)) == self.wanted

    def copies(self) -> bool:
        return self._got(list(PROMPTS[:2]), n=3) == [want for want in self.wanted[:2] for _ in range(3)]

    def rows(self) -> bool:
        """A vector on the first and the last prompt."""
        return self._got(list(PROMPTS), edits=[[self.edit], None, [self.edit]]) == [
            self.steered[0],
            self.wanted[1],
            self.steered[2],
        ]

    def states(self) -> bool:
        """The residual stream after block 1, at the last token, of rows of unequal length."""
        ids = [self.words(p)["input_ids"] for p in PROMPTS]
        seen: list[Tensor] = []
        handle = self._block().register_forward_hook(
            lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        try:
            with torch.no_grad():
                for row in ids:
                    self.net(input_ids=torch.tensor([row]))
        finally:
            handle.remove()
        want = torch.stack([self._active(x)[0, -1] for x in seen])
        got = self.lm.hidden_states(ids, [1])[1]
        return bool(torch.allclose(got, want, atol=1e-4 * float(want.std())))

    def _active(self, x: Tensor) -> Tensor:
        return x if x.dim() == 3 else x[self.lm.config.altup_active_idx]

    def log_probs(self) -> bool:
        drawn = self.lm.generate(list(PROMPTS), n=2, max_new_tokens=NEW, seed=0)
        total, _ = self.lm.log_likelihood(drawn)
        want = [self.alone.log_prob(PROMPTS[g], t) for g, t in zip(drawn.group.tolist(), drawn.tokens, strict=True)]
        return _close(total, want) and _close(drawn.log_prob, want)

    def fk(self) -> bool:
        """Particles that are copied and dropped; log-probabilities are those of a plain pass."""
        drawn = self.lm.generate(
            PROMPTS[1],
            sampler=FKSteering(num_particles=4),
            reward="length",
            beta=0.05,
            max_new_tokens=NEW,
            seed=0,
        )
        return _close(drawn.log_prob, [self.alone.log_prob(PROMPTS[1], tokens) for tokens in drawn.tokens])

    def waiting(self) -> bool:
        """Rows that wait for others at the end of a sentence."""
        process = self.lm.process(max_new_tokens=NEW, block=4, until=("e", "a", " "))
        drawn = steer.generate(process, list(PROMPTS), n=2, seed=0)
        want = [self.alone.log_prob(PROMPTS[g], t) for g, t in zip(drawn.group.tolist(), drawn.tokens, strict=True)]
        return _close(drawn.log_prob, want)

    def tree(self) -> bool:
        drawn = self.lm.generate(PROMPTS[1], sampler="dts", reward="length", n=None, max_new_tokens=6, seed=0)
        return _close(drawn.log_prob, [self.alone.log_prob(PROMPTS[1], tokens) for tokens in drawn.tokens])

    def served(self) -> bool:
        """Two prompts of unequal length in one request."""
        from starlette.testclient import TestClient

        from steer.adapters.transformers.serving.engine import TransformersEngine
        from steer.serving.app import create_app

        two = list(PROMPTS[:2])
        app = create_app(TransformersEngine(self.lm, name="m"))
        with TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as client:
            said = client.post(
                "/v1/completions", json={"model": "m", "prompt": two, "max_tokens": NEW, "temperature": 0}
            )
        if said.status_code != 200:
            raise RuntimeError(f"{said.status_code}: {said.text[:200]}")
        want = [self.words.decode(tokens, skip_special_tokens=True) for tokens in self.wanted[:2]]
        return [choice["text"] for choice in said.json()["choices"]] == want

    def results(self) -> Iterator[tuple[str, bool | str]]:
        """Right, wrong, or what was refused, of each trial."""
        for name in TRIALS:
            try:
                yield name, getattr(self, name)()
            except UnsupportedError as error:
                yield name, f"refused: {error}"
            except Exception as error:
                yield name, f"fails: {type(error).__name__}: {_line(error)}"


TRIALS = ("single", "batch", "copies", "rows", "states", "log_probs", "fk", "waiting", "tree", "served")


def _close(got: Tensor, want: list[float]) -> bool:
    """Summed log-probabilities of some ten float32 numbers of order one to ten."""
    return bool(torch.allclose(got.double(), torch.tensor(want, dtype=torch.float64), atol=2e-3))


def tried(kind: Any) -> dict[str, bool | str]:
    """What comes of one architecture: `{"built": why not}`, `{"library": how it fails}`, `{"refused": why}`, or the
    result of each trial and, under `note`, what was done otherwise.
    """
    try:
        config = configuration(kind)
        with torch.device("meta"):
            size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
        if size > _LARGEST:
            return {"built": f"{size / 1e6:.0f} million weights at least"}
        net = network(config)
    except Exception as error:
        return {"built": f"{type(error).__name__}: {_line(error)}"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        words = tokenizer()
        try:
            trials = Trials(net, words)
        except SteerError as error:
            return {"refused": str(error)}
        except Exception as error:
            return {"library": f"{type(error).__name__}: {_line(error)}"}
        try:
            trials.lm.generate("Hi", max_new_tokens=1)
        except SteerError as error:
            return {"refused": str(error)}
        out: dict[str, bool | str] = dict(trials.results())
    note = "; ".join(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)))
    return out | ({"note": note} if note else {})


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def verdict(out: dict[str, bool | str]) -> tuple[str, str]:
    """Right, refused, wrong or not tried, and what there is to say of it."""
    for name, shown in (("built", "not built"), ("library", "not run by the library"), ("refused", "refused")):
        if name in out:
            return shown, str(out[name])
    wrong = [f"{name}: {out[name]}" for name in TRIALS if out[name] is False or str(out[name]).startswith("fails")]
    if wrong:
        return "wrong", "; ".join(wrong)
    refused = [f"{name} {out[name]}" for name in TRIALS if out[name] is not True]
    return "right", "; ".join([*refused, *([str(out["note"])] if "note" in out else [])])


_SHORT = (
    (r"\S+: not right where (.*?) \(.*?\); done one by one instead, which is slower", r"one by one where \1"),
    (
        r"model \S+?: \S+ does not continue a text as a single pass of the library does \((.*?)\), so that.*",
        r"does not continue a text as the library's single pass does: \1",
    ),
    (r"^model \S+?: ", ""),
    (r"next-token logits differ", "logits differ"),
    (r"StrictDataclassClassValidationError: Class validation error for validator '\S+': ", ""),
)


def main(names: list[str]) -> None:
    """Print the table, then how many there are of each verdict."""
    transformers.logging.set_verbosity_error()
    counts: Counter[str] = Counter()
    print("| architecture | result | remarks |\n|---|---|---|")
    known = {kind.__name__.removesuffix("Config"): kind for kind in kinds()}
    asked = [name.removesuffix("Config") for name in names]
    if unknown := [name for name in asked if name not in known]:
        raise SystemExit(f"no causal language model of transformers: {', '.join(unknown)}")
    for name in asked or known:
        kind = known[name]
        found, note = verdict(tried(kind))
        for long, short in _SHORT:
            note = re.sub(long, short, note)
        counts[found] += 1
        print(f"| {name} | {found} | {note.replace('|', '/')} |", flush=True)
    print(f"\ntransformers {transformers.__version__}: " + ", ".join(f"{n} {name}" for name, n in counts.most_common()))


if __name__ == "__main__":
    main(sys.argv[1:])
