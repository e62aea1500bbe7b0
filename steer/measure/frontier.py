"""Reward against drift from the base model: methods, each at several strengths, on one model and the same prompts.

Methods can be compared at equal KL only where KL is known: exactly, as a bound, or as a population's estimate (see
`Samples.kl_kind`). Of the others the reward and the cost are told, and why there is no KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from steer.core import Prompt, Reward, Samples, check
from steer.core.notebook import text_html
from steer.files import as_json, write_text
from steer.measure.distances import interval
from steer.measure.tables import aligned, ranged
from steer.model import Model, as_prompts
from steer.progress import ticking
from steer.rewards import as_reward

__all__ = ["SWEEPS", "Frontier", "Point", "frontier"]

SWEEPS: dict[str, list[dict[str, Any]]] = {
    "best-of-n": [{"sampler": "best-of-n", "n": n} for n in (2, 4, 8, 16)],
    "fk": [{"sampler": "fk", "num_particles": 16, "beta": beta} for beta in (2.0, 0.5, 0.125)],
    "svdd": [{"sampler": "svdd", "num_candidates": m} for m in (2, 4)],
}
"""Settings of `generate` by the name of a method, from weak to strong. FK's betas are in units of the reward's spread
over plain samples.
"""


@dataclass(frozen=True)
class Point:
    """One method at one strength."""

    method: str
    setting: str
    rewards: list[float]
    """Mean reward by prompt, of the steered law: weighted where the population is."""
    kls: list[float] | None
    """Mean KL in nats by prompt, or None."""
    kl_kind: str
    tokens: float
    """Tokens drawn for each prompt, of every candidate."""

    @property
    def reward(self) -> tuple[float, float]:
        """Mean and half width of its 95% interval over prompts; NaN for the width of one prompt."""
        return interval(self.rewards)

    @property
    def kl(self) -> tuple[float, float] | None:
        """The same of the KL; None where it is not known, or infinite for some prompt."""
        known = self.kls is not None and all(map(math.isfinite, self.kls))
        return interval(self.kls) if self.kls is not None and known else None


@dataclass(frozen=True)
class Frontier:
    """What was measured; the first point is the base model."""

    points: list[Point]

    def of(self, method: str) -> list[Point]:
        """Points of one method, the base model before them, by KL where it is known."""
        mine = [self.points[0], *(p for p in self.points[1:] if p.method == method)]
        return sorted(mine, key=lambda p: math.inf if p.kl is None else p.kl[0])

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(p.method for p in self.points[1:]))

    def at_kl(self, kl: float) -> dict[str, float | None]:
        """Mean reward of each method at this KL, in a straight line between its points; None beyond them, and where its
        KL is not known.
        """
        found: dict[str, float | None] = {}
        for method in self.methods:
            line = [(p.kl[0], p.reward[0]) for p in self.of(method) if p.kl is not None]
            pairs = [(a, b) for a, b in pairwise(line) if a[0] <= kl <= b[0]]
            found[method] = _between(*pairs[0], kl) if pairs else None
        return found

    def table(self) -> str:
        """Plain text: a row for each point."""
        rows = [["method", "setting", "reward", "KL", "kind of KL", "tokens"]]
        for p in self.points:
            kl = "" if p.kl is None else ranged(*p.kl)
            rows.append([p.method, p.setting, ranged(*p.reward), kl, p.kl_kind, f"{p.tokens:.0f}"])
        return aligned(rows)

    def write(self, folder: Path | str) -> None:
        """Write frontier.json into `folder` in one step."""
        points = [{**asdict(p), "reward": p.reward, "kl": p.kl} for p in self.points]
        write_text(Path(folder) / "frontier.json", as_json({"points": points}) + "\n")

    def __repr__(self) -> str:
        return f"Frontier({', '.join(self.methods)}; {len(self.points)} points, {len(self.points[0].rewards)} prompts)"

    def _repr_html_(self) -> str:
        return text_html(self.table())


def frontier(
    model: Model,
    prompts: Sequence[Prompt],
    reward: Reward | str | Callable[..., Any],
    methods: Sequence[str] | Mapping[str, Sequence[Mapping[str, Any]]] = ("best-of-n", "fk"),
    *,
    n: int = 8,
    seed: int = 0,
    progress: bool = False,
    on_point: Callable[[Point, Samples], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Frontier:
    """Generate by every method at every strength, and measure reward and KL.

    Args:
        model: any model whose `generate` takes the reward.
        prompts: at least two, for intervals.
        reward: what is measured, and what samplers choose by.
        methods: names in `SWEEPS`, or by a name of your own the settings of `generate` from weak to strong:
            `{"calm": [{"edits": calm(0.1)}, {"edits": calm(0.2)}]}`.
        n: samples of the base model, and of methods that are edits, for each prompt.
        on_point: is given each point as it is measured, with its samples.
        on_step: is called after every step with the steps of this point that are done, and of how many; what it raises
            ends the measurement.
        settings: of every call of `generate`, such as `max_new_tokens` and `temperature`.

    Raises `InputError`.
    """
    prompts = as_prompts(prompts)
    check(len(prompts) >= 2, "prompts", f"{len(prompts)} prompts", "at least 2: intervals are over prompts")
    sweeps = _sweeps(methods)
    scored = as_reward(reward)
    check(scored is not None, "reward", reward, "a reward, an expression or a function")
    shared = {"reward": scored, "seed": seed, "progress": on_step or False, **settings}
    points: list[Point] = []

    def measured(method: str, given: Mapping[str, Any], samples: Samples) -> None:
        points.append(_point(method, given, samples))
        if on_point is not None:
            on_point(points[-1], samples)

    with ticking(progress, "methods", 1 + sum(map(len, sweeps.values()))) as tick:
        base = model.generate(list(prompts), n=n, **shared)
        spread = float(base.reward.std())
        measured("base", {"n": n}, base)
        tick(1)
        for method, sweep in sweeps.items():
            for given in sweep:
                own = {**({} if "sampler" in given else {"n": n}), **given}
                if method in SWEEPS and "beta" in own:
                    own["beta"] = max(own["beta"] * spread, 1e-6)
                measured(method, own, model.generate(list(prompts), **{**shared, **own}))
                tick(1)
    return Frontier(points)


def _sweeps(methods: Any) -> dict[str, list[dict[str, Any]]]:
    if not isinstance(methods, Mapping):
        for name in methods:
            check(name in SWEEPS, "methods", name, f"{', '.join(SWEEPS)}, or settings of generate by a name")
        return {name: SWEEPS[name] for name in methods}
    for name, sweep in methods.items():
        fits = isinstance(sweep, Sequence) and bool(sweep) and all(isinstance(s, Mapping) for s in sweep)
        check(
            fits and name != "base", f"methods[{name!r}]", sweep, "a list of settings of generate, from weak to strong"
        )
    return {name: [dict(s) for s in sweep] for name, sweep in methods.items()}


def _point(method: str, given: Mapping[str, Any], samples: Samples) -> Point:
    kl = samples.kl
    told = ", ".join(f"{k} {_brief(v)}" for k, v in given.items() if k != "sampler")
    return Point(
        method=method,
        setting=told,
        rewards=samples.mean_reward().tolist(),
        kl_kind=samples.kl_kind or "unknown",
        kls=None if kl is None else samples.mean(kl).tolist(),
        tokens=samples.cost.generated_tokens / len(samples.prompts),
    )


def _brief(value: Any) -> str:
    if hasattr(value, "strength"):
        return f"at {value.strength:g}"
    if hasattr(value, "tuned"):
        return f"at w {value.w:g}"
    text = f"{value:.3g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _between(low: tuple[float, float], high: tuple[float, float], kl: float) -> float:
    share = (kl - low[0]) / (high[0] - low[0]) if high[0] > low[0] else 1.0
    return low[1] + share * (high[1] - low[1])
