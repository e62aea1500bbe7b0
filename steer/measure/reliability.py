"""Reliability of an edit: how evenly it moves a choice between two answers, which prompts it steers the wrong way,
and what else it moves.

The propensity of a prompt at strength s is `log p(wanted) - log p(other)`, each of the whole answer; its slope over the
strengths, by least squares, is the prompt's steerability, and a prompt whose slope is below 0 is steered the wrong way
(Tan et al. 2024, 2407.12404). Effectiveness is the mean over target sets of `(y_s - y) / (1 - y)`, with y the accuracy,
and entanglement the root mean square of `y_s - y` over the other sets (Siu et al. 2025, 2509.13450).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.core import Prompt, check
from steer.files import as_json, write_text
from steer.measure.distances import interval
from steer.measure.rankings import wilson
from steer.measure.tables import aligned, few, number, ranged
from steer.progress import ticking

__all__ = [
    "Choice",
    "Reliability",
    "Setting",
    "effectiveness",
    "entanglement",
    "measure_reliability",
    "slopes",
    "spearman",
]


@dataclass(frozen=True)
class Choice:
    """A question with the wanted answer and others."""

    prompt: Prompt
    wanted: str
    others: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """One strength, on all sets."""

    strength: float
    propensity: float
    propensity_half: float
    """Mean over the target's prompts, and half of its 95% interval."""
    accuracy: dict[str, float]
    """Share of prompts whose wanted answer is the likeliest, by set."""
    effectiveness: float
    entanglement: float | None
    """None without other sets."""


@dataclass
class Reliability:
    """What was measured."""

    settings: dict[str, Any]
    strengths: list[Setting] = field(default_factory=list)
    slopes: list[float] = field(default_factory=list)
    """Of each prompt of the target sets."""
    monotone: list[float] = field(default_factory=list)
    """Spearman's correlation of strength and propensity, of each prompt."""

    @property
    def wrong_way(self) -> float:
        """Share of prompts whose slope is below 0."""
        return sum(s < 0 for s in self.slopes) / len(self.slopes)

    def summary(self) -> str:
        """Slope, spread and the share that is steered the wrong way, in words."""
        n, (mean, half) = len(self.slopes), interval(self.slopes)
        low, high = wilson(self.wrong_way, n)
        spread = torch.tensor(self.slopes).std().item() if n > 1 else math.nan
        return (
            f"slope {ranged(mean, half)} nats a unit of strength (spread over prompts {number(spread)}); steered the "
            f"wrong way: {self.wrong_way:.1%} of {n} prompts ({low:.1%} .. {high:.1%}); "
            f"Spearman {number(sum(self.monotone) / n)}"
        )

    def span(self, setting: Setting, name: str) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy on a set."""
        return wilson(setting.accuracy[name], self.settings["prompts"][name])

    def table(self) -> str:
        """Plain text; accuracies with their 95% intervals."""
        names = list(self.strengths[0].accuracy)
        rows = [["strength", "propensity", "effectiveness", "entanglement", *names]]
        for s in self.strengths:
            beside = "-" if s.entanglement is None else number(s.entanglement)
            cells = [f"{s.strength:+g}", ranged(s.propensity, s.propensity_half), number(s.effectiveness), beside]
            for name in names:
                low, high = self.span(s, name)
                cells.append(f"{s.accuracy[name]:.1%} ({low:.1%} .. {high:.1%})")
            rows.append(cells)
        return "\n".join(filter(None, [aligned(rows), self.summary(), few(len(self.slopes))]))

    def records(self) -> list[dict[str, Any]]:
        """A flat row for each strength."""
        rows = []
        for s in self.strengths:
            row = {k: v for k, v in asdict(s).items() if k != "accuracy"}
            rows.append(row | {f"accuracy_{name}": share for name, share in s.accuracy.items()})
        return rows

    def write(self, folder: Path | str) -> None:
        """Write reliability.json into `folder` in one step."""
        found = {**asdict(self), "wrong_way": self.wrong_way, "summary": self.summary()}
        write_text(Path(folder) / "reliability.json", as_json(found) + "\n")


def slopes(strengths: Sequence[float], propensities: Tensor) -> Tensor:
    """Least-squares slope of each row of `propensities` `[N, S]` over the strengths `[N]`."""
    x = torch.tensor(strengths, dtype=torch.float64)
    x = x - x.mean()
    return (propensities.double() @ x) / x.square().sum()


def spearman(strengths: Sequence[float], propensities: Tensor) -> Tensor:
    """Spearman's rank correlation of each row `[N, S]` with the strengths; 0 for a row that is constant."""
    x = _ranks(torch.tensor([list(strengths)], dtype=torch.float64))
    y = _ranks(propensities.double())
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    scale = x.norm() * y.norm(dim=1)
    return torch.where(scale > 0, (y @ x[0]) / scale.clamp_min(1e-300), 0.0)


