"""`steer eval`, `steer compare`, `steer race` and `steer guide`: measurements that print a table and draw a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

from steer.cli import checks
from steer.cli.checks import Coming
from steer.cli.generating import tuned_model
from steer.cli.options import CompareOptions, EvalOptions, FrontierOptions, GuideOptions, ModelOptions, RaceOptions
from steer.cli.session import Run, Session
from steer.cli.values import pairs, typed
from steer.core import Sampler, check
from steer.edits import split_spec
from steer.measure.report import Report, evaluate
from steer.pictures.style import FORMATS
from steer.rewards import parse_reward
from steer.rewards.algebra import check_reward

__all__ = ["compare", "evaluation", "frontier", "guide", "race"]


def _positive(options: Any, *names: str) -> None:
    for name in names:
        check(getattr(options, name) >= 1, name, getattr(options, name), "an integer of 1 or more")


def _pictures(options: Any, name: str) -> list[Path]:
    """The files of a picture, one for each format. Raises `InputError`."""
    wanted = [part.strip() for part in options.format.split(",")]
    check(set(wanted) <= set(FORMATS), "format", options.format, f"{', '.join(FORMATS)}, with commas between them")
    return [options.out / f"{name}.{kind}" for kind in dict.fromkeys(wanted)]


def _draw(draw: Callable[[Any, Path], None], found: Any, options: Any, name: str) -> str:
    """Draw in every format that was asked for; the files, for people."""
    paths = _pictures(options, name)
    for path in paths:
        draw(found, path)
    return ", ".join(map(str, paths))


def _numbers(field: str, text: str) -> list[float]:
    found = checks.read_strengths(text, field)
    assert found is not None
    return found


def _sizes(field: str, text: str) -> list[int]:
    found = _numbers(field, text)
    check(
        all(x >= 1 and x == int(x) for x in found), field, text, "whole numbers of 1 or more with commas between them"
    )
    return [int(x) for x in found]


def evaluation(options: EvalOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to evaluate an edit."""
    from steer.pictures.charts import draw_report

    checks.check_model(options)
    checks.check_causal(options)
    prompts = checks.read_prompts(options.prompts)
    strengths = checks.read_strengths(options.strengths)
    reward = parse_reward(options.reward)
    check_reward(reward, images=False)
    checks.check_decoding(options.temperature, options.max_new_tokens)
    check(options.n >= 1, "n", options.n, "an integer of 1 or more")
    checks.check_beta(options.beta)
    check(options.system is None or bool(options.system.strip()), "system", options.system, "text that is not empty")
    checks.check_folder(options.out)
    _pictures(options, "check")
    make = checks.edit_maker(options.edit, coming)
    file = Path(split_spec(options.edit)[0])
    check(not options.keep or file.suffix == ".safetensors", "keep", str(file), "unset, or a .safetensors file")

    def run(session: Session) -> None:
        model = session.load(options)
        report: Report = evaluate(
            model,
            prompts,
            make(model),
            strengths=strengths,
            reward=reward,
            seed=options.seed,
            n=options.n,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            beta=options.beta,
            system=options.system,
            control=options.control,
            progress=session.progress,
        )
        report = replace(report, artifact=Path(options.edit).name)
        report.write(options.out)
        if options.keep:
            report.keep(file)
        drawn = _draw(draw_report, report, options, "report")
        session.say(f"{report.table()}\nwrote {options.out / 'report.json'} and {drawn}")

    return run


