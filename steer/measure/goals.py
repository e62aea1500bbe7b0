"""Steerability towards goals: how far a text ends from where it was asked to go, and what else moved.

A text is a point in a space of goals, one dimension for each measure of a text, each scaled so that the central 95% of
the seed texts spans [0, 1], and clipped. With `z_0` the source, `z*` the goal, `z` what came out, `d = z* - z_0`,
`u = d / |d|` and `e = z* - z` (Chang et al. 2025, 2505.23816):

    error           |e|
    miscalibration  |<e, u>| / |d|
    orthogonality   |e - <e, u> u| / |z - z_0|, clipped to [0, 1]: the share of the movement that nobody asked for

Letters: `N` texts, `d` dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.core import InputError, Reward, RewardError, Samples, check
from steer.core.errors import first_line
from steer.files import as_json, write_text
from steer.measure.tables import aligned, few, number
from steer.progress import ticking
from steer.rewards import lift
from steer.rewards.text import words

__all__ = [
    "DIMENSIONS",
    "Coverage",
    "GoalRow",
    "GoalSettings",
    "Goals",
    "Scale",
    "Steered",
    "binned",
    "measure_goals",
    "metrics",
    "mtld",
    "request",
]

FEWEST_SEEDS = 20
"""A central 95% of fewer texts is two texts."""


def mtld(text: str, threshold: float = 0.72) -> float:
    """Measure of textual lexical diversity (McCarthy and Jarvis 2010): words over factors, the mean of both directions.
    A factor ends where the share of different words falls below `threshold`; the rest counts as the part of a factor
    that it is. The number of words where there is no factor at all.
    """
    tokens = words(text)
    return (_one_way(tokens, threshold) + _one_way(tokens[::-1], threshold)) / 2


def _one_way(tokens: Sequence[str], threshold: float) -> float:
    factors, seen, length = 0.0, set[str](), 0
    for token in tokens:
        seen.add(token)
        length += 1
        if len(seen) / length < threshold:
            factors, seen, length = factors + 1, set(), 0
    if length:
        factors += (1 - len(seen) / length) / (1 - threshold)
    return len(tokens) / factors if factors > 0 else float(len(tokens))


def _each(measure: Callable[[str], float]) -> Reward:
    return lift(lambda outputs: torch.tensor([measure(text) for text in outputs], dtype=torch.float64))


DIMENSIONS: dict[str, str | Reward] = {
    "difficulty": "readability:grade",
    "length": _each(lambda text: math.log(1 + len(words(text)))),
    "diversity": _each(mtld),
    "sentiment": "sentiment",
}
"""Measures of a text that need no download."""

_WORDING = {
    "difficulty": ("harder to read", "easier to read"),
    "length": ("longer", "shorter"),
    "diversity": ("more varied in its words", "more repetitive in its words"),
    "sentiment": ("more positive", "more negative"),
}


# ------------------------------------------------------------------------------------------------------------- space


@dataclass(frozen=True)
class Scale:
    """The linear map of every dimension to [0, 1], fitted to seed texts."""

    names: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def fit(cls, names: Sequence[str], values: Tensor) -> Scale:
        """From measures of the seed texts `[N, d]`. Raises `InputError` for too few of them, or a constant measure."""
        check(len(values) >= FEWEST_SEEDS, "texts", f"{len(values)} texts", f"at least {FEWEST_SEEDS}, for the scale")
        quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
        low, high = torch.quantile(values.double(), quantiles, dim=0)
        for name, a, b in zip(names, low, high, strict=True):
            check(bool(b > a), f"dimension {name}", f"{float(a):g} for 95% of the texts", "a measure that varies")
        return cls(tuple(names), tuple(low.tolist()), tuple(high.tolist()))

    def __call__(self, values: Tensor) -> Tensor:
        """Points `[N, d]` of measures `[N, d]`."""
        low, high = (torch.tensor(x, dtype=torch.float64) for x in (self.low, self.high))
        return ((values.double() - low) / (high - low)).clamp(0, 1)


def measured(texts: Sequence[str], dimensions: Mapping[str, Reward]) -> Tensor:
    """Measures `[N, d]`. Raises `InputError` naming the text and the dimension of one that is no number."""
    zero = torch.zeros(len(texts), dtype=torch.float64)
    samples = Samples([""] * len(texts), list(texts), torch.arange(len(texts)), zero)
    columns = []
    for name, reward in dimensions.items():
        try:
            column = reward(samples).double()
        except RewardError as error:
            raise InputError(f"dimension {name}", first_line(error), "a finite number for every text") from error
        bad = (~torch.isfinite(column)).nonzero()
        if len(bad):
            raise InputError(f"text {int(bad[0])}: {name}", float(column[int(bad[0])]), "a finite number")
        columns.append(column)
    return torch.stack(columns, 1)


def metrics(source: Tensor, goal: Tensor, found: Tensor) -> dict[str, Tensor]:
    """Error, miscalibration and orthogonality `[N]` each, of points `[N, d]`. A text that has not moved has
    orthogonality 0. Raises `InputError` where a goal is its source.
    """
    wanted, missed, moved = goal - source, goal - found, (found - source).norm(dim=1)
    size = wanted.norm(dim=1)
    check(bool((size > 0).all()), "goal", "a shift of 0", "goals that are not where the text is")
    unit = wanted / size.unsqueeze(1)
    along = (missed * unit).sum(1)
    across = (missed - along.unsqueeze(1) * unit).norm(dim=1)
    share = torch.where(moved > 0, across / moved.clamp_min(1e-300), 0.0).clamp(0, 1)
    return {"error": missed.norm(dim=1), "miscalibration": along.abs() / size, "orthogonality": share}


_EDGES = (-0.5, -0.2, -0.1, 0.1, 0.2, 0.5)


def binned(source: Tensor, point: Tensor) -> Tensor:
    """`point` `[N, d]` as the source moved by whole bins over 7: the published evaluator's seven bins around a source,
    without its overflow at the upper end of the scale.
    """
    edges = source.unsqueeze(-1) + torch.tensor(_EDGES, dtype=torch.float64)
    return source + ((point.unsqueeze(-1) >= edges).sum(-1) - 3) / 7


# ------------------------------------------------------------------------------------------------------------- probe


@dataclass(frozen=True)
class Coverage:
    """How evenly the seed texts lie in the space of goals."""

    share: float
    """Effective number of seeds, weighted to be uniform, over their number: 1 where they are uniform already."""
    auc: float
    """Of a classifier of seeds against uniform points: .5 where they cannot be told apart."""


def uniform_weights(points: Tensor, generator: torch.Generator) -> tuple[Tensor, Coverage]:
    """Weights `[N]`, sum 1, that make points `[N, d]` uniform in the cube: the odds of a logistic regression, linear
    and quadratic in each dimension, of uniform points against these.
    """
    others = torch.rand(points.shape, generator=generator, dtype=torch.float64)
    x = torch.cat([points.double(), others])
    features = torch.cat([x, x.square(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    label = torch.cat([torch.zeros(len(points)), torch.ones(len(others))]).double()
    w = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    fit = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        fit.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(features @ w, label) + 1e-6 * w.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    fit.step(loss)  # type: ignore[no-untyped-call]
    odds = (features @ w).detach()
    mine, theirs = odds[: len(points)], odds[len(points) :]
    weights = torch.softmax(mine, 0)
    above = (theirs.unsqueeze(1) > mine).double() + 0.5 * (theirs.unsqueeze(1) == mine).double()
    return weights, Coverage(coverage_share(weights), float(above.mean()))


def coverage_share(weights: Tensor) -> float:
    """Effective sample size of weights `[N]` over their number."""
    return float(weights.sum().square() / weights.square().sum() / len(weights))


def _goals(sources: Tensor, count: int, active: int, generator: torch.Generator) -> Tensor:
    """`count` goals for each source `[S, d]`: `[S, count, d]`, uniform where `active` dimensions move by .1 to .7."""
    found = sources.unsqueeze(1).repeat(1, count, 1)
    for s in range(len(sources)):
        for g in range(count):
            for d in torch.randperm(sources.shape[1], generator=generator)[:active].tolist():
                z = float(sources[s, d])
                while not 0.1 <= abs(float(found[s, g, d]) - z) <= 0.7:
                    found[s, g, d] = torch.rand(1, generator=generator, dtype=torch.float64)
    return found


def request(text: str, shift: Mapping[str, float], negative: bool = False) -> str:
    """The prompt that asks for a text to be moved by `shift` in some dimensions; `negative`: and not in others."""
    asked = []
    for name, by in shift.items():
        up, down = _WORDING.get(name, (f"higher in {name}", f"lower in {name}"))
        degree = "slightly " if abs(by) < 0.2 else "much " if abs(by) > 0.5 else ""
        asked.append(f"{degree}{up if by > 0 else down}")
    rest = " Do not change anything else about it." if negative else ""
    return f"Rewrite the text below so that it is {', '.join(asked)}.{rest} Answer with the new text alone.\n\n{text}"


# ------------------------------------------------------------------------------------------------------------- study


@dataclass(frozen=True)
class GoalSettings:
    """How large the probe is, and how texts are drawn."""

    sources: int = 16
    goals: int = 8
    active: int = 3
    best_of: int = 8
    binned: bool = False
    """Measure in the published evaluator's bins."""
    seed: int = 0
    max_new_tokens: int = 96
    temperature: float = 1.0


