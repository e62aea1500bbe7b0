"""Language models through transformers: anything that `AutoModelForCausalLM` loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from steer.adapters.language.blocks import decoder_blocks
from steer.adapters.language.decoding import Decoding
from steer.adapters.language.facts import CALIBRATION, fingerprint
from steer.adapters.language.generation import own_settings
from steer.adapters.language.model import TextModel
from steer.adapters.transformers import tracking
from steer.adapters.transformers.hooks import Hooks, recording
from steer.adapters.transformers.process import TextProcess
from steer.adapters.transformers.reading import Opening, means_of, same_lengths
from steer.core import ModelInfo, SteerError, check
from steer.core.errors import first_line
from steer.model import Plan

__all__ = ["LanguageModel", "load"]


def load(
    model: str | Path | nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: Any = None,
    name: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> LanguageModel:
    """A language model from a Hugging Face id, a local folder, a GGUF file, or a loaded module with its tokenizer.

    `options` go to `from_pretrained`. Only safetensors and GGUF weights are read. Raises `SteerError` where nothing can
    be loaded.
    """
    if isinstance(model, nn.Module):
        check(tokenizer is not None, "tokenizer", None, "the model's tokenizer, when a loaded model is given")
        return LanguageModel(
            model, tokenizer, name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        )
    where, extra = str(model), {}
    if where.endswith(".gguf"):
        check(Path(where).is_file(), "model", where, "a GGUF file that exists")
        where, extra = str(Path(where).parent), {"gguf_file": Path(where).name}
    try:
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **extra)
        network = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code,
            **({} if extra else {"use_safetensors": True}), **extra, **options,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SteerError(f"model: could not load {str(model)!r}: {first_line(error)}") from error
    if device is not None and device_map is None:
        network = network.to(device)
    return LanguageModel(network, tokenizer, name or str(model))


class LanguageModel(TextModel):
    """A causal language model and its tokenizer, ready to be steered. The network itself is never changed."""

    def __init__(self, network: Any, tokenizer: Any, name: str) -> None:
        super().__init__(tokenizer, name)
        self.network = network.eval()
        self.network.requires_grad_(False)
        self.config = network.config.get_text_config(decoder=True)
        self.blocks = decoder_blocks(network)
        self.trunk = network.base_model
        """The network without its output head."""
        if self.trunk is network:
            raise SteerError(f"model {type(network).__name__}: has no base model under its output head")
        self.hooks = Hooks(self.blocks)
        self._norms: Tensor | None = None

    # ---- facts

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        embedding = self.network.get_input_embeddings()
        hook = getattr(embedding, "_hf_hook", None)
        places = [getattr(h, "execution_device", None) for h in getattr(hook, "hooks", (hook,))]
        return next((torch.device(p) for p in places if p is not None), embedding.weight.device)

    @property
    def vocabulary(self) -> int:
        return int(self.network.get_output_embeddings().weight.shape[0])

    @property
    def context_length(self) -> int | None:
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def pad_token_id(self) -> int:
        for value in (self.tokenizer.pad_token_id, *self.eos_token_ids):
            if value is not None:
                return int(value)
        return 0

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        given = self.network.generation_config.eos_token_id if self.network.generation_config else None
        given = self.tokenizer.eos_token_id if given is None else given
        return () if given is None else tuple(given) if isinstance(given, list | tuple) else (int(given),)

    @property
    def own_settings(self) -> dict[str, Any]:
        return own_settings(self.network.generation_config)

    @cached_property
    def info(self) -> ModelInfo:
        width = int(self.config.hidden_size)
        return ModelInfo(
            name=self.name,
            fingerprint=self._fingerprint(),
            num_layers=len(self.blocks),
            width=width,
            model_type=str(self.config.model_type),
            residual_norms=self.residual_norms,
            unembedding=lambda: _weight(self.network.get_output_embeddings()),
        )

    def _fingerprint(self) -> str:
        weight = _weight(self.network.get_input_embeddings())
        sample = None
        if weight.device.type != "meta":
            # bf16 first, so that one checkpoint loaded in two precisions is one model.
            flat = weight.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 256)].to(torch.bfloat16).float().cpu()
        return fingerprint(self.config.model_type, len(self.blocks), self.config.hidden_size, weight.shape, sample)

    def residual_norms(self) -> Tensor:
        """Median norm of the residual stream after each block `[L]`, on a few ordinary sentences. The first token, an
        attention sink with a norm of its own, is left out.
        """
        if self._norms is None:
            norms: list[list[Tensor]] = [[] for _ in self.blocks]
            for text in CALIBRATION:
                ids = torch.tensor([self.tokenizer(text)["input_ids"]], device=self.device)
                with torch.inference_mode(), recording(self.blocks, range(len(self.blocks))) as seen:
                    self.trunk(input_ids=ids, use_cache=False)
                for layer, x in seen.items():
                    norms[layer].append(x[0, 1:].float().norm(dim=-1).cpu())
            self._norms = torch.stack([torch.cat(x).median() for x in norms]).clone()
        return self._norms

    # ---- generation

    def process(
        self, *, generation_config: GenerationConfig | str | None = None, block: int = 1, until: Sequence[str] = (),
        **settings: Any,
    ) -> TextProcess:  # fmt: skip
        """The model as a `Process`, with decoding settings as for `generate`. A step draws `block` tokens, or fewer
        where a token holds one of the strings in `until`, such as sentence ends ".", "!", "?" and line breaks.
        """
        decoding = Decoding.create(generation_config, self.own_settings, **settings)
        return TextProcess(self, decoding, block=block, until=tuple(until))

    def stream(self, plan: Plan, how: Any) -> Any:
        from steer.adapters.transformers.streaming import TextStream, feed_streamer

        return TextStream(self, plan) if how is True else feed_streamer(self, plan, how)

    # ---- reading

    @torch.inference_mode()
    def features(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Final hidden states `[N, D]` after the last token of each row of token ids, on which the output head and
        value heads work; in one pass.
        """
        track, _ = tracking.start(self, ids, (), 1, hidden=True)
        assert track.hidden is not None
        return track.hidden

    @torch.inference_mode()
    def hidden_states(
        self,
        ids: Sequence[Sequence[int]],
        layers: Sequence[int] | None = None,
        *,
        pool: str = "last",
        since: Sequence[int] | None = None,
        max_tokens: int | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> dict[int, Tensor]:
        """Residual stream after each of `layers` (default: all) of every row of token ids: `{layer: [N, D]}`.

        `pool` is "last" (the last token) or "mean" (over the tokens from position `since` of each row on; by default
        all but the first, an attention sink). Batches hold rows of one length, so that nothing is padded, up to
        `max_tokens` (default: 512 on a CPU, whose caches hold no more, 4096 elsewhere). What all rows begin with, such
        as a chat's system prompt, is read once, and nothing above the last of `layers` is run, nor the output head.
        """
        check(pool in ("last", "mean"), "pool", pool, "last, mean")
        wanted = list(range(len(self.blocks))) if layers is None else list(layers)
        with torch.inference_mode(False):  # what training starts from
            out = {layer: torch.empty(len(ids), self.info.width) for layer in wanted}
        opening = Opening(self, ids, wanted)
        for rows in same_lengths(ids, max_tokens or (512 if self.device.type == "cpu" else 4096)):
            length = len(ids[rows[0]])
            first = [length - 1 if pool == "last" else min(1, length - 1) if since is None else since[i] for i in rows]
            seen = opening.read([ids[i] for i in rows], whole=min(first) < opening.length)
            for layer, x in seen.items():
                skipped = length - x.shape[1]
                out[layer][rows] = means_of(x, [start - skipped for start in first]).cpu()
            if on_batch is not None:
                on_batch(len(rows))
        return out


def _weight(module: Any) -> Tensor:
    """A module's weight, brought back where accelerate had offloaded it."""
    with align_module_device(module):
        return module.weight
