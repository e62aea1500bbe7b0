"""Samplers side by side at equal cost: how close each comes to `p exp(r / beta)`, and how the distance falls with
budget.

The target is a large pool of the model's *own* samples, weighted by `exp(r / beta)`: against real data the gap between
model and data would drown every difference between samplers. Distances are taken in the features of a judge that no
sampler sees.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from steer.core import Cost, Process, Reward, Sampler, Samples, check
from steer.files import replacing
from steer.measure.distances import Target, frechet_distance, interval, mmd, total_variation, unique_share
from steer.measure.pools import Judged, as_samples, judged, pool_of
from steer.measure.tables import aligned, number, ranged
from steer.methods.best_of_n import Ancestral, BestOfN
from steer.methods.dts import DTS
from steer.methods.fk import FKSteering
from steer.methods.samplers import SAMPLERS
from steer.methods.svdd import SVDD
from steer.progress import ticking
from steer.rewards import parse_reward
from steer.sampling.lookahead import Preview
from steer.sampling.weights import resample

__all__ = ["METHODS", "Comparison", "Line", "Problem", "compare", "methods_by_name"]


@dataclass(frozen=True)
class Problem:
    """What is wanted."""

    name: str
    reward: str
    beta: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Problem:
        """`NAME=REWARD` or `NAME=REWARD@BETA`."""
        name, found, rest = text.partition("=")
        check(bool(found and name.strip() and rest.strip()), "task", text, "NAME=REWARD or NAME=REWARD@BETA")
        reward, at, beta = rest.rpartition("@")
        if not at:
            return cls(name.strip(), rest)
        try:
            value = float(beta)
        except ValueError:
            value = -1.0
        check(0 < value < float("inf"), f"task {name}: beta", beta, "a number above 0")
        return cls(name.strip(), reward, value)


@dataclass(frozen=True)
class Setting:
    """Sizes: `outputs` of `particles` chains of `steps` network evaluations each."""

    outputs: int
    particles: int
    steps: int

    @property
    def calls(self) -> int:
        """Network evaluations for each output."""
        return self.particles * self.steps


LARGEST_POPULATION = 2000
"""Curves over budgets follow FK up to here, where it is at the floor."""

Make = Callable[[Setting], tuple[Sampler, bool]]
"""A sampler, and whether it is run once for each output."""

_LOOKING: dict[str, Any] = {"lookahead": Preview(), "trust": 4.0}
_NARROW: dict[str, Any] = {**_LOOKING, "exponent": 0.3}
"""With `2 N^0.8` children a node draws a new one at each of its first 36 visits; with `2 N^0.3` at the first 4."""


def _tree(s: Setting, **settings: Any) -> DTS:
    return DTS(s.outputs, rollouts=None, max_nfe=s.outputs * s.calls, batch=32, **settings)


METHODS: dict[str, Make] = {
    "ancestral": lambda s: (Ancestral(s.outputs), False),
    "best-of-n": lambda s: (BestOfN(s.particles), True),
    "importance": lambda s: (
        FKSteering(s.particles, n=s.outputs, start=s.steps),
        False,
    ),
    "svdd": lambda s: (SVDD(s.outputs, s.particles), False),
    "svdd-argmax": lambda s: (SVDD(s.outputs, s.particles, "argmax"), False),
    "fk-per-output": lambda s: (FKSteering(s.particles, n=s.outputs, per_output=True), False),
    "fk": lambda s: (FKSteering(s.particles, n=s.outputs), False),
    "fk-tempered": lambda s: (FKSteering(s.particles, n=s.outputs, tempering=2.1 ** (1 / s.steps) - 1), False),
    "dts-published": lambda s: (_tree(s, estimator="published"), False),
    "dts": lambda s: (_tree(s), False),
    "dts-x0-hat": lambda s: (_tree(s, **_LOOKING), False),
}


OLD_NAMES = {
    "plain": "ancestral",
    "best of K": "best-of-n",
    "importance resampling": "importance",
    "SVDD, soft": "svdd",
    "SVDD, argmax": "svdd-argmax",
    "FK, per output": "fk-per-output",
    "FK, one population": "fk",
    "FK, tempered": "fk-tempered",
    "DTS, published": "dts-published",
    "DTS": "dts",
    "DTS, x0-hat": "dts-x0-hat",
    "DTS, x0-hat, exponent 0.3": "dts-x0-hat-narrow",
}
"""What methods were called once: in files that runs go on from and, for one release, in requests."""


def methods_by_name() -> dict[str, Make]:
    """`METHODS`, and every other registered sampler by its own name with its own settings."""
    return {name: partial(_registered, kind) for name, kind in SAMPLERS.items()} | METHODS


def _registered(kind: type[Sampler], s: Setting) -> tuple[Sampler, bool]:
    candidates = s.particles * s.outputs if kind.shares else s.particles
    return kind.sized(candidates, s.outputs), kind.population == "n"


@dataclass(frozen=True)
class Line:
    """One method, once."""

    task: str
    method: str
    seed: int
    calls: float
    """Network evaluations for each output."""
    reward: float
    frechet: float
    mmd: float
    variation: float
    unique: float
    seconds: float
    """Of the processor."""
    rollouts: int = 0
    """Size of the population or tree, for curves over budgets; 0 in the main table."""


_COLUMNS = (
    ("calls", "calls/output", "{:.0f}"),
    ("reward", "reward", "{:.3f}"),
    ("frechet", "Frechet", "{:.1f}"),
    ("mmd", "MMD x1000", "{:.1f}"),
    ("variation", "TV", "{:.3f}"),
    ("unique", "unique", "{:.2f}"),
    ("seconds", "CPU s", "{:.0f}"),
)


@dataclass
class Comparison:
    """Everything that was measured; `write` keeps it, `tables` shows it."""

    settings: dict[str, Any]
    lines: list[Line] = field(default_factory=list)
    targets: dict[str, dict[str, float]] = field(default_factory=dict)

    def has(self, task: str, method: str, seed: int, rollouts: int = 0) -> bool:
        """Whether this was measured before."""
        return any((x.task, x.method, x.seed, x.rollouts) == (task, method, seed, rollouts) for x in self.lines)

    def write(self, path: Path) -> None:
        """As JSON, in one step."""
        with replacing(path) as temporary:
            found = {"settings": self.settings, "targets": self.targets, "lines": [asdict(x) for x in self.lines]}
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path, settings: dict[str, Any]) -> Comparison:
        """What is left of an earlier run with the same settings; empty otherwise."""
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.get("settings") == settings:
                lines = [Line(**{**x, "method": OLD_NAMES.get(x["method"], x["method"])}) for x in found["lines"]]
                return cls(settings, lines, found["targets"])
        return cls(settings)

    def records(self) -> list[dict[str, Any]]:
        """A flat row for each method and seed."""
        return [asdict(x) for x in self.lines]

    def rows(self, task: str, rollouts: int = 0) -> Iterator[tuple[str, dict[str, tuple[float, float]]]]:
        """Methods with mean and half width of the 95% interval of every column, over seeds."""
        mine = [x for x in self.lines if x.task == task and x.rollouts == rollouts]
        for method in dict.fromkeys(x.method for x in mine):
            seeds = [x for x in mine if x.method == method]
            yield method, {name: interval([getattr(x, name) for x in seeds]) for name, _, _ in _COLUMNS}

    def tables(self) -> str:
        """Plain text: one table for each task and budget."""
        parts = []
        for task in dict.fromkeys(x.task for x in self.lines):
            for size in sorted({x.rollouts for x in self.lines if x.task == task}):
                about = f", {size} rollouts in all" if size else ""
                facts = self.targets[task]
                head = f"{task}{about} (target: reward {facts['reward']:.3f}, effective points {facts['ess']:.0f})"
                rows = list(self.rows(task, size))
                parts.append("\n".join([_table(head, rows), *([] if size else _unequal(rows))]))
        return "\n\n".join(parts)


def _unequal(rows: list[tuple[str, dict[str, tuple[float, float]]]]) -> list[str]:
    """Which methods did not cost what most did, as a line below a table."""
    calls = {method: columns["calls"][0] for method, columns in rows}
    usual = sorted(calls.values())[len(calls) // 2]
    others = [f"{method} {count:.0f}" for method, count in calls.items() if abs(count - usual) > 0.05 * usual]
    return [f"not at the cost of the others, {usual:.0f} calls an output: {', '.join(others)}"] if others else []


def _table(head: str, rows: list[tuple[str, dict[str, tuple[float, float]]]]) -> str:
    cells = [["", *(title for _, title, _ in _COLUMNS)]]
    for method, columns in rows:
        line = [method]
        for name, _, shape in _COLUMNS:
            mean, half = columns[name]
            exact = name in ("calls", "seconds")
            line.append(number(mean, shape) if exact else ranged(mean, half, shape))
        cells.append(line)
    return f"{head}\n{aligned(cells)}"


def compare(
    model: Any,
    tasks: list[Problem],
    out: Path,
    *,
    prompt: str = "",
    methods: list[str] | None = None,
    outputs: int = 128,
    particles: int = 4,
    steps: int = 25,
    seeds: int = 3,
    pool: int = 6144,
    budgets: list[int] | None = None,
    curves: list[str] | None = None,
    progress: bool = False,
) -> Comparison:
    """Run every method on every task, `seeds` times; what was measured before in `out` is kept.

    Args:
        model: a diffusion model with a judge.
        tasks: rewards and their KL coefficients.
        out: folder for results.json, pool.safetensors and pictures.
        prompt: what the base law is asked for.
        methods: of `methods_by_name()`; those of `METHODS` by default.
        outputs, particles, steps: `outputs` images at `particles * steps` network evaluations each.
        pool: base samples that stand for the target.
        budgets: sizes of one population or tree at which to draw distance against budget, with
            `outputs` drawn from each.

    Raises `InputError` for a method that is not known and `UnsupportedError` for a model without a judge.
    """
    chosen = list(METHODS) if methods is None else [OLD_NAMES.get(name, name) for name in methods]
    makers = methods_by_name()
    for name in chosen:
        check(name in makers, "methods", name, ", ".join(makers))
    names = [task.name for task in tasks]
    for name in curves or []:
        check(name in names, "curves", name, ", ".join(names))
    setting = Setting(outputs, particles, steps)
    process = model.process(steps=steps, max_batch=256)
    settings = {
        "model": model.name,
        "prompt": prompt,
        "outputs": outputs,
        "particles": particles,
        "steps": steps,
        "pool": pool,
        "tasks": [asdict(t) for t in tasks],
    }
    found = Comparison.read(out / "results.json", settings)
    out.mkdir(parents=True, exist_ok=True)
    points = pool_of(model, process, prompt, pool, 0, out / "pool.safetensors", progress)
    jobs = [(t, m, s) for s in range(seeds) for t in tasks for m in chosen]
    with ticking(progress, "comparing", len(jobs)) as tick:
        for task, method, seed in jobs:
            reward, target = _target(model, task, points, found)
            if not found.has(task.name, method, seed):
                samples = _once(makers[method](setting), process, prompt, reward, task.beta, seed, outputs)
                found.lines.append(_line(model, task, method, seed, samples, target))
                found.write(out / "results.json")
            tick(1)
    for seed in range(seeds if budgets else 0):
        assert budgets is not None
        # Importance resampling needs base samples alone, which all tasks can share.
        base = pool_of(model, process, prompt, max(budgets), seed + 1, out / f"base-{seed}.safetensors", progress)
        for task in (t for t in tasks if curves is None or t.name in curves):
            reward, target = _target(model, task, points, found)
            curve = _Curve(model, process, prompt, task, reward, target, seed, outputs, budgets, found)
            for line in curve.lines(base):
                found.lines.append(line)
                found.write(out / "results.json")
    return found


def _target(model: Any, task: Problem, points: Judged, found: Comparison) -> tuple[Reward, Target]:
    reward = parse_reward(task.reward).bind(model)
    scores = reward(as_samples(points))
    target = Target.tilted(points.features, points.labels, scores / task.beta)
    found.targets[task.name] = {"reward": target.mean(scores), "base": float(scores.mean()), "ess": target.ess}
    return reward, target


def _once(
    made: tuple[Sampler, bool], process: Process, prompt: str, reward: Reward, beta: float, seed: int, outputs: int
) -> Samples:
    sampler, apart = made
    began = time.process_time()
    generator = torch.Generator().manual_seed(seed)
    prompts = [prompt] * outputs if apart else [prompt]
    samples = sampler.run(process, prompts, generator=generator, reward=reward, beta=beta)
    return replace(samples, cost=replace(samples.cost, seconds=time.process_time() - began))


def _line(
    model: Any, task: Problem, method: str, seed: int, samples: Samples, target: Target, rollouts: int = 0
) -> Line:
    features, labels = judged(model, samples.outputs)
    assert samples.reward is not None
    return Line(
        task.name,
        method,
        seed,
        samples.cost.nfe / len(samples),
        float(samples.reward.mean()),
        frechet_distance(features, target),
        1000 * mmd(features, target),
        total_variation(labels, target, len(model.judge.classes)),
        unique_share(samples.outputs),
        samples.cost.seconds,
        rollouts,
    )


@dataclass(frozen=True)
class _Curve:
    """Distance against budget: one tree that grows, read by both estimators; populations of the same size."""

    model: Any
    process: Process
    prompt: str
    task: Problem
    reward: Reward
    target: Target
    seed: int
    outputs: int
    budgets: list[int]
    found: Comparison

    def lines(self, base: Judged) -> Iterator[Line]:
        """What was not measured before; `base` are base samples."""
        yield from self._trees()
        yield from self._populations()
        yield from self._resampled(base)

    def _trees(self) -> Iterator[Line]:
        trees: list[tuple[tuple[str, ...], dict[str, Any]]] = [
            (("dts", "dts-published"), {}),
            (("dts-x0-hat",), _LOOKING),
            (("dts-x0-hat-narrow",), _NARROW),
        ]
        for names, looking in trees:
            if all(self._has(name, size) for name in names for size in self.budgets):
                continue
            began = time.process_time()
            sampler = DTS(rollouts=max(self.budgets), batch=32, **looking)
            forest = sampler.plant(self.process, [self.prompt], generator=self._generator(50_000), **self._aim)
            for size in sorted(self.budgets):
                forest.grow(rollouts=size)
                spent = time.process_time() - began
                for name in names:
                    forest.sampler = replace(sampler, estimator="published" if "published" in name else "weighted")
                    if not self._has(name, size):
                        yield self._line(name, forest.samples(self.outputs), size, spent)

    def _populations(self) -> Iterator[Line]:
        for size in (b for b in sorted(self.budgets) if b <= LARGEST_POPULATION and not self._has("fk", b)):
            began = time.process_time()
            generator = self._generator(70_000)
            particles = FKSteering(size).run(self.process, [self.prompt], generator=generator, **self._aim)
            drawn = particles.select(resample(particles.log_weight, generator, "ssp", self.outputs))
            yield self._line("fk", drawn, size, time.process_time() - began)

    def _resampled(self, base: Judged) -> Iterator[Line]:
        scores, zero = self.reward(as_samples(base)), torch.zeros(self.outputs)
        for size in (b for b in sorted(self.budgets) if not self._has("importance", b)):
            index = resample(scores[:size] / self.task.beta, self._generator(80_000), "ssp", self.outputs)
            cost = Cost(nfe=size * self.process.num_steps, model_calls=self.process.num_steps)
            drawn = Samples([self.prompt], base.outputs[index], zero.long(), zero, scores[index], cost=cost)
            yield self._line("importance", drawn, size, 0.0)

    @property
    def _aim(self) -> dict[str, Any]:
        return {"reward": self.reward, "beta": self.task.beta}

    def _generator(self, first: int) -> torch.Generator:
        return torch.Generator().manual_seed(first + self.seed)

    def _has(self, name: str, size: int) -> bool:
        return self.found.has(self.task.name, name, self.seed, size)

    def _line(self, method: str, samples: Samples, size: int, seconds: float) -> Line:
        samples = replace(samples, cost=replace(samples.cost, seconds=seconds))
        return _line(self.model, self.task, method, self.seed, samples, self.target, size)
