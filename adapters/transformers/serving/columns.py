"""One wish written several ways at once: rows of one batch, each beside what the unsteered model would have said there.

The first column is the unsteered model. Behind every other column a row of the unsteered model reads what that column
writes, so that each token's law stands beside the law it would have had: their KL is exact, and costs one row more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from steer.adapters.transformers import tracking
from steer.adapters.transformers.serving.batch import BatchRow, Taken, Trace
from steer.adapters.transformers.serving.preparing import Prepared
from steer.adapters.transformers.serving.tickets import OwnPass
from steer.core import Cost, InputError, check
from steer.serving.engine import Event, TokenLogprob
from steer.serving.requests import Emit, scored

if TYPE_CHECKING:
    from steer.adapters.transformers.model import LanguageModel

__all__ = ["Columns", "ColumnsTicket", "Opened", "Traced"]


@dataclass(frozen=True)
class Columns:
    """Requests of one choice each, to be written together. `scripts[i]` are tokens that column i begins with."""

    columns: tuple[Prepared, ...]
    scripts: tuple[tuple[int, ...], ...] = ()
    alternatives: int = 5
    """Likeliest tokens to report of either law."""

    def __post_init__(self) -> None:
        check(bool(self.columns), "columns", 0, "at least one")
        check(not self.columns[0].edits, "columns", "edits on the first", "none: it is the unsteered model")
        for column in self.columns:
            check(column.choices == 1 and column.plan is None, "columns", f"{column.choices} texts", "one text each")
            if not column.shares:
                edit = next((type(e).__name__ for e in column.guided), "the model")
                raise InputError("edits", edit, "edits and models whose rows may decode beside others")
        lengths = [len(script) for script in self.scripts]
        check(len(lengths) in (0, len(self.columns)), "scripts", lengths, "one for each column")
        for script in self.scripts:
            least = min(c.sampling.max_tokens for c in self.columns)
            check(len(script) < least, "scripts", f"{len(script)} tokens", f"fewer than max_tokens, {least}")
            top = self.columns[0].process.model.vocabulary
            check(all(0 <= token < top for token in script), "scripts", script, f"token ids from 0 to {top - 1}")


@dataclass(frozen=True)
class Opened:
    """The prompts were read. `weights[i]` are by layer the factors that column i's edits got from its prompt."""

    weights: tuple[dict[int, float], ...]


@dataclass(frozen=True)
class Traced:
    """One token of a column, with the text that it adds."""

    choice: int
    text: str
    trace: Trace


class ColumnsTicket(OwnPass):
    """`Columns` on their way."""

    def __init__(self, columns: Columns, emit: Emit) -> None:
        super().__init__(columns.columns[0], emit)
        self._columns = columns
        self._kl = [0.0] * len(columns.columns)

    @property
    def size(self) -> int:
        return 2 * len(self._columns.columns) - 1

    @property
    def columns(self) -> int:
        return max(column.columns for column in self._columns.columns)

    @property
    def measures(self) -> bool:
        return True

    @torch.inference_mode()
    def open(self, model: LanguageModel, taken: Taken) -> tuple[tracking.AnyTrack, list[int]]:
        columns = self._columns.columns
        scripts = self._columns.scripts or ((),) * len(columns)
        edits = [(edit, frozenset({i})) for i, column in enumerate(columns) for edit in column.hidden]
        hidden = any(column.guided for column in columns)
        longest = max(column.sampling.max_tokens for column in columns)
        track, self.cost = tracking.start(
            model.body, [column.ids[0] for column in columns], edits, 1, hidden=hidden, new=longest
        )
        leaders = [
            BatchRow(
                model,
                column.sampling,
                i,
                column.seed,
                edits=column.guided,
                script=scripts[i],
                traced=self._columns.alternatives,
                taken=taken,
            )
            for i, column in enumerate(columns)
        ]
        for row in leaders:  # choice 0 of a request of its own: what a server would answer
            row.generator = torch.Generator().manual_seed((columns[row.choice].seed * 1_000_003) % 2**63)
        followers = [
            BatchRow(model, row.sampling, row.choice, columns[row.choice].seed, leader=row, taken=taken)
            for row in leaders[1:]
        ]
        self.rows = [*leaders, *followers]
        self.emit(Opened(tuple(_weights(track, i) for i in range(len(columns)))))  # type: ignore[arg-type]
        return track, [*range(len(columns)), *[0] * len(followers)]

    def taken(self, row: BatchRow, text: str, logprobs: Sequence[TokenLogprob]) -> None:
        if row.error is not None:
            self.fail(row.error)
        elif row.leader is None:
            assert row.trace is not None
            self._kl[row.choice] += row.trace.kl
            event: Event = Traced(row.choice, text, row.trace)  # type: ignore[assignment]
            self.emit(event)

    @property
    def texts(self) -> list[BatchRow]:
        return [row for row in self.rows if row.leader is None]

    def measure(self) -> tuple[list[float | None], list[float | None], Cost]:
        rewards: list[float | None] = []
        for row, column in zip(self.texts, self._columns.columns, strict=True):
            found = column.reward and scored(column, column.process.model, column.reward, [row.text], [row.tokens])
            rewards.append(found[0] if found else None)
        return rewards, list(self._kl), Cost(reward_calls=sum(r is not None for r in rewards))


def _weights(track: tracking.AnyTrack, row: int) -> dict[int, float]:
    """Largest factor of row `row` at each layer where something acts."""
    if not isinstance(track, tracking.Track) or not track.plan:
        return {}
    found: dict[int, float] = {}
    for entry in track.plan.entries:
        weight = float(entry.weight[row])
        if weight:
            found[entry.layer] = max(found.get(entry.layer, weight), weight, key=abs)
    return found
