"""What a job will take, before it starts: network evaluations counted from its options, and the time that a short try
of the model suggests.

Approximate: texts that end early and trees that share their beginnings take less, rewards and lookaheads more. An
evaluation is one token of one row, or one denoising step of one image.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from steer.cli import checks
from steer.cli.options import (
    DistanceOptions,
    FrontierOptions,
    GenerateOptions,
    GuidanceOptions,
    ModelOptions,
    Options,
    SearchOptions,
    StrengthOptions,
    TrainValueOptions,
)
from steer.cli.session import Session
from steer.embedded import resolve
from steer.loading import is_endpoint

__all__ = ["estimated", "evaluations"]

ROWS, TOKENS, STEPS = 8, 12, 3
"""Of the try."""
MOST_STRENGTHS = 6
"""Strengths other than 0 in a sweep by default: fewer for some kinds of edit."""


def estimated(options: Options, session: Session) -> str:
    """A line on cost and time; the model is loaded and tried where that costs nobody anything."""
    count = evaluations(options)
    if count is None or not isinstance(options, ModelOptions):
        return "no estimate of its cost"
    images = checks.draws_images(options)
    cost = f"about {count:,} {'network evaluations' if images else 'tokens'} at most"
    here = not is_endpoint(options.model) and isinstance(resolve(options.model), Path)
    if not here or checks.denoises_text(options):
        return cost
    seconds = count * _pace(session.load(options), images)
    return f"{cost}, {_spoken(seconds)} at the pace of a short try here (rewards come on top)"


def evaluations(options: Options) -> int | None:
    """Network evaluations of a job at most; None for jobs that are not counted."""
    found = next((count for kind, count in _COUNTS.items() if type(options) is kind), None)
    return None if found is None else found(options)


def _pace(model: Any, images: bool) -> float:
    """Seconds for one evaluation, when eight rows go together; the first run, which warms up, does not count."""
    spent = 0.0
    for _ in range(2):
        began = time.perf_counter()
        if images:
            model.generate(model.classes[0] if model.classes else "", n=ROWS, steps=STEPS, seed=0)
        else:
            model.generate("Once upon a time", n=ROWS, max_new_tokens=TOKENS, seed=0)
        spent = time.perf_counter() - began
    return spent / (ROWS * (STEPS if images else TOKENS))


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ------------------------------------------------------------------------------------------------------------- counts


def _process(count: int) -> Any:
    """What a sampler asks a process for before a run."""
    return SimpleNamespace(num_steps=count)


def _asked(path: Path | None) -> int:
    return 1 if path is None or str(path) == "-" else len(checks.read_prompts(path))


def _generate(options: GenerateOptions) -> int:
    from steer.cli.generating import sampler_of

    images = checks.draws_images(options)
    sampler = sampler_of(options)
    steps = options.steps if images else options.max_new_tokens
    one = sampler.rows * sampler.updates(_process(steps))
    prompts = len(options.class_) if options.class_ else _asked(options.prompts)
    return prompts * one


def _strength(options: StrengthOptions) -> int:
    given = checks.read_strengths(options.strengths)
    strengths = MOST_STRENGTHS if given is None else len([x for x in given if x])
    settings = 1 + strengths * (1 + options.control) + (options.system is not None)
    return settings * _asked(options.prompts) * options.n * options.max_new_tokens


def _distance(options: DistanceOptions) -> int:
    from steer.measure.compare import METHODS

    each = options.outputs * options.particles * options.steps
    methods = len(options.method) or len(METHODS)
    sizes = sum(int(x) for x in options.budgets.split(",")) if options.budgets else 0
    largest = max((int(x) for x in options.budgets.split(",")), default=0) if options.budgets else 0
    curves = options.seeds * options.steps * (3 * largest + sizes + largest) * len(options.curve or options.task)
    return len(options.task) * methods * options.seeds * each + options.pool * options.steps + curves


def _search(options: SearchOptions) -> int:
    budgets = [int(float(x)) for x in options.budgets.split(",")]
    reached = (options.reach or max(budgets)) - max(budgets)
    return _asked(options.prompts) * options.seeds * (sum(budgets) * max(1, len(options.method)) + reached)


def _frontier(options: FrontierOptions) -> int:
    from steer.measure.frontier import SWEEPS
    from steer.methods.samplers import make_sampler

    settings = [setting for name in options.method for setting in SWEEPS[name]]
    drawn = len(settings) * (options.candidates or 0)
    for setting in settings if options.candidates is None else ():
        told = {name: value for name, value in setting.items() if name not in ("sampler", "n", "beta")}
        sampler = make_sampler(setting["sampler"], setting.get("n"), **told)
        drawn += sampler.rows * sampler.updates(_process(1))
    points = 1 + len(options.edit) * len(options.strengths.split(",")) + len(options.system)
    points += len(options.tuned) * len(options.w.split(","))
    return _asked(options.prompts) * options.max_new_tokens * (points * options.n + drawn)


def _guidance(options: GuidanceOptions) -> int:
    steps = options.steps if checks.draws_images(options) else options.max_new_tokens
    each = options.outputs * options.seeds * steps * 2  # of the base and of the policy
    return _asked(options.prompts) * len(options.w.split(",")) * each * (1 + options.particles)


def _value(options: TrainValueOptions) -> int:
    from steer.train.value import ValueSettings

    given = dict(text.split("=", 1) for text in options.set if "=" in text)
    plain = ValueSettings()
    samples, tokens = (int(given.get(name, getattr(plain, name))) for name in ("samples", "max_new_tokens"))
    return _asked(options.prompts) * samples * tokens


_COUNTS: dict[type, Callable[[Any], int | None]] = {
    GenerateOptions: _generate,
    StrengthOptions: _strength,
    DistanceOptions: _distance,
    SearchOptions: _search,
    FrontierOptions: _frontier,
    GuidanceOptions: _guidance,
    TrainValueOptions: _value,
}
