"""Settings of trainers: frozen dataclasses that are the Python argument, the saved card and the command line's options.

A field's annotation is its check. `settle` makes an instance of names and values, as they come from Python, from text
or from YAML, and says of a bad one which field it is, what was given and what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from steer.core.errors import InputError
from steer.core.names import meant

__all__ = [
    "Count",
    "Finite",
    "Part",
    "Positive",
    "Real",
    "Seed",
    "Share",
    "Texts",
    "UNSET",
    "Whole",
    "check_known",
    "describe",
    "refusal",
    "settings_class",
    "settle",
]

S = TypeVar("S")


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number, not true or false")
    return value


_NUMBER = BeforeValidator(_number)
UNSET: Any = None
"""A default that depends on other fields, which `__post_init__` fills in."""
Whole = Annotated[int, Field(ge=0), _NUMBER]
Count = Annotated[int, Field(ge=1), _NUMBER]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), _NUMBER]
Finite = Annotated[float, Field(ge=0, allow_inf_nan=False), _NUMBER]
Real = Annotated[float, Field(allow_inf_nan=False), _NUMBER]
Share = Annotated[float, Field(ge=0, le=1), _NUMBER]
Part = Annotated[float, Field(ge=0, lt=1), _NUMBER]
Texts = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1), _NUMBER]


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings_class(kind: type[S]) -> type[S]:
    """Make `kind` a frozen dataclass whose fields are checked as their annotations say; what they refuse is an
    `InputError`. Its own `__post_init__` may check more, and fill in what depends on other fields.
    """
    made: Any = checked_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(kind)
    plain = made.__init__

    def __init__(self: Any, **values: Any) -> None:
        try:
            plain(self, **values)
        except ValidationError as error:
            raise refusal(error, get_type_hints(made, include_extras=True)) from None

    made.__init__ = __init__
    return made


def check_known(where: str, keys: Iterable[Any], allowed: Sequence[str]) -> None:
    """Refuse keys that are not among `allowed`, with the nearest one."""
    for key in keys:
        if key not in allowed:
            raise InputError(where, key, (", ".join(allowed) or "no settings") + meant(str(key), allowed, 0.5))


def settle(kind: type[S], base: S | None, given: Mapping[str, Any], where: str) -> S:
    """`base`, or the defaults of `kind`, with the fields in `given` in their place; None leaves a default.

    Raises:
        InputError: an unknown name, with the nearest known one, or a value that its field does not allow.
    """
    names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    check_known(f"setting of {where}", given, names)
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]  # type: ignore[arg-type]
    start = {} if base is None else asdict(base)  # type: ignore[call-overload]
    values = {**start, **{name: value for name, value in given.items() if value is not None}}
    for name in needed:
        if name not in values:
            raise InputError(f"setting of {where}", sorted(values), f"also needed: {name}")
    return kind(**values)


def refusal(error: ValidationError, hints: Mapping[str, Any], field: str | None = None) -> InputError:
    """What pydantic refused, as field, given and allowed; `hints` are the annotations of the fields."""
    first = error.errors()[0]
    inside = first.get("ctx", {}).get("error")
    if isinstance(inside, InputError):
        return inside
    name = str(first["loc"][0]) if first["loc"] and field is None else str(field)
    allowed = describe(hints[name]) if name in hints else None
    return InputError(name, first.get("input"), allowed or first["msg"])


def describe(hint: Any) -> str | None:
    """What an annotation allows, in words; None where there are none for it."""
    if get_origin(hint) is Literal:
        return ", ".join(map(str, get_args(hint)))
    inner, *more = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    members = [m for m in get_args(inner) if m is not type(None)] if type(None) in get_args(inner) else []
    if members:
        return describe(members[0])
    parts = [p for m in more for p in getattr(m, "metadata", [m])]
    bounds = {type(p): getattr(p, name) for p in parts for name in _BOUNDS if isinstance(p, _BOUNDS[name])}
    words = {int: "an integer", float: "a number", bool: "true, false", str: "text"}.get(inner)
    if words is None or not bounds:
        return words
    if Ge in bounds and Le in bounds and Gt not in bounds:
        return f"{words} from {bounds[Ge]:g} to {bounds[Le]:.10g}"
    low = f"above {bounds[Gt]:g}" if Gt in bounds else f"of {bounds[Ge]:g} or more" if Ge in bounds else ""
    high = f"at most {bounds[Le]:g}" if Le in bounds else f"below {bounds[Lt]:.10g}" if Lt in bounds else ""
    return f"{words} {', '.join(filter(None, (low, high)))}"


_BOUNDS: dict[str, Any] = {"ge": Ge, "gt": Gt, "le": Le, "lt": Lt}
