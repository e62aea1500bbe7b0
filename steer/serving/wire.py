"""The `steer` field of a request over the wire: `{"steer": {...}}` beside OpenAI's fields.

The server, the vLLM plug-in and the clients share these shapes. Names stand for artifacts that were registered before;
nothing in a request is a path.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from steer.artifacts import MAX_STRENGTH
from steer.core import InputError
from steer.core.names import NAME

__all__ = [
    "NAME",
    "EditRequest",
    "SteerRequest",
    "VectorRequest",
    "encodable",
    "field_of",
    "is_loopback",
    "nearest",
    "wanted",
]


def encodable(text: str) -> str:
    """The text, where it can be written as UTF-8. Raises `ValueError`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("text that can be written as UTF-8, without lone surrogates") from error
    return text


_MOST = 2**31 - 1
Word = Annotated[str, Field(max_length=1024), AfterValidator(encodable)]
"""A short text: names, layers, scopes."""
LayerNumber = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,4})$")]
Base64 = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$")]
Strength = Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH)]
Beta = Annotated[float, Field(ge=1e-6, le=1e6)]
Count = Annotated[int, Field(ge=1, le=_MOST)]
Scalar = (
    bool
    | Annotated[int, Field(ge=-_MOST, le=_MOST)]
    | Annotated[float, Field(ge=-1e9, le=1e9)]
    | None
    | Annotated[str, Field(max_length=256), AfterValidator(encodable)]
)


def is_loopback(host: str) -> bool:
    """Whether a host, without its port, is this machine itself: `localhost` and names below it, or an address of the
    loopback. Other names are not, whatever they look like (`127.example.com`).
    """
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# ------------------------------------------------------------------------------------------------------------ errors


_UNIONS = frozenset({"str", "int", "float", "bool", "StrictStr"})


def field_of(loc: Sequence[int | str]) -> list[str]:
    """Where in the body, without the names that pydantic gives to the members of a union."""
    where = [str(part) for part in loc]
    where = where[1:] if where and where[0] in ("body", "query", "path") else where
    return [
        part for part in where if part.isdecimal() or (part.replace("_", "").isidentifier() and part not in _UNIONS)
    ]


def nearest(errors: Sequence[Any]) -> Any:
    """Of what is wrong with the first wrong field: the way in which it could have been right that came nearest."""
    field = field_of(errors[0]["loc"])[:1]

    def nearness(error: Any) -> tuple[bool, int]:
        return not error["type"].endswith(("_type", "_parsing")), len(field_of(error["loc"]))

    return max((e for e in errors if field_of(e["loc"])[:1] == field), key=nearness)


def wanted(error: Any) -> str:
    """What would have been right."""
    return (
        str(error["msg"])
        .removeprefix("Value error, ")
        .replace("Input should be None", "allowed: nothing")
        .replace("Input should be", "allowed:")
    )


# ---------------------------------------------------------------------------------------------------------- requests


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)
    where: ClassVar[str] = "steer"
    """What errors call it."""

    @classmethod
    def parse(cls, given: Any) -> Self:
        """From plain data or JSON text. Raises `InputError` that names the field."""
        try:
            if isinstance(given, str):
                return cls.model_validate_json(given)
            return cls.model_validate(given)
        except ValidationError as error:
            first = nearest(error.errors())
            field = ".".join([cls.where, *field_of(first["loc"])])
            allowed = ", ".join(cls.model_fields) if first["type"] == "extra_forbidden" else first["msg"]
            raise InputError(field, first.get("input"), allowed) from None


def _artifact_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError("letters, digits, dot, dash and underscore, at most 128 of them")
    return name


ArtifactName = Annotated[str, Field(json_schema_extra={"pattern": f"^{NAME.pattern}$"}), AfterValidator(_artifact_name)]


class VectorRequest(_Strict):
    """A steering vector in the request itself: a direction for each of some layers, 0 the first block, as numbers or as
    base64 of little-endian float32. Servers take it where they were started with `--inline-vectors`.
    """

    where: ClassVar[str] = "steer.edits.vector"
    layers: dict[LayerNumber, list[float] | Base64] = Field(
        min_length=1, max_length=1024, description='`{"12": [0.1, ...]}`, or base64 in place of each list.'
    )


