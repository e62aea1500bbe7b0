"""Jobs behind the commands. A job checks its options before anything is loaded, and returns what is left to run."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

from steer.cli import bulk, demo, generating, judging, measuring, playing, serving, tabulating, training
from steer.cli.recipe import Recipe
from steer.cli.session import Run, Session
from steer.core import SteerError, check
from steer.ranks import Ranks, ranks
from steer.serving.idle import give_back_memory

__all__ = ["JOBS", "check_ranks", "run_recipe"]


JOBS: dict[str, Callable[..., Run]] = {
    "generate": generating.generate,
    "batch": bulk.batch,
    "train vector": training.train_vector,
    "train controller": training.train_controller,
    "train value": training.train_value,
    "train reward": training.train_reward,
    "train stimulus": training.train_stimulus,
    "train policy": training.train_policy,
    "train images": training.train_images,
    "train router": playing.train_router,
    "eval strength": measuring.strength,
    "eval frontier": measuring.frontier,
    "eval search": measuring.search,
    "eval distance": measuring.distance,
    "eval guidance": measuring.guidance,
    "eval goals": judging.goals,
    "eval concept": judging.concept,
    "eval reliability": judging.reliability,
    "eval pairs": judging.pairs,
    "play": playing.play,
    "table": tabulating.tabulate,
    "serve": serving.serve,
    "demo": demo.demo,
}
"""By the names in `steer.cli.options.COMMANDS`."""


SHARED = frozenset({"batch", "train vector", "train controller", "train value", "train reward", "train policy"})
"""Commands whose work several ranks share."""


def check_ranks(command: str) -> Ranks:
    """The ranks that run a command. Raises `InputError` where there are several and it has no use for them."""
    shared = ranks()
    check(shared.count == 1 or command in SHARED, "WORLD_SIZE", shared.count, f"1 for {command}; more share {_SHARING}")
    return shared


_SHARING = ", ".join(sorted(SHARED))


def run_recipe(recipe: Recipe, session: Session) -> None:
    """Check every step, then run them in order. Steps that name one model share it; ranks take each step together."""
    coming: set[Path] = set()
    jobs = []
    for step in recipe.steps:
        try:
            check_ranks(step.command)
            jobs.append(JOBS[step.command](step.options, frozenset(coming)))
        except SteerError as error:
            raise SteerError(f"recipe {recipe.name}, step {step.name} ({step.command}): {error}") from error
        if step.output is not None:
            coming.add(step.output.absolute())
    for number, (step, job) in enumerate(zip(recipe.steps, jobs, strict=True), 1):
        print(f"[{number}/{len(jobs)}] {step.name}: {step.command}", file=sys.stderr)
        job(session)
        ranks().wait()  # what the first one writes, all read
        # Trainers leave cycles behind, and the C library keeps what is freed: hours later that is gigabytes.
        gc.collect()
        give_back_memory()
    if recipe.next:
        print(f"next: {recipe.next}", file=sys.stderr)
