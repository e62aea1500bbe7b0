"""`steer generate`: a request is checked whole, then text or images are drawn."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

from steer.cli import checks, showing
from steer.cli.checks import Coming, job_of
from steer.cli.options import GenerateOptions, SampleOptions
from steer.cli.session import Run, Session
from steer.cli.values import coerce, pairs, spelled, typed
from steer.core import Ability, Edit, InputError, RawText, Reward, Sampler, Samples, check
from steer.core.names import check_known
from steer.critique.reading import parse_critic
from steer.loading import is_endpoint
from steer.measure.report import strength_unit
from steer.methods.gradient import GradientGuidance
from steer.methods.rlg import RLGuidance
from steer.methods.samplers import SAMPLERS, make_sampler, with_preset
from steer.methods.value import ValueGuidance
from steer.model import Plan, execute, prepare
from steer.progress import note
from steer.prompt_files import write_samples
from steer.rewards import parse_reward
from steer.rewards.algebra import check_reward
from steer.sampling.lookahead import Lookahead, Preview, Rollouts

__all__ = ["Drawing", "generate", "process_settings", "request", "sampler_of"]


@dataclass(frozen=True)
class Drawing:
    """What text and images have in common, checked."""

    sampler: Sampler
    reward: Reward | None
    seed: int
    guidance: Callable[[Any, dict[str, Any]], list[Edit]]
    """Guidance towards a tuned policy, from the model and the settings of its process."""


def generate(options: GenerateOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to generate."""
    checks.check_model(options)
    images = checks.draws_images(options)
    checks.check_kind(options, images, masked=not images and checks.denoises_text(options))
    return _images(options, coming) if images else _texts(options, coming)


def request(options: SampleOptions, images: bool, coming: Coming, *, keep_previews: bool = False) -> Drawing:
    """Check what does not depend on the model's prompts and settings."""
    checks.check_beta(options.beta)
    check(options.max_rows >= 1, "max_rows", options.max_rows, "an integer of 1 or more")
    sampler = sampler_of(options, keep_previews)
    reward = None if options.reward is None else parse_reward(options.reward)
    if reward is not None:
        check_reward(reward, images)
    check(reward is not None or not sampler.needs_reward, "reward", None, f"a reward: {options.sampler} chooses by it")
    if options.out is not None:
        checks.check_output(options.out, suffixes=(".json", ".jsonl"))
    drawn = 0 if by_line(options) else secrets.randbits(31)  # lines of two runs fit together by the same seed
    seed = drawn if options.seed is None else options.seed
    return Drawing(sampler, reward, seed, _guidance(options, images, coming))


def by_line(options: SampleOptions) -> bool:
    """Whether samples are written to a file line by line, as they come."""
    return options.out is not None and options.out.suffix == ".jsonl"


# ---------------------------------------------------------------------------------------------------------- samplers


def sampler_of(options: SampleOptions, keep_previews: bool = False) -> Sampler:
    check_known("sampler", options.sampler, SAMPLERS)
    check(options.n is None or options.n >= 1, "n", options.n, "an integer of 1 or more")
    kind = SAMPLERS[options.sampler]
    hints = get_type_hints(kind)
    settable = {f.name: hints[f.name] for f in fields(kind)}  # type: ignore[arg-type]
    given = pairs(options.set)
    found: dict[str, Any] = with_preset(options.sampler, {"preset": given.pop("preset", None)})
    found = {name: value for name, value in found.items() if name not in given} | _critic(options, settable)
    if {"lookahead"} <= settable.keys() & given.keys():
        found["lookahead"] = _lookahead(given.pop("lookahead"), type(None) in get_args(settable["lookahead"]))
    settings = typed(given, settable, f"setting of {options.sampler}") | found
    check(options.n is None or "n" not in settings, "n", options.n, "one of --n and --set n=...")
    if keep_previews and "lineage" in kind.shows:
        settings["keep_previews"] = True
    # n=none is a choice of its own, and not that of the default.
    return kind(**settings) if "n" in settings else make_sampler(options.sampler, options.n, **settings)


