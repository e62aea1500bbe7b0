"""Limits on what one client, and all of them together, may ask for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from steer.core import check_whole

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """Everything is counted before work starts; a request beyond a limit is refused and costs nothing."""

    body_bytes: int = 4 << 20
    """Of a request, artifacts aside."""
    choices: int = 32
    """Texts that one request gets back, over all of its prompts."""
    candidates: int = 256
    """Texts that one request may draw in all."""
    tokens: int = 2048
    """Of one choice; also the default where a request names none."""
    total_tokens: int = 131_072
    """That one request may draw in all, of every candidate."""
    requests: int = 256
    """That run or wait at one time; one more is answered 429."""
    vector_bytes: int = 4 << 20
    """Of the vectors that come with one request, as float32."""
    artifacts: int = 256
    artifact_bytes: int = 1 << 30
    """Of all artifacts together, and so of any one."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            check_whole(entry.name, value)
