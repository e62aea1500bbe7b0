"""`steer play` and `steer train router`: agents in environments, and models behind a router."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, get_type_hints

from steer.cli import checks
from steer.cli.checks import Coming
from steer.cli.options import PlayOptions, TrainRouterOptions
from steer.cli.session import Run, Session
from steer.cli.values import coerce, pairs, typed
from steer.core import InputError, Sampler, check
from steer.critique.critics import Critic
from steer.critique.reading import parse_critic
from steer.methods.samplers import SAMPLERS, make_sampler, with_preset
from steer.pictures.episodes import draw_episodes
from steer.turns.actors import LegalCritic, UniformActor
from steer.turns.play import play as play_episodes
from steer.turns.process import TurnProcess
from steer.turns.registry import maker

__all__ = ["play", "train_router"]

_UNIFORM = "uniform"
_SHOWN = 20
"""Episodes on the page."""


def play(options: PlayOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to play."""
    uniform = options.model == _UNIFORM
    if not uniform:
        checks.check_model(options)
    check(not (uniform and options.edit), "edit", options.edit, "unset: the uniform actor has no network")
    check(options.episodes >= 1, "episodes", options.episodes, "an integer of 1 or more")
    check(options.prompt is None or options.prompts is None, "prompt", "both", "--prompt TEXT or --prompts FILE")
    checks.check_decoding(options.temperature, options.max_new_tokens, None, None)
    prompts: list[Any] = checks.read_prompts(options.prompts) if options.prompts else [options.prompt or "Play."]
    environment, sampler = maker(options.env), _sampler(options)
    inside = options.sampler == "critique"
    edits = [checks.edit_maker(text, coming) for text in options.edit]

    def made(actor: Any) -> TurnProcess:
        draw = {"draw": sampler} if inside else {}
        return TurnProcess(
            environment,
            actor,
            max_turns=options.max_turns,
            history=options.history,
            seconds=options.seconds,
            **draw,  # type: ignore[arg-type]
        )

    trial = made(UniformActor())
    if not inside:
        sampler.check_process(trial)

    def run(session: Session) -> None:
        actor: Any = UniformActor()
        mounted: list[Any] = []
        if not uniform:
            model = session.load(options)
            actor = model.process(max_new_tokens=options.max_new_tokens, temperature=options.temperature)
            mounted = [make(model) for make in edits]
        process = made(actor)
        if not uniform:
            bound = sampler.bind(model)
            process = process if not inside else TurnProcess(**{**_held(process), "draw": bound})
        played = play_episodes(
            process,
            prompts=prompts,
            episodes=options.episodes,
            sampler=None if inside else sampler,
            edits=mounted,
            seed=options.seed,
            margin=options.margin,
            max_rows=options.max_rows,
            progress=session.progress,
        )
        written = played.save(options.out)
        title = f"{options.model} plays {options.env}"
        page = options.out / "episodes.html"
        draw_episodes(
            page, played.records[:_SHOWN], [t for t in played.trees if t["row"] < _SHOWN], title, played.facts()
        )
        session.say(str(played))
        session.say(f"wrote {', '.join(str(path) for path in [*written, page])}")

    return run


def _held(process: TurnProcess) -> dict[str, Any]:
    return {f.name: getattr(process, f.name) for f in fields(process)}


def _sampler(options: PlayOptions) -> Sampler:
    check(options.sampler in SAMPLERS, "sampler", options.sampler, str(SAMPLERS))
    hints = get_type_hints(SAMPLERS[options.sampler])
    settable = {f.name: hints[f.name] for f in fields(SAMPLERS[options.sampler])}  # type: ignore[arg-type]
    given = pairs(options.set)
    found = with_preset(options.sampler, {"preset": given.pop("preset", None)})
    settings = {**found, **typed(given, settable, f"setting of {options.sampler}")}
    if options.critic is not None:
        check("critic" in settable, "critic", options.critic, "unset, or --sampler critique or turn-search")
        settings["critic"] = _critic(options.critic)
    if options.sampler == "critique":
        check(settings.get("n", 1) == 1, "n", settings.get("n"), "1: one action is taken in a turn")
    return make_sampler(options.sampler, **settings)


def _critic(text: str) -> Critic:
    return LegalCritic() if text == "legal" else parse_critic(text)


def train_router(options: TrainRouterOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to train a router."""
    from steer.routing.router import train_router as train

    check(options.data.is_file(), "data", str(options.data), "a file that is there")
    checks.check_output(options.out, suffixes=(".safetensors",))
    check(options.overwrite or not options.out.exists(), "out", str(options.out), "a new file, or --overwrite")
    price = {name: coerce(f"price.{name}", value, float) for name, value in pairs(options.price, "price").items()}
    grid = [coerce("grid", part, float) for part in options.grid.split(",")]
    check(all(lam >= 0 for lam in grid), "grid", options.grid, "numbers of 0 or more")
    rows = []
    for i, line in enumerate(options.data.read_text(encoding="utf-8").splitlines()):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise InputError(f"data, line {i + 1}", line, "JSON") from error

    def run(session: Session) -> None:
        router, table = train(rows, price=price, grid=grid, seed=options.seed)
        router.save(options.out)
        session.say(f"{table.prompts} held-out prompts\n{table}\nwrote {options.out}")

    return run