def compare(options: CompareOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to compare samplers."""
    from steer.measure.compare import Problem, methods_by_name
    from steer.measure.compare import compare as measure
    from steer.pictures.charts import draw_curves

    checks.check_model(options)
    check(checks.draws_images(options), "model", options.model, "a diffusion model with a judge")
    tasks = [Problem.parse(text) for text in options.task]
    check(bool(tasks), "task", options.task, "at least one")
    for task in tasks:
        check_reward(parse_reward(task.reward), images=True)
    for name in options.method:
        check(name in methods_by_name(), "method", name, ", ".join(methods_by_name()))
    _positive(options, "outputs", "particles", "steps", "seeds", "pool")
    budgets = None if options.budgets is None else _sizes("budgets", options.budgets)
    names = [task.name for task in tasks]
    for name in options.curve:
        check(name in names, "curve", name, ", ".join(names))
    checks.check_folder(options.out)
    _pictures(options, "check")

    def run(session: Session) -> None:
        found = measure(
            session.load(options),
            tasks,
            options.out,
            prompt=options.prompt,
            methods=options.method or None,
            outputs=options.outputs,
            particles=options.particles,
            steps=options.steps,
            seeds=options.seeds,
            pool=options.pool,
            budgets=budgets,
            curves=options.curve or None,
            progress=session.progress,
        )
        drawn = _draw(draw_curves, found, options, "curves")
        more = f" and {drawn}" if budgets else ""
        session.say(f"{found.tables()}\nwrote {options.out / 'results.json'}{more}")

    return run


def race(options: RaceOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to race searches."""
    from steer.measure.race import methods_by_name
    from steer.measure.race import race as measure
    from steer.pictures.charts import draw_race

    images, prompts = _prompts(options, options.prompts)
    reward = parse_reward(options.reward)
    check_reward(reward, images=images)
    checks.check_beta(options.beta)
    known = methods_by_name()
    for name in options.method:
        check(name in known, "method", name, ", ".join(known))
        check(bool(options.edit) or not known[name].guided, "method", name, "methods without guidance, or --edit")
    _positive(options, "seeds", "steps", "max_new_tokens", "block")
    budgets = _sizes("budgets", options.budgets)
    check(options.reach is None or options.reach >= max(budgets), "reach", options.reach, "the largest budget or more")
    settings = _by_method(options)
    edits = [checks.edit_maker(text, coming) for text in options.edit]
    checks.check_folder(options.out)
    _pictures(options, "check")

    def run(session: Session) -> None:
        model = session.load(options)
        process = _process(model, options, images, block=options.block)
        about = {"model": options.model, "edits": [Path(text).name for text in options.edit]}
        found = measure(
            process,
            prompts,
            reward.bind(model),
            budgets,
            options.out,
            methods=options.method,
            edits=[make(model) for make in edits],
            beta=options.beta,
            seeds=options.seeds,
            reach=options.reach,
            options=settings,
            about=about,
            progress=session.progress,
        )
        drawn = _draw(draw_race, found, options, "race")
        session.say(f"{found.table()}\nwrote {options.out / 'race.json'} and {drawn}")

    return run


def _by_method(options: RaceOptions) -> dict[str, dict[str, Any]]:
    """`METHOD.KEY=VALUE`, against the settings of each method's sampler."""
    from steer.measure.race import methods_by_name

    found: dict[str, dict[str, str]] = {}
    for key, value in pairs(options.set).items():
        name, dot, setting = key.rpartition(".")
        check(
            bool(dot) and name in options.method,
            "set",
            key,
            "METHOD.KEY=VALUE with one of " + ", ".join(options.method),
        )
        found.setdefault(name, {})[setting] = value
    made = {}
    for name, given in found.items():
        kind: type[Sampler] = type(methods_by_name()[name].make(1, 1))
        hints = get_type_hints(kind)
        settable = {f: hints[f] for f in kind.__dataclass_fields__}  # type: ignore[attr-defined]
        made[name] = typed(given, settable, f"setting of {name}")
        kind(**made[name])
    return made


def frontier(options: FrontierOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to compare methods by reward against KL."""
    from steer.measure.frontier import SWEEPS
    from steer.measure.frontier import frontier as measure
    from steer.pictures.charts import draw_frontier

    checks.check_model(options)
    checks.check_causal(options)
    prompts = checks.read_prompts(options.prompts)
    check(len(prompts) >= 2, "prompts", f"{len(prompts)} prompts", "at least 2: intervals are over prompts")
    reward = parse_reward(options.reward)
    check_reward(reward, images=False)
    checks.check_decoding(options.temperature, options.max_new_tokens)
    check(
        options.temperature > 0, "temperature", options.temperature, "above 0: greedy texts have no KL worth the name"
    )
    for name in options.method:
        check(name in SWEEPS, "method", name, ", ".join(SWEEPS))
    _positive(options, "n")
    strengths = _numbers("strengths", options.strengths)
    edits = {text: checks.edit_maker(text, coming) for text in options.edit}
    ws = _numbers("w", options.w)
    for folder in options.tuned:
        check(folder in coming or (folder / "steer.json").is_file(), "tuned", str(folder), "the folder of a policy")
    names = [folder.name for folder in options.tuned]
    check(len({*names}) == len(names), "tuned", names, "folders of different names")
    checks.check_folder(options.out)
    _pictures(options, "check")

    def run(session: Session) -> None:
        from steer.cli.generating import tuned_model
        from steer.methods.rlg import RLGuidance

        model = session.load(options)
        methods: dict[str, Any] = {name: SWEEPS[name] for name in options.method}
        drawn: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
        for folder in options.tuned:
            policy: Any = tuned_model(model, folder, False)
            methods[folder.name] = [{"edits": RLGuidance(policy.process(**drawn), w)} for w in ws]
        for text, make in edits.items():
            edit: Any = make(model)
            methods[Path(text.partition(":")[0]).stem] = [{"edits": replace(edit, strength=x)} for x in strengths]
        methods |= {f"system: {text[:40]}": [{"system": text}] for text in options.system}
        found = measure(
            model,
            prompts,
            reward,
            methods,
            n=options.n,
            seed=options.seed,
            progress=session.progress,
            **drawn,
        )
        found.write(options.out)
        pictures = _draw(draw_frontier, found, options, "frontier")
        session.say(f"{found.table()}\nwrote {options.out / 'frontier.json'} and {pictures}")

    return run


def guide(options: GuideOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to sweep RL guidance."""
    from steer.measure.guide import Sweep, sweep
    from steer.pictures.charts import draw_guide

    images, prompts = _prompts(options, options.prompts)
    reward = parse_reward(options.reward)
    check_reward(reward, images=images)
    if options.tuned.absolute() not in coming:
        check(options.tuned.is_dir(), "tuned", str(options.tuned), "the folder of a policy")
    _positive(options, "outputs", "particles", "seeds", "steps", "max_new_tokens")
    ws = _numbers("w", options.w)
    checks.check_folder(options.out)
    _pictures(options, "check")

    def run(session: Session) -> None:
        model = session.load(options)
        tuned = tuned_model(model, options.tuned, images)
        options.out.mkdir(parents=True, exist_ok=True)

        def keep(found: Sweep) -> None:
            found.write(options.out)
            _draw(draw_guide, found, options, "guide")

        found = sweep(
            _process(model, options, images),
            _process(tuned, options, images),
            prompts,
            reward.bind(model),
            ws=ws,
            outputs=options.outputs,
            particles=options.particles,
            seeds=options.seeds,
            progress=session.progress,
            about={"model": options.model, "tuned": options.tuned.name, "reward": options.reward},
            on_point=keep,
        )
        drawn = _pictures(options, "guide")
        session.say(f"{found.table()}\nwrote {options.out / 'guide.json'} and {', '.join(map(str, drawn))}")

    return run


def _prompts(options: ModelOptions, path: Path | None) -> tuple[bool, list[Any]]:
    """Whether the model draws images, and what it is asked for; diffusion models may be asked for nothing."""
    checks.check_model(options)
    images = checks.draws_images(options)
    check(images or path is not None, "prompts", None, "a file of prompts")
    return images, [""] if path is None else checks.read_prompts(path)


def _process(model: Any, options: Any, images: bool, **text: Any) -> Any:
    if images:
        return model.process(steps=options.steps, max_batch=256)
    if checks.denoises_text(options):
        return model.process(length=options.max_new_tokens, steps=options.steps)
    return model.process(max_new_tokens=options.max_new_tokens, **text)
