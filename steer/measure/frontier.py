"""Reward against drift from the base model: methods, each at several strengths, on one model and the same prompts.

Methods can be compared at equal KL only where KL is known: exactly, as a bound, or as a population's estimate (see
`Samples.kl_kind`). Of the others the reward and the cost are told, and why there is no KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from steer.core import Prompt, Reward, check
from steer.core.notebook import text_html
from steer.files import as_json, write_text
from steer.measure.distances import interval
from steer.measure.tables import aligned, few, ranged
from steer.methods.samplers import make_sampler, sampler_fields, sampler_name
from steer.model import Model, as_prompts
from steer.progress import ticking
from steer.rewards import as_reward

__all__ = ["SWEEPS", "Frontier", "Point", "frontier"]

SWEEPS: dict[str, list[dict[str, Any]]] = {
    "best-of-n": [{"sampler": "best-of-n", "n": n} for n in (2, 4, 8, 16)],
    "fk": [{"sampler": "fk", "num_particles": 16, "beta": beta} for beta in (2.0, 0.5, 0.125)],
    "svdd": [{"sampler": "svdd", "num_candidates": m} for m in (2, 4)],
    "dts-star": [{"sampler": "dts-star", "rollouts": n, "batch": 8} for n in (8, 16)],
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
    also: dict[str, list[float]] = field(default_factory=dict)
    """Mean by prompt of rewards that no method aimed at, by their names."""

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
    candidates: int | None = None
    """Texts that every point drew for each prompt, where all drew as many."""
    kls: tuple[float, ...] = (0.5, 2.0)
    """Drifts at which methods are compared, in nats a text."""

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
        return {method: found and found[0] for method, found in self.intervals_at_kl(kl).items()}

    def intervals_at_kl(self, kl: float) -> dict[str, tuple[float, float] | None]:
        """`at_kl` with the half width of the 95% interval over prompts, for the share of each point as it is."""
        found: dict[str, tuple[float, float] | None] = {}
        for method in self.methods:
            line = [(p.kl[0], p.rewards) for p in self.of(method) if p.kl is not None]
            pairs = [(a, b) for a, b in pairwise(line) if a[0] <= kl <= b[0]]
            found[method] = _between(*pairs[0], kl) if pairs else None
        return found

    def non_dominated(self) -> list[Point]:
        """Points of known KL that no other beats: none has as much reward for as little KL (and, where points drew
        different numbers of texts, as few tokens) and is better in one of them. Means alone count, not intervals.
        """
        known = [p for p in self.points if p.kl is not None]
        scored = [(-p.reward[0], p.kl[0], 0.0 if self.candidates else p.tokens) for p in known if p.kl is not None]

        def beaten(mine: tuple[float, ...]) -> bool:
            return any(all(a <= b for a, b in zip(o, mine, strict=True)) and o != mine for o in scored)

        return [p for p, mine in zip(known, scored, strict=True) if not beaten(mine)]

    def table(self) -> str:
        """Plain text: a row for each point, the points that none beats marked, and each method at equal KL."""
        more = list(self.points[0].also)
        best = {id(p) for p in self.non_dominated()}
        rows = [["method", "setting", "reward", "KL", "kind of KL", "tokens", *more, ""]]
        for p in self.points:
            kl = "" if p.kl is None else ranged(*p.kl)
            others = [ranged(*interval(p.also[name])) for name in more]
            mark = "unbeaten" if id(p) in best else ""
            rows.append([p.method, p.setting, ranged(*p.reward), kl, p.kl_kind, f"{p.tokens:.0f}", *others, mark])
        same = f"every point drew {self.candidates} texts for each prompt" if self.candidates else ""
        warning = few(len(self.points[0].rewards))
        return "\n".join([aligned(rows), *filter(None, [same, *map(self._at, self.kls), warning])])

    def _at(self, kl: float) -> str:
        found = self.intervals_at_kl(kl)
        order = sorted((m for m in found if found[m]), key=lambda m: -(found[m] or (0.0,))[0])
        shown = [f"{m} {ranged(*x)}" for m in order if (x := found[m]) is not None]
        missing = [m for m in found if found[m] is None]
        without = f"; not there: {', '.join(missing)}" if missing else ""
        return f"at KL {kl:g}: {', '.join(shown) or 'none'}{without}"

    def records(self) -> list[dict[str, Any]]:
        """A flat row for each point."""
        best = {id(p) for p in self.non_dominated()}
        return [
            {
                "method": p.method,
                "setting": p.setting,
                "reward": p.reward[0],
                "reward_half": p.reward[1],
                "kl": p.kl and p.kl[0],
                "kl_half": p.kl and p.kl[1],
                "kl_kind": p.kl_kind,
                "tokens": p.tokens,
                **{name: interval(values)[0] for name, values in p.also.items()},
                **{f"{name}_half": interval(values)[1] for name, values in p.also.items()},
                "unbeaten": id(p) in best,
            }
            for p in self.points
        ]

    def write(self, folder: Path | str) -> None:
        """Write frontier.json into `folder` in one step."""
        points = [{**asdict(p), "reward": p.reward, "kl": p.kl} for p in self.points]
        at_kl = {f"{kl:g}": self.intervals_at_kl(kl) for kl in self.kls}
        whole = {"points": points, "candidates": self.candidates, "at_kl": at_kl}
        write_text(Path(folder) / "frontier.json", as_json(whole) + "\n")

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
    candidates: int | None = None,
    also: Sequence[Reward | str] = (),
    seed: int = 0,
    progress: bool = False,
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
        candidates: texts that every setting draws for each prompt, in place of `n`, so that all cost the same: a
            best-of-4 runs `candidates / 4` times.
        also: rewards that are measured on the same texts and that no method aims at.
        settings: of every call of `generate`, such as `max_new_tokens` and `temperature`.

    Raises `InputError`.
    """
    prompts = as_prompts(prompts)
    check(len(prompts) >= 2, "prompts", f"{len(prompts)} prompts", "at least 2: intervals are over prompts")
    sweeps = _sweeps(methods)
    scored = as_reward(reward)
    check(scored is not None, "reward", reward, "a reward, an expression or a function")
    others = {str(one): one.bind(model) for given in also if (one := as_reward(given)) is not None}
    check(candidates is None or candidates >= 1, "candidates", candidates, "an integer of 1 or more")
    runs = {id(own): _runs(own, candidates) for sweep in sweeps.values() for own in sweep}
    shared = {"reward": scored, "seed": seed, **settings}

    def point(method: str, own: dict[str, Any], times: int) -> tuple[Point, Any]:
        samples = model.generate(list(prompts) * times, **{**shared, **own})
        return _point(method, own, samples, times, others), samples

    count = n if candidates is None else candidates
    with ticking(progress, "methods", 1 + sum(map(len, sweeps.values()))) as tick:
        first, base = point("base", {"n": count}, 1)
        spread, points = float(base.reward.std()), [first]
        tick(1)
        for method, sweep in sweeps.items():
            for given in sweep:
                own = {**({} if "sampler" in given else {"n": count}), **given}
                if method in SWEEPS and "beta" in own:
                    own["beta"] = max(own["beta"] * spread, 1e-6)
                points.append(point(method, own, runs[id(given)])[0])
                tick(1)
    return Frontier(points, candidates)


