"""The registry of training objectives: a paper is one row that names its pieces, and one line of defaults.

Pieces are names in the tables of `losses`, `rounds`, `advantages`, `surrogates` and `schedules`; everything in a row is
a default of `PolicySettings` and can be set otherwise, so that new combinations need no code. Numbers are those of the
papers or of their released code; learning rates are steer's own, for adapters of small models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

__all__ = ["METHODS", "NUMBERED", "STUDIES", "Method", "entry", "table"]

PAIRS, COMPLETIONS, LABELS = (
    ("prompt", "chosen", "rejected"),
    ("prompt", "completion"),
    ("prompt", "completion", "label"),
)


@dataclass(frozen=True)
class Method:
    """One way to tune.

    Attributes:
        paper: its short title, with the arXiv number where it has one.
        pieces: defaults of `PolicySettings`, the options of pieces among them.
        columns: of the rows that it learns from where it does not sample; () for a method that always samples.
        trainer: TRL's, where that has it.
        losses: TRL's losses, the default first.
        beside: columns that it needs beside the prompt although it samples.
        rate: learning rate where all weights are tuned; ten times as much for LoRA.
        judged: whether it needs a reward where it samples.
        note: what a user should know.
    """

    paper: str
    pieces: Mapping[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    trainer: str = ""
    losses: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    rate: float = 2e-6
    judged: bool = True
    note: str = ""

    @property
    def native(self) -> bool:
        """Whether TRL's trainer is the default."""
        return bool(self.trainer) and self.pieces.get("driver", "native") == "native"


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
_GRPO = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo")


def _pairs(paper: str, *, note: str = "", columns: tuple[str, ...] = PAIRS, **pieces: Any) -> Method:
    """A loss of pairs, of the data's or, with a reward, of own samples; one long fit."""
    defaults = {"link": "logistic", "sampler": "policy", "pairing": "best_worst"}
    return Method(paper, {**defaults, **pieces}, columns, rate=5e-6, note=note)


def _iterated(
    paper: str, *, note: str = "", beside: tuple[str, ...] = (), judged: bool = True, **pieces: Any
) -> Method:
    """A loss of pairs of own samples, in rounds."""
    defaults = {"link": "logistic", "sampler": "policy", "pairing": "best_worst", "rounds": 3, "beta": 0.0}
    return Method(paper, {**defaults, **pieces}, beside=beside, rate=5e-6, judged=judged, note=note)


def _gradient(paper: str, *, note: str = "", beside: tuple[str, ...] = (), **pieces: Any) -> Method:
    """A policy gradient: fresh samples for each update."""
    defaults = {"surrogate": "clip", "sampler": "policy", "fresh": True, "beta": 0.0, "advantage": "group_std"}
    return Method(paper, {**defaults, **pieces}, beside=beside, note=note)


