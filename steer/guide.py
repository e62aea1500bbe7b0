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

from steer.artifacts import replacing
from steer.core import Process, Prompt, Reward, Samples, check
from steer.methods.best_of_n import Ancestral
from steer.methods.fk import FKSteering
from steer.methods.rlg import RLGuidance
from steer.metrics import interval
from steer.progress import ticking
from steer.rewards import lift

__all__ = ["Point", "Sweep", "sweep"]


@dataclass(frozen=True)
class Point:
    """One w: means over seeds (and prompts), with half widths of 95% intervals."""

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
        lines = [f"{'':10s} {'w':>5s} {'reward':>16s} {'KL':>16s} {'ESS':>6s}"]
        for p in self.points:
            reward, kl = f"{p.reward:.3f} ±{p.reward_half:.3f}", f"{p.kl:.2f} ±{p.kl_half:.2f}"
            ess = f"{p.ess:6.0%}" if p.kind == "corrected" else f"{'':6s}"
            lines.append(f"{p.kind:10s} {p.w:5.2f} {reward:>16s} {kl:>16s} {ess}")
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """guide.json and guide.png."""
        with replacing(folder / "guide.json") as temporary:
            found = {"settings": self.settings, "points": [asdict(p) for p in self.points]}
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        from steer.picture import draw_guide

        draw_guide(self, folder / "guide.png")


def sweep(
    base: Process,
    tuned: Process,
    prompts: Sequence[Prompt],
    reward: Reward,
    *,
    ws: Sequence[float] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0),
    outputs: int = 64,
    particles: int = 4,
    seeds: int = 3,
    about: dict[str, Any] | None = None,
    progress: bool = False,
    on_point: Callable[[Sweep], None] | None = None,
) -> Sweep:
    """Reward and KL at every w.

    Args:
        base, tuned: processes of the model and of its policy.
        reward: bound; it only measures.
        ws: how far to go.
        outputs: for each prompt and seed.
        particles: of corrected guidance, for each output, in one population a prompt.
        on_point: sees what is there after every w.
    """
    check(len(ws) > 0 and all(math.isfinite(w) for w in ws), "ws", ws, "finite numbers")
    found = Sweep({**(about or {}), "outputs": outputs, "particles": particles, "seeds": seeds})
    nothing = lift(_zeros)
    jobs = [(kind, w) for w in ws for kind in ("plain", "corrected")]
    with ticking(progress, "sweeping w", len(jobs) * seeds) as tick:
        for kind, w in jobs:
            rewards, drifts, shares = [], [], []
            for seed in range(seeds):
                generator = torch.Generator().manual_seed(seed)
                edit = RLGuidance(tuned, w, aim="product" if kind == "corrected" else "base")
                # Where a step is a point its KL says nothing, so that plain guidance leaves those steps alone, too.
                process = base.edited(edit).as_proposal()
                with process.session():
                    if kind == "plain":
                        samples = Ancestral(outputs).run(process, prompts, generator=generator)
                        kl = samples.kl
                        assert kl is not None
                        drifts.append(float(kl.mean()))
                    else:
                        sampler = FKSteering(outputs * particles)
                        samples = sampler.run(process, prompts, generator=generator, reward=nothing)
                        drifts.append(float(samples.kl.mean()))  # type: ignore[union-attr]
                        shares.append(float((samples.ess / (outputs * particles)).mean()))
                scores = reward(samples)
                rewards.append(float(_means(samples, scores).mean()))
                tick(1)
            (r, r_half), (k, k_half) = interval(rewards), interval(drifts)
            share = sum(shares) / len(shares) if shares else 1.0
            found.points.append(Point(kind, w, r, r_half, k, k_half, share))
            if on_point is not None:
                on_point(found)
    return found


def _zeros(outputs: Any) -> Tensor:
    return torch.zeros(len(outputs))


def _means(samples: Samples, values: Tensor) -> Tensor:
    """Weighted mean of `values` for each prompt `[B]`."""
    total = torch.zeros(len(samples.prompts), dtype=torch.float64)
    return total.index_add(0, samples.group, samples.weights * values.double())
