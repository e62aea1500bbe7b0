"""An OpenAI-compatible endpoint: where it is, what it understands, and answers that were paid for before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steer.adapters.openai.connection import Call, Connection, EndpointError
from steer.adapters.openai.dialect import Dialect, Reply
from steer.adapters.openai.results import Results
from steer.core import Cost

__all__ = ["Endpoint"]


@dataclass(frozen=True)
class Endpoint:
    """What a process asks. `results` keeps answers and gives them back unpaid; None keeps none."""

    connection: Connection
    dialect: Dialect
    results: Results | None = None

    @property
    def url(self) -> str:
        return self.connection.url

    def answers(self, calls: Sequence[tuple[Call, int]], top: int | None) -> tuple[list[Reply | EndpointError], Cost]:
        """The answer to each call with its seed, or its error, and what was paid. `top` is as in `Dialect.answer`."""
        answers: list[Reply | EndpointError] = []
        cost = Cost()
        for said, paid in self._asked(calls):
            answer = said if isinstance(said, EndpointError) else self._read(said, top)
            if paid and isinstance(answer, Reply):
                cost = cost + answer.cost
            answers.append(answer)
        return answers, cost

    def _read(self, said: Any, top: int | None) -> Reply | EndpointError:
        try:
            return self.dialect.answer(said, top)
        except EndpointError as error:
            return error

    def _asked(self, calls: Sequence[tuple[Call, int]]) -> list[tuple[Any, bool]]:
        """What was said to every call, or its error, and whether it was paid for now."""
        connection, results = self.connection, self.results
        if results is None:
            return [(answer, True) for answer in connection.post_all([call for call, _ in calls])]
        keys = [Results.key(connection.url, call.path, call.body, seed) for call, seed in calls]
        found = [results.find(key) for key in keys]
        missing = [i for i, answer in enumerate(found) if answer is None]

        def keep(i: int, answer: Any) -> None:
            if isinstance(answer, dict) and answer.get("choices"):
                results.keep(keys[missing[i]], {name: answer.get(name) for name in ("choices", "usage")})

        fresh = dict(zip(missing, connection.post_all([calls[i][0] for i in missing], keep), strict=True))
        return [(fresh.get(i, answer), i in fresh) for i, answer in enumerate(found)]