def _runs(own: Mapping[str, Any], candidates: int | None) -> int:
    """How often a sampler is run on each prompt so that it draws `candidates` texts. Raises `InputError`."""
    if candidates is None or own.get("sampler") is None:
        return 1
    named = isinstance(own["sampler"], str)
    fields = sampler_fields(own["sampler"]) if named else []
    sampler = make_sampler(own["sampler"], **{k: v for k, v in own.items() if k in fields})
    drawn = getattr(sampler, "rollouts", None) or sampler.rows
    allowed = f"a multiple of {drawn}, which {sampler_name(sampler)} draws"
    check(candidates % drawn == 0, "candidates", candidates, allowed)
    return candidates // drawn


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


def _point(method: str, given: Mapping[str, Any], samples: Any, times: int, others: Mapping[str, Reward]) -> Point:
    kl = samples.kl
    told = ", ".join(f"{k} {_brief(v)}" for k, v in given.items() if k not in ("sampler", "batch"))

    def by_prompt(values: Any) -> list[float]:
        # Prompts stand one after the other as often as the method was run.
        found: list[float] = samples.mean(values).reshape(times, -1).mean(0).tolist()
        return found

    return Point(
        method=method,
        setting=told,
        rewards=by_prompt(samples.reward),
        kl_kind=samples.kl_kind or "unknown",
        kls=None if kl is None else by_prompt(kl),
        tokens=times * samples.cost.generated_tokens / len(samples.prompts),
        also={name: by_prompt(one(samples)) for name, one in others.items()},
    )


def _brief(value: Any) -> str:
    if hasattr(value, "strength"):
        return f"at {value.strength:g}"
    if hasattr(value, "tuned"):
        return f"at w {value.w:g}"
    text = f"{value:.3g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _between(low: tuple[float, list[float]], high: tuple[float, list[float]], kl: float) -> tuple[float, float]:
    share = (kl - low[0]) / (high[0] - low[0]) if high[0] > low[0] else 1.0
    return interval([a + share * (b - a) for a, b in zip(low[1], high[1], strict=True)])