def _critic(options: SampleOptions, settable: Mapping[str, Any]) -> dict[str, Any]:
    """The critic that was named, as a setting."""
    path = options.critic_instruction
    if options.critic is None:
        check(path is None, "critic_instruction", str(path), "unset: without --critic model:ID nobody reads it")
        return {}
    check("critic" in settable, "critic", options.critic, "unset, or --sampler critique")
    check(path is None or path.is_file(), "critic_instruction", str(path), "a file that is there")
    return {"critic": parse_critic(options.critic, None if path is None else path.read_text(encoding="utf-8"))}


def _lookahead(text: str, optional: bool) -> Lookahead | None:
    """`preview`, `rollouts:M`, or `none` where a sampler can do without."""
    name, colon, count = text.partition(":")
    allowed = f"preview, rollouts:M (M completions of every row){', none' if optional else ''}"
    if optional and text.lower() == "none":
        return None
    if text == "preview":
        return Preview()
    check(name == "rollouts", "lookahead", text, allowed)
    try:
        return Rollouts(coerce("m", count if colon else 1, int))
    except InputError as error:
        raise InputError("lookahead", text, allowed) from error


def _guidance(options: SampleOptions, images: bool, coming: Coming) -> Callable[[Any, dict[str, Any]], list[Edit]]:
    folder, w = options.tuned, 1.5 if options.w is None else options.w
    if folder is None:
        check(options.w is None, "w", options.w, "unset: without --tuned there is no policy to go towards")
        return lambda model, settings: []
    check(math.isfinite(w), "w", w, "a finite number (0 is the base, 1 the tuned policy)")
    if folder.absolute() not in coming:
        check(folder.exists(), "tuned", str(folder), "a folder that exists, as train policy writes it")
        if not images:
            from steer.train.policy_folder import read_policy_card

            read_policy_card(folder)

    def make(model: Any, settings: dict[str, Any]) -> list[Edit]:
        policy = tuned_model(model, folder, images)
        return [RLGuidance(policy.process(**settings), w)]

    return make


def tuned_model(model: Any, folder: Path, images: bool) -> Any:
    """The policy in `folder`, which is checked against its base; for images any other network or LoRA is taken as it
    is.
    """
    if not images:
        from steer.adapters.transformers.policy.folder import load_policy

        return load_policy(model, folder)
    if not (folder / "steer.json").is_file():
        return model.tuned(folder)
    from steer.adapters.diffusers.policy.tuning import load_diffusion_policy

    return load_diffusion_policy(model, folder)


# -------------------------------------------------------------------------------------------------------------- text


def _texts(options: GenerateOptions, coming: Coming) -> Run:
    check(
        (options.prompt is None) != (options.prompts is None),
        "prompt",
        "neither" if options.prompt is None else "both",
        "--prompt TEXT or --prompts FILE, one of them",
    )
    prompts: list[Any] = [options.prompt] if options.prompts is None else checks.read_prompts(options.prompts)
    checks.check_prompt("prompt", prompts[0])
    mixed = options.raw and (options.system is not None or any(not isinstance(p, str) for p in prompts))
    check(not mixed, "raw", "messages or a system message", "texts alone: raw text has no messages")
    check(options.system is None or bool(options.system.strip()), "system", options.system, "text that is not empty")
    checks.check_decoding(options.temperature, options.max_new_tokens, options.top_k, options.top_p)
    checks.check_generation_config(options.generation_config)
    penalty = options.repetition_penalty
    check(penalty is None or penalty > 0, "repetition_penalty", penalty, "a number above 0 (1 is off)")
    check(options.base in ("truncated", "full"), "base", options.base, "truncated, full")
    check(options.block >= 1, "block", options.block, "an integer of 1 or more")
    check(all(options.until), "until", options.until, "texts that are not empty")
    asked = request(options, False, coming)
    single = len(prompts) == 1 and asked.sampler.keeps_all and asked.sampler.rows == 1
    check(
        not options.stream or (single and not options.json), "stream", True, "one prompt, n=1, ancestral, without json"
    )
    remote, masked = is_endpoint(options.model), checks.denoises_text(options)
    check(options.steps >= 1, "steps", options.steps, "an integer of 1 or more")
    only_here = ("stream", "edit", "reading", "stop_if", "until", "tuned", "generation_config", "split_special_tokens")
    for name in only_here if remote else ():
        check(not getattr(options, name), spelled(name), getattr(options, name), "unset: the model is an endpoint's")
    edits = [checks.edit_maker(text, coming) for text in options.edit]
    readings = checks.readings_of(options.reading, options.stop_if, coming)
    able = ", ".join(name for name, kind in SAMPLERS.items() if kind.reads)
    check(not readings or asked.sampler.reads, "reading", f"with {options.sampler}", f"one of the samplers {able}")
    for name in ("stream", "json") if by_line(options) else ():
        check(not getattr(options, name), name, True, "unset: --out FILE.jsonl is written line by line")

    return _TextJob(options, prompts, asked, edits, readings, masked).run


