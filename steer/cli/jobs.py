"""What the commands do. A job checks its options before anything is loaded, and returns what is left to run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from steer.cli import checks, generating, measuring, serving, training
from steer.cli.checks import Coming
from steer.cli.options import EvalOptions, ModelOptions
from steer.core import check
from steer.engine import is_endpoint, load
from steer.report import Report, evaluate
from steer.rewards import parse_reward

__all__ = ["JOBS", "Session"]


@dataclass
class Session:
    """Where results go, and the models that are loaded, each once."""

    out: TextIO
    progress: bool = field(default_factory=lambda: sys.stderr.isatty())
    models: dict[tuple[str, str, str | None], Any] = field(default_factory=dict)

    def say(self, text: str, end: str = "\n") -> None:
        """Write to the results."""
        print(text, file=self.out, end=end, flush=True)

    def load(self, options: ModelOptions) -> Any:
        """The model that `options` name."""
        key = (options.model, options.dtype, options.device)
        if key not in self.models:
            given = {"dtype": options.dtype, "device": options.device}
            settings: dict[str, Any] = {} if is_endpoint(options.model) else given
            self.models[key] = load(options.model, **settings)
        return self.models[key]


Run = Callable[[Session], None]


# ------------------------------------------------------------------------------------------------------------- eval


def evaluation(options: EvalOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to evaluate an edit."""
    checks.check_model(options)
    check(not checks.draws_images(options), "model", options.model, "a language model")
    prompts = checks.read_prompts(options.prompts)
    strengths = checks.read_strengths(options.strengths)
    reward = parse_reward(options.reward)
    checks.check_reward(reward, images=False)
    checks.check_decoding(options.temperature, options.max_new_tokens)
    check(options.n >= 1, "n", options.n, "an integer of 1 or more")
    checks.check_beta(options.beta)
    check(options.system is None or bool(options.system.strip()), "system", options.system, "text that is not empty")
    checks.check_folder(options.out)
    make = checks.edit_maker(options.edit, coming)

    def run(session: Session) -> None:
        model = session.load(options)
        report: Report = evaluate(
            model, prompts, make(model), strengths=strengths, reward=reward, seed=options.seed, n=options.n,
            max_new_tokens=options.max_new_tokens, temperature=options.temperature, beta=options.beta,
            system=options.system, control=options.control, progress=session.progress,
        )  # fmt: skip
        report = replace(report, artifact=Path(options.edit).name)
        report.write(options.out)
        session.say(f"{report.table()}\nwrote {options.out / 'report.json'} and {options.out / 'report.png'}")

    return run


JOBS: dict[str, Callable[..., Run]] = {
    "generate": generating.generate,
    "train vector": training.train_vector,
    "train controller": training.train_controller,
    "train value": training.train_value,
    "train policy": training.train_policy,
    "train images": training.train_images,
    "eval": evaluation,
    "compare": measuring.compare,
    "race": measuring.race,
    "guide": measuring.guide,
    "serve": serving.serve,
}
"""By the names in `steer.cli.options.COMMANDS`."""
