"""Searches side by side: the reward that each finds for a budget of network evaluations.

A budget counts what the network reads for one prompt: tokens of prompt and continuation, of every candidate that ever
lived (language models), or rows times steps (diffusion). Every method gets the same budgets and prompts, and returns
its one best output.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.core import Edit, Process, Prompt, Reward, Sampler, Samples, check
from steer.files import replacing
from steer.measure.distances import interval
from steer.measure.tables import aligned
from steer.methods.best_of_n import BestOfN
from steer.methods.dts import SearchDTS
from steer.methods.fk import FKSteering
from steer.methods.svdd import SVDD
from steer.progress import ticking

__all__ = ["METHODS", "Heat", "Race", "race"]


@dataclass(frozen=True)
class Entry:
    """One method: a sampler for `chains` whole generations' worth of budget, or for `nfe` evaluations where it can
    count them itself.
    """

    make: Callable[[int, int], Sampler]
    guided: bool = False
    """Whether the edits take part."""
    sharpness: float = 1.0
    """Divides beta: search wants the highest reward, not the tilted law."""


METHODS: dict[str, Entry] = {
    "best-of-n": Entry(lambda chains, nfe: BestOfN(chains)),
    "fk": Entry(lambda chains, nfe: FKSteering(chains, n=1, select="best"), sharpness=5.0),
    "dts-star": Entry(
        lambda chains, nfe: SearchDTS(n=1, rollouts=None, max_nfe=nfe, batch=max(1, min(8, chains // 4)))
    ),
    "svdd": Entry(lambda chains, nfe: SVDD(n=max(1, chains // 4), num_candidates=4, choose="argmax")),
    "vas": Entry(lambda chains, nfe: BestOfN(chains), guided=True),
    "vas+fk": Entry(lambda chains, nfe: FKSteering(chains, n=1, select="best"), guided=True, sharpness=5.0),
}
"""By name. The methods that are guided need an edit."""


@dataclass(frozen=True)
class Heat:
    """One method at one budget: one prompt and seed after another."""

    method: str
    budget: int
    rewards: list[list[float]]
    """Best reward, by seed and prompt."""
    nfe: float
    """Evaluations that a prompt really took, on average."""

    @property
    def mean(self) -> float:
        """Over seeds and prompts."""
        return sum(map(sum, self.rewards)) / sum(map(len, self.rewards))

    @property
    def half(self) -> float:
        """Half width of the 95% interval, over seeds where there are at least three, else over prompts."""
        if len(self.rewards) >= 3:
            return interval([sum(r) / len(r) for r in self.rewards])[1]
        by_prompt = [sum(r) / len(r) for r in zip(*self.rewards, strict=True)]
        return interval(by_prompt)[1] if len(by_prompt) > 1 else math.nan


@dataclass
class Race:
    """Everything that was measured."""

    settings: dict[str, Any]
    heats: list[Heat] = field(default_factory=list)

    def table(self) -> str:
        """Plain text: a row for each method, a column for each budget, and how much less it needs than best-of-n."""
        budgets = sorted({h.budget for h in self.heats})
        rows = [["", *(f"{b} evaluations" for b in budgets), "saves"]]
        for method in dict.fromkeys(h.method for h in self.heats):
            mine = {h.budget: h for h in self.heats if h.method == method}
            cells = [f"{mine[b].mean:.3f} ±{mine[b].half:.3f}" if b in mine else "" for b in budgets]
            saved = self.saving(method)
            rows.append([method, *cells, "" if saved is None else f"{saved:.1f}x"])
        return aligned(rows)

    def saving(self, method: str) -> float | None:
        """Evaluations that best-of-n took at its largest budget over those at which `method` reaches the same mean
        reward, between its budgets on a logarithmic scale; None where it never does.
        """
        base = sorted((h for h in self.heats if h.method == "best-of-n"), key=lambda h: h.nfe)
        mine = sorted((h for h in self.heats if h.method == method), key=lambda h: h.nfe)
        if not base or method == "best-of-n":
            return None
        goal = base[-1].mean
        before: Heat | None = None
        for heat in mine:
            if heat.mean >= goal:
                if before is None:
                    return base[-1].nfe / heat.nfe
                share = (goal - before.mean) / (heat.mean - before.mean)
                return base[-1].nfe / math.exp(math.log(before.nfe) + share * math.log(heat.nfe / before.nfe))
            before = heat
        return None

    def write(self, path: Path) -> None:
        """As JSON, in one step."""
        with replacing(path) as temporary:
            heats = [{**asdict(h), "mean": h.mean, "half": h.half} for h in self.heats]
            temporary.write_text(json.dumps({"settings": self.settings, "heats": heats}, indent=1) + "\n", "utf-8")

    @classmethod
    def read(cls, path: Path, settings: dict[str, Any]) -> Race:
        """What is left of an earlier run with the same settings; empty otherwise."""
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.get("settings") == settings:
                names = ("method", "budget", "rewards", "nfe")
                return cls(settings, [Heat(**{k: h[k] for k in names}) for h in found["heats"]])
        return cls(settings)


def race(
    process: Process,
    prompts: Sequence[Prompt],
    reward: Reward,
    budgets: Sequence[int],
    out: Path,
    *,
    methods: Sequence[str] = ("best-of-n", "fk", "dts-star"),
    edits: Sequence[Edit] = (),
    beta: float = 0.1,
    seeds: int = 3,
    at_once: int = 64,
    options: dict[str, dict[str, Any]] | None = None,
    about: dict[str, Any] | None = None,
    progress: bool = False,
) -> Race:
    """Every method at every budget, `seeds` times; what was measured before in `out` is kept.

    Args:
        process: without edits.
        reward: bound.
        budgets: evaluations for each prompt.
        out: folder for race.json and race.png.
        methods: of `METHODS`.
        edits: what guided methods are guided by; correct weights keep FK's law.
        beta: KL coefficient for FK and for edits.
        at_once: rows generated at once.
        options: settings of samplers in place of the defaults here, by method.
        about: what else identifies the run: model, texts of reward and edits.
    """
    for name in methods:
        check(name in METHODS, "methods", name, ", ".join(METHODS))
        check(bool(edits) or not METHODS[name].guided, "methods", name, "methods without guidance, or an edit to guide")
    check(bool(budgets) and all(b > 0 for b in budgets), "budgets", budgets, "numbers above 0")
    settings = {
        **(about or {}), "prompts": list(prompts), "beta": beta, "seeds": seeds, "steps": process.num_steps,
        "options": options or {}, "reward": str(reward),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    found = Race.read(out / "race.json", settings)
    guided = process
    for edit in edits:
        guided = guided.edited(edit.with_beta(beta))
    lengths = {False: _per_chain(process, prompts), True: _per_chain(guided, prompts) if edits else (0.0, 1.0)}
    jobs = [(m, b) for b in budgets for m in methods if not any((h.method, h.budget) == (m, b) for h in found.heats)]
    with ticking(progress, "racing", len(jobs) * seeds) as tick:
        for name, budget in jobs:
            entry = METHODS[name]
            first, each = lengths[entry.guided]
            sampler = entry.make(max(1, int((budget - first) / each)), budget)
            sampler = type(sampler)(**{**_fields(sampler), **(options or {}).get(name, {})})
            rewards, spent = [], 0.0
            for seed in range(seeds):
                best, nfe = _heat(guided if entry.guided else process, prompts, sampler, reward,
                                  beta / entry.sharpness, seed, at_once)  # fmt: skip
                rewards.append(best)
                spent += nfe / len(prompts) / seeds
                tick(1)
            found.heats.append(Heat(name, budget, rewards, spent))
            found.write(out / "race.json")
    return found


def _fields(sampler: Sampler) -> dict[str, Any]:
    return {name: getattr(sampler, name) for name in sampler.__dataclass_fields__}  # type: ignore[attr-defined]


def _per_chain(process: Process, prompts: Sequence[Prompt]) -> tuple[float, float]:
    """Evaluations that a prompt takes before any chain, and those of one chain, on average over a few."""
    some = list(prompts[:8])
    generator = torch.Generator().manual_seed(123)
    costs = []
    for n in (2, 6):
        state = process.init(some, n, generator)
        while not process.done(state):
            state = process.propose(state, generator)
        costs.append(process.decode(state).cost.nfe / len(some))
    each = (costs[1] - costs[0]) / 4
    return max(costs[0] - 2 * each, 0.0), each


def _heat(
    process: Process, prompts: Sequence[Prompt], sampler: Sampler, reward: Reward, beta: float, seed: int, at_once: int
) -> tuple[list[float], float]:
    """Best reward for each prompt, and evaluations in all."""
    best: list[float] = []
    nfe = 0.0
    size = max(1, at_once // sampler.rows)
    for first in range(0, len(prompts), size):
        some = prompts[first : first + size]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + first)
        with process.session():
            samples = sampler.run(process, some, generator=generator, reward=reward, beta=beta)
        best += _best(samples, len(some)).tolist()
        nfe += samples.cost.nfe
    return best, nfe


def _best(samples: Samples, prompts: int) -> Tensor:
    assert samples.reward is not None
    top = torch.full((prompts,), -torch.inf, dtype=torch.float64)
    return top.scatter_reduce(0, samples.group, samples.reward, "amax")