_NAMED_OR_INLINE: list[JsonValue] = [
    {"required": ["name"], "properties": {"name": {"pattern": f"^{NAME.pattern}$"}, "vector": {"type": "null"}}},
    {"required": ["vector"], "properties": {"name": {"const": ""}, "vector": {"type": "object"}}},
]
"""For the server's description: one of the two, and the other not at all."""


class EditRequest(_Strict):
    """A registered vector, controller or value head by its `name`, or a `vector` of the request's own, with settings in
    place of its card's (see `steer.load_edit`).

    Strengths are at most a million either way, beta between a millionth and a million.
    """

    where: ClassVar[str] = "steer.edits"
    model_config = ConfigDict(json_schema_extra={"oneOf": _NAMED_OR_INLINE})
    vector: VectorRequest | None = Field(default=None, description="In place of `name`, where the server takes them.")
    name: str = Field(default="", validate_default=True, description="Needed where there is no `vector`.")
    strength: Strength | None = None
    layers: Word | Annotated[list[Annotated[int, Field(ge=0, lt=100_000)]], Field(max_length=1024)] | None = None
    scope: Word | None = None
    position: Word | None = None
    operator: Word | None = None
    unit: Word | None = None
    keep_norm: bool | None = None
    low: Strength | None = None
    high: Strength | None = None
    threshold: Strength | None = None
    beta: Beta | None = None
    top_k: Count | None = None
    tail: Word | None = None

    @field_validator("name")
    @classmethod
    def _named(cls, name: str, about: ValidationInfo) -> str:
        inline = about.data.get("vector", "wrong") is not None
        if not name and not inline:
            raise PydanticCustomError("missing", "a name, or a vector")
        if name and about.data.get("vector") is not None:
            raise ValueError("unset beside a vector")
        return _artifact_name(name) if name else name

    def options(self) -> dict[str, Any]:
        """The settings that were given, but for the strength."""
        return self.model_dump(exclude_none=True, exclude={"name", "vector", "strength"})


class SteerRequest(_Strict):
    """How one request is to be steered."""

    edits: list[EditRequest] = Field(default=[], max_length=64)
    readings: list[ArtifactName] = Field(default=[], max_length=16)
    """Registered vectors and probes, by name: each gives a number for each token, read where the token is chosen."""
    stop_if: Annotated[str, Field(max_length=256), AfterValidator(encodable)] | None = None
    """A comparison of one of the readings with a number, such as `calm < -1.5`: a text ends with the first token whose
    reading fulfils it.
    """
    sampler: Word | None = None
    """By name, of `steer.SAMPLERS`; None draws each choice on its own."""
    candidates: Count | None = None
    """Candidates, particles or rollouts for each choice; not OpenAI's `n`, which counts what comes back."""
    settings: dict[str, Scalar] = Field(default={}, max_length=64)
    """Of the sampler."""
    reward: Annotated[str, Field(max_length=4096), AfterValidator(encodable)] | None = None
    """An expression of named rewards; it never names a file, a module or a hub's model unless the server allows it."""
    critic: Annotated[str, Field(max_length=4096), AfterValidator(encodable)] | None = None
    """Of the sampler critique: REWARD>=NUMBER, of the rewards that `reward` may name."""
    beta: Beta = 1.0
    budget: Count | None = None
    """Tokens that may be generated in all, of every candidate."""
    block: Count | None = None
    """Tokens in one step of a sampler that weighs or searches; by default each engine's own choice."""
    base: Literal["truncated", "full"] = "truncated"
    """What samplers weigh against under top-k, top-p and min-p: the truncated law, or the full one before."""
    kl: bool = True
    """Measure the drift of every choice. For hidden-state edits that takes two more passes over the finished text."""

    @property
    def names(self) -> list[str]:
        """Of all registered artifacts that it names, edits and readings."""
        return [*(edit.name for edit in self.edits if edit.vector is None), *self.readings]

    @property
    def token_level(self) -> bool:
        """Whether nothing chooses between finished texts, so that tokens can be streamed as they come."""
        return self.sampler in (None, "ancestral")
