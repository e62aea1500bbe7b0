"""Recipes of the page: what a tab was asked, as one object from which its commands, code and address are made.

A tab's recipe is a frozen pydantic model derived from `Recipe`, in a file of its own. It gives `jobs` (from which the
command line and the YAML are written), `python`, and, where a server can do it, `request` (from which curl's line is
written). The address holds the recipe itself: JSON, deflated, in base64 for addresses, checked like any input.
"""

from __future__ import annotations

import base64
import binascii
import json
import shlex
import zlib
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from steer.core import InputError, check

__all__ = ["LIMIT_ADDRESS", "LIMIT_TEXT", "Job", "Recipe", "decode", "encode", "fitted", "fitting"]

LIMIT_ADDRESS = 6_000
"""Characters of a recipe in an address: browsers and proxies cut longer ones."""
LIMIT_TEXT = 16_000
"""Characters of one text field."""
_LIMIT_JSON = 64_000
_FOLDER = "${recipes}"
"""The folder of what steer ships, as a recipe of `steer run` calls it; `shipped` names a file in it."""
_FIND = "recipes=$(python -c 'import steer.recipes; print(*steer.recipes.__path__)')\n"


@dataclass(frozen=True)
class Job:
    """One command of `steer` and its options, by their names in a recipe of `steer run`."""

    name: str
    command: str
    settings: dict[str, Any]
    shipped: str = ""
    """The file of pairs that it reads, where steer ships it."""

    def line(self) -> str:
        """The command line."""
        words = ["steer", *self.command.split()]
        for key, value in self.settings.items():
            option = "--" + key.replace("_", "-")
            for one in value if isinstance(value, list) else [value]:
                words += [option] if one is True else [] if one is False else [f"{option}={one}"]
        return shlex.join(words) + (f' --pairs="$recipes/{self.shipped}"' if self.shipped else "")

    def step(self) -> dict[str, Any]:
        """The same in a recipe of `steer run`, in which `${` begins a variable."""
        settings = {key: _literal(value) for key, value in self.settings.items()}
        settings |= {"pairs": f"{_FOLDER}/{self.shipped}"} if self.shipped else {}
        return {"name": self.name, "command": self.command, "settings": settings}


def fitting(model: str, name: str, pairs: str) -> Job:
    """The command that fits a vector to shipped pairs."""
    return Job(f"fit-{name}", "train vector", {"model": model, "out": f"{name}.safetensors"}, f"{pairs}.jsonl")


def fitted(name: str, pairs: str) -> list[str]:
    """The lines of Python that do the same with `model`."""
    return [
        f"pairs = importlib.resources.files('steer.recipes') / {f'{pairs}.jsonl'!r}",
        f"steer.train_vector(model, str(pairs)).save({f'{name}.safetensors'!r})",
    ]


def _literal(value: Any) -> Any:
    if isinstance(value, list):
        return [_literal(one) for one in value]
    return value.replace("${", "${dollar}{") if isinstance(value, str) else value


class Recipe(BaseModel):
    """What one tab was asked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, str_max_length=LIMIT_TEXT)
    tab: ClassVar[str]
    kinds: ClassVar[dict[str, type[Recipe]]] = {}
    """Recipes by tab; filled as their modules are imported."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        Recipe.kinds[cls.tab] = cls

    @classmethod
    def parse(cls, given: dict[str, Any]) -> Any:
        """The recipe from plain data. Raises `InputError` that names the field."""
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or "recipe"
            shown = repr(first.get("input"))
            raise InputError(field, shown[:80] + ("..." if len(shown) > 80 else ""), first["msg"]) from None

    @abstractmethod
    def jobs(self) -> list[Job]:
        """Commands that do the same, in order."""

    @abstractmethod
    def python(self) -> str:
        """A program that does the same."""

    def request(self) -> dict[str, Any] | None:
        """The body of a chat completion that does the same on `steer serve`; None where a server cannot."""
        return None

    # ---- the forms, which are the same for every tab

    def commands(self) -> str:
        """Command lines."""
        jobs = self.jobs()
        return (_FIND if any(job.shipped for job in jobs) else "") + "\n".join(job.line() for job in jobs)

    def yaml(self) -> str:
        """A recipe for `steer run FILE.yaml`."""
        made: dict[str, Any] = {"description": f"Made on the page of steer demo, tab {self.tab}."}
        made["steps"] = [job.step() for job in self.jobs()]
        if "${dollar}" in json.dumps(made):
            made["variables"] = {"dollar": "$"}
        return yaml.safe_dump(made, sort_keys=False, allow_unicode=True, width=100)

    def curl(self) -> str:
        """The request to a server, and how to start it; why there is none where there is none."""
        body = self.request()
        if body is None:
            return "# A server has no route for this; use one of the other forms."
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        text = json.dumps(body, ensure_ascii=False)
        start = shlex.join(["steer", "serve", f"--model={body['model']}", "--artifacts=."])
        return f"# {start}\ncurl http://127.0.0.1:8000{path} -H 'Content-Type: application/json' -d {shlex.quote(text)}"


def encode(recipe: Recipe) -> str:
    """The recipe for an address. Raises `InputError` where it is too long for one."""
    entries = {"tab": recipe.tab, **recipe.model_dump(exclude_defaults=True)}
    packed = zlib.compress(json.dumps(entries, separators=(",", ":")).encode(), 9)
    text = base64.urlsafe_b64encode(packed).decode().rstrip("=")
    check(
        len(text) <= LIMIT_ADDRESS, "address", f"{len(text)} characters", f"at most {LIMIT_ADDRESS}: a shorter prompt"
    )
    return text


def decode(text: str) -> Recipe:
    """The recipe in an address. Raises `InputError` for whatever is none."""
    allowed = "a recipe as this page writes it"
    check(len(text) <= LIMIT_ADDRESS, "address", f"{len(text)} characters", f"at most {LIMIT_ADDRESS}")
    try:
        packed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        reader = zlib.decompressobj()
        plain = reader.decompress(packed, _LIMIT_JSON)
        entries = json.loads(plain) if reader.eof else None
    except (binascii.Error, zlib.error, ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict) or entries.get("tab") not in Recipe.kinds:
        raise InputError("address", _short(text), allowed)
    return Recipe.kinds[entries.pop("tab")].parse(entries)


def _short(text: str) -> str:
    return text if len(text) <= 24 else text[:24] + "..."
