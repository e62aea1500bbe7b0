"""Rows answered from Python, `model.map`: what `steer batch` does with a file, for rows in memory or in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from steer.bulk.job import Worker, answered, run_job
from steer.bulk.outputs import Outputs
from steer.bulk.source import Rows, read_rows, survey
from steer.bulk.texts import Requests
from steer.core import check
from steer.core.names import check_known
from steer.edits import Artifact, split_spec
from steer.methods.samplers import SAMPLERS, sampler_fields
from steer.rewards import as_reward
from steer.serving.artifact_store import Store
from steer.serving.engine import Engine
from steer.serving.limits import Limits
from steer.serving.reward_store import Rewards
from steer.serving.tasks import Tasks
from steer.serving.wire import SteerRequest

__all__ = ["Wanted", "mapped"]

_OWN = "own_reward"
_FIELDS = {"max_new_tokens": "max_tokens", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p"}
_MOST = 1 << 30
_TOKENS = 64
"""The longest output where nothing is said."""


@dataclass(frozen=True)
class Wanted:
    """What rows get that do not say otherwise; see `Model.map`."""

    edits: Any = ()
    sampler: Any = None
    reward: Any = None
    beta: float = 1.0
    n: int | None = None
    system: str | None = None
    artifacts: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def listed(self) -> list[Any]:
        """The edits, one by one."""
        return list(self.edits) if type(self.edits) in (list, tuple) else [self.edits]

    @property
    def sayable(self) -> bool:
        """Whether a request can say it, so that rows of any length decode together."""
        own = [] if self.sampler is None else sampler_fields(self.sampler) if self.sampler in SAMPLERS else None
        named = all(isinstance(edit, str | Artifact) for edit in self.listed)
        return named and own is not None and self.settings.keys() <= {*_FIELDS, *own}


def mapped(
    model: Any,
    rows: Rows,
    wanted: Wanted,
    *,
    make_engine: Callable[[int], Engine] | None = None,
    out: str | None = None,
    seed: int = 0,
    keep: frozenset[str] = frozenset(),
    max_rows: int = 32,
    **options: Any,
) -> list[dict[str, Any]]:
    """Records in the order of the rows; see `Model.map`. `options` are those of `run_job`."""
    _check(model, wanted)
    order = [row.id for row in read_rows(rows)]
    found = survey(rows)
    with ExitStack() as stack:
        together = make_engine is not None and wanted.sayable
        shared: dict[str, Any] = {"seed": seed, "keep": keep}
        if make_engine is not None and together:
            worker: Worker = _requests(make_engine(max_rows), wanted, max_rows, shared, stack)
        else:
            worker = _outputs(model, wanted, max_rows, shared)
        if out is None:
            worker.check_fields(found.fields)
            records = answered(worker, read_rows(rows))
        else:
            job = {"model": model.name, "seed": seed, "keep": sorted(keep), "together": together, **_told(wanted)}
            run_job(worker, rows, out, job, **options)
            with Path(out).open("rb") as file:
                records = [json.loads(line) for line in file]
    by_id = {str(record["id"]): record for record in records}
    return [by_id[name] for name in order]


def _check(model: Any, wanted: Wanted) -> None:
    """Raise `InputError` for a name that nothing has; the values are checked with each row."""
    own = {"readings", "stop_if"} if hasattr(model, "readings") else set()
    if isinstance(wanted.sampler, str):
        check_known("sampler", wanted.sampler, SAMPLERS)
        own |= {"preset", *sampler_fields(wanted.sampler)}
    for name in wanted.settings:
        check_known("map()", name, {*model.settings, *own})


def _told(wanted: Wanted) -> dict[str, Any]:
    """The same as plain data, by which the file of another job is known."""
    return {f.name: _plain(getattr(wanted, f.name)) for f in fields(wanted)}


def _plain(value: Any) -> Any:
    if isinstance(value, Artifact):
        marks = {
            name: blake2b(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            for name, x in value.tensors.items()
        }
        return [str(value.card), {name: mark.hexdigest()[:32] for name, mark in marks.items()}]
    if isinstance(value, dict):
        return {str(name): _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return getattr(value, "__qualname__", None) or str(value)


def _requests(engine: Engine, wanted: Wanted, max_rows: int, shared: dict[str, Any], stack: ExitStack) -> Requests:
    """Rows as requests."""
    stack.callback(engine.close)
    folder = Path(stack.enter_context(TemporaryDirectory()))
    given = [_named(edit, folder, i) for i, edit in enumerate(wanted.listed)]
    own = {name: x for name, x in wanted.settings.items() if name not in _FIELDS}
    kind = None if wanted.sampler is None else SAMPLERS[wanted.sampler]
    candidates = None if kind is None or not kind.population else own.pop(kind.population, wanted.n)
    rewards = Rewards((), wanted.artifacts)
    own_reward = as_reward(wanted.reward)
    reward = None if own_reward is None else _OWN
    if own_reward is not None:
        rewards.lend(_OWN, own_reward)
    asked = {"edits": [edit for edit, _ in given], "sampler": wanted.sampler, "settings": own, "beta": wanted.beta}
    default = SteerRequest.parse({**asked, "candidates": candidates, "reward": reward})
    limits = Limits(choices=_MOST, candidates=_MOST, tokens=_MOST, total_tokens=_MOST)
    store = Store(wanted.artifacts, engine.check_artifact, files=tuple(path for _, path in given))
    plain = not given and wanted.sampler is None and reward is None
    decoding = {theirs: wanted.settings.get(ours) for ours, theirs in _FIELDS.items()}
    n = wanted.n if wanted.sampler in (None, "ancestral") else None
    return Requests(
        engine,
        Tasks(store, rewards, limits, None if plain else default, engine.own_edits),
        fields={"max_tokens": _TOKENS, **{k: v for k, v in decoding.items() if v is not None}, "n": n},
        system=wanted.system,
        capacity=2 * max_rows,
        **shared,
    )


def _named(edit: str | Artifact, folder: Path, number: int) -> tuple[dict[str, Any], Path]:
    """An edit as a request says it, and its file."""
    if isinstance(edit, Artifact):
        path = folder / f"edit-{number}.safetensors"
        edit.save(path)
        return {"name": path.stem}, path
    text, strength, options = split_spec(edit)
    check(Path(text).is_file(), "edits", text, "a file that is there")
    return {"name": Path(text).stem, "strength": strength, **options}, Path(text)


def _outputs(model: Any, wanted: Wanted, max_rows: int, shared: dict[str, Any]) -> Outputs:
    """Rows as calls of `generate`."""
    check(wanted.artifacts is None, "artifacts", str(wanted.artifacts), "unset: rows do not name edits here")
    check(not model.images, "model", model.name, "a model that writes text: steer batch writes images to files")
    about = {"edits": wanted.edits, "sampler": wanted.sampler, "reward": wanted.reward, "beta": wanted.beta}
    about |= {"n": wanted.n, "system": wanted.system, "max_rows": max_rows}
    given = {name: x for name, x in about.items() if x is not None}
    return Outputs(model, given | wanted.settings, **shared)
