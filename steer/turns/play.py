"""Play: episodes of an agent in an environment, as records and in a table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steer.core import Cost, Edit, Prompt, Sampler, Samples, check_whole
from steer.files import as_json, write_text
from steer.measure.tables import aligned, number, ranged
from steer.methods.samplers import make_sampler
from steer.methods.turn_search import TurnSearch
from steer.model import execute, prepare
from steer.rewards.returns import Return
from steer.turns.process import TurnProcess
from steer.turns.regret import RegretReport, regret_report

__all__ = ["Played", "play"]


@dataclass(frozen=True)
class Played:
    """Episodes and what they came to."""

    records: list[dict[str, Any]]
    """By episode: prompt, messages, actions, rewards, return, done, truncated, failure."""
    cost: Cost
    optimum: float | None = None
    """The best expected return, where it is known."""
    regret: RegretReport | None = None
    trees: list[dict[str, Any]] = field(default_factory=list)
    """Of turn-search: the upper part of the tree of every turn."""
    pairs: list[dict[str, Any]] = field(default_factory=list)
    """Of turn-search: preferences for DPO."""

    @property
    def mean(self) -> float:
        """Mean return."""
        return sum(r["return"] for r in self.records) / len(self.records)

    @property
    def half(self) -> float:
        """Half of its 95% interval."""
        n = len(self.records)
        if n < 2:
            return math.nan
        return 1.96 * math.sqrt(sum((r["return"] - self.mean) ** 2 for r in self.records) / (n - 1) / n)

    def share(self, name: str) -> float:
        """Share of episodes whose last turn's info has `name`, NaN where none says."""
        known = [r["infos"][-1][name] for r in self.records if r["infos"] and name in r["infos"][-1]]
        return sum(map(bool, known)) / len(self.records) if known else math.nan

    @property
    def unparsed(self) -> float:
        """Share of actions that the environment could not read."""
        told = [bool(info.get("unparsed")) for r in self.records for info in r["infos"]]
        return sum(told) / len(told) if told else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the episodes."""
        found = {
            "episodes": len(self.records),
            "return": self.mean,
            "half": self.half,
            "success": self.share("success"),
            "turns": sum(len(r["actions"]) for r in self.records) / len(self.records),
            "unparsed": self.unparsed,
            "failures": sum(r["failure"] is not None for r in self.records),
            "optimum": self.optimum,
            "cost": {name: getattr(self.cost, name) for name in Cost.__dataclass_fields__},
        }
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.items()}

    def __str__(self) -> str:
        return f"{self.facts()}\nseconds {self.cost.seconds:.1f}"

    def facts(self) -> str:
        """The table, without the time that it took."""
        told = self.to_dict()
        cost = self.cost
        rows = [
            ["episodes", str(told["episodes"])],
            ["mean return", ranged(self.mean, self.half)],
            ["best policy", "-" if self.optimum is None else number(self.optimum)],
            ["success", number(self.share("success"))],
            ["turns", number(told["turns"], "{:.2f}")],
            ["actions not read", number(self.unparsed)],
            ["failures", str(told["failures"])],
            ["model calls", str(cost.model_calls)],
            ["tokens", str(cost.generated_tokens)],
            ["price", number(cost.price)],
        ]
        return aligned(rows) + ("" if self.regret is None else f"\n{self.regret}")

    def save(self, folder: Path | str) -> list[Path]:
        """Write `episodes.jsonl`, `play.json` and, where there are trees, `trees.jsonl` and `pairs.jsonl`."""
        where = Path(folder)
        named = {"episodes.jsonl": self.records, "trees.jsonl": self.trees, "pairs.jsonl": self.pairs}
        written = []
        for name, rows in named.items():
            if rows:
                write_text(where / name, "".join(json.dumps(row, default=str) + "\n" for row in rows))
                written.append(where / name)
        write_text(where / "play.json", as_json(self.to_dict()) + "\n")
        return [*written, where / "play.json"]


def play(
    process: TurnProcess,
    *,
    prompts: Sequence[Prompt] = ("Play.",),
    episodes: int = 100,
    sampler: Sampler | str | None = None,
    edits: Sequence[Edit] = (),
    seed: int = 0,
    margin: float = 0.0,
    max_rows: int = 256,
    progress: bool = False,
) -> Played:
    """Play `episodes` for each prompt. Same seed, same episodes. With a sampler that chooses among episodes the returns
    are those of the chosen ones, luck included.
    """
    check_whole("episodes", episodes)
    asked = [prompt for prompt in prompts for _ in range(episodes)]
    chosen = make_sampler(sampler)
    if isinstance(chosen, TurnSearch):  # one episode after the other: all are one batch, whose trees have its numbers
        max_rows = max(max_rows, len(asked) * chosen.rows)
    plan = prepare(
        process,
        asked,
        edits=[list(edits)] * len(asked) if edits else (),
        sampler=chosen,
        reward=Return(),
        seed=seed,
        max_rows=max_rows,
        progress=progress,
    )
    return played(process, execute(plan), margin)


def played(process: TurnProcess, samples: Samples, margin: float = 0.0) -> Played:
    """What samples of a `TurnProcess` came to."""
    records = []
    for prompt, text in zip((samples.prompts[b] for b in samples.group.tolist()), samples.outputs, strict=True):
        records.append(
            {
                "prompt": prompt if isinstance(prompt, str) else list(prompt),
                "messages": text.messages,
                "actions": text.actions,
                "rewards": text.rewards,
                "infos": text.infos,
                "return": text.total(),
                "done": text.done,
                "truncated": text.truncated,
                "failure": text.failure,
            }
        )
    trees = [tree for tree in samples.trace or () if hasattr(tree, "pairs")]
    pairs = [row for tree in trees for row in tree.pairs(margin)]
    whole = bool(records) and all(r["infos"] and "regret" in r["infos"][0] and not r["failure"] for r in records)
    report = regret_report([r["infos"] for r in records]) if whole else None
    cost = replace(samples.cost)
    return Played(records, cost, process.kind.solve(), report, [tree.to_dict() for tree in trees], pairs)
