"""`steer batch`: a file of rows is checked and read once, then answered row by row."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from steer.bulk import Outputs, Requests, Summary, run_job
from steer.bulk.job import Elsewhere, Later, Worker
from steer.bulk.outputs import check_fields as check_output_fields
from steer.bulk.source import Shard, is_remote
from steer.bulk.texts import check_fields as check_request_fields
from steer.cli import checks, generating
from steer.cli.checks import Coming
from steer.cli.options import BatchOptions, GenerateOptions, ServeOptions
from steer.cli.serving import check_engine, default_steering, start_engine
from steer.cli.session import Run, Session
from steer.core import SteerError, check, check_whole
from steer.loading import is_endpoint
from steer.ranks import ranks
from steer.serving.artifact_store import Store
from steer.serving.limits import Limits
from steer.serving.reward_store import Rewards
from steer.serving.tasks import Tasks

__all__ = ["batch"]

_PLACE_OR_PACE = frozenset(
    {
        "source",
        "target",
        "shard",
        "max_rows",
        "max_failures",
        "retry_failed",
        "overwrite",
        "check",
        "device",
        "engine_on",
        "actors",
    }
)
"""Options that change no record."""
_REWARD = "job_reward"
_CONNECTIONS = 8
"""Rows that wait for an endpoint at one time."""


def batch(options: BatchOptions, coming: Coming = frozenset()) -> Run:
    """Check a bulk job."""
    checks.check_model(options)
    shard, target = _share(options)
    check_whole("max_rows", options.max_rows)
    check(options.max_failures is None or options.max_failures >= 0, "max_failures", options.max_failures, "0 or more")
    if not is_remote(target):
        checks.check_output(Path(target), "target")
    check(not _same(options.source, target), "target", target, "another file than the rows, which would be lost")
    images = checks.draws_images(options)
    plain = images or is_endpoint(options.model) or checks.denoises_text(options)
    options = replace(options, target=target)
    make = (_outputs if plain else _requests)(options, images)
    check(options.actors == 1 or options.engine_on is not None, "actors", options.actors, "1 without --engine-on")
    cluster = None if options.engine_on is None else _cluster(options, images)

    def run(session: Session) -> None:
        known = partial(check_output_fields if plain else check_request_fields, keep=frozenset(options.keep))
        here = Later(known, lambda: make(session))
        try:
            summary = run_job(
                here if cluster is None else Elsewhere(known, _records(options, cluster)),
                options.source,
                target,
                checks.job_of(options, _PLACE_OR_PACE),
                shard=shard,
                max_failures=options.max_failures,
                retry_failed=options.retry_failed,
                overwrite=options.overwrite,
                progress=session.progress,
            )
        except (KeyboardInterrupt, SteerError):
            print(f"steer: what was done is kept in {target}; the same command goes on", file=sys.stderr)
            raise
        session.say(_told(summary, target))

    return run


def _share(options: BatchOptions) -> tuple[Shard, str]:
    """The rows of this process and its file: several ranks share the rows out, each with a file of its own."""
    shard, shared = Shard.parse(options.shard), ranks()
    if shared.count == 1:
        return shard, options.target
    allowed = f"0/1 on {shared.count} ranks, each of which takes its own share"
    check(shard == Shard(), "shard", options.shard, allowed)
    stem, dot, kind = options.target.rpartition(".")
    return Shard(shared.index, shared.count), f"{stem}-{shared.index}of{shared.count}{dot}{kind}"


def _same(source: str, target: str) -> bool:
    """Whether records would be written over the rows."""
    if is_remote(source) or is_remote(target):
        return source == target
    written = (Path(target), Path(f"{target}.part.jsonl"), Path(f"{target}.job.json"))
    return Path(source).resolve() in [path.resolve() for path in written]


def _told(summary: Summary, target: str) -> str:
    before = f", {summary.before} before" if summary.before else ""
    failed = f"; {summary.failed} failed (--retry-failed does those again)" if summary.failed else ""
    return f"wrote {target}: {summary.done} rows in {summary.seconds:.0f} s{before}{failed}"


def _generation(options: BatchOptions) -> GenerateOptions:
    """The same as options of `generate`, whose checks and meanings it shares."""
    both = {f.name for f in fields(GenerateOptions)} & {f.name for f in fields(BatchOptions)}
    return GenerateOptions(**{name: getattr(options, name) for name in both})


# ------------------------------------------------------------------------------------------------------------ cluster


def _cluster(options: BatchOptions, images: bool) -> Any:
    """Where the job runs. Raises `InputError` for what cannot run there."""
    from steer.adapters.ray import Cluster

    assert options.engine_on is not None
    cluster = Cluster.parse(options.engine_on, options.actors, 2 * options.max_rows)
    check(ranks().count == 1, "engine_on", options.engine_on, "unset under torchrun: Ray starts its own processes")
    return cluster


def _records(options: BatchOptions, cluster: Any) -> Any:
    """What has the cluster answer rows."""
    from steer.adapters.ray import run_on_ray

    return partial(run_on_ray, partial(answering, replace(options, engine_on=None, actors=1), os.getcwd()), cluster)


def answering(options: BatchOptions, folder: str) -> Worker:
    """The worker of a job, in a process of its own, where its paths are those of the job's folder."""
    with suppress(OSError):  # another machine may not have it
        os.chdir(folder)
    images = checks.draws_images(options)
    plain = images or is_endpoint(options.model) or checks.denoises_text(options)
    made: Worker = (_outputs if plain else _requests)(options, images)(Session(sys.stderr, progress=False))
    return made