def _ranks(x: Tensor) -> Tensor:
    """Ranks within each row, equal values sharing their mean."""
    less = (x.unsqueeze(2) > x.unsqueeze(1)).sum(2).double()
    same = (x.unsqueeze(2) == x.unsqueeze(1)).sum(2).double()
    return less + (same + 1) / 2


def effectiveness(before: Sequence[float], after: Sequence[float]) -> float:
    """Mean over target sets of `(after - before) / (1 - before)`; the difference itself where that is 0/0."""
    gains = [(b - a) / (1 - a) if a < 1 else b - a for a, b in zip(before, after, strict=True)]
    return sum(gains) / len(gains)


def entanglement(before: Sequence[float], after: Sequence[float], falls: bool = False) -> float:
    """Root mean square over other sets of `after - before`; `falls`: over those alone that fell, 0 where none did."""
    moves = [b - a for a, b in zip(before, after, strict=True) if not falls or b < a]
    return math.sqrt(sum(m * m for m in moves) / len(moves)) if moves else 0.0


def measure_reliability(
    model: Any,
    targets: Mapping[str, Sequence[Choice]],
    edit: Any,
    strengths: Sequence[float],
    *,
    sides: Mapping[str, Sequence[Choice]] | None = None,
    progress: bool = False,
) -> Reliability:
    """Score every answer at every strength.

    Args:
        model: a language model with `score`.
        targets: sets of questions that the edit is for, by name.
        edit: its strength is replaced; strength 0 is always measured.
        sides: sets that it should leave alone.

    Raises `InputError`.
    """
    sides = dict(sides or {})
    check(bool(targets), "choices", {}, "at least one set of questions")
    twice = sorted(set(targets) & set(sides))
    check(not twice, "side", twice, "other names than those of the choices")
    chosen = sorted({0.0, *map(float, strengths)})
    check(len(chosen) >= 2, "strengths", list(strengths), "at least one that is not 0")
    sets = {**targets, **sides}
    margins: dict[float, dict[str, Tensor]] = {}
    with ticking(progress, "scoring answers", len(chosen) * len(sets)) as tick:
        for s in chosen:
            margins[s] = {}
            for name, choices in sets.items():
                check(bool(choices), name, [], "at least one question")
                margins[s][name] = _margins(model, choices, [replace(edit, strength=s)] if s else [])
                tick(1)
    found = Reliability({"edit": repr(edit), "prompts": {name: len(rows) for name, rows in sets.items()}})
    base = {name: _share(margins[0.0][name]) for name in sets}
    for s in chosen:
        here = {name: _share(margins[s][name]) for name in sets}
        mean, half = interval(torch.cat([margins[s][name] for name in targets]).tolist())
        gain = effectiveness([base[n] for n in targets], [here[n] for n in targets])
        beside = entanglement([base[n] for n in sides], [here[n] for n in sides]) if sides else None
        found.strengths.append(Setting(s, mean, half, here, gain, beside))
    by_prompt = torch.stack([torch.cat([margins[s][name] for name in targets]) for s in chosen], 1)
    found.slopes = slopes(chosen, by_prompt).tolist()
    found.monotone = spearman(chosen, by_prompt).tolist()
    return found


def _share(margins: Tensor) -> float:
    return float((margins > 0).double().mean())


def _margins(model: Any, choices: Sequence[Choice], edits: Any) -> Tensor:
    """Log-probability of the wanted answer less that of the likeliest other one `[N]`."""
    prompts = [c.prompt for c in choices for _ in range(1 + len(c.others))]
    texts = [text for c in choices for text in (c.wanted, *c.others)]
    scores, at, margins = model.score(prompts, texts, edits=edits).log_prob, 0, []
    for c in choices:
        mine = scores[at : at + 1 + len(c.others)]
        margins.append(mine[0] - mine[1:].max())
        at += len(mine)
    return torch.stack(margins)
