"""What the commands do. A job checks its options before anything is loaded, and returns what is left to run."""

from __future__ import annotations

from collections.abc import Callable

from steer.cli import generating, measuring, serving, training
from steer.cli.session import Run

__all__ = ["JOBS"]


JOBS: dict[str, Callable[..., Run]] = {
    "generate": generating.generate,
    "train vector": training.train_vector,
    "train controller": training.train_controller,
    "train value": training.train_value,
    "train policy": training.train_policy,
    "train images": training.train_images,
    "eval": measuring.evaluation,
    "compare": measuring.compare,
    "race": measuring.race,
    "guide": measuring.guide,
    "serve": serving.serve,
}
"""By the names in `steer.cli.options.COMMANDS`."""
