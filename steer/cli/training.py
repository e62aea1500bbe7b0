"""Jobs of `steer train ...`: a vector, a controller, a value head, a policy or a model, checked and then trained."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from steer import artifacts
from steer.artifacts import Card
from steer.cli import cards, checks
from steer.cli.checks import Coming
from steer.cli.options import (
    TrainControllerOptions,
    TrainImagesOptions,
    TrainOptions,
    TrainPolicyOptions,
    TrainRewardOptions,
    TrainStimulusOptions,
    TrainValueOptions,
    TrainVectorOptions,
)
from steer.cli.session import Run, Session
from steer.cli.values import pairs
from steer.core import InputError, Reward, check
from steer.core.names import meant
from steer.data import FORMATS, prompt_of, read_table, read_text
from steer.loading import is_endpoint
from steer.logs import check_targets, logging_to
from steer.progress import note
from steer.ranks import ranks
from steer.rewards import parse_reward
from steer.rewards.algebra import check_reward
from steer.train.rollouts import Recorded
from steer.train.settings import settle

__all__ = [
    "train_controller",
    "train_images",
    "train_policy",
    "train_reward",
    "train_stimulus",
    "train_value",
    "train_vector",
]


def train_vector(options: TrainVectorOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to fit a vector."""
    from steer.train.vector import VectorSettings
    from steer.train.vector import train_vector as train

    _check_training(options)
    settings = _settings(VectorSettings, options, "train vector")
    rows = checks.read_pairs(options.pairs)
    return _trainer(options, lambda model, more: train(model, rows, settings, **more))


