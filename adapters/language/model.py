"""What models of tokens have in common, whatever runs them: prompts to token ids, and tokens to text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steer.adapters.language.generation import decoding_settings, fit_lengths, mention_own
from steer.adapters.language.prompts import PromptReader
from steer.core import InputError, Prompt, PromptEdit, Samples, check
from steer.edits import as_edits
from steer.model import Model

__all__ = ["TextModel", "shown"]


def shown(prompt: Prompt) -> Any:
    """The prompt as it appears in results."""
    return prompt if isinstance(prompt, str) else list(prompt)


class TextModel(Model):
    """A causal language model with its tokenizer. Its `process` takes `generation_config`, a `GenerationConfig`
    or "checkpoint" (see `steer.adapters.language.generation`).
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name
        self.reader = PromptReader(tokenizer, name)

    @property
    def split_special_tokens(self) -> bool:
        """Whether control tokens that messages spell, such as `<|im_end|>`, are read as text; else they are what they
        are to the tokenizer. Off until set; servers set it. A `RawText` always holds control tokens.
        """
        return self.reader.split_special_tokens

    @split_special_tokens.setter
    def split_special_tokens(self, whether: bool) -> None:
        self.reader.split_special_tokens = bool(whether)

    def forget_prompts(self) -> None:
        """Remember no prompt's tokens from here on: those of strangers seldom come again."""
        self.reader.forget()

    @property
    def chats(self) -> bool:
        """Whether plain prompts are wrapped as a user's message."""
        return self.reader.chats

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Text becomes a user's message where the model has a chat template, and is continued as
        it stands where it has none; a `RawText` is always continued. Raises `InputError`.
        """
        if isinstance(prompt, str):
            check(bool(prompt.strip()), "prompt", prompt, "text that is not empty")
        return self.reader.encode(prompt)

    def show(self, prompt: Prompt) -> Any:
        """The prompt as it appears in results."""
        return shown(prompt)

    def decode(self, tokens: Sequence[int], stop: Sequence[str] = ()) -> str:
        """Text of generated tokens, cut before the first stop string."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        cuts = [at for at in (text.find(s) for s in stop) if at >= 0]
        return text[: min(cuts)] if cuts else text

    @property
    @abstractmethod
    def own_settings(self) -> dict[str, Any]:
        """What the checkpoint's own `generation_config.json` says of how texts are drawn."""

    def fit(self, settings: Mapping[str, Any], prompts: list[Prompt], edits: Any) -> dict[str, Any]:
        config = settings.get("generation_config")
        if config is None:
            mention_own(self.name, self.own_settings, settings)
            return dict(settings)
        wanted = {
            **decoding_settings(config, self.own_settings),
            **{k: v for k, v in settings.items() if v is not None},
        }
        totals = [name for name in ("max_length", "min_length") if name in wanted]
        if not totals:
            return dict(settings)
        rewriting = [edit for edit, _ in as_edits(edits, len(prompts), self) if isinstance(edit, PromptEdit)]
        check(not rewriting, f"generation_config.{totals[0]}", wanted[totals[0]], "unset with an edit of the prompt")
        fitted = fit_lengths(wanted, [len(self.encode(prompt)) for prompt in prompts])
        new = {name: fitted[name] for name in ("max_new_tokens", "min_new_tokens") if name in fitted}
        return {**settings, **new}

    def default_n(self, settings: Mapping[str, Any]) -> int | None:
        config: Any = settings.get("generation_config")
        own = self.own_settings if config == "checkpoint" else {}
        count = getattr(config, "num_return_sequences", None) or own.get("num_return_sequences")
        return None if count == 1 else count

    def log_likelihood(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Summed log-probability `[N]` of each output after its prompt under the unedited model at temperature 1, and
        the number of its tokens `[N]`.
        """
        tokens = samples.tokens or [
            list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in samples.texts
        ]
        process: Any = self.process(max_new_tokens=max(1, max(len(t) for t in tokens)))
        total = process.log_likelihood(samples.prompts, samples.group, tokens)
        return total, torch.tensor([len(t) for t in tokens], dtype=torch.float64)


def check_lengths(ids: Sequence[Sequence[int]], new: int, limit: int | None) -> None:
    """Refuse prompts that leave no room for `new` tokens."""
    for i, row in enumerate(ids):
        if not row:
            raise InputError(f"prompts[{i}]", "", "a prompt with at least one token")
        if limit is not None and len(row) + new > limit:
            raise InputError(
                f"prompts[{i}]", f"{len(row)} tokens and max_new_tokens={new}",
                f"at most {limit} tokens in all, the model's context",
            )  # fmt: skip
