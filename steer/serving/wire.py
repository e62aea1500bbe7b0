"""What a request over the wire may say about steering: `{"steer": {...}}` beside OpenAI's fields.

The server, the vLLM plug-in and the clients share these shapes. Names stand for artifacts that were registered before;
nothing in a request is a path.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from steer.core import InputError

__all__ = ["NAME", "EditRequest", "SteerRequest", "is_loopback"]


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Names of artifacts."""

Scalar = bool | int | Annotated[float, Field(allow_inf_nan=False)] | str


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


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class EditRequest(_Strict):
    """A registered vector, controller or value head, with settings in place of its card's (see `steer.load_edit`)."""

    name: str
    strength: float | None = None
    layers: str | list[int] | None = None
    scope: str | None = None
    operator: str | None = None
    unit: str | None = None
    keep_norm: bool | None = None
    threshold: float | None = None
    beta: float | None = None
    top_k: int | None = None
    tail: str | None = None

    @field_validator("name")
    @classmethod
    def _named(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError("letters, digits, dot, dash and underscore, at most 128 of them")
        return name

    def options(self) -> dict[str, Any]:
        """The settings that were given, but for the strength."""
        return self.model_dump(exclude_none=True, exclude={"name", "strength"})


class SteerRequest(_Strict):
    """How one request is to be steered."""

    edits: list[EditRequest] = Field(default=[], max_length=64)
    sampler: str | None = None
    """By name, of `steer.SAMPLERS`; None draws each choice on its own."""
    candidates: int | None = Field(default=None, ge=1)
    """Candidates, particles or rollouts for each choice; not OpenAI's `n`, which counts what comes back."""
    settings: dict[str, Scalar] = Field(default={}, max_length=64)
    """Of the sampler."""
    reward: str | None = Field(default=None, max_length=4096)
    """An expression of named rewards; it never names a file, a module or a hub's model unless the server allows it."""
    beta: float = Field(default=1.0, gt=0)
    budget: int | None = Field(default=None, ge=1)
    """Tokens that may be generated in all, of every candidate."""
    block: int | None = Field(default=None, ge=1)
    """Tokens in one step of a sampler that weighs or searches; by default each engine's own choice."""
    kl: bool = True
    """Measure the drift of every choice. For hidden-state edits that takes two more passes over the finished text."""

    @classmethod
    def parse(cls, given: Any) -> SteerRequest:
        """From plain data or JSON text. Raises `InputError` that names the field."""
        try:
            if isinstance(given, str):
                return cls.model_validate_json(given)
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(["steer", *map(str, first["loc"])])
            allowed = ", ".join(cls.model_fields) if first["type"] == "extra_forbidden" else first["msg"]
            raise InputError(field, first.get("input"), allowed) from None

    @property
    def token_level(self) -> bool:
        """Whether nothing chooses between finished texts, so that tokens can be streamed as they come."""
        return self.sampler in (None, "ancestral")
