"""Searches side by side: the reward that each finds for a budget of network evaluations.

A budget counts what the network reads for one prompt: tokens of prompt and continuation, of every candidate that ever
lived (language models), or rows times steps (diffusion). Every method gets the same budgets and prompts, and returns
its one best output. Best-of-n is read off one pool for all its budgets (`reward_curve`: the expected best of n of it),
which may reach beyond those of the others, to say how many more evaluations it needs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.core import Edit, Process, Prompt, Reward, Sampler, Samples, check
from steer.files import replacing
from steer.measure.distances import interval
from steer.measure.tables import aligned, few, ranged
from steer.methods.best_of_n import BestOfN, reward_curve
from steer.methods.dts import SearchDTS
from steer.methods.fk import FKSteering
from steer.methods.samplers import SAMPLERS
from steer.methods.svdd import SVDD
from steer.progress import ticking

__all__ = ["METHODS", "Measured", "Race", "methods_by_name", "race"]


@dataclass(frozen=True)
class Contender:
    """One method: a sampler for `chains` whole generations' worth of budget, or for `nfe` evaluations where it can
    count them itself.
    """

    make: Callable[[int, int], Sampler]
    guided: bool = False
    """Whether the edits take part."""
    sharpness: float = 1.0
    """Divides beta: search wants the highest reward, not the tilted law."""


METHODS: dict[str, Contender] = {
    "best-of-n": Contender(lambda chains, nfe: BestOfN(chains)),
    "fk": Contender(lambda chains, nfe: FKSteering(chains, n=1, select="best"), sharpness=5.0),
    "dts-star": Contender(
        lambda chains, nfe: SearchDTS(n=1, rollouts=None, max_nfe=nfe, batch=max(1, min(8, chains // 4)))
    ),
    "svdd": Contender(lambda chains, nfe: SVDD(n=max(1, chains // 4), num_candidates=4, choose="argmax")),
    "vas": Contender(lambda chains, nfe: BestOfN(chains), guided=True),
    "vas+fk": Contender(lambda chains, nfe: FKSteering(chains, n=1, select="best"), guided=True, sharpness=5.0),
}
"""By name. The methods that are guided need an edit."""


def methods_by_name() -> dict[str, Contender]:
    """`METHODS`, and every other registered sampler that goes by a reward, its whole budget spent on one output."""
    others = {name: kind for name, kind in SAMPLERS.items() if kind.needs_reward and name not in METHODS}
    return METHODS | {name: Contender(partial(_sized, kind)) for name, kind in others.items()}


def _sized(kind: type[Sampler], chains: int, nfe: int) -> Sampler:
    return kind.sized(chains)


@dataclass(frozen=True)
class Measured:
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
    heats: list[Measured] = field(default_factory=list)

    def table(self) -> str:
        """Plain text: a row for each method, a column for each budget, how much less it needs than best-of-n at its
        largest, and how much more best-of-n needs than the method at its own largest.
        """
        budgets = sorted({h.budget for h in self.heats})
        rows = [["", *(f"{b} evaluations" for b in budgets), "saves", "best-of-n needs"]]
        for method in dict.fromkeys(h.method for h in self.heats):
            mine = {h.budget: h for h in self.heats if h.method == method}
            cells = [ranged(mine[b].mean, mine[b].half) if b in mine else "" for b in budgets]
            saved = self.saving(method)
            rows.append([method, *cells, "" if saved is None else f"{saved:.1f}x", self._needs(method)])
        flat = "best-of-n finds no more at its largest budget than at its smallest: nothing is saved or needed"
        warnings = [few(max((len(h.rewards[0]) for h in self.heats), default=0)), "" if self.rises else flat]
        return "\n".join([aligned(rows), *filter(None, warnings)])

    @property
    def rises(self) -> bool:
        """Whether best-of-n finds more with its largest budget than with its smallest, by more than their intervals
        leave open; only then is there an exchange of evaluations for reward.
        """
        base = self._curve("best-of-n")
        if len(base) < 2:
            return True
        first, last = base[0], base[-1]
        apart = [h.half for h in (first, last) if not math.isnan(h.half)]
        return last.mean - first.mean > math.hypot(*apart)

    def saving(self, method: str) -> float | None:
        """Evaluations that best-of-n took at its largest budget over those at which `method` reaches the same mean
        reward, between its budgets on a logarithmic scale; None where it never does, and where best-of-n itself does
        not rise by more than its intervals: then there is nothing to be saved.
        """
        base, mine = self._curve("best-of-n"), self._curve(method)
        if not base or method == "best-of-n" or not self.rises:
            return None
        there = _reached(mine, base[-1].mean)
        return None if there is None else base[-1].nfe / there

    def needs(self, method: str) -> float | None:
        """Evaluations at which best-of-n reaches the mean reward that `method` has at its largest budget, over those
        that it took there; infinite where best-of-n never does in its budgets, None without it.
        """
        base, mine = self._curve("best-of-n"), self._curve(method)
        if not base or method == "best-of-n" or not self.rises:
            return None
        there = _reached(base, mine[-1].mean)
        return math.inf if there is None else there / mine[-1].nfe

    def _needs(self, method: str) -> str:
        factor = self.needs(method)
        if factor is None:
            return ""
        most = self._curve("best-of-n")[-1].nfe / self._curve(method)[-1].nfe
        return f"over {most:.1f}x" if math.isinf(factor) else f"{factor:.1f}x"

    def _curve(self, method: str) -> list[Measured]:
        return sorted((h for h in self.heats if h.method == method), key=lambda h: h.nfe)

    def records(self) -> list[dict[str, Any]]:
        """A flat row for each method and budget."""
        return [
            {"method": h.method, "budget": h.budget, "reward": h.mean, "reward_half": h.half, "evaluations": h.nfe}
            for h in self.heats
        ]

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
                return cls(settings, [Measured(**{k: h[k] for k in names}) for h in found["heats"]])
        return cls(settings)


def _reached(curve: list[Measured], goal: float) -> float | None:
    """Evaluations at which a curve comes to a mean reward, on a logarithmic scale between its budgets, or None."""
    before: Measured | None = None
    for heat in curve:
        if heat.mean >= goal:
            if before is None:
                return heat.nfe
            share = (goal - before.mean) / (heat.mean - before.mean)
            return math.exp(math.log(before.nfe) + share * math.log(heat.nfe / before.nfe))
        before = heat
    return None


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
    reach: int | None = None,
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
        methods: of `methods_by_name()`.
        edits: what guided methods are guided by; correct weights keep FK's law.
        beta: KL coefficient for FK and for edits.
        at_once: rows generated at once.
        reach: evaluations to which best-of-n goes on from the largest budget, doubling it.
        options: settings of samplers in place of the defaults here, by method.
        about: what else identifies the run: model, texts of reward and edits.
    """
    known = methods_by_name()
    _check(methods, budgets, bool(edits))
    settings = {
        **(about or {}),
        "prompts": list(prompts),
        "beta": beta,
        "seeds": seeds,
        "steps": process.num_steps,
        "options": options or {},
        "reward": str(reward),
    }
    out.mkdir(parents=True, exist_ok=True)
    found = Race.read(out / "race.json", settings)
    guided = process
    for edit in edits:
        guided = guided.edited(edit.with_beta(beta))
    lengths = {False: _per_chain(process, prompts), True: _per_chain(guided, prompts) if edits else (0.0, 1.0)}
    least = math.ceil(max(sum(lengths[known[name].guided]) for name in methods))
    check(min(budgets) >= least, "budgets", min(budgets), f"at least {least}, which one output takes on average")
    rejecting = bool((options or {}).get("best-of-n", {}).get("reject"))
    jobs = _jobs(found, methods, budgets, reach, rejecting)
    with ticking(progress, "racing", len(jobs) * seeds) as tick:
        for name, some in jobs:
            entry = known[name]
            first, each = lengths[entry.guided]
            made = [entry.make(max(1, int((budget - first) / each)), budget) for budget in some]
            samplers = [type(s)(**{**_fields(s), **(options or {}).get(name, {})}) for s in made]
            runs = []
            for seed in range(seeds):
                there = guided if entry.guided else process
                runs.append(_heat(there, prompts, samplers, reward, beta / entry.sharpness, seed, at_once))
                tick(1)
            found.heats += _averaged(name, some, samplers, first, runs, len(prompts))
            found.write(out / "race.json")
    return found


