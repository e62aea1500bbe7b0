"""The table of samplers by name, and how one is made from a name and settings.

Nothing is imported here before a sampler is asked for, so that help can list their names at once.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steer.core import Sampler

__all__ = ["SAMPLERS", "Registry", "make_sampler", "sampler_name"]


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
)


def make_sampler(sampler: Sampler | str | None, n: int | None = None, **settings: Any) -> Sampler:
    """A sampler from its name and settings. `n` is how many outputs, or best-of-n's candidates, for each prompt."""
    from steer.core import Sampler, check

    if isinstance(sampler, Sampler):
        check(n is None and not settings, "n", n, "unset: the sampler that was given has its own")
        return sampler
    name = sampler or "ancestral"
    check(name in SAMPLERS, "sampler", name, str(SAMPLERS))
    kind = SAMPLERS[name]
    known = list(kind.__dataclass_fields__)  # type: ignore[attr-defined]
    for key in settings:
        check(key in known, f"sampler {name}", key, ", ".join(known))
    if n is not None:
        check("n" in known, "n", n, f"unset: {name} has no such setting")
        settings["n"] = n
    return kind(**settings)


def sampler_name(sampler: Sampler) -> str:
    return next((name for name, kind in SAMPLERS.items() if kind is type(sampler)), type(sampler).__name__)
