"""What the commands do. A job checks its options before anything is loaded, and returns what is left to run."""

from __future__ import annotations

import inspect
import secrets
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TextIO, get_type_hints

from steer import artifacts
from steer.cli import checks
from steer.cli.checks import Coming
from steer.cli.options import (
    EvalOptions,
    GenerateOptions,
    ModelOptions,
    TrainControllerOptions,
    TrainOptions,
    TrainValueOptions,
    TrainVectorOptions,
)
from steer.cli.values import pairs, typed
from steer.core import Sampler, Samples, check
from steer.engine import SAMPLERS, Plan, execute, load, make_sampler, prepare
from steer.report import Report, as_json, evaluate, write_text
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
            self.models[key] = load(options.model, dtype=options.dtype, device=options.device)
        return self.models[key]


Run = Callable[[Session], None]


# --------------------------------------------------------------------------------------------------------- generate


def generate(options: GenerateOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to generate."""
    checks.check_model(options)
    check(
        (options.prompt is None) != (options.prompts is None), "prompt", options.prompt, "one of --prompt and --prompts"
    )
    prompts: list[Any] = [options.prompt] if options.prompts is None else checks.read_prompts(options.prompts)
    checks.check_prompt("prompt", prompts[0])
    mixed = options.raw and (options.system is not None or any(not isinstance(p, str) for p in prompts))
    check(not mixed, "raw", "messages or a system message", "texts alone: raw text has no messages")
    check(options.system is None or bool(options.system.strip()), "system", options.system, "text that is not empty")
    checks.check_decoding(options.temperature, options.max_new_tokens, options.top_k, options.top_p)
    check(
        options.repetition_penalty > 0, "repetition_penalty", options.repetition_penalty, "a number above 0 (1 is off)"
    )
    check(0 < options.beta < float("inf"), "beta", options.beta, "a number above 0")
    check(options.max_rows >= 1, "max_rows", options.max_rows, "an integer of 1 or more")
    sampler = _sampler(options)
    reward = None if options.reward is None else parse_reward(options.reward)
    single = len(prompts) == 1 and options.sampler == "ancestral" and getattr(sampler, "n", 1) == 1
    check(
        not options.stream or (single and not options.json), "stream", True, "one prompt, n=1, ancestral, without json"
    )
    edits = [checks.edit_maker(text, coming) for text in options.edit]
    if options.out is not None:
        checks.check_output(options.out)
    seed = secrets.randbits(31) if options.seed is None else options.seed

    def run(session: Session) -> None:
        model = session.load(options)
        process = model.process(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            repetition_penalty=options.repetition_penalty,
        )
        mounted = [make(model) for make in edits]
        if options.system is not None:
            from steer.methods.prompt import SystemPrompt

            mounted.append(SystemPrompt(options.system))
        plan = prepare(
            process, _as_raw(prompts) if options.raw else prompts, edits=mounted, sampler=sampler, reward=reward,
            beta=options.beta, seed=seed, max_rows=options.max_rows, model=model,
            progress=session.progress and not options.stream,
        )  # fmt: skip
        samples = _streamed(model, plan, session) if options.stream else execute(plan)
        _show_samples(samples, options, seed, session)

    return run


def _sampler(options: GenerateOptions) -> Sampler:
    check(options.sampler in SAMPLERS, "sampler", options.sampler, ", ".join(SAMPLERS))
    check(options.n is None or options.n >= 1, "n", options.n, "an integer of 1 or more")
    kind = SAMPLERS[options.sampler]
    hints = get_type_hints(kind)
    settable = {f.name: hints[f.name] for f in fields(kind)}  # type: ignore[arg-type]
    settings = typed(pairs(options.set), settable, f"setting of {options.sampler}")
    check(options.n is None or "n" not in settings, "n", options.n, "one of --n and --set n=...")
    check(
        options.sampler != "best-of-n" or options.reward is not None,
        "reward", None, "a reward: best-of-n needs something to be best at",
    )  # fmt: skip
    return make_sampler(options.sampler, settings.pop("n", options.n), **settings)


def _as_raw(prompts: list[Any]) -> list[Any]:
    from steer.core import RawText

    return [RawText(prompt) for prompt in prompts]


def _streamed(model: Any, plan: Plan, session: Session) -> Samples:
    """Run a plan and print its one text as it is drawn."""
    from steer.adapters.streaming import Follower

    follower = Follower(model, plan, lambda piece: session.say(piece.text, end=""))
    samples = execute(plan, follower.step)
    follower.finish(samples)
    return samples


def _show_samples(samples: Samples, options: GenerateOptions, seed: int, session: Session) -> None:
    found = {"model": options.model, **samples.to_dict(), "seed": seed}
    if options.out is not None:
        write_text(options.out, as_json(found) + "\n")
    if options.json:
        session.say(as_json(found))
        return
    for entry in found["prompts"]:
        if not options.stream:
            session.say(f"> {_shown(entry['prompt'])}")
        for sample in entry["samples"]:
            facts = [f"{k} {sample[k]:.3f}" for k in ("reward", "kl") if sample[k] is not None]
            text = "" if options.stream else sample["text"]
            session.say(f"{text}\n  [{', '.join(facts)}]\n")
    if len(samples) > 1:
        session.say(_summary(samples))


def _summary(samples: Samples) -> str:
    """Means over all samples, with a normal 95% interval of the reward, and what they cost."""
    parts = []
    if samples.reward is not None:
        half = 1.96 * float(samples.reward.std()) / len(samples) ** 0.5
        parts.append(f"mean reward {float(samples.reward.mean()):.3f} +- {half:.3f}")
    if samples.kl is not None:
        parts.append(f"mean kl {float(samples.kl.mean()):.3f}")
    cost = samples.cost
    parts.append(f"{cost.generated_tokens} tokens, {cost.model_calls} model calls, {cost.seconds:.1f} s")
    return f"{len(samples)} samples: {', '.join(parts)}"


def _shown(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n> ".join(f"{m['role']}: {m['content']}" for m in prompt)


# ------------------------------------------------------------------------------------------------------------ train


def train_vector(options: TrainVectorOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to fit a vector."""
    from steer.train.vector import train_vector as train

    _check_training(options)
    methods = ("mean", "pca", "probe")
    check(options.method in methods, "method", options.method, ", ".join(methods))
    rows = checks.read_pairs(options.pairs)
    settings = _settings(train, options, "train vector")
    return _trainer(options, lambda model, more: train(model, rows, method=options.method, **settings, **more))


def train_controller(options: TrainControllerOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to train a controller."""
    from steer.train.controller import train_controller as train

    _check_training(options)
    positive = checks.read_prompts(options.positive, "positive")
    negative = checks.read_prompts(options.negative, "negative")
    settings = _settings(train, options, "train controller")
    return _trainer(
        options, lambda model, more: train(model, positive, negative, **settings, **more), options.keep_work
    )


def train_value(options: TrainValueOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to train a value head."""
    from steer.train.value import train_value as train

    _check_training(options)
    prompts = checks.read_prompts(options.prompts)
    reward = parse_reward(options.reward)
    settings = _settings(train, options, "train value")
    return _trainer(
        options, lambda model, more: train(model, prompts, reward.bind(model), **settings, **more), options.keep_work
    )


def _check_training(options: TrainOptions) -> None:
    checks.check_model(options)
    checks.check_output(options.out)


def _settings(train: Callable[..., Any], options: TrainOptions, where: str) -> dict[str, Any]:
    """`--set` against the keyword-only parameters that are not options already."""
    hints = get_type_hints(train)
    taken = {f.name for f in fields(options)} | {"progress", "work"}
    keywords = [p.name for p in inspect.signature(train).parameters.values() if p.kind is p.KEYWORD_ONLY]
    settable = {name: hints.get(name, Any) for name in keywords if name not in taken}
    return typed(pairs(options.set), settable, f"setting of {where}")


def _trainer(options: TrainOptions, train: Callable[[Any, dict[str, Any]], Any], keep_work: bool | None = None) -> Run:
    """`keep_work` is None for training that leaves nothing to resume from."""
    work = options.out.with_name(options.out.name + ".work")

    def run(session: Session) -> None:
        more: dict[str, Any] = {"seed": options.seed, "progress": session.progress}
        if keep_work is not None:
            more["work"] = work
        made = train(session.load(options), more)
        artifacts.save(options.out, *made)
        if keep_work is False:
            shutil.rmtree(work, ignore_errors=True)
        session.say(f"{made[1].describe()}\nwrote {options.out}")

    return run


# ------------------------------------------------------------------------------------------------------------- eval


def evaluation(options: EvalOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to evaluate an edit."""
    checks.check_model(options)
    prompts = checks.read_prompts(options.prompts)
    strengths = checks.read_strengths(options.strengths)
    reward = parse_reward(options.reward)
    checks.check_decoding(options.temperature, options.max_new_tokens)
    check(options.n >= 1, "n", options.n, "an integer of 1 or more")
    check(0 < options.beta < float("inf"), "beta", options.beta, "a number above 0")
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
    "generate": generate,
    "train vector": train_vector,
    "train controller": train_controller,
    "train value": train_value,
    "eval": evaluation,
}
"""By the names in `steer.cli.options.COMMANDS`."""
