"""Data of text policies: checked hyper-parameters, and rows of text as token ids.

Prompts go through `LanguageModel.encode`, so that a policy is tuned on the tokens that it will see; completions are
followed by the model's end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from steer.core import InputError, check, check_whole
from steer.core.errors import check_unicode
from steer.data import plain_row, prompt_of

if TYPE_CHECKING:
    from steer.adapters.transformers.model import LanguageModel


METHODS = ("sft", "dpo", "kto", "grpo", "raft")
COLUMNS = {
    "sft": ("prompt", "completion"),
    "dpo": ("prompt", "chosen", "rejected"),
    "kto": ("prompt", "completion", "label"),
}
LOSSES = {
    "sft": ("nll", "dft"),
    "dpo": (
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
        "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
    ),
    "kto": ("kto", "apo_zero_unpaired"),
    "grpo": ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo"),
    "raft": ("nll", "dft"),
}  # fmt: skip
"""TRL's losses by method, the default first."""
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_DIFFERENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
"""Losses of the difference of two rewards, in which the partition function of another divergence cancels."""
_RATES = {"sft": 2e-5, "dpo": 5e-6, "kto": 5e-6, "grpo": 2e-6, "raft": 2e-5}
"""Learning rates where all weights are tuned; ten times as much for LoRA."""
_RELEVANT = {
    "sft": (),
    "dpo": ("beta", "f_divergence"),
    "kto": ("beta",),
    "grpo": ("beta", "group_size", "max_new_tokens", "temperature"),
    "raft": ("group_size", "max_new_tokens", "temperature", "rounds"),
}