# -------------------------------------------------------------------------------------------------------------- texts


def _requests(options: BatchOptions, images: bool) -> Any:
    """Rows as requests to an engine that serves."""
    given = _generation(options)
    checks.check_kind(given, images=False)
    checks.check_decoding(options.temperature, options.max_new_tokens, options.top_k, options.top_p)
    generating.request(given, False, frozenset())
    rewards = [*options.allow_reward, *([] if options.reward is None else [f"{_REWARD}={options.reward}"])]
    read = Rewards(rewards, options.artifacts)
    plain = not options.edit and options.reward is None and options.sampler == "ancestral"
    default = default_steering(replace(given, reward=None if options.reward is None else _REWARD))
    engine_options = ServeOptions(
        model=options.model,
        dtype=options.dtype,
        device=options.device,
        check=options.check,
        engine=options.engine,
        engine_set=options.engine_set,
        max_rows=options.max_rows,
        cache_tokens=1 << 30,
    )
    check_engine(engine_options)

    def make(session: Session) -> Worker:
        engine = start_engine(engine_options, session)
        most = 1 << 30
        limits = Limits(choices=most, candidates=most, tokens=most, total_tokens=most)
        store = Store(options.artifacts, engine.check_artifact, files=default.files)
        tasks = Tasks(store, read, limits, None if plain else default.request, engine.own_edits)
        decoding = {
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k,
            "max_tokens": options.max_new_tokens,
            "n": options.n if options.sampler == "ancestral" else None,
        }
        return Requests(
            engine,
            tasks,
            fields=decoding,
            system=options.system,
            seed=options.seed,
            keep=frozenset(options.keep),
            capacity=2 * options.max_rows,
        )

    return make


# ------------------------------------------------------------------------------------------------------------- others


def _outputs(options: BatchOptions, images: bool) -> Any:
    """Rows as calls of `generate`."""
    given = _generation(options)
    masked = not images and not is_endpoint(options.model)
    checks.check_kind(given, images=images, masked=masked)
    check(options.engine == "transformers", "engine", options.engine, f"transformers: {options.model} is no such model")
    for name in ("edit", "artifacts", "allow_reward"):
        check(not getattr(options, name), name, str(getattr(options, name)), "unset: edits are a language model's")
    asked = generating.request(given, images, frozenset())
    check(not images or not is_remote(options.target), "target", options.target, "a path here: images lie beside it")
    folder = Path(f"{options.target}.images") if images else None
    settings = generating.process_settings(given, images, masked)
    if options.system is not None:
        settings["system"] = options.system

    def make(session: Session) -> Worker:
        from steer.images import save_image

        return Outputs(
            session.load(options),
            {
                **settings,
                "sampler": asked.sampler,
                "reward": asked.reward,
                "beta": options.beta,
                "max_rows": options.max_rows,
            },
            images=folder,
            seed=options.seed,
            keep=frozenset(options.keep),
            capacity=_CONNECTIONS if is_endpoint(options.model) else 1,
            write=lambda image, path: save_image(path, image),
        )

    return make
