"""Jobs of `steer eval` whose rows are told right from wrong: goals, concepts, choices and preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from steer.cli import checks
from steer.cli.checks import Coming
from steer.cli.generating import tuned_model
from steer.cli.measuring import numbers, picture_files, publish
from steer.cli.options import ConceptOptions, EvalOptions, GoalsOptions, PairsOptions, ReliabilityOptions
from steer.cli.session import Run, Session
from steer.cli.values import check_known
from steer.core import InputError, check
from steer.rewards import parse_reward
from steer.rewards.algebra import check_reward

__all__ = ["concept", "goals", "pairs", "reliability"]


def _check(options: EvalOptions) -> None:
    """What the four share: a causal language model, a folder, formats of pictures."""
    checks.check_model(options)
    checks.check_causal(options)
    checks.check_folder(options.out)
    picture_files(options, "check")


def _named(field: str, given: list[str]) -> dict[str, Path]:
    """`[NAME=]FILE` texts by name, a file's own by default. Raises `InputError`."""
    found: dict[str, Path] = {}
    for text in given:
        name, equals, file = text.partition("=")
        path = Path(file if equals else text)
        name = name if equals else path.stem
        check(bool(name) and bool(str(path)) and name not in found, field, text, "[NAME=]FILE, names that differ")
        found[name] = path
    return found


