"""The transformers engine behind the server: see `steer.serving`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

from steer.adapters.language.serving import ServedModel
from steer.adapters.transformers.serving.columns import Columns, ColumnsTicket, Opened, Traced
from steer.adapters.transformers.serving.echo import echoes, with_echo
from steer.adapters.transformers.serving.preparing import Prepared, Preparer
from steer.adapters.transformers.serving.scheduler import Scheduler
from steer.adapters.transformers.serving.tickets import Ticket
from steer.adapters.transformers.serving.work import Done, Told, Work, WorkTicket
from steer.core import check, check_whole
from steer.serving.engine import Event, Finished, Load
from steer.serving.requests import Emit, relayed

if TYPE_CHECKING:
    from steer.adapters.transformers.model import LanguageModel

__all__ = ["TransformersEngine"]


class TransformersEngine(ServedModel[Prepared]):
    """One language model that serves many requests at once.

    Args:
        model: the model. It belongs to the engine from then on: others may not run it beside.
        name: what requests call it; default: its own name.
        max_rows: texts that decode together.
        cache_tokens: room of the running batch: rows times the positions of the longest.
        searches: searches that take turns; further ones wait.
        search_share: of the time, for searches and measurements, while plain requests are there.
        split_special_tokens: control tokens that messages spell are text (see `TextModel.split_special_tokens`).
    """

    kind = "transformers"

    def __init__(
        self,
        model: LanguageModel,
        *,
        name: str | None = None,
        max_rows: int = 32,
        cache_tokens: int = 65_536,
        searches: int = 4,
        search_share: float = 0.15,
        split_special_tokens: bool = True,
    ) -> None:
        for field, value in (("max_rows", max_rows), ("cache_tokens", cache_tokens), ("searches", searches)):
            check_whole(field, value)
        check(0 < search_share < 1, "search_share", search_share, "a share of the time between 0 and 1")
        self.model = model
        self.serve(Preparer(model, max_rows, cache_tokens), name or model.name, split_special_tokens)
        model.residual_norms()
        self._scheduler = Scheduler(
            model, max_rows=max_rows, cache_tokens=cache_tokens, searches=searches, search_share=search_share
        )

    def run(self, prepared: Prepared) -> AsyncGenerator[Event]:
        events = self._relayed(lambda emit: Ticket(prepared, emit))
        return self._echoed(prepared, events) if prepared.task.echo else events

    async def _echoed(self, prepared: Prepared, events: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
        told = [event async for event in self.run_work(lambda tell: echoes(self.model, prepared))]
        prompts = next(event.value for event in told if isinstance(event, Done))
        texts = [self.model.tokenizer.decode(list(ids)) for ids in prepared.ids]
        async with aclosing(with_echo(prepared, texts, prompts, events)) as every:
            async for event in every:
                yield event

    def run_columns(self, columns: Columns) -> AsyncGenerator[Event | Opened | Traced]:
        """Write columns beside each other: `Opened`, a `Traced` for each token, `Ended` for each column, `Finished`."""
        return self._relayed(lambda emit: ColumnsTicket(columns, emit))

    async def run_work(self, work: Work) -> AsyncGenerator[Told | Done]:
        """Run a function that uses the model for other things than requests, between the steps of the batch. It is
        given `tell`, to be called as often as may be: others compute meanwhile, and what it is told goes out as `Told`.
        """
        async for event in self._relayed(lambda emit: WorkTicket(work, emit)):
            if not isinstance(event, Finished):
                yield event  # type: ignore[misc]

    def _relayed(self, made: Callable[[Emit], Ticket]) -> AsyncGenerator[Event]:
        def begin(emit: Emit) -> Callable[[], None]:
            ticket = made(emit)
            self._scheduler.submit(ticket)

            def stop() -> None:
                ticket.cancelled = True
                self._scheduler.wake()

            return stop

        return relayed(begin)

    def load(self) -> Load:
        return self._scheduler.load()

    def close(self) -> None:
        self._scheduler.close()
