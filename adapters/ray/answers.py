"""The class that Ray Data makes one of in each actor: rows in, records out.

    rows.map_batches(Answers, fn_constructor_args=(make,), compute=ActorPoolStrategy(size=2), batch_size=64)

It is the worker of a bulk job, so that a row's record is what it is without Ray: its seed follows from its id. Rows and
records travel as JSON.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

from steer.bulk.job import Worker, answer_all
from steer.bulk.source import Row
from steer.files import as_json

__all__ = ["Answers"]


class Answers:
    """Answers batches of rows.

    Args:
        make: makes the worker, once in each actor; Ray sends it there, so it has to be picklable.
    """

    def __init__(self, make: Callable[[], Worker]) -> None:
        self._worker = make()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch with columns `number`, `id`, `row` (JSON, or "" for one that cannot be read) and `error`; gives one
        with a column `record` (JSON). A row that fails has a record with its error.
        """
        import numpy as np

        columns = (batch["number"], batch["id"], batch["row"], batch["error"])
        rows = [
            Row(int(number), str(name), json.loads(str(text)) if text else None, str(error))
            for number, name, text, error in zip(*columns, strict=True)
        ]
        records = asyncio.run(answer_all(self._worker, rows))
        return {"record": np.array([as_json(record) for record in records], dtype=object)}