def goals(options: GoalsOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to measure steerability."""
    from steer.measure.goals import DIMENSIONS, FEWEST_SEEDS, GoalSettings, measure_goals
    from steer.pictures.studies import draw_goals

    _check(options)
    texts = checks.read_prompts(options.texts, "texts")
    check(all(isinstance(t, str) for t in texts), "texts", "messages", "texts")
    check(len(texts) >= FEWEST_SEEDS, "texts", f"{len(texts)} texts", f"at least {FEWEST_SEEDS}, for the scale")
    wanted: dict[str, Any] = {}
    for text in options.dimension or list(DIMENSIONS):
        name, equals, expression = text.partition("=")
        if not equals:
            check_known("dimension", [name], [*DIMENSIONS, "NAME=REWARD"])
        reward: Any = parse_reward(expression) if equals else DIMENSIONS[name]
        reward = parse_reward(reward) if isinstance(reward, str) else reward
        check_reward(reward, images=False)
        wanted[name] = reward
    edits = {}
    for text in options.edit:
        name, equals, file = text.partition("=")
        check(bool(equals) and name in wanted, "edit", text, f"NAME=FILE with one of {', '.join(wanted)}")
        edits[name] = checks.edit_maker(file, coming)
    names = {f.name for f in fields(GoalSettings)}
    settings = GoalSettings(**{name: getattr(options, name) for name in names})
    checks.check_decoding(options.temperature, options.max_new_tokens)
    for name, most in (("sources", len(texts)), ("active", len(wanted)), ("goals", 10**6), ("best_of", 10**6)):
        value, least = getattr(options, name), 2 if name == "goals" else 1
        check(least <= value <= most, name, value, f"{least} to {most}" if most < 10**6 else f"{least} or more")

    def run(session: Session) -> None:
        model = session.load(options)
        made = {name: make(model) for name, make in edits.items()}
        dimensions = {name: reward.bind(model) for name, reward in wanted.items()}
        found = measure_goals(model, texts, dimensions, made, settings, progress=session.progress)
        found.write(options.out)
        publish(session, options, "goals", found, found.table(), draw=draw_goals, texts=found.examples)

    return run


def concept(options: ConceptOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to judge concepts."""
    from steer.measure.concept import Concept, ConceptSettings, evaluate_concepts
    from steer.pictures.studies import draw_concept

    _check(options)
    prompts = checks.read_prompts(options.prompts)
    rows = checks.read_rows(options.concepts, ("concept", "words", "edit"), "concepts")
    makers = []
    for i, row in enumerate(rows, 1):
        good = isinstance(row["words"], list) and bool(row["words"]) and all(isinstance(w, str) for w in row["words"])
        check(good, f"concepts row {i}: words", row["words"], "a list of words")
        makers.append(checks.edit_maker(str(row["edit"]), coming))
    factors = numbers("factors", options.factors)
    check(min(factors) > 0, "factors", options.factors, "numbers above 0")
    check(0 < options.scale < float("inf"), "scale", options.scale, "a number above 0")
    check(len(prompts) >= 2 or not options.split, "prompts", f"{len(prompts)} prompts", "at least 2, or --no-split")
    checks.check_decoding(options.temperature, options.max_new_tokens)
    judge = _judge(options.judge)
    own = {name: getattr(options, name) for name in ("scale", "split", "seed", "max_new_tokens", "temperature")}

    def run(session: Session) -> None:
        model = session.load(options)
        concepts = [
            Concept(str(row["concept"]), tuple(row["words"]), make(model), str(row.get("system") or ""))
            for row, make in zip(rows, makers, strict=True)
        ]
        settings = ConceptSettings(factors=tuple(factors), **own)
        found = evaluate_concepts(model, concepts, prompts, judge(model), settings, progress=session.progress)
        found.write(options.out)
        publish(session, options, "concept", found, found.table(), draw=draw_concept, texts=found.examples)

    return run


def _judge(text: str) -> Callable[[Any], Any]:
    """The judge that a text names, made once the model is there. Raises `InputError`."""
    from steer.loading import is_endpoint, load
    from steer.measure.concept import ModelJudge, RuleJudge

    if text == "rules":
        return lambda model: RuleJudge()
    name = text.removeprefix("model:")
    if name != text or is_endpoint(text):
        check(bool(name), "judge", text, "model:MODEL")
        return lambda model: ModelJudge(load(name), text)
    reward = parse_reward(text)
    check_reward(reward, images=False)
    return lambda model: RuleJudge(reward.bind(model), f"rules, concept by {text}")


def reliability(options: ReliabilityOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to measure how evenly an edit steers."""
    from steer.measure.reliability import measure_reliability
    from steer.pictures.studies import draw_reliability

    _check(options)
    check(bool(options.choices), "choices", None, "at least one file")
    targets = {name: _choices("choices", path) for name, path in _named("choices", options.choices).items()}
    sides = {name: _choices("side", path) for name, path in _named("side", options.side).items()}
    twice = sorted(set(targets) & set(sides))
    check(not twice, "side", twice, "other names than those of --choices (NAME=FILE)")
    strengths = numbers("strengths", options.strengths)
    check(any(strengths), "strengths", options.strengths, "at least one that is not 0")
    make = checks.edit_maker(options.edit, coming)

    def run(session: Session) -> None:
        model = session.load(options)
        edit = make(model)
        check(hasattr(edit, "strength"), "edit", type(edit).__name__, "an edit with a strength")
        found = measure_reliability(model, targets, edit, strengths, sides=sides, progress=session.progress)
        found.write(options.out)
        publish(session, options, "reliability", found, found.table(), draw=draw_reliability)

    return run


def _choices(field: str, path: Path) -> list[Any]:
    """Rows {"prompt", "wanted", "other"}, where other may be a list. Raises `InputError`."""
    from steer.measure.reliability import Choice

    found = []
    for i, row in enumerate(checks.read_rows(path, ("prompt", "wanted", "other"), field), 1):
        others = row["other"] if isinstance(row["other"], list) else [row["other"]]
        good = all(isinstance(x, str) and x for x in [row["wanted"], *others]) and bool(others)
        check(good, f"{path} row {i}", row, "wanted and other as texts that are not empty")
        checks.check_prompt(f"{path} row {i}: prompt", row["prompt"])
        found.append(Choice(row["prompt"], row["wanted"], tuple(others)))
    return found


def pairs(options: PairsOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to rank pairs."""
    from steer.measure.rankings import Pair, rank_pairs
    from steer.pictures.studies import draw_rankings

    _check(options)
    rows = checks.read_rows(options.pairs, ("chosen", "rejected"), "pairs")
    for i, row in enumerate(rows, 1):
        _check_pair(f"pairs row {i}", row)
    checks.check_beta(options.beta)
    rewards = {text: parse_reward(text) for text in options.reward}
    for reward in rewards.values():
        check_reward(reward, images=False)
    edits = {text: checks.edit_maker(text, coming) for text in options.edit}
    for folder in options.tuned:
        there = folder.absolute() in coming or (folder / "steer.json").is_file()
        check(there, "tuned", str(folder), "the folder of a policy")

    def run(session: Session) -> None:
        model = session.load(options)
        found = rank_pairs(
            [Pair(r["prompt"], r["chosen"], r["rejected"], float(r.get("agreement") or 0.99)) for r in rows],
            rewards={name: reward.bind(model) for name, reward in rewards.items()},
            model=model,
            edits={Path(text).name: make(model) for text, make in edits.items()},
            policies={folder.name: tuned_model(model, folder, False) for folder in options.tuned},
            beta=options.beta,
            progress=session.progress,
        )
        found.write(options.out)
        publish(session, options, "pairs", found, found.table(), draw=draw_rankings)

    return run


def _check_pair(where: str, row: Mapping[str, Any]) -> None:
    checks.check_prompt(f"{where}: prompt", row.get("prompt"))
    good = all(isinstance(row[side], str) and row[side] for side in ("chosen", "rejected"))
    check(good, where, dict(row), "chosen and rejected as texts that are not empty")
    try:
        agreement = float(row.get("agreement") or 0.99)
    except (TypeError, ValueError):
        raise InputError(f"{where}: agreement", row["agreement"], "a share between 0 and 1") from None
    check(0 < agreement < 1, f"{where}: agreement", agreement, "a share between 0 and 1, neither")