METHODS: dict[str, Method] = {
    "sft": Method("Supervised fine-tuning", {"surrogate": "nll"}, COMPLETIONS, "SFT", _SFT, rate=2e-5),
    "kto": Method(
        "Kahneman-Tversky optimisation, 2402.01306", {}, LABELS, "KTO", ("kto", "apo_zero_unpaired"), rate=5e-6
    ),
    "grpo": Method(
        "Group-relative policy optimisation, 2402.03300",
        {"surrogate": "clip", "sampler": "policy", "fresh": True, "advantage": "group_std"},
        trainer="GRPO",
        losses=_GRPO,
    ),
    "raft": Method(
        "Reward-ranked fine-tuning, 2304.06767",
        {"surrogate": "nll", "advantage": "best", "sampler": "policy", "beta": 0.0},
        rate=2e-5,
    ),
    # 1-23: preferences
    "dpo": Method(
        "Direct preference optimisation, 2305.18290",
        {"link": "logistic", "sampler": "policy", "pairing": "best_worst"},
        PAIRS,
        "DPO",
        _DPO,
        rate=5e-6,
    ),
    "f_dpo": _pairs("Beyond reverse KL (f-DPO), 2309.16240", f="js_divergence", note="f: any of losses.DIVERGENCES"),
    "fdpg": _gradient(
        "Aligning by f-divergence minimisation (f-DPG), 2302.08215",
        surrogate=None,
        advantage=None,
        link="weighted",
        beta=0.1,
        divergence="js",
        max_weight=10.0,
        pairing="all",
    ),
    "lipo": _pairs(
        "LiPO: listwise preferences, 2402.01878",
        columns=("prompt", "completions", "scores"),
        weight="rank",
        pairing="ranked",
        sampler="base",
        beta=0.05,
    ),
    "spin": _iterated(
        "Self-play fine-tuning (SPIN), 2401.01335",
        beside=("completion",),
        judged=False,
        with_="gold",
        group_size=2,
        pairing="gold_own",
        prox=0.1,
        keep=(1.0, 1.0),
        note="fully optimised rounds diverge for prox below 0.5",
    ),
    "dno": _iterated(
        "Direct Nash optimisation, 2404.03715",
        target="soft",
        judge="winrate",
        pairing="ranked",
        prox=0.1,
        keep=(1.0, 0.3, 0.15),
        note="the paper's practice: target=win, pairing=margin and a judge of 1 to 6",
    ),
    "nash_md": _gradient(
        "Nash learning from human feedback (Nash-MD), 2312.00886",
        surrogate="plain",
        advantage="leave_one_out",
        judge="opponents",
        with_="opponents",
        opponent=0.5,
        kl="reward",
        beta=0.1,
        note="with constant steps its fixed point is near the Nash policy, not at it",
    ),
    "nash_mp": _iterated(
        "Nash mirror prox",
        link="square",
        target="reward",
        judge="opponents",
        with_="opponents",
        opponent=0.0,
        pairing="all",
        weight="others",
        reference="two_step",
        beta=0.1,
        prox=0.5,
        rounds=4,
        note="a practical form of ours: two regressions a step, both from the last policy",
    ),
    "inpo": _iterated(
        "Iterative Nash policy optimisation, 2407.00617",
        link="square",
        target="half",
        beta=0.0025,
        prox=0.005,
    ),
    "p3o": _gradient(
        "Pairwise PPO, 2310.00212",
        advantage="leave_one_out",
        group_size=2,
        kl="reward",
        beta=0.05,
        level="sequence",
        aggregate="sum",
    ),
    "rpo": _pairs(
        "RPO: SFT loss as adversarial regulariser, 2405.16436",
        anchor="chosen",
        anchor_weight=-0.005,
        beta=0.05,
        note="the average form is dpo with loss=sigmoid+sft",
    ),
    "apo_momentum": _iterated(
        "Accelerated preference optimisation, 2410.06293",
        prox=0.1,
        reference="extrapolated",
        extrapolation=0.3,
        lora_rank=0,
        note="moves weights beyond the last round's, so all weights are tuned",
    ),
    "mixed": _gradient(
        "Mixed preference optimisation, 2403.19443",
        schedule="gap_split",
        link="logistic",
        pairing="best_worst",
        advantage="leave_one_out",
        kl="reward",
        beta=0.1,
        aggregate="sum",
        level="sequence",
        note="easy pairs by DPO, prompts of the hard ones by RLOO from there",
    ),
    "selm": _iterated(
        "Self-exploring language models, 2405.19332",
        with_="greedy",
        anchor="greedy",
        anchor_weight=0.001,
        prox=0.01,
        note="a large anchor_weight is unbounded below",
    ),
    "cpl": _pairs("Contrastive preference learning, 2310.13639", reference="none", loser=0.5),
    "copg": _pairs(
        "Contrastive policy gradient, 2406.19185",
        columns=("prompt", "completions", "scores"),
        link="square",
        target="reward",
        scale="linear",
        weight="others",
        pairing="all",
    ),
    "brain": _pairs(
        "BRAIn: Bayesian reward-conditioned amortised inference, 2402.02479",
        columns=("prompt", "completions", "scores"),
        link="softmax",
        pairing="all",
    ),
    "meet": Method(
        "Learning from mistakes via control (MEET)",
        {"surrogate": "nll", "advantage": "good", "sampler": "base", "beta": 0.0},
        rate=2e-5,
        note="the good control alone, by soft labels: its optimum is ref sigmoid(r) / Z",
    ),
    "salsa": _gradient(
        "SALSA: soup-based alignment, 2411.01798",
        advantage="leave_one_out",
        kl="reward",
        beta=0.05,
        level="sequence",
        aggregate="sum",
        reference="soup",
        note="soup: the folder of a second policy",
    ),
    "rlgf": _gradient(
        "Learning to generate better than your LLM (RLGF), 2306.11816",
        with_="guide",
        roll_in="ppo++",
        roll_in_share=0.8,
        advantage="leave_one_out",
        beta=0.001,
        note="a group's mean in place of the paper's value head; the guide is the base",
    ),
    "refuel": _iterated(
        "REFUEL (REBEL for one turn), 2410.04612",
        link="square",
        target="reward",
        pairing="random_two",
        prox=1.0,
        note="the last turn of a conversation; prox is 1 / eta",
    ),
    "step_advantage": _pairs(
        "Direct advantage policy optimisation, 2412.18279",
        columns=("prompt", "completions", "scores"),
        link="single",
        target="advantage",
        judge="soft_value",
        sampler="base",
        pairing="all",
        note="the whole answer is one step; its value is the soft value over the group",
    ),
    "filtered": _gradient("Policy filtration (PF-PPO), 2409.06957", filter="bw"),
    # 27-46: verifiable rewards
    "multi_objective": _gradient(
        "Multi-objective GRPO (safety)", advantage="weighted", note="the terms of the reward are the objectives"
    ),
    "nft": _gradient("Negative-aware fine-tuning", surrogate="nft", advantage="mean_only", drop_constant=True),
    "entropy_change": _gradient("STEER: token entropy change", surrogate="entropy_change"),
    "clip_cov": _gradient("Clip-Cov, 2505.22617", surrogate="clip_cov"),
    "kl_cov": _gradient("KL-Cov, 2505.22617", surrogate="kl_cov"),
    "entropy_smooth": _gradient(
        "EPO: entropy-regularised policy optimisation", surrogate="entropy_smooth", beta=0.01, aggregate="sequence"
    ),
    "entropy_modulated": _gradient(
        "EMPG: entropy-modulated policy gradients", credit="entropy_steps", note="a step is a line"
    ),
    "risk": _gradient("RiskPO: risk measures", advantage="bundle"),
    "knapsack": _gradient("Knapsack RL", schedule="knapsack", aggregate="prompt"),
    "gain": _gradient("GAIN-RL: angle signals", schedule="gain", gain_width=8.0, gain_size=4.0),
    "hints": _gradient("GHPO: hints on failure", beside=("solution",), schedule="hints"),
    "asymmetric": _gradient(
        "Asymmetric policy optimisation", advantage="length_factor", weigh_kl=True, beta=0.001, aggregate="sequence"
    ),
    "critique": _gradient(
        "Critique-GRPO",
        surrogate="critique",
        advantage="mean_only",
        schedule="refine",
        aggregate="constant",
    ),
    "lite_ppo": _gradient("Tricks or traps (Lite PPO), 2508.08221", advantage="batch_std"),
    "vision_boxes": _gradient("Vision-R1", beta=0.001, group_size=4, note="with the reward vision_boxes"),
    "tool_call": _gradient("ToolRL, 2504.13958", beta=0.001, group_size=4, note="with the reward tool_call"),
    "info_gain": _gradient(
        "IGPO: information gain", beside=("answer",), credit="turns", beta=0.001, note="a turn is a line"
    ),
    "inpaint": _gradient(
        "IGPO: inpainting for masked diffusion models",
        beside=("solution",),
        schedule="inpaint",
        advantage="mean_only",
        level="sequence",
    ),
    "judge": _gradient(
        "Creative writing by a judge", beta=0.001, group_size=4, note="with a judge or a reward model as reward"
    ),
    "mirror": _gradient(
        "Mirror descent policy optimisation, 2005.09814", surrogate="mirror", advantage="mean_only", updates=5
    ),
    "dapo": _gradient("DAPO, 2503.14476", clip_high=0.28, dual=10.0, schedule="dynamic"),
}
"""By the name that `--method` takes."""

