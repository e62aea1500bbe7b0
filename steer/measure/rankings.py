"""Ranking accuracy: how often a reward, a model, an edit or a tuned policy puts the preferred text first, and how
often a perfect DPO could.

A model ranks by the log-probability of a text after its prompt, summed or a token; a tuned policy also by its implicit
reward `beta log(pi / pi_ref)`. The idealised accuracy is that of the optimum of RLHF under Bradley-Terry: it prefers y+
where `log pi_ref(y+) / pi_ref(y-) + logit(alpha) / beta > 0`, with alpha the share of people who prefer y+ (Chen et al.
2024, 2405.19534, section 3; ties count one half).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.core import Prompt, Reward, Samples, check
from steer.files import as_json, write_text
from steer.measure.tables import aligned, few, number
from steer.progress import ticking

__all__ = ["Pair", "Ranking", "Rankings", "accuracy", "idealised", "rank_pairs", "wilson"]


@dataclass(frozen=True)
class Pair:
    """Two texts after one prompt, the first of which is preferred by the share `agreement` of people."""

    prompt: Prompt
    chosen: str
    rejected: str
    agreement: float = 0.99


@dataclass(frozen=True)
class Ranking:
    """How often one judge puts the preferred text first."""

    judge: str
    by: str
    """What it ranks by: "reward", "sum", "a token", "implicit reward" or "idealised"."""
    accuracy: float
    low: float
    high: float
    """95% interval by Wilson."""


@dataclass
class Rankings:
    """What was measured."""

    settings: dict[str, Any]
    rankings: list[Ranking] = field(default_factory=list)

    def table(self) -> str:
        """Plain text."""
        rows = [["judge", "ranks by", "accuracy", "95% interval"]]
        for r in self.rankings:
            rows.append(
                [r.judge, r.by, f"{r.accuracy:.1%}", f"{number(r.low, '{:.1%}')} .. {number(r.high, '{:.1%}')}"]
            )
        return "\n".join(filter(None, [aligned(rows), few(int(self.settings["pairs"]), "pairs")]))

    def records(self) -> list[dict[str, Any]]:
        """A flat row for each judge."""
        return [asdict(r) for r in self.rankings]

    def write(self, folder: Path | str) -> None:
        """Write pairs.json into `folder` in one step."""
        found = {"settings": self.settings, "rankings": self.records()}
        write_text(Path(folder) / "pairs.json", as_json(found) + "\n")


def accuracy(margins: Tensor) -> float:
    """Share of margins `[P]` above 0; those of 0 count one half."""
    return float(((margins > 0).double() + 0.5 * (margins == 0).double()).mean())


def idealised(reference: Tensor, agreement: Tensor, beta: float) -> float:
    """Ranking accuracy of the optimum from margins of the reference `log pi_ref(y+) / pi_ref(y-)` `[P]` and shares of
    people who prefer y+ `[P]`, each between 0 and 1.
    """
    return accuracy(reference + torch.logit(agreement.double()) / beta)


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95% interval of a share out of `n` (Wilson 1927)."""
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def rank_pairs(
    pairs: Sequence[Pair],
    *,
    rewards: Mapping[str, Reward] | None = None,
    model: Any = None,
    edits: Mapping[str, Any] | None = None,
    policies: Mapping[str, Any] | None = None,
    beta: float = 0.1,
    progress: bool = False,
) -> Rankings:
    """Rank every pair by every judge.

    Args:
        rewards: bound rewards by name.
        model: a language model, the reference; ranks by log-probability itself.
        edits: edits by name, each of which makes the model another judge.
        policies: tuned policies by name, language models with the tokens of `model`.
        beta: of DPO, for the idealised accuracy.

    Raises `InputError`.
    """
    check(bool(pairs), "pairs", pairs, "at least one pair")
    check(0 < beta < math.inf, "beta", beta, "a number above 0")
    for i, pair in enumerate(pairs):
        check(0 < pair.agreement < 1, f"pairs[{i}].agreement", pair.agreement, "a share between 0 and 1, neither")
    found = Rankings({"pairs": len(pairs), "beta": beta})

    def add(judge: str, by: str, margins: Tensor) -> None:
        share = accuracy(margins)
        found.rankings.append(Ranking(judge, by, share, *wilson(share, len(pairs))))

    judges = [*(rewards or {}), *(["model"] if model is not None else []), *(edits or {}), *(policies or {})]
    with ticking(progress, "ranking", len(judges)) as tick:
        for name, reward in (rewards or {}).items():
            add(name, "reward", _scores(reward, pairs, "chosen") - _scores(reward, pairs, "rejected"))
            tick(1)
        if model is None:
            return found
        reference = _margins(model, pairs)
        for by, margins in zip(("sum", "a token"), reference, strict=True):
            add("model", by, margins)
        share = idealised(reference[0], torch.tensor([p.agreement for p in pairs]), beta)
        found.rankings.append(Ranking("perfect DPO", "idealised", share, *wilson(share, len(pairs))))
        tick(1)
        for name, edit in (edits or {}).items():
            for by, margins in zip(("sum", "a token"), _margins(model, pairs, edit), strict=True):
                add(name, by, margins)
            tick(1)
        for name, policy in (policies or {}).items():
            mine = _margins(policy, pairs)
            for by, margins in zip(("sum", "a token"), mine, strict=True):
                add(name, by, margins)
            add(name, "implicit reward", mine[0] - reference[0])
            tick(1)
    return found


def _scores(reward: Reward, pairs: Sequence[Pair], side: str) -> Tensor:
    zero = torch.zeros(len(pairs), dtype=torch.float64)
    texts = [getattr(pair, side) for pair in pairs]
    return reward(Samples([pair.prompt for pair in pairs], texts, torch.arange(len(pairs)), zero)).double()


def _margins(model: Any, pairs: Sequence[Pair], edits: Any = ()) -> tuple[Tensor, Tensor]:
    """Log-probability of the preferred text less that of the other `[P]`: summed, and a token."""
    prompts = [pair.prompt for pair in pairs]
    better, worse = (
        model.score(prompts, [getattr(pair, side) for pair in pairs], edits=edits) for side in ("chosen", "rejected")
    )
    return better.log_prob - worse.log_prob, better.mean - worse.mean
