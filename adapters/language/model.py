"""Language models of any engine: `generate` with its settings, and the reading of prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.stopping_criteria import StoppingCriteria

from steer.adapters.language.decoding import Decoding
from steer.adapters.language.generation import decoding_settings, fit_lengths, mention_own
from steer.adapters.language.prompts import PromptReader
from steer.core import InputError, ModelInfo, Prompt, PromptEdit, Reward, Sampler, Samples, check
from steer.core.edit import Prompts
from steer.core.scores import Scores
from steer.edits import as_edits
from steer.methods.samplers import SamplerSettings
from steer.model import Model, as_prompts

__all__ = ["TextModel", "TextSettings", "shown"]


def shown(prompt: Prompt) -> Any:
    """The prompt as it appears in results."""
    return prompt if isinstance(prompt, str) else list(prompt)


class TextSettings(SamplerSettings, total=False):
    """What `TextModel.generate` takes beside the prompts, for type checkers; its docstring says what each is."""

    edits: Any
    sampler: Sampler | str | None
    reward: Reward | str | Callable[..., Any] | None
    beta: float
    n: int | None
    seed: int | None
    system: str | None
    readings: Any
    stop_if: str | None
    max_rows: int | None
    progress: bool
    generation_config: GenerationConfig | str | None
    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    min_new_tokens: int | None
    bad_words_ids: Sequence[Sequence[int]] | None
    suppress_tokens: Sequence[int] | None
    stop: str | Sequence[str] | None
    eos_token_id: int | Sequence[int] | None
    logits_processor: Sequence[LogitsProcessor] | None
    stopping_criteria: Sequence[StoppingCriteria] | None
    block: int | None
    until: Sequence[str] | None
    max_tokens: int | None
    num_return_sequences: int | None
    do_sample: bool | None


class TextModel(Model):
    """A causal language model with its tokenizer. Its `process` takes `generation_config`, a `GenerationConfig`
    or "checkpoint" (see `steer.adapters.language.generation`).
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name
        self.reader = PromptReader(tokenizer, name)

    @overload  # type: ignore[override]  # names are checked, where the base class takes any
    def generate(
        self,
        prompts: Prompts = ...,
        *,
        stream: Literal[False] = ...,
        **given: Unpack[TextSettings],
    ) -> Samples: ...
    @overload
    def generate(self, prompts: Prompts = ..., *, stream: Any, **given: Unpack[TextSettings]) -> Any: ...
    def generate(
        self,
        prompts: Prompts = "",
        *,
        edits: Any = (),
        sampler: Sampler | str | None = None,
        reward: Reward | str | Callable[..., Any] | None = None,
        beta: float = 1.0,
        n: int | None = None,
        seed: int | None = None,
        system: str | None = None,
        max_rows: int | None = None,
        progress: bool = False,
        stream: Any = False,
        readings: Any = None,
        stop_if: str | None = None,
        generation_config: GenerationConfig | str | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        no_repeat_ngram_size: int | None = None,
        min_new_tokens: int | None = None,
        bad_words_ids: Sequence[Sequence[int]] | None = None,
        suppress_tokens: Sequence[int] | None = None,
        stop: str | Sequence[str] | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        stopping_criteria: Sequence[StoppingCriteria] | None = None,
        block: int | None = None,
        until: Sequence[str] | None = None,
        **more: Any,
    ) -> Any:
        """Write for every prompt.

        Args:
            prompts: one text or chat, or several. Text is a user's message where the model has a chat template.
            edits: an edit or a list of edits for all prompts, or one list for each (see `steer.generate`).
            sampler: a `Sampler`, or its name with its settings beside it: `sampler="fk", num_particles=16`. Default:
                independent samples.
            reward: a `Reward`, an expression such as "sentiment - 0.3*profanity", or a function of the texts.
            beta: KL coefficient of the target `p exp(reward / beta)`, for samplers that weigh.
            n: texts, best-of-n's candidates or particles for each prompt.
            seed: same seed, same texts on the same machine; None draws one.
            system: a system prompt for every chat.
            max_rows: texts generated at once.
            progress: show a bar on standard error.
            stream: True returns an iterator of pieces of text, whose `samples` are there when it has ended; a
                transformers streamer is fed with tokens.
            readings: vectors and probes, by name, to be read where each token is chosen (see `steer.generate`).
            stop_if: "calm < -1.5": a text ends with the first token whose reading fulfils this.
            generation_config: of transformers, or "checkpoint" for the checkpoint's own `generation_config.json`; what
                is named here goes before it. None: the model's whole law at temperature 1.
            max_new_tokens: of each text; 64 unless given.
            temperature: 0 is greedy; 1 unless given.
            top_k, top_p, min_p: truncation, as in transformers; off unless given.
            repetition_penalty, no_repeat_ngram_size, min_new_tokens, bad_words_ids, suppress_tokens, logits_processor,
            stopping_criteria: as in transformers; off unless given.
            stop: texts before which a text ends.
            eos_token_id: tokens that end a text; the model's own unless given, none for [].
            block: tokens of one step, for samplers that choose on the way.
            until: strings at which a step ends early, such as ".".
            more: the settings of a sampler that is named, and `max_tokens`, `num_return_sequences` and `do_sample`,
                which mean the same as `max_new_tokens`, `n` and `temperature` (0 or not).

        Returns:
            `Samples`, or for a stream its iterator.

        Raises:
            InputError: a field is out of range; nothing has run.
            UnsupportedError: the model cannot do what an edit, the sampler or `stream` needs.
        """
        given = dict(
            generation_config=generation_config,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            min_new_tokens=min_new_tokens,
            no_repeat_ngram_size=no_repeat_ngram_size,
            bad_words_ids=bad_words_ids,
            suppress_tokens=suppress_tokens,
            stop=stop,
            eos_token_id=eos_token_id,
            logits_processor=logits_processor,
            block=block,
            until=until,
            stopping_criteria=stopping_criteria,
            system=system,
            **more,
        )
        return super().generate(
            prompts,
            edits=edits,
            sampler=sampler,
            reward=reward,
            beta=beta,
            n=n,
            seed=seed,
            max_rows=max_rows,
            progress=progress,
            stream=stream,
            readings=readings,
            stop_if=stop_if,
            **given,
        )

    def __repr__(self) -> str:
        info = self.info
        name, blocks = Path(self.name).name, f"{info.num_layers} blocks of width {info.width}"
        return f"{type(self).__name__}({name!r}, {info.model_type}, {blocks})"

    def facts(self) -> dict[str, Any]:
        info, found = self.info, {"architecture": self.info.model_type}
        found |= {
            "blocks": str(info.num_layers),
            "width": str(info.width),
            "vocabulary": f"{len(self.tokenizer):,} tokens",
        }
        limit = getattr(self, "context_length", None)
        return found | ({"context": f"{limit:,} tokens"} if limit else {})

    @property
    def settings(self) -> frozenset[str]:
        return super().settings | {f.name for f in fields(Decoding)}

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
        """Keep no prompt's tokens from here on: prompts of many clients seldom repeat."""
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
    def info(self) -> ModelInfo:
        """What edits may know of the model."""

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
        new: dict[str, Any] = {name: fitted[name] for name in ("max_new_tokens", "min_new_tokens") if name in fitted}
        return dict(settings) | new

    def default_n(self, settings: Mapping[str, Any]) -> int | None:
        config: Any = settings.get("generation_config")
        own = self.own_settings if config == "checkpoint" else {}
        count = getattr(config, "num_return_sequences", None) or own.get("num_return_sequences")
        return None if count == 1 else count

    def score(self, prompts: Prompts, texts: Sequence[str], *, edits: Any = ()) -> Scores:
        """How likely the model finds each text after its prompt, under edits, at temperature 1.

        Args:
            prompts: one prompt for all texts, or one for each; read as `generate` reads them.
            texts: what follows, as it stands: no token that ends a text is added.
            edits: as of `generate`; a list for each prompt has one for each text. Hidden and prompt edits take one pass
                over each text, edits of the next token one step a token.

        Raises:
            InputError: texts and prompts that do not go together, or a text without tokens.
            UnsupportedError: the engine cannot score under one of the edits.
        """
        several, texts = as_prompts(prompts), list(texts)
        check(bool(texts), "texts", texts, "at least one text")
        several = several * len(texts) if len(several) == 1 else several
        check(len(several) == len(texts), "texts", f"{len(texts)} texts", f"one for each of {len(several)} prompts")
        tokens = [list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        for i, row in enumerate(tokens):
            check(bool(row), f"texts[{i}]", texts[i], "a text with at least one token")
        process = self.scorer(max(map(len, tokens)), edits, len(texts))
        total, greedy = process.score_tokens(process.encode(several), tokens)
        return Scores(total, torch.tensor([len(row) for row in tokens], dtype=torch.float64), greedy)

    def scorer(self, longest: int, edits: Any, count: int) -> Any:
        """The process that scores `count` rows of up to `longest` tokens under edits."""
        process: Any = self.process(max_new_tokens=longest, temperature=1.0)
        for edit, wanted in as_edits(edits, count, self):
            process = process.edited(edit.with_beta(1.0), None if wanted is None else sorted(wanted))
        return process

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


def check_ids(ids: Sequence[Sequence[int]], vocabulary: int) -> None:
    """Refuse prompts with tokens that the network has no embedding for, as a tokenizer of another model makes them."""
    for i, row in enumerate(ids):
        if row and max(row) >= vocabulary:
            raise InputError(f"prompts[{i}]", f"token {max(row)}", f"tokens below {vocabulary}, the model's vocabulary")


def check_lengths(ids: Sequence[Sequence[int]], new: int, limit: int | None) -> None:
    """Refuse prompts that leave no room for `new` tokens."""
    for i, row in enumerate(ids):
        if not row:
            raise InputError(f"prompts[{i}]", "", "a prompt with at least one token")
        if limit is not None and len(row) + new > limit:
            raise InputError(
                f"prompts[{i}]",
                f"{len(row)} tokens and max_new_tokens={new}",
                f"at most {limit} tokens in all, the model's context",
            )
