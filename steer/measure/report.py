"""Reports of an edit: reward, drift, fluency and diversity as the strength grows, and where texts break.

Letters: `B` prompts, `N` texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer import artifacts
from steer.core import Edit, Reward, Samples, check
from steer.core.notebook import text_html
from steer.edits import Artifact, as_edit
from steer.files import as_json, write_text
from steer.measure.tables import FEW, aligned, few, number
from steer.methods.prompt import SystemPrompt
from steer.methods.vector import SteeringVector
from steer.model import as_prompts
from steer.progress import ticking
from steer.rewards import as_reward, distinct_n

__all__ = ["Break", "Report", "ReportRow", "default_strengths", "evaluate", "strength_unit"]


PERPLEXITY_LIMIT = 1.5
"""Steering breaks where perplexity is this many times the unsteered one, by its whole interval ..."""
DIVERSITY_LIMIT = 0.5
"""... or distinct-2 falls below this share of the unsteered one."""


@dataclass(frozen=True)
class ReportRow:
    """What one setting did. `kind` is "unsteered", "steered", "random" or "system"."""

    kind: str
    strength: float | None
    reward: float
    reward_low: float
    reward_high: float
    """95% interval of the mean reward, by bootstrap over prompts."""
    kl: float | None
    """Mean KL to the unsteered model, nats a text."""
    kl_per_token: float | None
    perplexity: float
    """Of the texts under the unsteered model."""
    perplexity_ratio: float
    ratio_low: float
    ratio_high: float
    """95% interval of the ratio, by bootstrap over prompts."""
    distinct_1: float
    distinct_2: float
    distinct_3: float
    tokens: float
    """Mean length."""
    kl_low: float | None = None
    kl_high: float | None = None
    """95% interval of `kl_per_token`, by bootstrap over prompts."""
    distinct_low: float | None = None
    distinct_high: float | None = None
    """95% interval of `distinct_2`: a jackknife that leaves out one prompt at a time."""
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Break:
    """The first strength on one side at which the texts fall apart."""

    strength: float
    reason: str


@dataclass(frozen=True)
class Report:
    """A sweep over strengths."""

    model: str
    artifact: str
    reward: str
    settings: dict[str, Any]
    rows: list[ReportRow]
    breaks: list[Break]

    def of(self, kind: str) -> list[ReportRow]:
        """Rows of one kind in order of strength; the unsteered row belongs to both sweeps."""
        kinds = (kind, "unsteered") if kind in ("steered", "random") else (kind,)
        found = [row for row in self.rows if row.kind in kinds]
        return sorted(found, key=lambda row: row.strength or 0.0) if any(r.kind == kind for r in found) else []

    @property
    def verdict(self) -> str:
        """Where steering breaks, in words."""
        said = "; ".join(f"breaks at {b.strength:+g}: {b.reason}" for b in self.breaks)
        warning = few(int(self.settings.get("prompts", FEW)))
        return (said or "no strength in this sweep breaks the texts") + (f" ({warning})" if warning else "")

    def table(self) -> str:
        """Plain text for a terminal."""
        head = [
            "",
            "strength",
            "reward",
            "95% interval",
            "KL/text",
            "KL/token",
            "perplexity",
            "distinct-2",
            "tokens",
            "",
        ]
        rows, broken = [head], {b.strength for b in self.breaks}
        for row in [*self.of("steered"), *(r for r in self.of("random") if r.kind == "random"), *self.of("system")]:
            rows.append(
                [
                    row.kind,
                    "" if row.strength is None else f"{row.strength:+g}" if row.strength else "0",
                    number(row.reward),
                    f"{number(row.reward_low)} .. {number(row.reward_high)}",
                    _cell(row.kl),
                    _cell(row.kl_per_token),
                    f"{row.perplexity:.2f}",
                    f"{row.distinct_2:.3f}",
                    f"{row.tokens:.1f}",
                    "< breaks" if row.kind == "steered" and row.strength in broken else "",
                ]
            )
        title = f"{self.artifact} on {self.model}, reward {self.reward}"
        return f"{title}\n\n{aligned(rows)}\n\n{self.verdict}"

    def __repr__(self) -> str:
        strengths = [row.strength for row in self.of("steered")]
        return f"Report({self.artifact} on {self.model}, {self.reward}, {len(strengths)} strengths; {self.verdict})"

    def _repr_html_(self) -> str:
        return text_html(self.table())

    def records(self) -> list[dict[str, Any]]:
        """A flat row for each setting."""
        return [{k: v for k, v in asdict(row).items() if k != "examples"} for row in self.rows]

    def texts(self) -> list[dict[str, Any]]:
        """The examples of every setting."""
        return [
            {"setting": row.kind if row.strength is None else f"{row.kind} {row.strength:+g}", **example}
            for row in self.rows
            for example in row.examples
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "verdict": self.verdict}

    def write(self, folder: Path | str) -> None:
        """Write report.json into `folder` in one step; `steer.pictures.charts.draw_report` draws it."""
        write_text(Path(folder) / "report.json", as_json(self.to_dict()) + "\n")

    def keep(self, path: Path | str) -> None:
        """Write the sweep into the card of the artifact at `path`, in one step: `metrics["sweep"]` is a list of
        `[strength, perplexity ratio, whether the texts broke]`. Raises `InputError` where `path` is no artifact.
        """
        tensors, card = artifacts.load(path)
        broken = {b.strength for b in self.breaks}
        rows = [row for row in self.of("steered") if row.strength is not None]
        sweep = [[row.strength, round(row.perplexity_ratio, 4), row.strength in broken] for row in rows]
        artifacts.save(path, tensors, replace(card, metrics={**card.metrics, "sweep": sweep}))


def _cell(value: float | None) -> str:
    return "-" if value is None else number(value)


# ------------------------------------------------------------------------------------------------------------ sweep


def default_strengths(edit: Edit) -> list[float]:
    """Strengths worth looking at for this kind of edit."""
    if not isinstance(edit, SteeringVector):
        return [0.0, 0.5, 1.0, 1.5, 2.0]
    if edit.operator == "rotate":
        return [-90.0, -45.0, 0.0, 45.0, 90.0]
    if edit.operator == "ablate":
        return [0.0, 0.5, 1.0]
    top = 0.3 if edit.unit == "norm" else 3.0
    return [round(top * x / 3, 4) for x in (-3, -2, -1, 0, 1, 2, 3)]


def evaluate(
    model: Any,
    prompts: Sequence[Any],
    edit: Edit | Artifact | str,
    *,
    strengths: Sequence[float] | None = None,
    reward: Reward | str = "sentiment",
    seed: int = 0,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    beta: float = 1.0,
    n: int = 1,
    system: str | None = None,
    control: bool = True,
    progress: bool = False,
) -> Report:
    """Generate at every strength and measure.

    Args:
        model: a language model from `steer.load`.
        prompts: texts or chats.
        edit: a steering vector, controller or value guidance, an artifact or a file; its own strength is replaced.
        strengths: default: by kind of edit. 0, the unsteered model, is always included.
        reward: what is measured.
        beta: KL coefficient, for value guidance that has none of its own.
        n: texts for each prompt.
        system: also measure this system message in place of the edit.
        control: for steering vectors, also sweep random directions of the same norm: one on every other prompt, a
            second one on the rest.
        progress: show a bar on standard error.

    Raises:
        InputError: an edit without a strength, or no prompts.
    """
    prompts = as_prompts(prompts)
    edit = as_edit(edit, model, "edit")
    has_strength = is_dataclass(edit) and any(f.name == "strength" for f in fields(edit))
    check(has_strength, "edit", type(edit).__name__, "an edit with a strength")
    scored = as_reward(reward)
    assert scored is not None
    decoding = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    sweep = _Sweep(model, list(prompts), scored.bind(model), {**decoding, "seed": seed, "beta": beta, "n": n})
    chosen = sorted({float(s) for s in (default_strengths(edit) if strengths is None else strengths)} - {0.0})
    settings = _settings(edit, chosen, system, control, len(prompts))
    for _, _, edits in settings:
        sweep.validate(edits)
    base = sweep.row("unsteered", 0.0, None)
    rows = [base]
    with ticking(progress, "evaluating", len(settings)) as tick:
        for kind, strength, edits in settings:
            rows.append(sweep.row(kind, strength, edits, base))
            tick(1)
    facts = {**sweep.settings, "prompts": len(prompts), "system": system, "unit": strength_unit(edit)}
    return Report(model.name, type(edit).__name__, str(scored), facts, rows, _breaks(rows))


def strength_unit(edit: Any) -> str:
    """What strength 1 means, where that is not just one times the artifact."""
    operator = getattr(edit, "operator", "add")
    if operator == "rotate":
        return "degrees"
    normed = getattr(edit, "unit", "") == "norm" and operator in ("add", "clamp") and isinstance(edit, SteeringVector)
    return "residual norms" if normed else ""


def _settings(
    edit: Any, strengths: list[float], system: str | None, control: bool, count: int
) -> list[tuple[str, float | None, Any]]:
    made: list[tuple[str, float | None, Any]] = [("steered", s, [replace(edit, strength=s)]) for s in strengths]
    if control and isinstance(edit, SteeringVector):
        chance = [edit.random(seed) for seed in (1, 2)]
        for s in strengths:
            pair = [replace(vector, strength=s) for vector in chance]
            made.append(("random", s, [pair[b % 2] for b in range(count)] if count > 1 else pair[:1]))
    if system is not None:
        made.append(("system", None, [SystemPrompt(system)]))
    return made


@dataclass(frozen=True)
class _Sweep:
    model: Any
    prompts: list[Any]
    reward: Reward
    settings: dict[str, Any]
    unsteered: list[Tensor] = field(default_factory=list)
    """Surprise and tokens of every prompt `[B, 2]` without the edit, once they are there."""

    def validate(self, edits: list[Edit]) -> None:
        """Refuse what does not fit the model before anything is generated."""
        process = self.model.process()
        for edit in {id(e): e for e in edits}.values():
            process.edited(edit)

    def row(self, kind: str, strength: float | None, edits: Any, base: ReportRow | None = None) -> ReportRow:
        """Generate under `edits` and measure."""
        # One edit for each prompt is told from edits for all of them by being wrapped.
        each = [[e] for e in edits] if edits and len(edits) == len(self.prompts) else edits or ()
        samples = self.model.generate(self.prompts, edits=each, reward=self.reward, **self.settings)
        total, tokens = self.model.log_likelihood(replace(samples, prompts=self.prompts))
        perplexity = math.exp(min(-float(total.sum()) / max(float(tokens.sum()), 1.0), 700.0))
        low, high = _interval(_by_prompt(samples))
        surprise = torch.stack([-total, tokens])
        fluency = torch.stack([surprise[:, samples.group == b].sum(1) for b in range(len(samples.prompts))])
        if base is None:
            self.unsteered.append(fluency)
        ratio_low, ratio_high = _ratio_interval(fluency, self.unsteered[0])
        texts, kl = samples.texts, None if kind == "unsteered" else samples.kl
        drift = None if kl is None else _per_token(kl, tokens, samples)
        least, most = _jackknife([[texts[i] for i in rows] for rows in _rows_by_prompt(samples)])
        return ReportRow(
            kind=kind,
            strength=strength,
            reward=float(samples.reward.mean()),
            reward_low=low,
            reward_high=high,
            kl=0.0 if kind == "unsteered" else None if kl is None else float(kl.mean()),
            kl_per_token=0.0 if kind == "unsteered" else None if kl is None else float(kl.sum() / tokens.sum()),
            perplexity=perplexity,
            perplexity_ratio=perplexity / base.perplexity if base else 1.0,
            ratio_low=ratio_low,
            ratio_high=ratio_high,
            distinct_1=distinct_n(texts, 1),
            distinct_2=distinct_n(texts, 2),
            distinct_3=distinct_n(texts, 3),
            tokens=float(tokens.mean()),
            kl_low=None if drift is None else drift[0],
            kl_high=None if drift is None else drift[1],
            distinct_low=least,
            distinct_high=most,
            examples=_examples(samples),
        )


def _by_prompt(samples: Samples) -> Tensor:
    """Mean reward of every prompt `[B]`."""
    assert samples.reward is not None
    return torch.stack([samples.reward[samples.group == b].mean() for b in range(len(samples.prompts))])


def _rows_by_prompt(samples: Samples) -> list[list[int]]:
    return [(samples.group == b).nonzero().flatten().tolist() for b in range(len(samples.prompts))]


def _per_token(kl: Tensor, tokens: Tensor, samples: Samples, draws: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of KL a token, over prompts."""
    rows = _rows_by_prompt(samples)
    sums = torch.stack([torch.tensor([float(x[r].sum()) for r in rows], dtype=torch.float64) for x in (kl, tokens)])
    index = torch.randint(len(rows), (draws, len(rows)), generator=torch.Generator().manual_seed(0))
    total, count = sums[:, index].sum(-1)
    low, high = torch.quantile(total / count.clamp_min(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _jackknife(texts: Sequence[Sequence[str]]) -> tuple[float | None, float | None]:
    """95% interval of distinct-2 of all texts, from leaving out those of one prompt at a time; None for one prompt. A
    bootstrap would draw prompts twice, and find its own repetitions.
    """
    if len(texts) < 2:
        return None, None
    whole = distinct_n([text for some in texts for text in some], 2)
    left = [distinct_n([t for j, some in enumerate(texts) if j != i for t in some], 2) for i in range(len(texts))]
    mean = sum(left) / len(left)
    half = 1.96 * math.sqrt((len(left) - 1) / len(left) * sum((x - mean) ** 2 for x in left))
    return max(0.0, whole - half), min(1.0, whole + half)


def _interval(values: Tensor, draws: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of the mean of `[B]`."""
    index = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(values[index].mean(1), torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def _ratio_interval(mine: Tensor, base: Tensor, draws: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of the perplexity ratio, over prompts that both share: surprise and tokens `[B, 2]`."""
    index = torch.randint(len(mine), (draws, len(mine)), generator=torch.Generator().manual_seed(0))
    (a, n), (b, m) = (x.double()[index].sum(1).unbind(-1) for x in (mine, base))
    ratio = (a / n.clamp_min(1) - b / m.clamp_min(1)).clamp(-700, 700).exp()
    low, high = torch.quantile(ratio, torch.tensor([0.025, 0.975], dtype=ratio.dtype)).tolist()
    return low, high


def _examples(samples: Samples, count: int = 2) -> list[dict[str, Any]]:
    first = [int((samples.group == b).nonzero()[0]) for b in range(min(count, len(samples.prompts)))]
    assert samples.reward is not None
    return [
        {"prompt": samples.prompts[b], "text": samples.texts[i], "reward": float(samples.reward[i])}
        for b, i in enumerate(first)
    ]


def _breaks(rows: list[ReportRow]) -> list[Break]:
    """The first strength on each side that is too much."""
    base = rows[0]
    steered = sorted((r for r in rows if r.kind == "steered" and r.strength), key=lambda r: abs(r.strength or 0.0))
    found = []
    for side in (-1, 1):
        for row in steered:
            assert row.strength is not None
            reason = _broken(row, base)
            if row.strength * side > 0 and reason:
                found.append(Break(row.strength, reason))
                break
    return found


def _broken(row: ReportRow, base: ReportRow) -> str | None:
    ratio = row.perplexity_ratio
    if row.ratio_low > PERPLEXITY_LIMIT:
        return f"perplexity {ratio:,.{1 if ratio < 10 else 0}f} x unsteered"
    if row.distinct_2 < DIVERSITY_LIMIT * base.distinct_2:
        return f"distinct-2 {row.distinct_2:.2f}, unsteered {base.distinct_2:.2f}"
    return None
