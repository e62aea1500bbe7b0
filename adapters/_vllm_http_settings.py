"""What is set once for steer's routes in vLLM's own server: `additional_config={"steer": {"server": {...}}}`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from steer.core import InputError, check
from steer.serving.limits import Limits

__all__ = ["ServerSettings"]

_WHERE = "additional_config steer.server"


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the server. Nothing needs to be given."""

    artifacts: Path | None = None
    """Folder of registered artifacts; without one none can be registered over HTTP."""
    allow_reward: tuple[str, ...] = ()
    """Rewards that requests may name besides the shipped ones, as `steer serve --allow-reward` takes them."""
    limits: Limits = field(default_factory=Limits)

    @classmethod
    def of(cls, given: Any, artifacts: int, artifact_bytes: int) -> ServerSettings:
        """From plain data; `artifacts` and `artifact_bytes` are what the engine has room for. Raises `InputError`."""
        check(isinstance(given, dict), _WHERE, given, "a dictionary of settings")
        known = [f.name for f in fields(cls)]
        for name in given:
            check(name in known, _WHERE, name, ", ".join(known))
        folder = given.get("artifacts")
        check(folder is None or isinstance(folder, str), f"{_WHERE}.artifacts", folder, "a folder")
        rewards = given.get("allow_reward", [])
        texts = isinstance(rewards, list) and all(isinstance(text, str) for text in rewards)
        check(texts, f"{_WHERE}.allow_reward", rewards, "a list of rewards")
        room = {"artifacts": artifacts, "artifact_bytes": artifact_bytes}
        limits = _limits(given.get("limits", {}), room)
        return cls(None if folder is None else Path(folder), tuple(rewards), limits)


def _limits(given: Any, room: dict[str, int]) -> Limits:
    where = f"{_WHERE}.limits"
    check(isinstance(given, dict), where, given, "a dictionary of limits")
    usual = Limits()
    known = [f.name for f in fields(usual)]
    for name in given:
        check(name in known, where, name, ", ".join(known))
    for name, most in room.items():
        allowed = f"at most {most}, which is additional_config steer.{name}"
        check(not isinstance(given.get(name), int) or given[name] <= most, f"{where}.{name}", given.get(name), allowed)
    try:
        return Limits(**{name: min(getattr(usual, name), most) for name, most in room.items()} | given)
    except InputError as error:
        raise InputError(f"{where}.{error.field}", error.given, error.allowed) from None