@dataclass(frozen=True)
class Steered:
    """A steering vector for one dimension, and the shift that a unit of strength makes."""

    edit: Any
    slope: float


@dataclass(frozen=True)
class GoalRow:
    """One way to ask. Medians with 95% intervals by bootstrap over sources, and quartiles of the error."""

    method: str
    error: float
    error_low: float
    error_high: float
    error_quartiles: tuple[float, float]
    miscalibration: float
    orthogonality: float
    reached: float
    """Share of requests that end within an error of .2."""


@dataclass
class Goals:
    """What was measured."""

    settings: dict[str, Any]
    scale: Scale
    coverage: Coverage
    rows: list[GoalRow] = field(default_factory=list)
    deciles: dict[str, list[float | None]] = field(default_factory=dict)
    """By method, the share of requests within .2 by decile of the goal's first moved dimension."""
    slopes: dict[str, float] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def table(self) -> str:
        """Plain text."""
        rows = [["", "error", "95% interval", "quartiles", "miscalibration", "orthogonality", "within .2"]]
        for r in self.rows:
            low, high = r.error_quartiles
            rows.append(
                [
                    r.method,
                    number(r.error),
                    f"{number(r.error_low)} .. {number(r.error_high)}",
                    f"{number(low)} .. {number(high)}",
                    number(r.miscalibration),
                    number(r.orthogonality),
                    f"{r.reached:.0%}",
                ]
            )
        about = (
            f"medians over {self.settings['sources']} sources x {self.settings['goals']} goals; seeds cover "
            f"{self.coverage.share:.0%} of the space evenly (AUC against uniform {self.coverage.auc:.2f})"
        )
        slope = ", ".join(f"{name} {s:+.2f}" for name, s in self.slopes.items())
        lines = [about, f"shift a unit of strength: {slope}" if slope else "", few(self.settings["sources"], "sources")]
        return "\n".join([aligned(rows), *filter(None, lines)])

    def records(self) -> list[dict[str, Any]]:
        """A flat row for each way to ask."""
        flat = []
        for r in self.rows:
            row = asdict(r)
            low, high = row.pop("error_quartiles")
            flat.append(row | {"error_quartile_1": low, "error_quartile_3": high})
        return flat

    def write(self, folder: Path | str) -> None:
        """Write goals.json into `folder` in one step."""
        write_text(Path(folder) / "goals.json", as_json(asdict(self)) + "\n")


