"""Masked diffusion language models through transformers: anything that `AutoModelForMaskedLM` loads.

Models that were trained at all rates of masking (MDLM and its kin) are samplers of text; BERT and its kin, trained at
15 %, run the same way and are the worse the more is masked.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase

from steer.adapters.language.model import shown
from steer.adapters.language.prompts import PromptReader
from steer.adapters.transformers.checkpoint import check_files, check_weights
from steer.core import Prompt, RawText, Samples, SteerError, UnsupportedError, check
from steer.core.errors import first_line
from steer.masked import MaskedProcess
from steer.model import Model

__all__ = ["MaskedLanguageModel", "load"]


def load(
    model: str | Path | nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    mask_token_id: int | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: Any = None,
    name: str | None = None,
    trust_remote_code: bool = False,
    partial_weights: bool = False,
    **options: Any,
) -> MaskedLanguageModel:
    """A masked language model from a Hugging Face id, a local folder, or a loaded module with its tokenizer.

    `tokenizer` may be the name of another repository, for models that bring none (MDLM uses "gpt2"'s). `options` go to
    `from_pretrained`. Only safetensors weights are read, and code that a repository brings is run only with
    `trust_remote_code`. Raises `SteerError` where nothing can be loaded, or weights are missing without
    `partial_weights`.
    """
    network: Any = model
    try:
        if not isinstance(model, nn.Module):
            check_files(Path(model))
            network, found = AutoModelForMaskedLM.from_pretrained(
                str(model),
                dtype=dtype,
                device_map=device_map,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
            if not partial_weights:  # heads beside the masked one, such as BERT's next sentence, may be left over
                check_weights({"missing_keys": found["missing_keys"]}, name or str(model))
            tokenizer = tokenizer or str(model)
        check(tokenizer is not None, "tokenizer", None, "the model's tokenizer, when a loaded model is given")
        if isinstance(tokenizer, str | Path):
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer), trust_remote_code=trust_remote_code)
    except SteerError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise SteerError(f"model: could not load {str(model)!r}: {first_line(error)}") from error
    if device is not None and device_map is None:
        network = network.to(device)
    held = getattr(network.config, "_name_or_path", "") or type(network).__name__
    return MaskedLanguageModel(network, tokenizer, name or (held if network is model else str(model)), mask_token_id)


class MaskedLanguageModel(Model):
    """A masked language model and its tokenizer, ready to be steered: the `MaskedDenoiser` of its processes.

    A row of the network is `before + prompt + text + after`, `before` and `after` being what the tokenizer frames a
    text with ([CLS] and [SEP]); rows go through the network with others of the same length, so that nothing is padded.

    The mask is `mask_token_id`; by default the tokenizer's or the configuration's, or the model's last id where it has
    one more than the tokenizer (MDLM). Raises `InputError` where none is found, `UnsupportedError` for networks that
    are no denoisers of this kind.
    """

    def __init__(self, network: Any, tokenizer: Any, name: str, mask_token_id: int | None = None) -> None:
        self.network, self.tokenizer, self.name = network.eval(), tokenizer, name
        self.network.requires_grad_(False)
        self.config = network.config
        if getattr(self.config, "is_encoder_decoder", False):
            raise UnsupportedError(f"model {name}: encoder-decoder models are no masked denoisers of one sequence")
        if getattr(self.config, "time_conditioning", False):
            raise UnsupportedError(f"model {name}: its network wants the time; masked denoisers see the masks alone")
        parameters = inspect.signature(network.forward).parameters
        self._takes = frozenset(name for name in ("attention_mask", "timesteps") if name in parameters)
        self._mask_id = self._find_mask() if mask_token_id is None else mask_token_id
        inside = isinstance(self._mask_id, int) and 0 <= self._mask_id < self.vocabulary
        check(inside, "mask_token_id", self._mask_id, f"a token id from 0 to {self.vocabulary - 1}")
        self.reader = PromptReader(tokenizer, name, special=False)

    def _find_mask(self) -> int:
        for holder, field in (
            (self.tokenizer, "mask_token_id"),
            (self.config, "mask_token_id"),
            (self.config, "mask_index"),
        ):
            value = getattr(holder, field, None)
            if isinstance(value, int):
                return value
        known = len(self.tokenizer)
        allowed = f"the id of the mask: the tokenizer has none, and {known} tokens to the model's {self.vocabulary}"
        check(self.vocabulary == known + 1, "mask_token_id", None, allowed)
        return known

    # ---- facts

    @property
    def mask_id(self) -> int:
        return self._mask_id

    @property
    def vocabulary(self) -> int:
        return int(self.config.vocab_size)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return next(self.network.parameters()).device

    @property
    def context_length(self) -> int | None:
        """Longest row of the network, prompt and frame included."""
        limits = [getattr(self.config, field, None) for field in ("max_position_embeddings", "model_length")]
        limits.append(getattr(self.tokenizer, "model_max_length", None))
        return min((int(x) for x in limits if isinstance(x, int | float) and 0 < x < 1e9), default=None)

    # ---- text

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """Token ids that the tokenizer puts before and after a text."""
        bare, whole = ([int(i) for i in self.tokenizer("a", add_special_tokens=s)["input_ids"]] for s in (False, True))
        for at in range(len(whole) - len(bare) + 1):
            if bare and whole[at : at + len(bare)] == bare:
                return whole[:at], whole[at + len(bare) :]
        return [], []

    @property
    def chats(self) -> bool:
        """Whether plain prompts are wrapped as a user's message."""
        return self.reader.chats

    def prefix(self, prompt: Prompt) -> list[int]:
        """Token ids before a text. A prompt becomes a user's message where there is a chat template, and is continued
        as it stands where there is none, or if it is a `RawText`. An empty prompt is none at all.
        """
        tokens = self.reader.encode(prompt)
        plain = isinstance(prompt, str) and (not prompt or isinstance(prompt, RawText) or not self.chats)
        return [*self.frame[0], *tokens] if plain else tokens

    def encode(self, prompts: Sequence[Prompt], length: int) -> list[list[int]]:
        """Token ids before each prompt's text. Raises `InputError` where a text of `length` tokens does not fit."""
        rows, limit = [self.prefix(p) for p in prompts], self.context_length
        for b, row in enumerate(rows):
            size = len(row) + len(self.frame[1])
            fits = limit is None or size + length <= limit
            check(
                fits,
                f"prompts[{b}]",
                f"{size} tokens and length={length}",
                f"at most {limit} tokens in all, the model's context",
            )
            check(self.mask_id not in row, f"prompts[{b}]", "the mask token", "text without masks")
        return rows

    def show(self, prompt: Prompt) -> Any:
        """The prompt as it appears in results."""
        return shown(prompt)

    def decode_text(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    # ---- the network

    @torch.no_grad()
    def predict(self, tokens: Tensor, group: Tensor, encoded: list[list[int]]) -> Tensor:
        """Logits `[N, L, V]` of rows `[N, L]` after the prompts `group` `[N]`, in float32 or better."""
        owner, (count, length) = group.tolist(), tokens.shape
        after = torch.tensor(self.frame[1], dtype=torch.long, device=tokens.device)
        sizes = [len(encoded[b]) for b in owner]
        out: Tensor | None = None
        for size in sorted(set(sizes)):
            rows = [i for i, s in enumerate(sizes) if s == size]
            before = torch.tensor([encoded[owner[i]] for i in rows], dtype=torch.long, device=tokens.device)
            at = torch.tensor(rows, device=tokens.device)
            ids = torch.cat([before.reshape(len(rows), size), tokens[at], after.expand(len(rows), -1)], 1)
            law = self.logits(ids)[:, size : size + length]
            law = law if law.dtype == torch.float64 else law.float()
            law[..., self.mask_id] = -torch.inf
            if len(rows) == count:
                return law
            out = law.new_empty(count, length, law.shape[-1]) if out is None else out
            out[at] = law
        assert out is not None
        return out

    def logits(self, ids: Tensor) -> Tensor:
        """Logits `[N, T, V]` of whole rows `[N, T]`."""
        given: dict[str, Any] = {}
        if "attention_mask" in self._takes:
            given["attention_mask"] = torch.ones_like(ids)
        if "timesteps" in self._takes:
            # Networks without time conditioning ask for it all the same.
            given["timesteps"] = torch.zeros(len(ids), device=ids.device)
        out = self.network(input_ids=ids, **given)
        logits = out if isinstance(out, Tensor) else out[0] if isinstance(out, tuple) else out.logits
        if logits.shape[:2] != ids.shape or logits.shape[-1] != self.vocabulary:
            raise SteerError(
                f"model {self.name}: returned logits of shape {tuple(logits.shape)} for {tuple(ids.shape)} tokens and "
                f"a vocabulary of {self.vocabulary}"
            )
        return logits

    @torch.no_grad()
    def log_likelihood(self, samples: Samples, max_batch: int = 64) -> tuple[Tensor, Tensor]:
        """Pseudo-log-likelihood `[N]` of each output after its prompt, and the number of its tokens `[N]`.

        The sum over positions of `log p(token | all others)`, one row of the network for each (Salazar et al. 2020,
        "Masked Language Model Scoring", eq. 1). It is no log-probability of the text: conditionals of a masked model
        need not belong to one joint law, and no order of revealing has them.
        """
        total = torch.zeros(len(samples.group), dtype=torch.float64)
        for i, tokens in enumerate(samples.tokens or []):
            row = torch.tensor([tokens], device=self.device)
            encoded = self.encode([samples.prompts[int(samples.group[i])]], len(tokens))
            for first in range(0, len(tokens), max_batch):
                at = torch.arange(first, min(first + max_batch, len(tokens)), device=self.device)
                rows = row.repeat(len(at), 1)
                rows[torch.arange(len(at), device=self.device), at] = self.mask_id
                law = self.predict(rows, torch.zeros(len(at), dtype=torch.long), encoded).double().log_softmax(-1)
                total[i] += float(law[torch.arange(len(at), device=self.device), at, row[0, at]].sum())
        return total, torch.tensor([len(t) for t in samples.tokens or []], dtype=torch.float64)

    # ---- generation

    def process(
        self, *, length: int | None = None, steps: int = 64, max_new_tokens: int | None = None, **settings: Any
    ) -> MaskedProcess:
        """The model as a `Process`; `settings` are those of `MaskedProcess` (`temperature`, `top_k`, `top_p`,
        `suppress`, `order`, `shown`, `max_batch`). `length` (default 64) is the tokens of a text, all of which are
        drawn; `max_new_tokens` is another name for it.
        """
        check(length is None or max_new_tokens is None, "length", length, "one of length and max_new_tokens")
        length = (64 if max_new_tokens is None else max_new_tokens) if length is None else length
        known = set(MaskedProcess.__dataclass_fields__) - {"network", "edits", "length", "steps", "proposal"}
        for setting in settings:
            check(setting in known, "process()", setting, ", ".join(sorted(known)))
        return MaskedProcess(self, length, steps, **settings)
