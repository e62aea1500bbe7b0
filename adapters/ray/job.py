"""The loop of a bulk job over a Ray cluster: rows go out in windows, records are appended as they come back.

What has a record is never sent again, so that the job goes on after the driver was killed; actors that die are Ray's to
start again, with the batch that they had.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from steer.adapters.ray.answers import Answers
from steer.bulk.job import Worker
from steer.bulk.source import Row
from steer.core import SteerError, check, check_whole
from steer.core.errors import first_line
from steer.files import as_json

__all__ = ["Cluster", "run_on_ray"]

_WINDOW = 10_000
"""Rows that the driver holds at one time."""
_STARTS = 3
"""Actors that may die while they load the model, one after another, before the job ends."""


@dataclass(frozen=True)
class Cluster:
    """Where a job runs: a cluster's address, or one on this machine, with so many actors. Each takes `cpus` processors
    and, where the cluster has any, a GPU. Raises `InputError`.
    """

    address: str | None = None
    actors: int = 1
    cpus: float = 1.0
    batch: int = 64
    """Rows of one call."""

    def __post_init__(self) -> None:
        check_whole("actors", self.actors)
        check_whole("batch", self.batch)
        check(self.cpus > 0, "cpus", self.cpus, "a number above 0")

    @classmethod
    def parse(cls, text: str, actors: int, batch: int) -> Cluster:
        """From `ray` or `ray:ADDRESS`."""
        name, _, address = text.partition(":")
        check(name == "ray", "engine_on", text, "ray, or ray:ADDRESS of a cluster")
        return cls(address or None, actors, batch=batch)


def run_on_ray(make: Callable[[], Worker], cluster: Cluster, rows: Iterator[Row]) -> Iterator[dict[str, Any]]:
    """Records of the rows, in the order in which they are done.

    Raises:
        SteerError: Ray is missing or cannot be reached, or an actor cannot be started.
    """
    ray = _ray()
    began = not ray.is_initialized()
    if began:
        try:
            ray.init(address=cluster.address, log_to_driver=False, logging_level="error", include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise SteerError(f"engine_on: Ray cannot be had at {cluster.address}: {first_line(error)}") from error
    try:
        while window := list(islice(rows, _WINDOW)):
            yield from _window(ray, make, cluster, window)
    finally:
        if began:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise SteerError("engine_on: ray is not installed (pip install 'steer-engine[ray]')") from error
    return ray


def _window(ray: Any, make: Callable[[], Worker], cluster: Cluster, rows: list[Row]) -> Iterator[dict[str, Any]]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = _STARTS
    sent = [
        {"number": r.number, "id": r.id, "row": "" if r.data is None else as_json(r.data), "error": r.error}
        for r in rows
    ]
    blocks = min(len(sent), max(cluster.actors, len(sent) // cluster.batch))
    answered = ray.data.from_items(sent, override_num_blocks=blocks).map_batches(
        Answers,
        fn_constructor_args=(make,),
        compute=ray.data.ActorPoolStrategy(size=cluster.actors),
        batch_size=cluster.batch,
        num_cpus=cluster.cpus,
        num_gpus=1 if ray.cluster_resources().get("GPU", 0) >= cluster.actors else 0,
    )
    try:
        for found in answered.iter_rows():
            yield json.loads(found["record"])
    except ray.exceptions.RayError as error:
        raise SteerError(f"Ray ended the job: {first_line(error)}") from error
