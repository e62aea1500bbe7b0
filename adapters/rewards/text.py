"""Rewards from Hugging Face: any sequence classifier or reward model, through transformers."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steer.adapters.language.prompts import ChatTemplate
from steer.core import InputError, Prompt, Samples, SteerError, check
from steer.core.messages import plain_messages
from steer.rewards.algebra import Composable
from steer.rewards.text import texts_of

__all__ = ["ModelReward"]


Template = str | Callable[[Prompt, str], str]


@contextlib.contextmanager
def loading(reward: object, source: str, kind: str) -> Iterator[None]:
    """Whatever cannot be loaded within ends in one `SteerError`."""
    try:
        yield
    except SteerError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SteerError(f"reward {reward}: cannot load {source!r} as a {kind}: {reason}") from error


def pretrained(
    reward: object,
    architecture: Any,
    source: str,
    kind: str,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Any:
    """The trained network of `source` for scoring, frozen and on its device (None: CUDA where there is one).

    Code that comes with a model never runs. `SteerError` where it cannot be loaded or lacks trained weights.
    """
    with loading(reward, source, kind):
        model, report = architecture.from_pretrained(
            source, dtype=dtype or "auto", trust_remote_code=False, output_loading_info=True, **options
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise SteerError(
            f"reward {reward}: {source!r} is no trained {kind.split()[-1]}; it lacks {', '.join(missing[:3])}"
        )
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval().requires_grad_(False)


class ModelReward(Composable):
    """The score of (prompt, output) under a sequence classifier: a reward model's raw score (one label), otherwise the
    log-probability of `label` in nats.

    `source` is a model id, a folder, or `(model, tokenizer)`; weights are loaded on first use, and code that comes
    with a model never runs. `template` is the text to score: `"{output}"`, `"{prompt}\\n{output}"` or a function of
    (prompt, output); without one it is the tokenizer's chat template, else a text pair where the tokenizer has a
    separator, else prompt and output joined. What is longer than `max_length` tokens (None: what the model can
    take) loses its beginning. `dtype` None is the dtype that the weights were saved in.
    """

    modality: ClassVar[Literal["text", "image"] | None] = "text"
    alone = True

    def __init__(
        self,
        source: str | Path | tuple[Any, Any],
        label: str | int | None = None,
        template: Template | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check(isinstance(batch_size, int) and batch_size > 0, "batch_size", batch_size, "an integer > 0")
        check(max_length is None or max_length > 0, "max_length", max_length, "an integer > 0, or None")
        if isinstance(template, str):
            check("{output}" in template, "template", template, "a text with {output}, and {prompt} if wanted")
        self.source, self.label, self.template = source, label, template
        self.batch_size, self.max_length, self.device, self.dtype = batch_size, max_length, device, dtype
        self._loaded: tuple[Any, Any] | None = None
        if isinstance(source, tuple):
            self._loaded = (source[0], _from_the_left(source[1]))
            label_index(labels_of(source[0].config.to_dict()), label)
        else:
            config = folder_config(str(source))
            if config.get("id2label"):
                label_index(labels_of(config), label)

    def __repr__(self) -> str:
        source = type(self.source[0]).__name__ if isinstance(self.source, tuple) else str(self.source)
        return f'"{source}"' if self.label is None else f'"{source}":{self.label}'

    @property
    def labels(self) -> list[str]:
        """The classifier's labels by index; one for a reward model. Loads the model."""
        return labels_of(self._load()[0].config.to_dict())

    def score(self, samples: Samples) -> Tensor:
        texts = texts_of(samples, self)
        if not texts:
            return torch.zeros(0, dtype=torch.float64)
        model, tokenizer = self._load()
        prompts = [samples.prompts[b] for b in samples.group.tolist()]
        rows = [self._encode(model, tokenizer, p, t) for p, t in zip(prompts, texts, strict=True)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        scores = torch.empty(len(rows), dtype=torch.float64)
        for start in range(0, len(order), self.batch_size):
            index = order[start : start + self.batch_size]
            scores[index] = self._read(_logits(model, [rows[i] for i in index]), model.config)
        return scores

    def _read(self, logits: Tensor, config: Any) -> Tensor:
        if logits.shape[1] == 1:
            return logits[:, 0]
        index = label_index(labels_of(config.to_dict()), self.label)
        if config.problem_type == "multi_label_classification":
            return torch.nn.functional.logsigmoid(logits)[:, index]
        return logits.log_softmax(-1)[:, index]

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            source = as_path(str(self.source))
            with loading(self, source, "sequence classifier"):
                tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            model = pretrained(
                self, AutoModelForSequenceClassification, source, "sequence classifier", self.device, self.dtype
            )
            label_index(labels_of(model.config.to_dict()), self.label)
            self._loaded = (model, _from_the_left(tokenizer))
        return self._loaded

    def _encode(self, model: Any, tokenizer: Any, prompt: Prompt, text: str) -> dict[str, list[int]]:
        limit = self.max_length or _longest(model.config, tokenizer)
        options: dict[str, Any] = {"truncation": limit is not None, "max_length": limit}
        if self.template is not None:
            return dict(tokenizer(self._filled(prompt, text), **options))
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            chat.append({"role": "assistant", "content": text})
            filled = ChatTemplate(tokenizer, str(self)).render(chat, resumed=False)
            return dict(tokenizer(filled, add_special_tokens=False, **options))
        if tokenizer.sep_token is not None and flat(prompt):
            return dict(tokenizer(flat(prompt), text, **options))
        return dict(tokenizer(flat(prompt) + text, **options))

    def _filled(self, prompt: Prompt, text: str) -> str:
        if callable(self.template):
            return self.template(prompt, text)
        values = {"{prompt}": flat(prompt), "{output}": text}
        return re.sub(r"\{(?:prompt|output)\}", lambda m: values[m[0]], str(self.template))


def flat(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in plain_messages(prompt))


def _logits(model: Any, rows: Sequence[dict[str, list[int]]]) -> Tensor:
    rows = [row if row["input_ids"] else {key: [0] for key in row} for row in rows]
    width = max(len(row["input_ids"]) for row in rows)
    with _padding(model, rows) as pad, torch.inference_mode():
        batch = {
            key: torch.tensor([row[key] + [pad if key == "input_ids" else 0] * (width - len(row[key])) for row in rows])
            for key in rows[0]
        }
        device = next(model.parameters()).device
        return model(**{key: x.to(device) for key, x in batch.items()}).logits.double().cpu()


@contextlib.contextmanager
def _padding(model: Any, rows: Sequence[dict[str, list[int]]]) -> Iterator[int]:
    """The model's pad token. A decoder that has none finds a row's last token by the padding, so it is lent one for
    the call: the first id that no row contains, since a row may end in the end-of-sequence token.
    """
    config = model.config.get_text_config()
    if config.pad_token_id is not None:
        yield config.pad_token_id
        return
    used = {i for row in rows for i in row["input_ids"]}
    config.pad_token_id = next((i for i in range(config.vocab_size) if i not in used), 0)
    try:
        yield config.pad_token_id
    finally:
        config.pad_token_id = None


def _from_the_left(tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.truncation_side = "left"
    return tokenizer


def _longest(config: Any, tokenizer: Any) -> int | None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [n for n in (tokenizer.model_max_length, positions) if isinstance(n, int) and 0 < n < 10**9]
    return min(limits, default=None)


def as_path(source: str) -> str:
    return str(Path(source).expanduser()) if source.startswith("~") else source


def folder_config(source: str) -> dict[str, Any]:
    """The `config.json` of a model's folder, `{}` for a model id; `InputError` where the folder has none."""
    folder = Path(as_path(source))
    if not (folder.exists() or source.startswith((".", "/", "~"))):
        return {}
    config = folder / "config.json"
    check(config.is_file(), "reward model", source, "a folder with config.json, or a model id org/name")
    try:
        return dict(json.loads(config.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InputError("reward model", source, f"a folder with a readable config.json ({error})") from error


def labels_of(config: dict[str, Any]) -> list[str]:
    return [str(name) for _, name in sorted(config["id2label"].items(), key=lambda pair: int(pair[0]))]


def label_index(labels: list[str], label: str | int | None) -> int:
    if label is None and len(labels) == 1:
        return 0
    allowed = ", ".join(f"{i} ({name})" for i, name in enumerate(labels))
    check(label is not None and not isinstance(label, bool), "label", label, allowed)
    exact = [i for i, name in enumerate(labels) if name == label]
    same = exact or [i for i, name in enumerate(labels) if name.lower() == str(label).lower()]
    if not same and str(label).isdecimal() and int(label or 0) < len(labels):
        same = [int(label or 0)]
    check(len(same) == 1, "label", label, allowed)
    return same[0]