@dataclass(frozen=True)
class Tuning:
    """Hyper-parameters of one run; see `train_policy`. Raises `InputError` for one that is out of range."""

    method: str
    beta: float
    loss: str
    f_divergence: str
    lora_rank: int
    lora_alpha: int
    lora_targets: str
    learning_rate: float
    epochs: int
    steps: int | None
    batch_size: int
    group_size: int
    max_new_tokens: int
    temperature: float
    rounds: int
    seed: int

    @classmethod
    def create(
        cls, *, method: str, loss: str | None, learning_rate: float | None, lora_rank: int, lora_alpha: int | None,
        **more: Any,
    ) -> Tuning:  # fmt: skip
        """With the defaults that depend on the method and the rank."""
        check(method in METHODS, "method", method, ", ".join(METHODS))
        check_whole("lora_rank", lora_rank, 0, "an integer of 0 (all weights) or more")
        return cls(
            method=method,
            loss=LOSSES[method][0] if loss is None else loss,
            learning_rate=_RATES[method] * (10 if lora_rank else 1) if learning_rate is None else learning_rate,
            lora_rank=lora_rank,
            lora_alpha=2 * lora_rank if lora_alpha is None else lora_alpha,
            **more,
        )

    def __post_init__(self) -> None:
        for part in self.losses:
            joined = " (several joined by +)" if self.method == "dpo" else ""
            check(part in LOSSES[self.method], "loss", self.loss, f"for {self.method}: {self._losses()}{joined}")
        check(len(self.losses) == 1 or self.method == "dpo", "loss", self.loss, f"one of {self._losses()}")
        check(self.f_divergence in DIVERGENCES, "f_divergence", self.f_divergence, ", ".join(DIVERGENCES))
        if self.f_divergence != DIVERGENCES[0]:
            check(self.method == "dpo", "f_divergence", self.f_divergence, f"{DIVERGENCES[0]} for {self.method}")
            fits = all(part in _DIFFERENCES for part in self.losses)
            check(fits, "loss", self.loss, f"with {self.f_divergence}: {', '.join(_DIFFERENCES)}")
        _number("beta", self.beta, zero=self.method == "grpo")
        _number("learning_rate", self.learning_rate)
        _number("temperature", self.temperature)
        check_whole("epochs", self.epochs, 1)
        if self.steps is not None:
            check_whole("steps", self.steps, 1)
        two = self.method == "kto" and self.loss == "kto"
        check_whole("batch_size", self.batch_size, 2 if two else 1)
        check_whole("group_size", self.group_size, 2)
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        check_whole("rounds", self.rounds, 1)
        check_whole("seed", self.seed, 0)
        check(self.seed < 2**32, "seed", self.seed, f"an integer from 0 to {2**32 - 1}")
        if self.lora_rank:
            check_whole("lora_alpha", self.lora_alpha, 1)

    def _losses(self) -> str:
        return ", ".join(LOSSES[self.method])

    @property
    def losses(self) -> list[str]:
        return self.loss.split("+")

    @property
    def online(self) -> bool:
        """Whether the policy's own samples are what it is tuned on."""
        return self.method in ("grpo", "raft")

    @property
    def targets(self) -> str | list[str]:
        """Where LoRA goes, as PEFT takes it."""
        return "all-linear" if self.lora_targets == "all-linear" else self.lora_targets.replace(" ", "").split(",")

    def recipe(self) -> dict[str, Any]:
        """The entries that matter for this method."""
        always = ("method", "loss", "lora_rank", "learning_rate", "epochs", "steps", "batch_size", "seed")
        lora = ("lora_alpha", "lora_targets") if self.lora_rank else ()
        return {k: v for k, v in asdict(self).items() if k in (*always, *lora, *_RELEVANT[self.method])}

    def total_steps(self, rows: int) -> int:
        """Updates of the weights for `rows` rows."""
        return self.steps or self.epochs * -(-rows // self.batch_size)


def _number(field: str, given: Any, zero: bool = False) -> None:
    fits = isinstance(given, int | float) and not isinstance(given, bool) and given < float("inf")
    fits = fits and (given >= 0 if zero else given > 0)
    check(fits, field, given, "a number of 0 or more" if zero else "a number above 0")


def check_targets(model: LanguageModel, tuning: Tuning) -> None:
    """Raise where LoRA is asked for at modules that are not there, or at the output head."""
    if not tuning.lora_rank or isinstance(tuning.targets, str):
        return
    head = model.network.get_output_embeddings()
    linear = {n: m for n, m in model.network.named_modules() if isinstance(m, nn.Linear) and m is not head}
    known = sorted({n.rpartition(".")[2] for n in linear})
    for name in tuning.targets:
        fits = any(n == name or n.endswith(f".{name}") for n in linear)
        check(fits and bool(name), "lora_targets", name, f"all-linear, or names among {', '.join(known)}")


def read_rows(model: LanguageModel, data: Sequence[Any], tuning: Tuning) -> list[dict[str, Any]]:
    """Token ids of every row: `prompt_ids`, and by method `completion_ids`, `chosen_ids` and `rejected_ids`, `label`.

    Raises:
        InputError: no rows, or a row that lacks a column or is too long; names both.
    """
    check(isinstance(data, Sequence) and not isinstance(data, str), "data", data, "a list of rows")
    check(len(data) > 0, "data", data, "at least one row")
    end = _end(model)
    rows = []
    for i, row in enumerate(data):
        if tuning.online:
            rows.append({"prompt_ids": _prompt_ids(model, i, prompt_of(row), tuning.max_new_tokens)})
            continue
        columns = COLUMNS[tuning.method]
        row = plain_row(row, f"data[{i}]")
        check(isinstance(row, Mapping), f"data[{i}]", row, f"a row with {', '.join(columns)}")
        for column in columns:
            check(column in row, f"data[{i}].{column}", "nothing", f"a row with {', '.join(columns)}")
        found: dict[str, Any] = {}
        for column in (c for c in columns if c not in ("prompt", "label")):
            text = row[column]
            fits = isinstance(text, str) and bool(text.strip())
            check(fits, f"data[{i}].{column}", text, "text that is not empty")
            check_unicode(f"data[{i}].{column}", text)
            ids = list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
            found[f"{column}_ids"] = ids if ids[-1] == end else [*ids, end]
        if "label" in columns:
            check(isinstance(row["label"], bool), f"data[{i}].label", row["label"], "true, false")
            found["label"] = row["label"]
        longest = max(len(ids) for name, ids in found.items() if name != "label")
        rows.append({"prompt_ids": _prompt_ids(model, i, row["prompt"], longest), **found})
    least = 2 if tuning.method == "kto" and tuning.loss == "kto" else 1
    check(len(rows) >= least, "data", f"{len(rows)} rows", f"at least {least}: this loss compares rows with others")
    return rows


def _end(model: LanguageModel) -> int:
    ends = model.eos_token_ids
    check(bool(ends), "model", model.name, "a model that has an end-of-sequence token")
    own = model.tokenizer.eos_token_id
    return own if own in ends else ends[0]


def _prompt_ids(model: LanguageModel, i: int, prompt: Any, more: int) -> list[int]:
    check(isinstance(prompt, str | list | tuple), f"data[{i}].prompt", prompt, "text, or messages")
    try:
        ids = model.encode(prompt)
    except InputError as error:
        raise InputError(f"data[{i}].{error.field}", error.given, error.allowed) from error
    limit = model.context_length
    fits = limit is None or len(ids) + more <= limit
    check(fits, f"data[{i}]", f"a prompt of {len(ids)} tokens and {more} more", f"{limit} tokens, the model's context")
    return ids
