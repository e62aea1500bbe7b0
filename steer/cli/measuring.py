"""Jobs of `steer eval`: measurements of one kind of report, a page with pictures, JSON, CSV and a recipe."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from steer.cli import checks
from steer.cli.checks import Coming
from steer.cli.generating import tuned_model
from steer.cli.options import (
    COMMANDS,
    DistanceOptions,
    EvalOptions,
    FrontierOptions,
    GuidanceOptions,
    ModelOptions,
    SearchOptions,
    StrengthOptions,
)
from steer.cli.session import Run, Session
from steer.cli.values import pairs, settings_of, typed
from steer.core import Sampler, check
from steer.core.names import check_known
from steer.edits import split_spec
from steer.measure.report import Report, evaluate
from steer.pictures.report_page import Page
from steer.pictures.style import FORMATS
from steer.rewards import parse_reward
from steer.rewards.algebra import check_reward

__all__ = ["distance", "frontier", "guidance", "numbers", "picture_files", "publish", "search", "strength"]


def _positive(options: Any, *names: str) -> None:
    for name in names:
        check(getattr(options, name) >= 1, name, getattr(options, name), "an integer of 1 or more")


def picture_files(options: Any, name: str) -> list[Path]:
    """The files of a picture, one for each format. Raises `InputError`."""
    wanted = [part.strip() for part in options.format.split(",")]
    check(set(wanted) <= set(FORMATS), "format", options.format, f"{', '.join(FORMATS)}, with commas between them")
    return [options.out / f"{name}.{kind}" for kind in dict.fromkeys(wanted)]


def publish(session: Session, options: EvalOptions, slug: str, found: Any, summary: str, **more: Any) -> None:
    """Draw what was found in every format that was asked for, write the page beside its JSON, and say where."""
    drawn: dict[str, Any] = more.get("pictures", {slug: more["draw"]} if "draw" in more else {})
    pictures = []
    for name, draw in drawn.items():
        for path in picture_files(options, name):
            draw(found, path)
            pictures.append(path)
    command = next(name for name, kind in COMMANDS.items() if type(options) is kind)
    settings = settings_of(options)
    page = Page(
        title=more.get("title") or f"{command.removeprefix('eval ').capitalize()}: {options.model}",
        about=inspect.cleandoc(type(options).__doc__ or ""),
        summary=summary,
        records=found.records(),
        pictures=[path for path in pictures if path.suffix == f".{options.format.split(',')[0].strip()}"],
        texts=more.get("texts", ()),
        recipe=yaml.safe_dump({"name": slug, "command": command, "settings": settings}, sort_keys=False, width=110),
        files=[f"{slug}.json", f"{slug}.csv", "recipe.yaml", *(path.name for path in pictures)],
    )
    page.write(options.out, slug)
    beside = ", ".join(["page.html", *page.files])
    session.say(f"{summary}\nwrote {options.out}: {beside}")


def numbers(field: str, text: str) -> list[float]:
    found = checks.read_strengths(text, field)
    assert found is not None
    return found


def _sizes(field: str, text: str) -> list[int]:
    found = numbers(field, text)
    check(
        all(x >= 1 and x == int(x) for x in found), field, text, "whole numbers of 1 or more with commas between them"
    )
    return [int(x) for x in found]


def strength(options: StrengthOptions, coming: Coming = frozenset()) -> Run:
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
    picture_files(options, "check")
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
        publish(session, options, "report", report, report.table(), draw=draw_report, texts=report.texts())

    return run


def distance(options: DistanceOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to compare samplers."""
    from steer.measure.compare import OLD_NAMES, Problem, methods_by_name
    from steer.measure.compare import compare as measure
    from steer.pictures.charts import draw_curves, draw_methods

    checks.check_model(options)
    check(checks.draws_images(options), "model", options.model, "a diffusion model with a judge")
    tasks = [Problem.parse(text) for text in options.task]
    check(bool(tasks), "task", options.task, "at least one")
    for task in tasks:
        check_reward(parse_reward(task.reward), images=True)
    options = replace(options, method=[OLD_NAMES.get(name, name) for name in options.method])
    for name in options.method:
        check_known("method", name, methods_by_name())
    _positive(options, "outputs", "particles", "steps", "seeds", "pool")
    budgets = None if options.budgets is None else _sizes("budgets", options.budgets)
    names = [task.name for task in tasks]
    for name in options.curve:
        check(name in names, "curve", name, ", ".join(names))
    checks.check_folder(options.out)
    picture_files(options, "check")

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
        pictures = {"methods": draw_methods} | ({"curves": draw_curves} if budgets else {})
        publish(session, options, "results", found, found.tables(), pictures=pictures)

    return run


def search(options: SearchOptions, coming: Coming = frozenset()) -> Run:
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
        check_known("method", name, known)
        check(bool(options.edit) or not known[name].guided, "method", name, "methods without guidance, or --edit")
    _positive(options, "seeds", "steps", "max_new_tokens", "block")
    budgets = _sizes("budgets", options.budgets)
    check(options.reach is None or options.reach >= max(budgets), "reach", options.reach, "the largest budget or more")
    settings = _by_method(options)
    edits = [checks.edit_maker(text, coming) for text in options.edit]
    checks.check_folder(options.out)
    picture_files(options, "check")

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
        publish(session, options, "race", found, found.table(), draw=draw_race)

    return run


