"""The table of samplers by name, and how one is made from a name and settings.

Nothing is imported here before a sampler is asked for, so that help can list their names at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from steer.core import Sampler
    from steer.sampling.lookahead import Lookahead

__all__ = ["SAMPLERS", "Registry", "SamplerSettings", "make_sampler", "sampler_fields", "sampler_name"]


class Registry(MutableMapping[str, "type[Sampler]"]):
    """Classes by name, each given as itself or as `module:class`, which is imported when it is first asked for."""

    def __init__(self, **places: str) -> None:
        self._places: dict[str, type[Sampler] | str] = {k.replace("_", "-"): v for k, v in places.items()}

    def __getitem__(self, name: str) -> type[Sampler]:
        place = self._places[name]
        if isinstance(place, str):
            module, _, kind = place.partition(":")
            place = self._places[name] = getattr(import_module(module), kind)
        return place

    def __setitem__(self, name: str, kind: type[Sampler] | str) -> None:
        self._places[name] = kind

    def __delitem__(self, name: str) -> None:
        del self._places[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __str__(self) -> str:
        return ", ".join(self)


SAMPLERS = Registry(
    ancestral="steer.methods.best_of_n:Ancestral",
    best_of_n="steer.methods.best_of_n:BestOfN",
    fk="steer.methods.fk:FKSteering",
    svdd="steer.methods.svdd:SVDD",
    dts="steer.methods.dts:DTS",
    dts_star="steer.methods.dts:SearchDTS",
    critique="steer.methods.critique:Critique",
    turn_search="steer.methods.turn_search:TurnSearch",
)


class SamplerSettings(TypedDict, total=False):
    """Settings of samplers that `generate` takes beside a sampler's name, for type checkers; the sampler's docstring
    says what each is.
    """

    reject: float
    answer: str | Callable[[str], Any] | None
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
    explore: float | None
    estimator: str
    trust: float
    merge: bool
    max_bytes: int
    bonus: float
    backup: str
    critic: Any
    drafts: int
    rounds: int
    revise: bool
    ends: str
    keep: str
    history: str
    feedback: str
    heat: float
    repeats: str
    votes: int
    inner: Sampler | None
    template: str
    otherwise: str | None
    right: float
    preset: str
    over_ranks: bool
    candidates: int
    simulations: int
    depth: int | None
    how: str
    leaf: Any
    episodes: int
    gamma: float
    critic_weight: float
    width: int
    actions: str
    simulator: Callable[..., Any] | None


def make_sampler(sampler: Sampler | str | None, n: int | None = None, **settings: Any) -> Sampler:
    """A sampler from its name and settings. `n` is how many outputs, or best-of-n's candidates, for each prompt."""
    from steer.core import Sampler, check
    from steer.core.names import check_known

    if isinstance(sampler, Sampler):
        check(n is None and not settings, "n", n, "unset: the sampler that was given has its own")
        return sampler
    allowed = f"a sampler such as steer.FKSteering(num_particles=16), or its name: {SAMPLERS}"
    check(sampler is None or isinstance(sampler, str), "sampler", sampler, allowed)
    name = sampler or "ancestral"
    check_known("sampler", name, SAMPLERS)
    kind, known = SAMPLERS[name], sampler_fields(name)
    settings = with_preset(name, settings)
    for key in settings:
        check_known(f"sampler {name}", key, known)
    if n is not None:
        check("n" in known, "n", n, f"unset: {name} has no such setting")
        settings["n"] = n
    return kind(**settings)


def with_preset(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a sampler with those of its `preset`, where one is named, beneath them. Raises `InputError`."""
    from steer.core import check

    given = dict(settings)
    preset = given.pop("preset", None)
    if preset is None:
        return given
    presets = SAMPLERS[name].presets
    check(preset in presets, "preset", preset, ", ".join(presets) or f"unset: {name} has none")
    return {**presets[preset], **given}


def sampler_fields(name: str | None) -> list[str]:
    """Settings of a sampler by its name."""
    kind: Any = SAMPLERS.get(name or "ancestral")
    return [] if kind is None else list(kind.__dataclass_fields__)


def sampler_name(sampler: Sampler) -> str:
    return next((name for name, kind in SAMPLERS.items() if kind is type(sampler)), type(sampler).__name__)
