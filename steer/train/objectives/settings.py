"""Settings of tuned policies: what a method presets and what a user may set otherwise, every piece by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from steer.core import InputError, check, check_whole
from steer.core.names import meant
from steer.train.objectives import losses
from steer.train.objectives.options import options_of, taken
from steer.train.objectives.registry import METHODS, Method
from steer.train.objectives.schedules import SCHEDULES
from steer.train.settings import UNSET, Count, Finite, Positive, Seed, Share, Whole, settings_class

__all__ = ["DIVERGENCES", "PolicySettings", "policy_settings"]

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_DIFFERENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
"""Losses of the difference of two rewards, in which the partition function of another divergence cancels."""

Shares = Annotated[
    tuple[Share, ...], BeforeValidator(lambda value: value.split(",") if isinstance(value, str) else value)
]


@settings_class
class PolicySettings:
    """How a policy is tuned. What is None is as the method presets it; see `steer train policy --list`."""

    method: str
    """A name in the registry."""
    driver: Literal["native", "rows"] = UNSET
    """TRL's trainer, or rounds of our own with one trainer of rows."""
    beta: Finite = UNSET
    """KL coefficient: of the pull to the base. grpo and others have it in the loss (0 is off)."""
    prox: Finite = UNSET
    """Coefficient of the KL to the last round's policy, which limits the step."""
    loss: str = UNSET
    """native: TRL's name; default: nll, sigmoid, kto, dapo. For dpo several joined by `+`, of equal weight."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Between policy and model, for native dpo."""

    score: Literal["ratio", "mean"] = UNSET
    target: Literal["win", "robust", "soft", "half", "reward", "advantage"] = UNSET
    link: Literal["logistic", "square", "hinge", "single", "softmax", "weighted"] | None = UNSET
    weight: Literal["sum", "mean", "others", "rank"] = UNSET
    anchor: Literal["none", "chosen", "chosen_mean", "greedy"] = UNSET
    """Pieces of a loss of sequences; see `losses`."""
    sampler: Literal["policy", "base"] = UNSET
    """Whose samples are learnt from."""
    with_: Literal["none", "gold", "greedy", "opponents", "guide"] = UNSET
    """Beside them (`--set with=`): the data's completions, the policy's greedy one, opponents that a judge compares
    with, or a guide that each sample starts or ends with.
    """
    judge: Literal["reward", "winrate", "opponents", "soft_value"] = UNSET
    """What counts: the reward; how often a sample beats the others of its group, or the opponents, with probability
    sigmoid(r - r'); the reward less the soft value of its group.
    """
    pairing: Literal["best_worst", "gold_own", "margin", "all", "ranked", "random_two", "disagree"] = UNSET
    reference: Literal["previous", "none", "extrapolated", "soup", "ema", "two_step"] = UNSET
    """What `prox` pulls to: the policy as the round began, or moved beyond it, or a moving average; "soup" replaces the
    base by an average with a second policy; "none" has no reference at all.
    """
    keep: Shares = UNSET
    """Shares of the last rounds' rows that are trained on, the newest first."""
    advantage: (
        Literal[
            "none", "best", "good", "mean_only", "leave_one_out", "group_std", "batch_std", "bundle", "length_factor",
            "weighted",
        ]
        | None
    ) = UNSET  # fmt: skip
    credit: Literal["tokens", "entropy_steps", "turns"] = UNSET
    """How a sample's advantage reaches its tokens: the same for all, or by step or turn (a line of the text)."""
    surrogate: (
        Literal[
            "plain", "nll", "dft", "clip", "nft", "critique", "mirror", "kl_cov", "clip_cov", "entropy_change",
            "entropy_smooth",
        ]
        | None
    ) = UNSET  # fmt: skip
    aggregate: Literal["token", "sequence", "constant", "sum", "prompt"] = UNSET
    level: Literal["token", "sequence"] = UNSET
    """Whose ratio a surrogate takes."""
    kl: Literal["k1", "k2", "k3", "reward"] = UNSET
    """Where `beta` acts for a policy gradient: an estimate in the loss, or log(pi / ref) taken off the reward."""
    schedule: Literal["uniform", "dynamic", "knapsack", "gain", "hints", "refine", "inpaint", "gap_split"] = UNSET
    filter: Literal["none", "best", "bw", "br", "pow"] = UNSET
    """Samples drawn again by these weights before they are learnt from."""
    drop_constant: bool = UNSET
    """Leave out groups whose rewards are all the same."""
    weigh_kl: bool = UNSET
    """Weigh each sample's KL by its group's accuracy."""
    fresh: bool = UNSET
    """New samples of `batch_size` prompts for every `updates` updates; else rounds of all prompts."""
    updates: Count = UNSET
    """On each set of fresh samples."""
    opponent: Share = UNSET
    """Share of the base in the mixture that opponents are drawn from; 0 is the last policy itself."""
    extrapolation: Finite = UNSET
    ema: Share = UNSET
    """Decay of the moving average, for reference "ema"."""
    soup: str | None = None
    """Folder of a second policy, for reference "soup"."""
    soup_share: Share = 0.5
    """Of the base in the soup."""
    roll_in: Literal["ppo++", "aggrevated"] = UNSET
    roll_in_share: Share = UNSET
    gain_width: Positive = UNSET
    gain_size: Positive = UNSET
    """Of the curriculum "gain": how many prompts it is wide, and how far it moves."""
    options: dict[str, Any] = UNSET
    """Options of pieces by name, such as clip_high; `--set clip_high=0.28` reaches them too."""

    lora_rank: Whole = UNSET
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
    """Updates (with rounds: of every round; with fresh samples: sets of them), in place of epochs."""
    batch_size: Count = 8
    """Rows, pairs or prompts for each update."""
    group_size: Annotated[int, Field(ge=2)] = UNSET
    """Samples for each prompt."""
    max_new_tokens: Count = 32
    """Of a sample."""
    temperature: Positive = 1.0
    """Of samples."""
    rounds: Count = UNSET
    seed: Seed = 0

    def __post_init__(self) -> None:
        known = list(METHODS)
        check(self.method in METHODS, "method", self.method, ", ".join(known) + meant(self.method, known, 0.6))
        preset = dict(self.preset.pieces)
        own = {f.name for f in fields(self)}
        self._fill({**_DEFAULTS, **{k: v for k, v in preset.items() if k in own}})
        self._fill({"driver": "native" if self.preset.native else "rows"})
        rate = self.preset.rate * (10 if self.lora_rank else 1)
        loss = self.preset.losses[0] if self.preset.losses else ""
        self._fill({"loss": loss, "learning_rate": rate, "lora_alpha": 2 * self.lora_rank or None})
        self._check_driver()
        given = dict(self.options or {})
        object.__setattr__(self, "options", self._optioned(preset, own, given))
        if self.driver == "native":
            self._check_losses()
        else:
            self._check_rows()
        two = self.method == "kto" and self.loss == "kto"
        check_whole("batch_size", self.batch_size, 2 if two else 1)

    def _fill(self, defaults: Mapping[str, Any]) -> None:
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def _optioned(self, preset: dict[str, Any], own: set[str], given: dict[str, Any]) -> dict[str, Any]:
        """Options of the chosen pieces: the method's, then the given ones, each as its piece annotates it."""
        known = {} if self.driver == "native" else options_of(self)
        mine = {k: v for k, v in preset.items() if k not in own and k in known}
        for name in given:
            allowed = ", ".join(known) or "none of these pieces"
            check(name in known, "setting of train_policy", name, allowed + meant(name, list(known), 0.5))
        return {name: taken(name, value, known[name]) for name, value in {**mine, **given}.items()}

    def _check_driver(self) -> None:
        if self.driver == "native":
            names = ", ".join(k for k, m in METHODS.items() if m.trainer)
            check(bool(self.preset.trainer), "driver", "native", f"rows for {self.method}; native has {names}")
            loop = self.schedule not in ("uniform",)
            check(
                not loop,
                "schedule",
                self.schedule,
                "uniform for TRL's trainer, whose groups are all alike; or driver=rows",
            )
            check(
                self.method == "grpo" or self.beta != 0 or self.method == "sft", "beta", self.beta, "a number above 0"
            )
        else:
            check(self.method != "kto", "driver", "rows", "native for kto")
            check(
                self.f_divergence == "reverse_kl", "f_divergence", self.f_divergence, "with driver=rows: f in its place"
            )

    def _check_losses(self) -> None:
        known, dpo = self.preset.losses, self.method == "dpo"
        joined = " (several joined by +)" if dpo else ""
        for part in self.losses:
            check(part in known, "loss", self.loss, f"for {self.method}: {', '.join(known)}{joined}")
        check(len(self.losses) == 1 or dpo, "loss", self.loss, f"one of {', '.join(known)}")
        if self.f_divergence != DIVERGENCES[0]:
            check(dpo, "f_divergence", self.f_divergence, f"{DIVERGENCES[0]} for {self.method}")
            fits = all(part in _DIFFERENCES for part in self.losses)
            check(fits, "loss", self.loss, f"with {self.f_divergence}: {', '.join(_DIFFERENCES)}")

    def _check_rows(self) -> None:
        """Refuse pieces that do not fit each other."""
        preset = self.preset.losses[0] if self.preset.losses else ""
        check(self.loss == preset, "loss", self.loss, "unset for driver=rows: link or surrogate in its place")
        check(bool(self.link or self.surrogate), "link", None, f"one of {', '.join(losses.LINKS)}, or a surrogate")
        if self.link and self.schedule != "gap_split":
            check(self.beta + self.prox > 0, "beta", self.beta, "a number above 0, or prox above 0")
            needs_beta = self.link in ("softmax", "weighted")
            check(not needs_beta or self.beta > 0, "beta", self.beta, f"a number above 0 for {self.link}")
            check(self.reference != "none" or self.prox == 0, "prox", self.prox, "0 for reference=none")
        f = self.options.get("f", "reverse_kl")
        if f != "reverse_kl":
            fits = self.link in losses.PAIR_LINKS and self.options.get("loser", 1.0) == 1.0
            check(fits, "f", f, "reverse_kl: the loss is not one of a difference, in which its constant cancels")
        moved = self.reference in ("extrapolated", "ema")
        check(not (moved and self.lora_rank), "lora_rank", self.lora_rank, f"0 for reference={self.reference}")
        soup = self.reference == "soup"
        check(
            soup == (self.soup is not None),
            "soup",
            self.soup,
            "a policy's folder" if soup else "unset without reference=soup",
        )
        check(self.advantage != "none" or self.surrogate != "nft", "advantage", "none", "a rule, for nft")
        judged = self.with_ == "opponents"
        check(judged == (self.judge == "opponents"), "judge", self.judge, "opponents, exactly where with=opponents")
        check(
            (self.with_ == "greedy") == (self.anchor == "greedy"),
            "anchor",
            self.anchor,
            "greedy, exactly where with=greedy",
        )
        check(self.schedule in (*SCHEDULES, "gap_split"), "schedule", self.schedule, ", ".join(SCHEDULES))

    # ---- what follows from the settings

    @property
    def preset(self) -> Method:
        return METHODS[self.method]

    @property
    def losses(self) -> list[str]:
        return self.loss.split("+")

    @property
    def online(self) -> bool:
        """Whether the policy's own samples are what it is always tuned on."""
        return not self.preset.columns

    @property
    def targets(self) -> str | list[str]:
        """Where LoRA goes, as PEFT takes it."""
        return "all-linear" if self.lora_targets == "all-linear" else self.lora_targets.replace(" ", "").split(",")

    @property
    def sequences(self) -> bool:
        """Whether the loss is one of sequences, in place of tokens."""
        return self.link is not None

    @property
    def warnings(self) -> list[str]:
        """What is allowed and seldom wise."""
        found = []
        if self.method == "spin" and self.prox < 0.5 and self.steps is None:
            found.append("spin with prox below 0.5 diverges where a round is fully optimised; steps caps it")
        if self.anchor == "greedy" and self.options.get("anchor_weight", 0.0) > 0.1:
            found.append("an anchor_weight above 0.1 outweighs the preferences: the loss is unbounded below")
        return found

    def recipe(self) -> dict[str, Any]:
        """The entries that matter for this method: those that differ from what no method asks for, and its own."""
        always = ("method", "driver", "lora_rank", "learning_rate", "epochs", "steps", "batch_size", "seed")
        lora = ("lora_alpha", "lora_targets") if self.lora_rank else ()
        drawn = ("group_size", "max_new_tokens", "temperature")
        native: dict[str, tuple[str, ...]] = {
            "sft": ("loss",),
            "dpo": ("loss", "beta", "f_divergence"),
            "kto": ("loss", "beta"),
            "grpo": ("loss", "beta", *drawn),
        }
        values = asdict(self)
        if self.driver == "native":
            return {k: v for k, v in values.items() if k in (*always, *lora, *native[self.method])}
        kept = (*always, *lora, *drawn, "rounds", "beta")
        plain = {
            **_DEFAULTS,
            "loss": None,
            "f_divergence": "reverse_kl",
            "soup": None,
            "soup_share": 0.5,
            "options": {},
        }
        idle = ("lora_alpha", "lora_targets")
        differs = {
            k for k, v in values.items() if k not in idle and k != "loss" and v != plain.get(k) and v is not None
        }
        return {k: v for k, v in values.items() if k in kept or k in differs}

    def total_steps(self, rows: int) -> int:
        """Updates of the weights for `rows` rows (of one round; with fresh samples, sets of them)."""
        return self.steps or self.epochs * -(-rows // self.batch_size)


_DEFAULTS: dict[str, Any] = {
    "beta": 0.1,
    "prox": 0.0,
    "score": "ratio",
    "target": "win",
    "weight": "sum",
    "anchor": "none",
    "sampler": "policy",
    "with_": "none",
    "judge": "reward",
    "pairing": "best_worst",
    "reference": "previous",
    "keep": (1.0,),
    "advantage": "none",
    "credit": "tokens",
    "aggregate": "token",
    "level": "token",
    "kl": "k3",
    "schedule": "uniform",
    "filter": "none",
    "drop_constant": False,
    "weigh_kl": False,
    "fresh": False,
    "updates": 1,
    "opponent": 0.5,
    "extrapolation": 0.3,
    "ema": 0.9,
    "roll_in": "ppo++",
    "roll_in_share": 0.8,
    "gain_width": 1000.0,
    "gain_size": 500.0,
    "lora_rank": 16,
    "group_size": 8,
    "rounds": 1,
}
"""What holds where neither a method nor a user says otherwise."""


def policy_settings(base: PolicySettings | None = None, **given: Any) -> PolicySettings:
    """`base`, or the defaults of the method, with what is given in its place: fields, and options of pieces by name.
    None leaves a default; `with` is the field `with_`.
    """
    own = [f.name for f in fields(PolicySettings)]
    values = {("with_" if name == "with" else name): value for name, value in given.items() if value is not None}
    mine = {name: value for name, value in values.items() if name in own}
    options = {name: value for name, value in values.items() if name not in own}
    if base is not None:
        kept = {name: getattr(base, name) for name in own if name not in _derived(mine)}
        mine = {**kept, **mine}
    check("method" in mine, "method", None, ", ".join(METHODS))
    mine["options"] = {**(mine.get("options") or {}), **options}
    try:
        return PolicySettings(**mine)
    except InputError as error:
        if error.field != "setting of train_policy":
            raise
        close = meant(str(error.given), [*own, *str(error.allowed).split(", ")], 0.6)
        raise InputError(error.field, error.given, f"{', '.join(own)}; {error.allowed}{close}") from None


def _derived(changed: Mapping[str, Any]) -> set[str]:
    """Fields that other fields fill in, and that have to be filled in again where those change."""
    found = {"options"} if "driver" in changed else set()
    if {"method", "lora_rank"} & set(changed):
        found |= {"learning_rate", "lora_alpha", "loss", "driver", "options"}
    return found | ({"loss"} if changed.get("driver") == "rows" else set())