STUDIES: dict[str, str] = {
    "on_policy_study": "Suboptimal, on-policy data: the report's on_policy, chosen, rejected and kl",
    "ranking_study": "Preference learning does not learn rankings: the report's ranking accuracy",
    "randomisation": "RL from preferences via randomisation: pairing=disagree",
}
"""Papers without an objective: what of them there is."""

NUMBERED: tuple[tuple[str, ...], ...] = (
    ("dpo",),
    ("f_dpo",),
    ("fdpg",),
    ("lipo",),
    ("spin",),
    ("dno",),
    ("nash_md",),
    ("nash_mp",),
    ("inpo",),
    ("p3o",),
    ("rpo",),
    ("apo_momentum",),
    ("mixed",),
    ("selm",),
    ("cpl",),
    ("copg",),
    ("brain",),
    ("meet",),
    ("salsa",),
    ("rlgf",),
    ("refuel",),
    ("step_advantage",),
    ("filtered",),
    ("on_policy_study",),
    ("ranking_study",),
    ("randomisation",),
    ("multi_objective",),
    ("nft",),
    ("entropy_change",),
    ("clip_cov", "kl_cov"),
    ("entropy_smooth",),
    ("entropy_modulated",),
    ("risk",),
    ("knapsack",),
    ("gain",),
    ("hints",),
    ("asymmetric",),
    ("critique",),
    ("lite_ppo",),
    ("vision_boxes",),
    ("tool_call",),
    ("info_gain",),
    ("inpaint",),
    ("judge",),
    ("mirror",),
    ("dapo",),
)
"""The 46 papers of the catalogue, in its order, by their names here."""


def needs(method: Method) -> str:
    """The data that a method learns from, in words."""
    fixed = " ".join(method.columns)
    drawn = " ".join(("prompt", *method.beside, *(("+ reward",) if method.judged else ())))
    return fixed if method.native and fixed else f"{fixed} or {drawn}" if fixed else drawn


def entry(name: str) -> str:
    """A method's name, paper, driver, data, pieces and defaults, as lines."""
    method = METHODS[name]
    driver = f"native ({method.trainer})" if method.native else "rows"
    pieces = [f"{key.rstrip('_')}={_shown(value)}" for key, value in method.pieces.items() if value is not None]
    told = " ".join(pieces if not method.native else [f"loss={'|'.join(method.losses)}"])
    lines = [f"{driver}; data: {needs(method)}", told, *([method.note] if method.note else [])]
    wrapped = [f"{'':18}{part}" for line in lines for part in wrap(line, 100, break_on_hyphens=False)]
    return "\n".join([f"{name:18}{method.paper}", *wrapped])


def table() -> str:
    """What `steer train policy --list` prints: every method's entry, and papers that bring no objective."""
    papers = [f"{name:18}{about}" for name, about in STUDIES.items()]
    return "\n".join([*map(entry, METHODS), "", "Papers without an objective:", *papers])


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
