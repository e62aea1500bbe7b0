"""RL guidance, swept: reward and drift as w grows from the base model to its tuned policy and beyond.

Plain guidance draws from the mixed predictions. Corrected guidance weighs the same steps towards `p^(1 - w) p_tuned^w`
over whole paths, the law that plain guidance only approximates.
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

from steer.core import Process, Prompt, Reward, Sampler, Samples, check
from steer.files import replacing
from steer.measure.distances import interval
from steer.measure.tables import aligned, ranged
from steer.methods.best_of_n import Ancestral
from steer.methods.fk import FKSteering
from steer.methods.rlg import RLGuidance
from steer.progress import ticking
from steer.rewards import lift

__all__ = ["Point", "Sweep", "SweepSettings", "mean_and_error", "sweep"]


@dataclass(frozen=True)
class Point:
    """One w: means over prompts, with half widths of 95% intervals over outputs (the KL of corrected guidance has one
    number a run, so that its interval is over seeds).
    """

    kind: str
    """"plain" or "corrected"."""
    w: float
    reward: float
    reward_half: float
    kl: float
    """To the base, in nats an output, over the steps that have noise."""
    kl_half: float
    ess: float
    """Share of the particles that count, where there are weights."""


@dataclass
class Sweep:
    """Everything that was measured."""

    settings: dict[str, Any]
    points: list[Point] = field(default_factory=list)

    def table(self) -> str:
        """Plain text."""
        rows = [["", "w", "reward", "KL", "ESS"]]
        for p in self.points:
            reward, kl = ranged(p.reward, p.reward_half), ranged(p.kl, p.kl_half, "{:.2f}")
            rows.append([p.kind, f"{p.w:.2f}", reward, kl, f"{p.ess:.0%}" if p.kind == "corrected" else ""])
        return aligned(rows)

    def records(self) -> list[dict[str, Any]]:
        """A flat row for each w."""
        return [asdict(p) for p in self.points]

    def write(self, folder: Path) -> None:
        """Write guide.json in one step; `steer.pictures.charts.draw_guide` makes the picture beside it."""
        with replacing(folder / "guide.json") as temporary:
            found = {"settings": self.settings, "points": [asdict(p) for p in self.points]}
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """How a sweep is measured.

    Attributes:
        ws: how far to go.
        outputs: for each prompt and seed.
        particles: of corrected guidance, for each output, in one population a prompt.
        seeds: repetitions, from which intervals come.

    Raises `InputError`.
    """

    ws: Sequence[float] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
    outputs: int = 64
    particles: int = 4
    seeds: int = 3

    def __post_init__(self) -> None:
        check(len(self.ws) > 0 and all(math.isfinite(w) for w in self.ws), "ws", self.ws, "finite numbers")
        check(self.outputs >= 2, "outputs", self.outputs, "an integer of 2 or more, for the sake of intervals")


def sweep(
    base: Process,
    tuned: Process,
    prompts: Sequence[Prompt],
    reward: Reward,
    settings: SweepSettings,
    *,
    about: dict[str, Any] | None = None,
    progress: bool = False,
    on_point: Callable[[Sweep], None] | None = None,
) -> Sweep:
    """Reward and KL at every w.

    Args:
        base, tuned: processes of the model and of its policy.
        reward: bound; it only measures.
        on_point: sees what is there after every w.
    """
    outputs, particles, seeds = settings.outputs, settings.particles, settings.seeds
    found = Sweep({**(about or {}), "outputs": outputs, "particles": particles, "seeds": seeds})
    nothing = lift(_zeros)
    jobs = [(kind, w) for w in settings.ws for kind in ("plain", "corrected")]
    with ticking(progress, "sweeping w", len(jobs) * seeds) as tick:
        for kind, w in jobs:
            rewards, drifts, shares = [], [], []
            # Where a step is a point its KL says nothing, so that plain guidance leaves those steps alone, too.
            edit = RLGuidance(tuned, w, aim="product" if kind == "corrected" else "base")
            process = base.edited(edit).as_proposal()
            plain = kind == "plain"
            sampler: Sampler = Ancestral(outputs) if plain else FKSteering(outputs * particles)
            for seed in range(seeds):
                generator = torch.Generator().manual_seed(seed)
                with process.session():
                    samples = sampler.run(process, prompts, generator=generator, reward=None if plain else nothing)
                kl = samples.kl
                assert kl is not None
                rewards.append(mean_and_error(samples, reward(samples)))
                drifts.append(mean_and_error(samples, kl))
                shares.append(float((samples.ess / (outputs * particles)).mean()))
                tick(1)
            r, r_half = _together(rewards)
            k, k_half = _together(drifts) if plain else interval([mean for mean, _ in drifts])
            share = 1.0 if plain else sum(shares) / len(shares)
            found.points.append(Point(kind, w, r, r_half, k, k_half, share))
            if on_point is not None:
                on_point(found)
    return found


def _zeros(outputs: Any) -> Tensor:
    return torch.zeros(len(outputs))


def _together(runs: list[tuple[float, float]]) -> tuple[float, float]:
    """Mean of independent runs, each with its standard error, and the half width of the 95% interval; from the runs'
    means alone where an error is not known.
    """
    if any(math.isnan(error) for _, error in runs):
        return interval([mean for mean, _ in runs])
    errors = math.sqrt(sum(error**2 for _, error in runs)) / len(runs)
    return sum(mean for mean, _ in runs) / len(runs), 1.96 * errors


def mean_and_error(samples: Samples, values: Tensor) -> tuple[float, float]:
    """Weighted mean of `values` `[N]`, averaged over prompts, and its standard error given the prompts.

    Particles that share an ancestor at the start are one draw (Chan and Lai 2013, equation 2.17: the error from one
    run's genealogies); rows without a trace are independent. Consistent in the number of rows, too small where few
    ancestors are left; not a number where one is.
    """
    eves = torch.arange(len(samples))
    for generation in samples.trace or []:
        eves = eves[generation.ancestors]
    w, x, group, prompts = samples.weights, values.double(), samples.group, len(samples.prompts)
    means = torch.zeros(prompts, dtype=torch.float64).index_add(0, group, w * x)
    families = torch.zeros(len(samples), dtype=torch.float64).index_add(0, eves, w * (x - means[group]))
    square = torch.zeros(prompts, dtype=torch.float64).index_add(0, group, families.square())
    alive = torch.bincount(group[eves.unique()], minlength=prompts).double()
    return float(means.mean()), float((square * alive / (alive - 1)).sum().sqrt() / prompts)