def train_controller(options: TrainControllerOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to train a controller."""
    from steer.train.controller import ControllerSettings
    from steer.train.controller import train_controller as train

    _check_training(options)
    positive = checks.read_prompts(options.positive, "positive")
    negative = checks.read_prompts(options.negative, "negative")
    settings = _settings(ControllerSettings, options, "train controller")
    return _trainer(options, lambda model, more: train(model, positive, negative, settings, **more), options.keep_work)


def train_value(options: TrainValueOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to train a value head."""
    from steer.train.value import ValueSettings
    from steer.train.value import train_value as train

    _check_training(options)
    check((options.prompts is None) != (options.rollouts is None), "prompts", None, "either prompts or rollouts")
    check(options.reward is not None or options.rollouts is not None, "reward", None, "a reward, or rollouts with one")
    reward = None if options.reward is None else parse_reward(options.reward)
    if reward is not None:
        check_reward(reward, images=False)
    settings = _settings(ValueSettings, options, "train value")
    prompts = [] if options.prompts is None else checks.read_prompts(options.prompts)
    records, system = (None, None) if options.rollouts is None else _records(options.rollouts)

    def fit(model: Any, more: dict[str, Any]) -> Any:
        bound = None if reward is None else reward.bind(model)
        return train(model, prompts, bound, settings, rollouts=records, system=system, **more)

    return _trainer(options, fit, options.keep_work)


def _records(path: Path) -> tuple[list[Any], str | None]:
    """What `steer batch` wrote, and the system message of its job."""
    records = [row for _, row in read_table("rollouts", path, "a file that steer batch wrote")]
    Recorded.of(records)
    job = path.with_name(f"{path.name}.job.json")
    return records, json.loads(job.read_text(encoding="utf-8")).get("system") if job.is_file() else None


def train_reward(options: TrainRewardOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to train a reward."""
    from steer.train.reward import RewardSettings
    from steer.train.reward import train_reward as train

    _check_training(options)
    settings = _settings(RewardSettings, options, "train reward")
    allowed = f"{FORMATS} with chosen and rejected, ratings, or labels"
    rows = [row for _, row in read_table("data", options.data, allowed)]
    gate = None
    if options.gate is not None:
        gate = [row for _, row in read_table("gate", options.gate, f"{FORMATS} with chosen and rejected")]
    return _trainer(options, lambda model, more: train(model, rows, settings, gate=gate, **more), keep_work=False)


def train_stimulus(options: TrainStimulusOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to train a stimulus."""
    from steer.train.stimulus.settings import StimulusSettings
    from steer.train.stimulus.training import check_stimulus
    from steer.train.stimulus.training import train_stimulus as train

    network = options.policy != "extract"
    checks.check_model(options)
    checks.check_causal(options)
    if network:
        checks.check_folder(options.out)
    else:
        checks.check_output(options.out, suffixes=(".safetensors",))
    given = _told(StimulusSettings, options)
    named = Path(given["template"])
    if len(given["template"]) < 256 and named.is_file():
        given["template"] = read_text("template", named, "a text with {hint}").rstrip("\n")
    settings = settle(StimulusSettings, None, given, "train stimulus")
    reward = None if options.reward is None else parse_reward(options.reward)
    rows, test = _rows("data", options.data), None if options.test is None else _rows("test", options.test)
    check_stimulus(rows, reward, settings, test)
    name = _policy_model(options, network)

    def begin(model: Any, more: dict[str, Any]) -> Any:
        if network:
            from steer.adapters.transformers.policy.hints import open_policy

            policy = open_policy(model if name == options.model else name, options.policy)
            more |= {"network": policy, "out": options.out}
        return train(model, rows, reward, settings, test=test, **more)

    return _stimulus_trainer(options, begin) if network else _trainer(options, begin, options.keep_work)


def _rows(field: str, path: Path) -> list[Any]:
    return [row for _, row in read_table(field, path, f"{FORMATS} with input, and reference or hint")]


def _policy_model(options: TrainStimulusOptions, network: bool) -> str | None:
    """The name of the network that writes hints."""
    name = options.policy_model
    check(network or name is None, "policy_model", name, "unset: the policy extract has no network")
    if not network:
        return None
    far = is_endpoint(name or options.model)
    check(not far, "policy_model", name or options.model, "a model of this machine: an endpoint cannot be trained")
    check(name is not None or options.policy == "lm", "policy_model", name, "an encoder-decoder, for seq2seq")
    return name or options.model


def _stimulus_trainer(options: TrainStimulusOptions, train: Callable[[Any, dict[str, Any]], Any]) -> Run:
    """A stimulus that is a folder."""
    done = (options.out / "steer.json").is_file()
    check(options.overwrite or not done, "out", f"{options.out} (already there)", "a new folder, or --overwrite")

    def run(session: Session) -> None:
        model, more = session.load(options), {"progress": session.progress, "work": _work(options.out)}
        folder = _resumed(options, lambda: train(model, more))
        _finish(folder, session, options.keep_work)

    return run


def _check_training(options: TrainOptions) -> None:
    checks.check_model(options)
    checks.check_causal(options)
    checks.check_output(options.out, suffixes=(".safetensors",))
    check_targets(options.log)


S = TypeVar("S")


def _settings(kind: type[S], options: Any, where: str) -> S:
    """The options that are fields of `kind`, and `--set`."""
    return settle(kind, None, _told(kind, options), where)


def _told(kind: type, options: Any) -> dict[str, Any]:
    """The options that are fields of `kind`, and what `--set` says."""
    known = {f.name for f in fields(kind)}
    told = {f.name: getattr(options, f.name) for f in fields(options) if f.name in known}
    more = {name: None if text.lower() in ("none", "null") else text for name, text in pairs(options.set).items()}
    check(not told.keys() & more.keys(), "--set", sorted(told.keys() & more.keys()), "settings without an option")
    return {**told, **more}


def _work(out: Path) -> Path:
    """The folder from which training resumes."""
    return out.with_name(out.name + ".work")


T = TypeVar("T")


def _resumed(options: Any, train: Callable[[], T]) -> T:
    """What training makes; `--overwrite` clears what a run with other settings left to resume from."""
    from steer.train.loop import OtherRunError

    try:
        return train()
    except OtherRunError as error:
        if not options.overwrite:
            raise InputError(error.field, error.given, f"{error.allowed}; --overwrite begins anew") from None
    if ranks().first:
        shutil.rmtree(_work(options.out))
    ranks().wait()
    return train()


def _trainer(options: TrainOptions, train: Callable[[Any, dict[str, Any]], Any], keep_work: bool | None = None) -> Run:
    """`keep_work` is None for training that leaves nothing to resume from."""
    work = _work(options.out)

    def run(session: Session) -> None:
        job = _job(options)
        if _is_there(options, job):
            session.say(f"{options.out} is already there, made with these settings (--overwrite makes it anew)")
            return
        more: dict[str, Any] = {"progress": session.progress}
        if keep_work is not None:
            more["work"] = work
        with logging_to(*options.log, folder=work, settings=vars(options)):
            model = session.load(options)
            tensors, card = _resumed(options, lambda: train(model, more))
        card = replace(card, recipe={**card.recipe, "job": job})
        if ranks().first:
            artifacts.save(options.out, tensors, card)
            if keep_work is False:
                shutil.rmtree(work, ignore_errors=True)
        ranks().wait()
        session.say(f"{cards.described(card)}\nwrote {options.out}")
        for doubt in _doubts(card):
            note(ranks().first, f"warning: {doubt}")

    return run


def _job(options: TrainOptions) -> str:
    """What the result depends on: the options, the files that they name, and the version."""
    told = replace(options, overwrite=False, out=Path(), log=[])
    told = replace(told, keep_work=False) if hasattr(told, "keep_work") else told  # type: ignore[call-arg]
    given = [getattr(options, f.name) for f in fields(options) if f.name not in ("out", "log")]
    read = [hashlib.sha256(path.read_bytes()).hexdigest() for path in given if isinstance(path, Path)]
    version = Card("", {}).version
    return hashlib.sha256(repr([version, told, read]).encode()).hexdigest()[:12]


def _is_there(options: TrainOptions, job: str) -> bool:
    """Whether this very job has been done. Raises `InputError` where something else would be overwritten."""
    if options.overwrite or not options.out.exists():
        return False
    try:
        same = artifacts.read_card(options.out).recipe.get("job") == job
    except InputError:
        same = False
    allowed = "a new file; this one is finished, and other settings, data or another version made it (--overwrite)"
    check(same, "out", str(options.out), allowed)
    return True


_FEW = 20
"""Held-out rows below which an accuracy says next to nothing."""


def _doubts(card: Card) -> list[str]:
    """What in a card's figures is too little to rely on, in words."""
    found = []
    explained = card.metrics.get("explained")
    if explained and max(explained.values()) <= 0:
        found.append("the value head explains nothing of the reward on held-out rollouts: take more prompts or samples")
    accuracy, rows = card.metrics.get("held_out_balanced_accuracy"), card.data.get("rows", 0)
    if card.metrics.get("held_out_accuracy") and rows < _FEW:
        found.append(f"{rows} pairs leave few to hold out: the accuracies of the layers are uncertain")
    if accuracy is not None and accuracy <= 0.5:
        found.append(f"the controller tells held-out prompts apart no better than chance ({rows} prompts in all)")
    elif accuracy is not None and rows < 5 * _FEW:
        found.append(f"{rows} prompts leave few to hold out: the accuracy is uncertain")
    return found


# ----------------------------------------------------------------------------------------------------------- policies


def train_policy(options: TrainPolicyOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to tune a policy: a language model or a diffusion model, by the kind of the model."""
    checks.check_model(options)
    images, masked = checks.draws_images(options), checks.denoises_text(options)
    checks.check_folder(options.out)
    check_targets(options.log)
    free = not options.out.exists() or (options.out / "steer.json").is_file() or not any(options.out.iterdir())
    check(free, "out", f"{options.out} (a folder with other things in it)", "a new folder, or a policy's")
    reward = None if options.reward is None else parse_reward(options.reward)
    if reward is not None:
        check_reward(reward, images)
    tune = _tune_images if images else _tune_masked if masked else _tune_text
    allowed = "1 for a language model, whose policies are tuned in one process"
    check(images or ranks().count == 1, "WORLD_SIZE", ranks().count, allowed)
    train, data, settings = tune(options, reward)
    held_out = _held_out(options, text=not images and not masked)
    done = (options.out / "steer.json").is_file()
    check(options.overwrite or not done, "out", f"{options.out} (already there)", "a new folder, or --overwrite")

    def run(session: Session) -> None:
        given = {"out": options.out, "reward": reward, "work": _work(options.out), "progress": session.progress}
        given |= held_out
        with logging_to(*options.log, folder=_work(options.out), settings=vars(options)):
            model = session.load(options)
            folder = _resumed(options, lambda: train(model, data, settings, **given))
        _finish(folder, session, options.keep_work)

    return run


def _held_out(options: TrainPolicyOptions, text: bool) -> dict[str, Any]:
    """The prompts, or rows with them, that the reward is measured on."""
    path = options.held_out
    if path is None:
        return {}
    allowed = "unset, or with a --reward and a language model that writes from left to right"
    check(text and options.reward is not None, "held_out", str(path), allowed)
    rows = read_table("held_out", path, f"prompts in {FORMATS}")
    check(bool(rows), "held_out", f"{path} (no prompts)", "at least one prompt")
    for where, row in rows:
        checks.check_prompt(where, prompt_of(row))
    return {"held_out": [row for _, row in rows]}


Tuner = tuple[Callable[..., Any], Any, Any]
"""What tunes, on what, and with which settings."""


def _tune_text(options: TrainPolicyOptions, reward: Reward | None) -> Tuner:
    from steer.adapters.transformers.policy.trl import require_libraries
    from steer.adapters.transformers.policy.tuning import samples, train_policy
    from steer.train.objectives.registry import METHODS
    from steer.train.objectives.settings import PolicySettings, policy_settings

    known = list(METHODS)
    allowed = f"{', '.join(known)} (a language model){meant(options.method, known, 0.6)}"
    check(options.method in METHODS, "method", options.method, allowed)
    check(not options.class_, "class", options.class_, f"unset: {options.model} writes text")
    settings = policy_settings(**_told(PolicySettings, options))
    drawn = samples(settings, reward is not None)
    scored = drawn and settings.preset.judged
    check((reward is not None) == scored, "reward", options.reward, _wanted(scored, options.method))
    both = options.prompts is not None and options.data is not None
    check(not both, "prompts", str(options.prompts), "either prompts, or data with a column prompt")
    if not drawn or settings.preset.beside:
        check(
            options.prompts is None, "prompts", options.prompts and str(options.prompts), _wanted(False, options.method)
        )
    if not drawn:
        check(options.data is not None, "data", None, _wanted(True, options.method))
    if drawn and options.data is None:
        check(options.prompts is not None, "prompts", None, f"{_wanted(True, options.method)}, or data")
        assert options.prompts is not None
        data: list[Any] = checks.read_prompts(options.prompts)
    else:
        assert options.data is not None
        # Losses of pairs take ranked lists too: the columns that a row needs are checked with its texts.
        columns = ("prompt", *settings.preset.beside) if drawn else settings.preset.columns
        data = checks.read_dataset(options.data, columns if settings.driver == "native" or drawn else ("prompt",))
    require_libraries()
    return train_policy, data, settings


def _tune_masked(options: TrainPolicyOptions, reward: Reward | None) -> Tuner:
    from steer.adapters.transformers.policy.masked import train_masked_policy
    from steer.train.objectives.settings import PolicySettings, policy_settings

    told = _told(PolicySettings, options)
    settings = policy_settings(**{**told, "lora_rank": 0 if told["lora_rank"] is None else told["lora_rank"]})
    check(reward is not None, "reward", None, f"one for {options.method}")
    check(options.data is not None or options.prompts is not None, "data", None, "rows with prompt, or --prompts")
    if options.data is None:
        data: list[Any] = checks.read_prompts(options.prompts)  # type: ignore[arg-type]
    else:
        data = checks.read_dataset(options.data, ("prompt", *settings.preset.beside))
    return train_masked_policy, data, settings


def _tune_images(options: TrainPolicyOptions, reward: Reward | None) -> Tuner:
    from steer.adapters.diffusers.policy.tuning import train_diffusion_policy
    from steer.train.diffusion_policy.inputs import OBJECTIVES, DiffusionPolicySettings

    check(options.method in OBJECTIVES, "method", options.method, f"{', '.join(OBJECTIVES)} (a diffusion model)")
    settings = _settings(DiffusionPolicySettings, options, "train policy")
    asked = bool(options.class_) or options.prompts is not None
    if options.data is not None:
        given = str(options.data)
        check(options.method != "pg", "data", given, "unset for pg, which learns from its own samples")
        check(reward is None and not asked, "data", given, "either pairs, or a reward with classes or prompts")
        check((options.data / "pairs.jsonl").is_file(), "data", given, "a folder with images and pairs.jsonl")
        return train_diffusion_policy, options.data, settings
    check(reward is not None, "reward", None, f"a reward{', for pg' if options.method == 'pg' else ', or --data'}")
    return train_diffusion_policy, checks.image_prompts(options, options.class_, None, options.prompts), settings


def _wanted(wanted: bool, method: str) -> str:
    return f"one, for {method}" if wanted else f"unset for {method}"


# ------------------------------------------------------------------------------------------------------------- images


def train_images(options: TrainImagesOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to train the embedded diffusion model again."""
    import steer.adapters.diffusers  # noqa: F401  # says what to install where it is missing
    from steer.adapters.diffusers.fashion import FashionSettings
    from steer.adapters.diffusers.fashion import train_fashion as train
    from steer.train.fashion.images import read_idx

    settings = _settings(FashionSettings, options, "train images")
    checks.check_folder(options.out)
    check_targets(options.log)
    free = not options.out.exists() or not any(options.out.iterdir())
    check(free, "out", str(options.out), "a new or an empty folder")
    for split in ("train", "test"):
        read_idx(options.data, split)

    def run(session: Session) -> None:
        with logging_to(*options.log, folder=_work(options.out), settings=vars(options)):
            train(options.data, options.out, settings, work=_work(options.out), progress=session.progress)
        _finish(options.out, session, options.keep_work)

    return run


def _finish(folder: Path, session: Session, keep_work: bool) -> None:
    if not keep_work and ranks().first:
        shutil.rmtree(_work(folder), ignore_errors=True)
    session.say(f"{cards.describe(folder)}\nwrote {folder}")
    for doubt in _doubts_of_policy(folder):
        note(True, f"warning: {doubt}")


def _doubts_of_policy(folder: Path) -> list[str]:
    """What a policy's reward, before and after, is too little to rely on: of prompts that it learnt from, or no further
    apart than chance.
    """
    file = folder / "steer.json"
    card = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    metrics = card.get("metrics", {})
    names = [f"reward_{when}" for when in ("before", "after")]
    if not all(name in metrics for name in names):
        return []
    before, after = (metrics[name] for name in names)
    errors = [metrics[f"{name}_se"] for name in names if metrics.get(f"{name}_se") is not None]
    if len(errors) < len(names):
        return ["the reward before and after was measured on one sample: no more than an anecdote"]
    wide, found = 1.96 * math.hypot(*errors), []
    if "training" in card.get("data", {}).get("measured_on", ""):
        found.append("the reward before and after is that of training prompts; --held-out FILE measures it on others")
    if abs(after - before) <= wide:
        moved = f"{after - before:+.3g}, and chance alone moves it by {wide:.3g}"
        found.append(f"the reward changed by {moved}: more prompts or steps")
    return found