@dataclass
class _TextJob:
    """Texts to be drawn, checked. `mounted` are the edits, once there is a model for them."""

    options: GenerateOptions
    prompts: list[Any]
    asked: Drawing
    edits: list[Callable[[Any], Edit]]
    readings: Mapping[str, str]
    masked: bool
    mounted: list[Edit] = field(default_factory=list)

    def run(self, session: Session) -> None:
        options = self.options
        if by_line(options):
            _write_lines(options, self.asked, self.prompts, session, partial(self._lines, session))
            return
        with _reading(session.load(options), options.split_special_tokens):
            plan = self._plan(session, self.prompts, self.asked.seed, session.progress and not options.stream)
            samples = _streamed(session.load(options), plan, session) if options.stream else execute(plan)
        showing.show_samples(samples, options, self.asked.seed, session, streamed=options.stream)

    def _lines(self, session: Session, some: list[Any], seed: int) -> Samples:
        with _reading(session.load(self.options), self.options.split_special_tokens):
            return execute(self._plan(session, some, seed, False))

    def _plan(self, session: Session, some: list[Any], seed: int, progress: bool) -> Plan:
        options, model = self.options, session.load(self.options)
        settings = process_settings(options, False, self.masked)
        if not self.mounted:
            self._mount(model, settings)
        return prepare(
            model.process(**settings),
            [RawText(p) for p in some] if options.raw else some,
            edits=[self.mounted] * len(some),
            sampler=self.asked.sampler,
            reward=self.asked.reward,
            beta=options.beta,
            seed=seed,
            max_rows=options.max_rows,
            readings=self.readings or None,
            stop_if=options.stop_if,
            model=model,
            progress=progress,
        )

    def _mount(self, model: Any, settings: dict[str, Any]) -> None:
        self.mounted = [make(model) for make in self.edits] + self.asked.guidance(model, settings)
        if self.options.system is not None:
            from steer.methods.prompt import SystemPrompt

            self.mounted.append(SystemPrompt(self.options.system))
        for edit in self.mounted:
            _note_strength(edit)
            if isinstance(edit, ValueGuidance) and edit.is_weak(self.options.beta):
                better = f"try --beta {edit.suggested_beta:g}"
                note(True, f"note: beta {self.options.beta:g} hardly guides by this value head: {better}")


def _note_strength(edit: Edit) -> None:
    """A dose above 1 in residual norms drowns what the model says."""
    dose = getattr(edit, "strength", 0.0)
    if strength_unit(edit) == "residual norms" and abs(dose) > 1:
        note(True, f"warning: strength {dose:g} is in residual norms: texts usually break above 0.3")


def process_settings(options: GenerateOptions, images: bool, masked: bool = False) -> dict[str, Any]:
    """Settings of the model's process."""
    if images:
        names = ("steps", "eta", "guidance_scale")
        return {name: getattr(options, name) for name in names} | {"max_batch": options.max_rows}
    if is_endpoint(options.model):
        return _endpoint_settings(options)
    return (_masked_settings if masked else _text_settings)(options)


@contextmanager
def _reading(model: Any, split: bool) -> Iterator[None]:
    """Control tokens in messages are text meanwhile, where that was asked for: models outlive a job."""
    if not split:
        yield
        return
    kept, model.split_special_tokens = model.split_special_tokens, True
    try:
        yield
    finally:
        model.split_special_tokens = kept