def _by_method(options: SearchOptions) -> dict[str, dict[str, Any]]:
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
        check_known("method", name, SWEEPS)
    _positive(options, "n")
    for text in options.also:
        check_reward(parse_reward(text), images=False)
    check(options.candidates is None or options.candidates >= 1, "candidates", options.candidates, "1 or more")
    kls = numbers("at_kl", options.at_kl)
    check(min(kls) >= 0, "at_kl", options.at_kl, "numbers of 0 or more")
    sweeps = _Sweeps.of(options, coming)
    checks.check_folder(options.out)
    picture_files(options, "check")

    def run(session: Session) -> None:
        model = session.load(options)
        drawn: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
        found = measure(
            model,
            prompts,
            reward,
            sweeps.methods(options, model, drawn),
            n=options.n,
            candidates=options.candidates,
            also=options.also,
            seed=options.seed,
            progress=session.progress,
            on_point=lambda some, samples: replace(some, kls=tuple(kls)).write(options.out),
            **drawn,
        )
        found = replace(found, kls=tuple(kls))
        found.write(options.out)
        publish(session, options, "frontier", found, found.table(), draw=draw_frontier)

    return run


@dataclass(frozen=True)
class _Sweeps:
    """What `eval frontier` compares beside samplers: edits, value heads and policies, and how strong each is made."""

    edits: dict[str, Any]
    strengths: list[float]
    heads: dict[str, Any]
    betas: list[float]
    ws: list[float]

    @classmethod
    def of(cls, options: FrontierOptions, coming: Coming) -> _Sweeps:
        """Checked, as far as can be without the model. Raises `InputError`."""
        strengths = numbers("strengths", options.strengths)
        edits = {text: checks.edit_maker(text, coming) for text in options.edit}
        heads = {text: checks.edit_maker(text, coming) for text in options.guided}
        betas = numbers("betas", options.betas)
        check(min(betas) > 0, "betas", options.betas, "numbers above 0")
        ws = numbers("w", options.w)
        for folder in options.tuned:
            there = folder.absolute() in coming or (folder / "steer.json").is_file()
            check(there, "tuned", str(folder), "the folder of a policy")
        names = [folder.name for folder in options.tuned]
        check(len({*names}) == len(names), "tuned", names, "folders of different names")
        return cls(edits, strengths, heads, betas, ws)

    def methods(self, options: FrontierOptions, model: Any, drawn: dict[str, Any]) -> dict[str, Any]:
        """Settings of `generate`, from weak to strong, by the name of the method; samplers come first."""
        from steer.cli.generating import tuned_model
        from steer.measure.frontier import sweep_of
        from steer.methods.rlg import RLGuidance

        found: dict[str, Any] = {name: [dict(s) for s in sweep_of(name, options.candidates)] for name in options.method}
        for folder in options.tuned:
            policy: Any = tuned_model(model, folder, False)
            found[folder.name] = [{"edits": RLGuidance(policy.process(**drawn), w)} for w in self.ws]
        for text, make in self.edits.items():
            edit: Any = make(model)
            doses = [replace(edit, strength=x) for x in self.strengths] if hasattr(edit, "strength") else [edit]
            found[Path(text.partition(":")[0]).stem] = [{"edits": dosed} for dosed in doses]
        for text, make in self.heads.items():
            head = make(model)
            found[Path(text.partition(":")[0]).stem] = [{"edits": head, "beta": beta} for beta in self.betas]
        return found | {f"system: {text[:40]}": [{"system": text}] for text in options.system}


def guidance(options: GuidanceOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to sweep RL guidance."""
    from steer.measure.guide import Sweep, SweepSettings, sweep
    from steer.pictures.charts import draw_guide

    images, prompts = _prompts(options, options.prompts)
    reward = parse_reward(options.reward)
    check_reward(reward, images=images)
    if options.tuned.absolute() not in coming:
        check(options.tuned.is_dir(), "tuned", str(options.tuned), "the folder of a policy")
    _positive(options, "outputs", "particles", "seeds", "steps", "max_new_tokens")
    settings = SweepSettings(
        ws=numbers("w", options.w), outputs=options.outputs, particles=options.particles, seeds=options.seeds
    )
    checks.check_folder(options.out)
    picture_files(options, "check")

    def run(session: Session) -> None:
        model = session.load(options)
        tuned = tuned_model(model, options.tuned, images)
        options.out.mkdir(parents=True, exist_ok=True)

        def keep(found: Sweep) -> None:
            found.write(options.out)
            for path in picture_files(options, "guide"):
                draw_guide(found, path)

        found = sweep(
            _process(model, options, images),
            _process(tuned, options, images),
            prompts,
            reward.bind(model),
            settings,
            progress=session.progress,
            about={"model": options.model, "tuned": options.tuned.name, "reward": options.reward},
            on_point=keep,
        )
        publish(session, options, "guide", found, found.table(), draw=draw_guide)

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
