"""`steer batch`: a file of rows is checked and read once, then answered row by row."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from steer.bulk import Outputs, Requests, Summary, run_job
from steer.bulk.job import Worker
from steer.bulk.source import Shard, is_remote
from steer.cli import checks, generating
from steer.cli.checks import Coming
from steer.cli.options import BatchOptions, GenerateOptions, ServeOptions
from steer.cli.serving import check_engine, default_steering, start_engine
from steer.cli.session import Run, Session
from steer.core import SteerError, check, check_whole
from steer.loading import is_endpoint
from steer.serving.artifact_store import Store
from steer.serving.limits import Limits
from steer.serving.reward_store import Rewards
from steer.serving.tasks import Tasks

__all__ = ["batch"]

_PLACE_OR_PACE = frozenset(
    {"source", "target", "shard", "max_rows", "max_failures", "retry_failed", "overwrite", "check", "device"}
)
"""Options that change no record."""
_REWARD = "job_reward"
_CONNECTIONS = 8
"""Rows that wait for an endpoint at one time."""


def batch(options: BatchOptions, coming: Coming = frozenset()) -> Run:
    """Check a bulk job."""
    checks.check_model(options)
    shard = Shard.parse(options.shard)
    check_whole("max_rows", options.max_rows)
    check(options.max_failures is None or options.max_failures >= 0, "max_failures", options.max_failures, "0 or more")
    if not is_remote(options.target):
        checks.check_output(Path(options.target), "target")
    images = checks.draws_images(options)
    plain = images or is_endpoint(options.model) or checks.denoises_text(options)
    make = (_outputs if plain else _requests)(options, images)

    def run(session: Session) -> None:
        worker = make(session)
        try:
            summary = run_job(
                worker,
                options.source,
                options.target,
                _job(options),
                shard=shard,
                max_failures=options.max_failures,
                retry_failed=options.retry_failed,
                overwrite=options.overwrite,
                progress=session.progress,
            )
        except (KeyboardInterrupt, SteerError):
            print(f"steer: what was done is kept in {options.target}; the same command goes on", file=sys.stderr)
            raise
        finally:
            worker.close()
        session.say(_told(summary, options.target))

    return run


def _job(options: BatchOptions) -> dict[str, Any]:
    """What changes records."""
    given = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in _PLACE_OR_PACE}
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


def _told(summary: Summary, target: str) -> str:
    before = f", {summary.before} before" if summary.before else ""
    failed = f"; {summary.failed} failed (--retry-failed does those again)" if summary.failed else ""
    return f"wrote {target}: {summary.done} rows in {summary.seconds:.0f} s{before}{failed}"


def _generation(options: BatchOptions) -> GenerateOptions:
    """The same as options of `generate`, whose checks and meanings it shares."""
    both = {f.name for f in fields(GenerateOptions)} & {f.name for f in fields(BatchOptions)}
    return GenerateOptions(**{name: getattr(options, name) for name in both})


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