def _write_lines(
    options: GenerateOptions,
    asked: Drawing,
    prompts: list[Any],
    session: Session,
    draw: Callable[[list[Any], int], Samples],
) -> None:
    """Draw as many prompts at once as there are rows for, and write each as it is done."""
    assert options.out is not None
    drawn = write_samples(
        prompts,
        options.out,
        draw,
        job=_job(options, asked.seed),
        resume=not options.overwrite,
        batch=max(1, options.max_rows // asked.sampler.rows),
        seed=asked.seed,
        progress=session.progress,
        prepare=lambda: session.load(options),
    )
    there = len(prompts) - drawn
    session.say(
        f"wrote {options.out}: {drawn} prompts" + (f", {there} were there with these settings" if there else "")
    )


def _job(options: GenerateOptions, seed: int) -> dict[str, Any]:
    """What samples depend on beside their prompts."""
    return job_of(replace(options, seed=seed), {"prompt", "prompts", "out", "json", "overwrite", "device", "check"})


def _text_settings(options: GenerateOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("max_new_tokens", "block", "until", "base")} | _given(
        options, "generation_config", "temperature", "top_k", "top_p", "repetition_penalty"
    )


def _given(options: GenerateOptions, *names: str) -> dict[str, Any]:
    """Settings that were given."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _masked_settings(options: GenerateOptions) -> dict[str, Any]:
    """Settings of a masked diffusion process: all of `max_new_tokens` positions, revealed in `steps`."""
    return {
        "length": options.max_new_tokens,
        "steps": options.steps,
        **_given(options, "temperature", "top_k", "top_p"),
    }


def _endpoint_settings(options: GenerateOptions) -> dict[str, Any]:
    """What was asked for beyond the defaults, which an endpoint may not have; whole texts without --block."""
    penalty = options.repetition_penalty
    check(penalty in (None, 1), "repetition_penalty", penalty, "1: endpoints have none")
    found: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "base": options.base}
    given = _given(options, "temperature", "top_k", "top_p")
    found |= {name: value for name, value in given.items() if (name, value) not in (("top_k", 0), ("top_p", 1))}
    return found | ({"block": options.block} if options.block > 1 else {})


def _streamed(model: Any, plan: Plan, session: Session) -> Samples:
    """Run a plan and print its one text as it is drawn."""
    from steer.adapters.transformers.streaming import Follower

    follower = Follower(model, plan, lambda piece: session.say(piece.text, end=""))
    samples = execute(plan, follower.step)
    follower.finish(samples)
    return samples


# ------------------------------------------------------------------------------------------------------------ images


def _images(options: GenerateOptions, coming: Coming) -> Run:
    prompts = checks.image_prompts(options, options.class_, options.prompt, options.prompts)
    check(options.steps >= 1, "steps", options.steps, "an integer of 1 or more")
    check(0 <= options.eta <= 1, "eta", options.eta, "0 (deterministic) to 1")
    for name in ("guidance_scale", "gradient"):
        value = getattr(options, name)
        check(value is None or math.isfinite(value), name, value, "a finite number")
    asked = request(options, True, coming, keep_previews=options.lineage is not None)
    forking = Ability.BRANCH in asked.sampler.needs
    way_out = f"above 0, such as 1.0, for {options.sampler}: copies of a row part ways only where steps have noise"
    check(options.eta > 0 or not forking, "eta", options.eta, way_out)
    check(
        options.gradient is None or asked.reward is not None,
        "gradient",
        options.gradient,
        "unset, or with a --reward to climb",
    )
    check(not by_line(options), "out", str(options.out), "a .json file: lines are for texts")
    pictures = showing.Pictures.of(options, len(prompts))

    def run(session: Session) -> None:
        model = session.load(options)
        check(not options.class_ or bool(model.classes), "class", options.class_, f"unset: {model.name} has no classes")
        settings = process_settings(options, True)
        edits = asked.guidance(model, settings)
        if options.gradient is not None:
            assert asked.reward is not None
            edits.append(GradientGuidance(asked.reward.bind(model), strength=options.gradient))
        plan = prepare(
            model.process(**settings),
            prompts,
            edits=[edits] * len(prompts),
            sampler=asked.sampler,
            reward=asked.reward,
            beta=options.beta,
            seed=asked.seed,
            max_rows=options.max_rows,
            model=model,
            progress=session.progress,
        )
        samples = execute(plan, pictures.watch(plan))
        showing.show_samples(samples, options, asked.seed, session, pictures)

    return run