def measure_goals(
    model: Any,
    texts: Sequence[str],
    dimensions: Mapping[str, Reward],
    edits: Mapping[str, Any] | None = None,
    settings: GoalSettings | None = None,
    *,
    progress: bool = False,
) -> Goals:
    """Ask for texts at goals, and measure where they end.

    Args:
        texts: at least 20 seed texts, which make the scale and are the sources.
        dimensions: measures of a text by name, bound.
        edits: a steering vector by the dimension that it moves; its strength is its shift over a slope that is fitted
            by least squares on the first half of the goals, and only the second half is reported for all rows.

    Raises `InputError`.
    """
    settings, edits = settings or GoalSettings(), dict(edits or {})
    check(len(dimensions) >= 2, "dimension", list(dimensions), "at least 2: side effects need another one")
    check(1 <= settings.active <= len(dimensions), "active", settings.active, f"1 to {len(dimensions)}")
    check(settings.goals >= 2, "goals", settings.goals, "at least 2: slopes are fitted on the first half")
    check(1 <= settings.sources <= len(texts), "sources", settings.sources, f"1 to {len(texts)}, the texts")
    for name in edits:
        check(name in dimensions, "edit", name, f"a dimension: {', '.join(dimensions)}")
    generator = torch.Generator().manual_seed(settings.seed)
    values = measured(texts, dimensions)
    scale = Scale.fit(list(dimensions), values)
    points = scale(values)
    weights, coverage = uniform_weights(points, generator)
    chosen = torch.multinomial(weights, settings.sources, replacement=False, generator=generator)
    goals = _goals(points[chosen], settings.goals, settings.active, generator)
    probe = _Probe(model, [texts[i] for i in chosen.tolist()], points[chosen], goals, dimensions, scale, settings)
    found = Goals({**asdict(settings), "texts": len(texts)}, scale, coverage)
    with ticking(progress, "asking", 3 + 3 * bool(edits)) as tick:
        steered = {name: probe.calibrated(name, edit) for name, edit in edits.items()}
        found.slopes = {name: one.slope for name, one in steered.items()}
        tick(int(bool(edits)))
        ways: list[tuple[str, dict[str, Any]]] = [("prompt", {}), ("prompt + negative", {"negative": True})]
        ways.append((f"best of {settings.best_of}", {"best_of": settings.best_of}))
        if steered:
            ways += [("edits", {"steered": steered, "asked": False}), ("edits + prompt", {"steered": steered})]
        for name, way in ways:
            row, deciles, example = probe.row(name, **way)
            found.rows.append(row)
            found.deciles[name] = deciles
            found.examples.append(example)
            tick(1)
    return found


