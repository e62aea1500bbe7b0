"""Work that is no request, such as the fitting of a vector, between the steps of the running batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from steer.adapters.transformers.serving.tickets import Ticket, report
from steer.core import Cost
from steer.serving.requests import Emit

__all__ = ["Done", "Told", "Work", "WorkTicket"]

Work = Callable[[Callable[[Any], None]], Any]
"""Is given `tell`, which raises where nobody waits any more; returns its result."""


@dataclass(frozen=True)
class Told:
    """What the work said on its way."""

    value: Any


@dataclass(frozen=True)
class Done:
    """What the work returned."""

    value: Any


class WorkTicket(Ticket):
    """Work on its way."""

    def __init__(self, work: Work, emit: Emit) -> None:
        super().__init__(None, emit)
        self._work = work

    @property
    def searches(self) -> bool:
        return True

    def search(self, pause: Callable[[], None]) -> None:
        def tell(value: Any) -> None:
            self.emit(Told(value))  # type: ignore[arg-type]
            pause()

        try:
            self.emit(Done(self._work(tell)))  # type: ignore[arg-type]
            self.finish(0, Cost())
        except Exception as error:
            report(self, error)
