"""Language models through transformers: anything that `AutoModelForCausalLM` loads, and text models inside others."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, cached_file

from steer.adapters.language.blocks import decoder_blocks, trunk_of
from steer.adapters.language.decoding import Decoding
from steer.adapters.language.facts import CALIBRATION, fingerprint, token_of
from steer.adapters.language.generation import own_settings
from steer.adapters.language.model import TextModel, check_lengths
from steer.adapters.transformers import learning, tracking
from steer.adapters.transformers.adapter import find_adapter
from steer.adapters.transformers.body import Body, Layout, bare, structure, taken
from steer.adapters.transformers.cache import cache_argument
from steer.adapters.transformers.checkpoint import check_causal, check_files, check_weights
from steer.adapters.transformers.hooks import Hooks
from steer.adapters.transformers.layouts import Trial
from steer.adapters.transformers.process import TextProcess
from steer.adapters.transformers.reader import Reader
from steer.adapters.transformers.reading import Opening, means_of, same_lengths, token_readings
from steer.core import ModelInfo, Prompt, Samples, SteerError
from steer.core import check as require
from steer.core.edit import Prompts
from steer.core.errors import first_line
from steer.core.readings import Readings
from steer.edits import Artifact
from steer.embedded import resolve
from steer.hub import has_file
from steer.model import Plan, as_prompts
from steer.readings import reading_of

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
    check: bool = True,
    partial_weights: bool = False,
    context_length: int | None = None,
    **options: Any,
) -> LanguageModel:
    """A language model from a Hugging Face id, a local folder, a GGUF file, or a loaded module with its tokenizer.
    Models that see and hear are read as text models, and a PEFT adapter opens with the model that it names as its base.

    Args:
        check: try a few tokens of two rows against single passes of the library, and refuse the model, or lay
            its rows out otherwise, where they differ. Each layout is tried once, the first time that it is wanted.
        partial_weights: load although the checkpoint lacks weights of the network, or has some that it has no place
            for.
        context_length: positions that prompt and text may take together; default: what the configuration says.
        options: go to `from_pretrained`. Only safetensors and GGUF weights are read.

    Raises:
        SteerError: nothing can be loaded, or weights are missing or left over.
        UnsupportedError: the model is no causal language model, or does not come out as in the library.
    """
    made: dict[str, Any] = {"check": check, "context_length": context_length}
    if isinstance(model, nn.Module):
        require(tokenizer is not None, "tokenizer", None, "the model's tokenizer, when a loaded model is given")
        name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        return _checked(LanguageModel(model, tokenizer, name, **made))
    where, extra = str(model), {}
    if where.endswith(".gguf"):
        require(Path(where).is_file(), "model", where, "a GGUF file that exists")
        where, extra = str(Path(where).parent), {"gguf_file": Path(where).name}
    check_files(Path(model))
    adapter = None if extra else find_adapter(model)
    if adapter is not None:
        given = {"dtype": dtype, "device": device, "device_map": device_map, "trust_remote_code": trust_remote_code}
        below = resolve(adapter.base)
        if isinstance(below, str):
            has_file(below, "config.json")  # says at once that the hub is out of reach
        base = load(below, check=False, partial_weights=partial_weights, **given, **options)
        network, tokenizer = adapter.open(base.network), tokenizer or adapter.tokenizer() or base.tokenizer
        return _checked(LanguageModel(network, tokenizer, name or str(model), **made))
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **extra)
        check_causal(config, name or str(model))
        tokenizer = tokenizer or _tokenizer(where, config, trust_remote_code=trust_remote_code, **extra)
        network, found = _library(config).from_pretrained(
            where,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **({} if extra else {"use_safetensors": True}),
            **extra,
            **options,
        )
    except SteerError:
        raise
    except Exception as error:  # of any model's code, and of quantisers, which may want a library or a GPU
        raise SteerError(f"model: could not load {str(model)!r}: {first_line(error)}") from error
    check_causal(config, name or str(model), network, decoder_blocks(network))
    if not partial_weights:
        check_weights(found, name or str(model), None if isinstance(network.config, type(config)) else network)
    if device is not None and device_map is None:
        network = network.to(device)
    return _checked(LanguageModel(network, tokenizer, name or str(model), **made))


def _tokenizer(where: str, config: Any, **options: Any) -> Any:
    """The tokenizer, with the chat template that older checkpoints of models that see and hear hold in a file of their
    own.
    """
    tokenizer = AutoTokenizer.from_pretrained(where, **options)
    if not getattr(tokenizer, "chat_template", None) and config.get_text_config(decoder=True) is not config:
        file = cached_file(where, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            tokenizer.chat_template = json.loads(Path(file).read_text(encoding="utf-8"))["chat_template"]
    return tokenizer


def _library(config: Any) -> Any:
    """The class of the library that loads a configuration: as a text model, or as one that sees and hears too."""
    kind = type(config)
    known = kind in AutoModelForCausalLM._model_mapping or kind not in AutoModelForMultimodalLM._model_mapping
    return AutoModelForCausalLM if known else AutoModelForMultimodalLM


def _checked(model: LanguageModel) -> LanguageModel:
    """The model, after the layouts that every use of it wants have been tried."""
    model.body.allows("pads")
    return model


class LanguageModel(TextModel):
    """A causal language model and its tokenizer, ready to be steered. The network itself is never changed."""

    def __init__(
        self, network: Any, tokenizer: Any, name: str, *, check: bool = True, context_length: int | None = None
    ) -> None:
        super().__init__(tokenizer, name)
        self.blocks = decoder_blocks(bare(network))
        check_causal(network.config, name, network, self.blocks)
        self.network = network.eval()
        self.network.requires_grad_(False)
        self.config = network.config.get_text_config(decoder=True)
        self.trunk = trunk_of(bare(network), self.blocks)
        """The network without its output head."""
        self.hooks = Hooks(self.blocks)
        self._norms: Tensor | None = None
        self._context = context_length
        self.body = self._body(check)
        """What the parts of the adapter are handed."""

    def _body(self, check: bool) -> Body:
        trial: list[Trial] = []

        def probe(body: Body, layout: str) -> str | None:
            if not trial:
                trial.append(Trial(body, self.tokenizer(CALIBRATION[0])["input_ids"]))
            return trial[0](layout)

        takes = taken(self.network)
        cache_argument(takes, bare(self.network))
        layout = Layout({}, probe if check else None)
        body = Body(
            name=self.name,
            network=self.network,
            trunk=self.trunk,
            blocks=self.blocks,
            hooks=self.hooks,
            config=self.config,
            pad_token_id=self.pad_token_id,
            context=self.context_length,
            layout=layout,
            describe=lambda: self.info,
        )
        layout.known.update(structure(body.new_cache(), takes))
        return body

    # ---- facts

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.body.device

    @property
    def vocabulary(self) -> int:
        return int(self.network.get_output_embeddings().weight.shape[0])

    @property
    def context_length(self) -> int | None:
        return self._context or _context(self.config)

    @property
    def pad_token_id(self) -> int:
        """Padding is masked: any id that the network can read will do."""
        rows = self.network.get_input_embeddings().weight.shape[0]
        given = (self.tokenizer.pad_token_id, *self.eos_token_ids)
        return next((int(value) for value in given if value is not None and 0 <= value < rows), 0)

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
            token_id=lambda text: token_of(self.tokenizer, text),
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
                with torch.inference_mode(), self.body.recording(range(len(self.blocks))) as seen:
                    self.body.read(ids)
                for layer, x in seen.items():
                    norms[layer].append(x[0, 1:].float().norm(dim=-1).cpu())
            self._norms = torch.stack([torch.cat(x).median() for x in norms]).clone()
        return self._norms

    # ---- generation

    def process(
        self,
        *,
        generation_config: GenerationConfig | str | None = None,
        block: int = 1,
        until: Sequence[str] = (),
        base: str = "truncated",
        **settings: Any,
    ) -> TextProcess:
        """The model as a `Process`, with decoding settings as for `generate`. A step draws `block` tokens, or fewer
        where a token holds one of the strings in `until`, such as sentence ends ".", "!", "?" and line breaks. `base`
        says what the weights of samplers refer to under truncation: "truncated" or "full" (see `TextProcess`).
        """
        decoding = Decoding.create(generation_config, self.own_settings, **settings)
        return TextProcess(self, decoding, block=block, until=tuple(until), base=base)

    def stream(self, plan: Plan, how: Any) -> Any:
        from steer.adapters.transformers.streaming import TextStream, feed_streamer

        return TextStream(self, plan) if how is True else feed_streamer(self, plan, how)

    # ---- reading

    @torch.inference_mode()
    def features(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Final hidden states `[N, D]` after the last token of each row of token ids, on which the output head and
        value heads work; in one pass.
        """
        track, _ = tracking.start(self.body, ids, (), 1, hidden=True)
        assert track.hidden is not None
        return track.hidden

    def readings(
        self, prompts: Prompts, texts: Sequence[str], artifact: Artifact | str | Path, *, layer: int | None = None
    ) -> list[Tensor]:
        """What a vector or a probe reads at each token of given texts, unsteered: a tensor `[T]` for each text.

        A vector fitted with `method="probe"` reads log-odds of its positive side; others the component of the residual
        stream along the direction, in units of the layer's median residual norm, as strengths are, and the mean over
        their layers. (`generate(readings=)` reads while texts are drawn, a token's number one position earlier: where
        it was chosen.)

        Args:
            prompts: one for all texts, or one for each.
            artifact: a vector, or its file.
            layer: after which block alone; default: of a probe the one that separated best, of others all of theirs.

        Raises `InputError`.
        """
        reading = reading_of("artifact", artifact, self.info, None if layer is None else [layer])
        several = as_prompts(prompts)
        several = several * len(texts) if len(several) == 1 else several
        require(len(several) == len(texts), "texts", f"{len(texts)} texts", f"one for each of {len(several)} prompts")
        reader, found = Reader(Readings((reading,)), self.body.stream), []
        for prompt, text in zip(several, texts, strict=True):
            ids, tail = self.encode(prompt), self.tokenizer(text, add_special_tokens=False)["input_ids"]
            check_lengths([[*ids, *tail]], 0, self.context_length)
            found.append(token_readings(self.body, [*ids, *tail], len(ids), reader))
        return found

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
        texts = isinstance(ids, str) or any(isinstance(row, str) for row in ids)
        require(not texts, "ids", ids, "rows of token ids: model.encode(text) of each text")
        require(pool in ("last", "mean"), "pool", pool, "last, mean")
        limit = self.context_length
        for i, row in enumerate(ids):
            fits = limit is None or len(row) <= limit
            require(fits, f"ids[{i}]", f"{len(row)} tokens", f"at most {limit}, the model's context")
        wanted = list(range(len(self.blocks))) if layers is None else list(layers)
        with torch.inference_mode(False):  # what training starts from
            out = {layer: torch.empty(len(ids), self.info.width) for layer in wanted}
        opening = Opening(self.body, ids, wanted)
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

    # ---- what training through the frozen network needs, see `learning`

    def read_prefix(
        self, ids: Sequence[Sequence[int]], reply_tokens: int, layers: Sequence[int]
    ) -> tuple[learning.Keys, Tensor, list[list[int]], dict[int, Tensor]]:
        """Prompts read once: caches, their mask, the model's own greedy replies, states at the last token."""
        return learning.read_prefix(self, ids, reply_tokens, layers)

    def reply_logits(
        self,
        last: Sequence[int],
        replies: Sequence[Sequence[int]],
        keys: learning.Keys,
        mask: Tensor,
        program: dict[int, Callable[[Tensor], Tensor]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Differentiable logits `[N, T, V]` of replies, the replies, and where they are real."""
        return learning.reply_logits(self, last, replies, keys, mask, program)

    def rollout_features(self, prompts: Sequence[Prompt], drawn: Samples, *, after: bool, width: int) -> Tensor:
        """Final hidden states `[N, width, D]` of finished texts, in half precision."""
        return learning.rollout_features(self, prompts, drawn, after=after, width=width)


def _weight(module: Any) -> Tensor:
    """A module's weight, brought back where accelerate had offloaded it."""
    with align_module_device(module):
        return module.weight


def _context(config: Any) -> int | None:
    """Positions that a text model reads: what it was made for, times the factor of a rope that stretches them."""
    names = ("max_position_embeddings", "max_seq_len")
    limit = next((value for value in (getattr(config, name, None) for name in names) if value), None)
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in [rope] if "rope_type" in rope else [x for x in rope.values() if isinstance(x, dict)]:
        if limit and kind.get("rope_type") in ("yarn", "dynamic") and kind.get("factor"):
            made_for = kind.get("original_max_position_embeddings") or limit
            limit = max(limit, int(kind["factor"] * made_for))
    return int(limit) if limit and limit > 0 else None