def _check(methods: Sequence[str], budgets: Sequence[int], edited: bool) -> None:
    """Raise `InputError` for methods that are not known, or not to be guided, and for budgets that are none."""
    known = methods_by_name()
    for name in methods:
        check(name in known, "methods", name, ", ".join(known))
        check(edited or not known[name].guided, "methods", name, "methods without guidance, or an edit to guide")
    check(bool(budgets) and all(b > 0 for b in budgets), "budgets", budgets, "numbers above 0")


def _averaged(
    name: str,
    budgets: Sequence[int],
    samplers: Sequence[Sampler],
    first: float,
    runs: Sequence[tuple[list[list[float]], float]],
    prompts: int,
) -> list[Measured]:
    """A method at every budget, from a run for each seed: best rewards by sampler and prompt, and evaluations of the
    last sampler, of which smaller ones take their share beyond the `first` of a prompt.
    """
    spent = sum(nfe / prompts / len(runs) for _, nfe in runs)
    found = []
    for i, (budget, sampler) in enumerate(zip(budgets, samplers, strict=True)):
        share = sampler.rows / samplers[-1].rows
        found.append(Measured(name, budget, [best[i] for best, _ in runs], first + (spent - first) * share))
    return found


def _jobs(
    found: Race, methods: Sequence[str], budgets: Sequence[int], reach: int | None, rejecting: bool
) -> list[tuple[str, list[int]]]:
    """Methods with the budgets that are still to be measured: all that can be read off one pool together."""
    further, last = [], max(budgets)
    while reach is not None and last < reach:
        last = min(2 * last, reach)
        further.append(last)
    jobs = []
    for name in methods:
        wanted = [*budgets, *further] if name == "best-of-n" else budgets
        missing = sorted({b for b in wanted if not any((h.method, h.budget) == (name, b) for h in found.heats)})
        pooled = isinstance(methods_by_name()[name].make(1, 1), BestOfN) and not rejecting
        jobs += [(name, missing)] if pooled and missing else [(name, [b]) for b in missing]
    return jobs


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
    process: Process,
    prompts: Sequence[Prompt],
    samplers: Sequence[Sampler],
    reward: Reward,
    beta: float,
    seed: int,
    at_once: int,
) -> tuple[list[list[float]], float]:
    """Best reward for each prompt, by sampler, and evaluations in all: of the last sampler, whose pool tells what
    smaller ones would have found.
    """
    best: list[list[float]] = [[] for _ in samplers]
    nfe = 0.0
    size = max(1, at_once // samplers[-1].rows)
    for first in range(0, len(prompts), size):
        some = prompts[first : first + size]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + first)
        with process.session():
            samples = samplers[-1].run(process, some, generator=generator, reward=reward, beta=beta)
        for mine, found in zip(best, _found(samples, len(some), samplers), strict=True):
            mine += found.tolist()
        nfe += samples.cost.nfe
    return best, nfe


def _found(samples: Samples, prompts: int, samplers: Sequence[Sampler]) -> list[Tensor]:
    """Best reward for each prompt, by sampler."""
    if len(samplers) == 1:
        return [_best(samples, prompts)]
    assert samples.pool is not None and samples.pool.reward is not None
    scores = samples.pool.reward.reshape(prompts, -1)
    return list(reward_curve(scores, [sampler.rows for sampler in samplers]).T)


def _best(samples: Samples, prompts: int) -> Tensor:
    assert samples.reward is not None
    top = torch.full((prompts,), -torch.inf, dtype=torch.float64)
    return top.scatter_reduce(0, samples.group, samples.reward, "amax")