@dataclass(frozen=True)
class _Probe:
    model: Any
    texts: list[str]
    sources: Tensor
    goals: Tensor
    dimensions: Mapping[str, Reward]
    scale: Scale
    settings: GoalSettings

    @property
    def _half(self) -> int:
        return self.settings.goals // 2

    def _drawn(self, prompts: list[Any], edits: Any = (), n: int = 1) -> list[str]:
        s = self.settings
        drawn = {"max_new_tokens": s.max_new_tokens, "temperature": s.temperature, "seed": s.seed, "n": n}
        return list(self.model.generate(prompts, edits=edits, **drawn).texts)

    def calibrated(self, name: str, edit: Any) -> Steered:
        """The edit with the shift that a unit of strength makes in its dimension, on rewrites of every source."""
        prompts, shifts, doses = [request_same(text) for text in self.texts], [], []
        at = list(self.dimensions).index(name)
        own = edit.strength or 1.0
        plain = self.scale(measured(self._drawn(prompts), self.dimensions))[:, at]
        for dose in (-own, own):
            there = self.scale(measured(self._drawn(prompts, [replace(edit, strength=dose)]), self.dimensions))[:, at]
            shifts.append(there - plain)
            doses.append(torch.full_like(plain, dose))
        x, y = torch.cat(doses), torch.cat(shifts)
        slope = float((x @ y) / (x @ x))
        check(slope != 0, f"edit {name}", "a shift of 0 at its own strength", "an edit that moves its dimension")
        return Steered(edit, slope)

    def row(
        self,
        name: str,
        negative: bool = False,
        best_of: int = 1,
        steered: Mapping[str, Steered] | None = None,
        asked: bool = True,
    ) -> tuple[GoalRow, list[float | None], dict[str, Any]]:
        """Ask in one way for the second half of the goals."""
        goals = self.goals[:, self._half :]
        count = goals.shape[1]
        sources = self.sources.unsqueeze(1).expand_as(goals).reshape(-1, goals.shape[2])
        goals = goals.reshape(sources.shape)
        texts = [text for text in self.texts for _ in range(count)]
        shifts = [_shift(self.scale.names, z, to) for z, to in zip(sources, goals, strict=True)]
        prompts: list[Any] = [
            request(text, by, negative) if asked else request_same(text) for text, by in zip(texts, shifts, strict=True)
        ]
        edits = () if steered is None else [_dosed(steered, by) for by in shifts]
        written = self._drawn(prompts, edits, best_of)
        places = self.scale(measured(written, self.dimensions)).reshape(len(prompts), best_of, -1)
        nearest = (goals.unsqueeze(1) - places).norm(dim=2).argmin(1)
        found = places[torch.arange(len(prompts)), nearest]
        if self.settings.binned:
            goals, found = binned(sources, goals), binned(sources, found)
            kept = (goals != sources).any(1)
            sources, goals, found = sources[kept], goals[kept], found[kept]
        values = metrics(sources, goals, found)
        error = values["error"]
        owner = torch.arange(len(self.texts)).repeat_interleave(count)
        owner = owner if len(owner) == len(error) else owner[kept]
        low, high = _bootstrap(error, owner, len(self.texts))
        quartiles = torch.quantile(error, torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
        row = GoalRow(
            name,
            float(error.median()),
            low,
            high,
            (quartiles[0], quartiles[1]),
            float(values["miscalibration"].median()),
            float(values["orthogonality"].median()),
            float((error <= 0.2).double().mean()),
        )
        example = {"way": name, "prompt": str(prompts[0]), "text": written[int(nearest[0])]}
        return row, _by_decile(sources, goals, error), example


def request_same(text: str) -> str:
    """The prompt that asks for a text again, for edits that are told nothing of the goal."""
    return f"Rewrite the text below. Answer with the new text alone.\n\n{text}"


def _shift(names: Sequence[str], source: Tensor, goal: Tensor) -> dict[str, float]:
    return {name: float(g - s) for name, s, g in zip(names, source, goal, strict=True) if g != s}


def _dosed(steered: Mapping[str, Steered], shift: Mapping[str, float]) -> list[Any]:
    mine = [(steered[name], by) for name, by in shift.items() if name in steered]
    return [replace(one.edit, strength=by / one.slope) for one, by in mine]


def _bootstrap(values: Tensor, owner: Tensor, sources: int, draws: int = 1000) -> tuple[float, float]:
    """95% interval of the median of `values` `[N]`, over sources drawn again."""
    generator = torch.Generator().manual_seed(0)
    groups = [values[owner == s] for s in range(sources)]
    medians = []
    for _ in range(draws):
        again = torch.randint(sources, (sources,), generator=generator).tolist()
        together = torch.cat([groups[s] for s in again])
        if len(together):
            medians.append(together.median())
    low, high = torch.quantile(torch.stack(medians), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _by_decile(sources: Tensor, goals: Tensor, error: Tensor) -> list[float | None]:
    """Share within .2 by decile of the goal in its first moved dimension; None for a decile without requests."""
    first = (goals != sources).double().argmax(1)
    place = goals[torch.arange(len(goals)), first]
    shares: list[float | None] = []
    for low, high in pairwise([i / 10 for i in range(11)]):
        mine = (place >= low) & ((place < high) | (high == 1.0))
        shares.append(float((error[mine] <= 0.2).double().mean()) if bool(mine.any()) else None)
    return shares
