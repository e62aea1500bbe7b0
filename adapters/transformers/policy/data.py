"""Data of text policies: checked hyper-parameters, and rows of text as token ids.

Prompts go through `LanguageModel.encode`, so that a policy is tuned on the tokens that it will see; completions are
followed by the model's end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from torch import nn

from steer.core import InputError, check, check_whole
from steer.core.errors import check_unicode
from steer.data import plain_row, prompt_of
from steer.train.settings import UNSET, Count, Finite, Positive, Seed, Whole, settings_class

if TYPE_CHECKING:
    from steer.adapters.transformers.model import LanguageModel


@dataclass(frozen=True)
class Objective:
    """One way to tune: TRL's trainer and losses (the default first), its rows, and the settings that matter to it."""

    trainer: str
    losses: tuple[str, ...]
    rate: float
    """Learning rate where all weights are tuned; ten times as much for LoRA."""
    columns: tuple[str, ...] = ()
    """Of its rows; none where the policy's own samples are what it is tuned on."""
    own: tuple[str, ...] = ()


_SFT = ("nll", "dft")
_DPO = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
_DRAWN = ("group_size", "max_new_tokens", "temperature")
OBJECTIVES = {
    "sft": Objective("SFT", _SFT, 2e-5, ("prompt", "completion")),
    "dpo": Objective("DPO", _DPO, 5e-6, ("prompt", "chosen", "rejected"), ("beta", "f_divergence")),
    "kto": Objective("KTO", ("kto", "apo_zero_unpaired"), 5e-6, ("prompt", "completion", "label"), ("beta",)),
    "grpo": Objective("GRPO", ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo"), 2e-6, own=("beta", *_DRAWN)),
    "raft": Objective("SFT", _SFT, 2e-5, own=(*_DRAWN, "rounds")),
}
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_DIFFERENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
"""Losses of the difference of two rewards, in which the partition function of another divergence cancels."""


@settings_class
class PolicySettings:
    """How a policy is tuned."""

    method: Literal["sft", "dpo", "kto", "grpo", "raft"]
    """grpo has the KL to the model in its loss; raft takes in each of `rounds` rounds the best of `group_size` samples
    for each prompt, then SFT on them.
    """
    beta: Finite = 0.1
    """KL coefficient of dpo, kto and grpo (there 0 is off)."""
    loss: str = UNSET
    """TRL's name; default: nll, sigmoid, kto, dapo. For dpo several joined by `+`, of equal weight."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Between policy and model, for dpo."""
    lora_rank: Whole = 16
    """0 tunes all weights."""
    lora_alpha: Count | None = None
    """Default: twice the rank."""
    lora_targets: str = "all-linear"
    """ "all-linear" (without the output head), or names of modules joined by commas."""
    learning_rate: Positive = UNSET
    """Default by method; the schedule is a cosine. Weight decay and dropout are 0."""
    epochs: Count = 1
    """Passes over the data."""
    steps: Count | None = None
    """Updates (for raft: of every round), in place of epochs."""
    batch_size: Count = 8
    """Rows, pairs or prompts for each update."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Samples for each prompt."""
    max_new_tokens: Count = 32
    """Of a sample."""
    temperature: Positive = 1.0
    """Of samples."""
    rounds: Count = 1
    """Of raft."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        rate = self.objective.rate * (10 if self.lora_rank else 1)
        defaults = {"loss": self.objective.losses[0], "learning_rate": rate, "lora_alpha": 2 * self.lora_rank or None}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._check_losses()
        check(self.method == "grpo" or self.beta != 0, "beta", self.beta, "a number above 0")
        two = self.method == "kto" and self.loss == "kto"
        check_whole("batch_size", self.batch_size, 2 if two else 1)

    def _check_losses(self) -> None:
        known, dpo = self.objective.losses, self.method == "dpo"
        joined = " (several joined by +)" if dpo else ""
        for part in self.losses:
            check(part in known, "loss", self.loss, f"for {self.method}: {', '.join(known)}{joined}")
        check(len(self.losses) == 1 or dpo, "loss", self.loss, f"one of {', '.join(known)}")
        if self.f_divergence != DIVERGENCES[0]:
            check(dpo, "f_divergence", self.f_divergence, f"{DIVERGENCES[0]} for {self.method}")
            fits = all(part in _DIFFERENCES for part in self.losses)
            check(fits, "loss", self.loss, f"with {self.f_divergence}: {', '.join(_DIFFERENCES)}")

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.method]

    @property
    def losses(self) -> list[str]:
        return self.loss.split("+")

    @property
    def online(self) -> bool:
        """Whether the policy's own samples are what it is tuned on."""
        return not self.objective.columns

    @property
    def targets(self) -> str | list[str]:
        """Where LoRA goes, as PEFT takes it."""
        return "all-linear" if self.lora_targets == "all-linear" else self.lora_targets.replace(" ", "").split(",")

    def recipe(self) -> dict[str, Any]:
        """The entries that matter for this method."""
        always = ("method", "loss", "lora_rank", "learning_rate", "epochs", "steps", "batch_size", "seed")
        lora = ("lora_alpha", "lora_targets") if self.lora_rank else ()
        return {k: v for k, v in asdict(self).items() if k in (*always, *lora, *self.objective.own)}

    def total_steps(self, rows: int) -> int:
        """Updates of the weights for `rows` rows."""
        return self.steps or self.epochs * -(-rows // self.batch_size)


def check_targets(model: LanguageModel, tuning: PolicySettings) -> None:
    """Raise where LoRA is asked for at modules that are not there, or at the output head."""
    if not tuning.lora_rank or isinstance(tuning.targets, str):
        return
    head = model.network.get_output_embeddings()
    linear = {n: m for n, m in model.network.named_modules() if isinstance(m, nn.Linear) and m is not head}
    known = sorted({n.rpartition(".")[2] for n in linear})
    for name in tuning.targets:
        fits = any(n == name or n.endswith(f".{name}") for n in linear)
        check(fits and bool(name), "lora_targets", name, f"all-linear, or names among {', '.join(known)}")


def read_rows(model: LanguageModel, data: Sequence[Any], tuning: PolicySettings) -> list[dict[str, Any]]:
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
        columns = tuning.objective.columns
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
