"""The table of samplers by name, and how one is made from a name and settings."""

from __future__ import annotations

from typing import Any, TypedDict

from steer.core import Sampler, check
from steer.core.names import check_known
from steer.methods.best_of_n import Ancestral, BestOfN
from steer.methods.dts import DTS, SearchDTS
from steer.methods.fk import FKSteering
from steer.methods.svdd import SVDD
from steer.sampling.lookahead import Lookahead

SAMPLERS: dict[str, type[Sampler]] = {
    "ancestral": Ancestral,
    "best-of-n": BestOfN,
    "fk": FKSteering,
    "svdd": SVDD,
    "dts": DTS,
    "dts-star": SearchDTS,
}


class SamplerSettings(TypedDict, total=False):
    """Settings of samplers that `generate` takes beside a sampler's name, for type checkers; the sampler's docstring
    says what each is.
    """

    reject: float
    num_particles: int
    per_output: bool
    potential: str
    terminal: str
    start: int
    every: int
    ess_threshold: float | None
    resampler: str
    tempering: float | None
    lookahead: Lookahead | None
    select: str | None
    correct: bool
    floor: float | None
    keep_previews: bool
    num_candidates: int
    choose: str
    rollouts: int | None
    max_nfe: int | None
    seconds: float | None
    batch: int
    levels: int | None
    widening: float
    exponent: float
    explore: float
    estimator: str
    trust: float
    merge: bool
    max_bytes: int
    bonus: float
    backup: str


def make_sampler(sampler: Sampler | str | None, n: int | None = None, **settings: Any) -> Sampler:
    """A sampler from its name and settings. `n` is its population: outputs, candidates or particles for each prompt."""
    if isinstance(sampler, Sampler):
        check(n is None and not settings, "n", n, "unset: the sampler that was given has its own")
        return sampler
    name = sampler or "ancestral"
    check_known("sampler", name, SAMPLERS)
    kind, known = SAMPLERS[name], sampler_fields(name)
    for key in settings:
        check_known(f"sampler {name}", key, known)
    if n is not None:
        population = next((name for name in ("n", "num_particles") if name in known), None)
        check(population is not None, "n", n, f"unset: {name} has no population")
        settings[str(population)] = n
    return kind(**settings)


def sampler_fields(name: str | None) -> list[str]:
    """Settings of a sampler by its name."""
    kind: Any = SAMPLERS.get(name or "ancestral")
    return [] if kind is None else list(kind.__dataclass_fields__)


def sampler_name(sampler: Sampler) -> str:
    return next((name for name, kind in SAMPLERS.items() if kind is type(sampler)), type(sampler).__name__)
