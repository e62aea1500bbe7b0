"""Tuned policies as LoRA adapters (PEFT) or whole networks: TRL's trainers by their options, and rounds of our own.

A policy is a folder: the adapter in PEFT's layout, or a network in transformers', and a card, `steer.json`, that says
which model it was tuned from and how. Methods are rows of `steer.train.objectives.registry`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from steer.adapters.transformers.model import LanguageModel
from steer.adapters.transformers.policy.data import check_targets, read_rows
from steer.adapters.transformers.policy.folder import open_network, save_network
from steer.adapters.transformers.policy.rows import fit_rows, rank_pairs
from steer.adapters.transformers.policy.trl import Online, fit, quiet, require_libraries, scores
from steer.artifacts import Card, data_hash
from steer.core import Reward, check
from steer.data import prompt_of
from steer.files import replacing_folder
from steer.progress import note, ticking
from steer.rewards import as_reward
from steer.rewards.verifiable import prompt_key, with_rows
from steer.train.objectives.settings import PolicySettings, policy_settings
from steer.train.policy_folder import CARD, check_target, claim, thinned

__all__ = ["PolicySettings", "train_policy"]


def train_policy(
    model: LanguageModel,
    data: Sequence[Any],
    settings: PolicySettings | None = None,
    *,
    out: Path | str,
    reward: Reward | str | Callable[..., Any] | None = None,
    held_out: Sequence[Any] | None = None,
    work: Path | None = None,
    progress: bool = False,
    **given: Any,
) -> Path:
    """Tune a policy and write it to the folder `out`; `model` itself is not changed.

    Args:
        model: a language model from `steer.load`.
        data: rows with the columns that `steer train policy --list` names for the method: `{"prompt", "completion"}`
            (sft), `{"prompt", "chosen", "rejected"}` (dpo and other losses of pairs), `{"prompt", "completions",
            "scores"}` (ranked lists), `{"prompt", "completion", "label": bool}` (kto); for methods that sample prompts,
            or rows `{"prompt"}` with what the method or a verifiable reward reads beside it. A prompt is text or
            messages and is encoded as for `generate`; completions are text, and end-of-sequence is added.
        settings: how, its `method` first of all; fields of `PolicySettings` and options of pieces may also be `given`
            by name.
        out: folder; an older policy there is replaced in one step, anything else is refused.
        reward: what methods that sample raise; with it losses of pairs learn from own samples, dpo for one from the
        best
            and the worst of `group_size` for each prompt. Rewards that score under a model score under `model`.
        held_out: prompts, or rows as `data`, on which the reward before and after is measured; without them it is that
            of the prompts that the policy learns from, which the card says (`data["measured_on"]`).
        work: folder for checkpoints and samples; a run that stopped goes on from there to the same result.

    Raises:
        InputError: a bad setting, row, reward or folder; nothing has been trained.
        SteerError: TRL or PEFT is missing, or the loss is no longer finite.
    """
    tuning = policy_settings(settings, **given)
    final = Path(out)
    check_target(final)
    check_targets(model, tuning)
    scored = as_reward(reward)
    drawn = samples(tuning, scored is not None)
    wanted = drawn and tuning.preset.judged
    check((scored is not None) == wanted, "reward", reward, f"{'one' if wanted else 'none'} for {tuning.method}")
    if drawn and tuning.driver == "native" and not tuning.online:
        allowed = f"{tuning.preset.losses[0]} for own samples; other losses of them by link, target and score"
        check(tuning.loss == tuning.preset.losses[0], "loss", tuning.loss, allowed)
        tuning = policy_settings(tuning, driver="rows")  # of its own samples
    check(tuning.schedule != "inpaint", "schedule", "inpaint", "another for a causal language model")
    rows = read_rows(model, data, tuning, drawn)
    for warning in tuning.warnings:
        note(True, f"warning: {warning}")
    require_libraries()
    recipe = {**tuning.recipe(), **({"reward": str(scored)} if scored is not None else {})}
    hashed = data_hash(list(data))
    run = {**recipe, "data": hashed, "model": model.info.fingerprint}
    claim(work, run)
    online = None if scored is None else _online(model, scored, data)
    judged = online if held_out is None or scored is None else _online(model, scored, _apart(held_out, data))
    check(judged is not None or held_out is None, "held_out", held_out, f"unset: {tuning.method} measures no reward")
    with quiet(), replacing_folder(final) as temporary:
        metrics: dict[str, Any] = {}
        if judged is not None:
            metrics |= measured("before", model, model, judged, tuning, progress)
        if tuning.driver == "rows":
            metrics |= fit_rows(model, rows, tuning, online, temporary, work, run, progress=progress)
        else:
            metrics |= _fit(model, rows, tuning, online, temporary, work, progress)
        if judged is not None:
            metrics |= measured("after", open_network(model, temporary), model, judged, tuning, progress)
        card = Card(
            kind="policy",
            model=model.info.entry(),
            settings={"form": "lora" if tuning.lora_rank else "full"},
            recipe=recipe,
            data={"sha256": hashed, "rows": len(data), **_measured_on(judged, held_out is not None)},
            metrics=metrics,
        )
        (temporary / CARD).write_text(json.dumps(asdict(card), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return final


_MEASURED = 64
"""Prompts on which a reward is measured, at most."""


def _online(model: LanguageModel, reward: Reward, rows: Sequence[Any]) -> Online:
    prompts = [prompt_of(row) for row in rows]
    return Online(prompts, with_rows(reward.bind(model), [model.show(p) for p in prompts], rows))


def _apart(held_out: Sequence[Any], data: Sequence[Any]) -> Sequence[Any]:
    """Rows whose prompts are none of those that are learnt from. Raises `InputError`."""
    learnt = {prompt_key(prompt_of(row)) for row in data}
    listed = isinstance(held_out, Sequence) and not isinstance(held_out, str) and len(held_out) > 0
    check(listed, "held_out", held_out, "a list of prompts, or of rows with prompt")
    for i, row in enumerate(held_out):
        apart = prompt_key(prompt_of(row)) not in learnt
        check(apart, f"held_out[{i}]", prompt_of(row), "prompts that are not among those of data")
    return held_out


def _measured_on(judged: Online | None, apart: bool) -> dict[str, str]:
    """What a card says of the rewards before and after."""
    if judged is None:
        return {}
    count = min(len(judged.prompts), _MEASURED)
    return {"measured_on": f"{count} {'held-out' if apart else 'training'} prompts"}


def samples(tuning: PolicySettings, rewarded: bool) -> bool:
    """Whether a run learns from samples: always, or with a reward, or never."""
    return tuning.online or (rewarded and tuning.preset.native is False) or (rewarded and tuning.method == "dpo")


def measured(
    when: str,
    policy: LanguageModel,
    base: LanguageModel,
    online: Online,
    tuning: PolicySettings,
    progress: bool = False,
) -> dict[str, float]:
    """Mean reward of samples for the first 64 prompts of `online`, with one seed for all policies, and its standard
    error: over prompts, or over the samples of a single one.
    """
    prompts = list(online.prompts[:_MEASURED])
    drawn = policy.generate(
        prompts,
        n=max(1, min(tuning.group_size, _MEASURED // len(prompts))),
        temperature=tuning.temperature,
        max_new_tokens=tuning.max_new_tokens,
        seed=tuning.seed * 100_003 + 99_991,
        progress=progress,
    )
    found = scores(base, online, range(len(prompts)), drawn.group.tolist(), drawn.tokens or []).double()
    means = torch.stack([found[drawn.group == b].mean() for b in range(len(prompts))])
    apart = means if len(means) > 1 else found
    made = {f"reward_{when}": round(float(found.mean()), 5)}
    if len(apart) > 1:
        made[f"reward_{when}_se"] = round(float(apart.std()) / len(apart) ** 0.5, 5)
    return made


def _fit(
    model: LanguageModel,
    rows: list[dict[str, Any]],
    tuning: PolicySettings,
    online: Online | None,
    folder: Path,
    work: Path | None,
    progress: bool,
) -> dict[str, Any]:
    """One run of a trainer of TRL's."""
    with ticking(progress, f"tuning by {tuning.method}", tuning.total_steps(len(rows))) as tick:
        kept = work and work / "checkpoints"
        fitted = fit(model, rows, tuning, online=online, work=kept, tick=tick)
    save_network(fitted.network, model, folder)
    seen = {k: thinned(v) for k, v in (("loss", fitted.loss), ("reward", fitted.reward)) if v}
    ranked = rank_pairs(model, fitted.network, rows, tuning.beta) if tuning.method == "dpo" else {}
    return {**seen, **ranked, **({"left_out": fitted.left_out} if fitted.left_out else {})}
