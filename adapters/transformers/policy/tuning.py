"""Tuned policies: SFT, DPO and its kin, KTO, GRPO and RAFT through TRL, as LoRA adapters (PEFT) or whole networks.

A policy is a folder: the adapter in PEFT's layout, or a network in transformers', and a card, `steer.json`, that says
which model it was tuned from and how. Losses and trainers are TRL's; RAFT (Dong et al. 2023) is rounds of best-of-K
samples and SFT on them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steer.adapters.transformers.model import LanguageModel
from steer.adapters.transformers.policy.data import PolicySettings, check_targets, read_rows
from steer.adapters.transformers.policy.folder import open_network, save_network
from steer.adapters.transformers.policy.raft import mean_reward, own_pairs, run_raft
from steer.adapters.transformers.policy.trl import Online, fit, quiet, require_libraries
from steer.artifacts import Card, data_hash
from steer.core import Reward, check
from steer.data import prompt_of
from steer.files import replacing_folder
from steer.progress import ticking
from steer.rewards import as_reward
from steer.train.policy_folder import CARD, check_target, claim, thinned
from steer.train.settings import settle

__all__ = ["PolicySettings", "train_policy"]


def train_policy(
    model: LanguageModel,
    data: Sequence[Any],
    settings: PolicySettings | None = None,
    *,
    out: Path | str,
    reward: Reward | str | Callable[..., Any] | None = None,
    work: Path | None = None,
    progress: bool = False,
    **given: Any,
) -> Path:
    """Tune a policy and write it to the folder `out`; `model` itself is not changed.

    Args:
        model: a language model from `steer.load`.
        data: rows `{"prompt", "completion"}` (sft), `{"prompt", "chosen", "rejected"}` (dpo), `{"prompt",
            "completion", "label": bool}` (kto); for grpo and raft, and for dpo with a reward, prompts, or rows
            `{"prompt"}`. A prompt is text or messages and is encoded as for `generate`; completions are text, and
            end-of-sequence is added.
        settings: how, its `method` first of all; fields of `PolicySettings` may also be `given` by name.
        out: folder; an older policy there is replaced in one step, anything else is refused.
        reward: what grpo and raft raise; with it dpo makes its own pairs, of the best and the worst of `group_size`
            samples for each prompt. Rewards that score under a model score under `model`.
        work: folder for checkpoints and samples; a run that stopped goes on from there to the same result.

    Raises:
        InputError: a bad setting, row, reward or folder; nothing has been trained.
        SteerError: TRL or PEFT is missing, or the loss is no longer finite.
    """
    tuning = settle(PolicySettings, settings, given, "train_policy")
    final = Path(out)
    check_target(final)
    check_targets(model, tuning)
    scored = as_reward(reward)
    paired = scored is not None and tuning.method == "dpo"
    fits = paired or (scored is not None) == tuning.online
    check(fits, "reward", reward, f"{'one' if tuning.online else 'none'} for {tuning.method}")
    rows = [] if paired else read_rows(model, data, tuning)
    require_libraries()
    recipe = {**tuning.recipe(), **({"reward": str(scored)} if scored is not None else {})}
    hashed = data_hash(list(data))
    claim(work, {**recipe, "data": hashed, "model": model.info.fingerprint})
    online = None if scored is None else Online([prompt_of(row) for row in data], scored.bind(model))
    metrics: dict[str, Any] = {}
    if paired:
        assert online is not None
        rows = read_rows(model, own_pairs(model, online, tuning, work, progress), tuning)
        metrics["pairs"] = len(rows)
    with quiet(), replacing_folder(final) as temporary:
        metrics |= _tune(model, rows, tuning, online, temporary, work, progress)
        card = Card(
            kind="policy",
            model=model.info.entry(),
            settings={"form": "lora" if tuning.lora_rank else "full"},
            recipe=recipe,
            data={"sha256": hashed, "rows": len(data)},
            metrics=metrics,
        )
        (temporary / CARD).write_text(json.dumps(asdict(card), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return final


def _tune(
    model: LanguageModel,
    rows: list[dict[str, Any]],
    tuning: PolicySettings,
    online: Online | None,
    folder: Path,
    work: Path | None,
    progress: bool,
) -> dict[str, Any]:
    """Write the tuned network to `folder`, and say what was seen."""
    metrics: dict[str, Any] = {}
    if online is not None:
        metrics["reward_before"] = mean_reward(model, model, online, tuning, progress)
    if tuning.method == "raft":
        assert online is not None
        with tempfile.TemporaryDirectory() as scratch:
            metrics |= run_raft(model, rows, online, tuning, folder, work or Path(scratch), progress)
    else:
        metrics |= _fit(model, rows, tuning, online, folder, work, progress)
    if online is not None:
        metrics["reward_after"] = mean_reward(open_network(model, folder), model, online, tuning, progress)
    return metrics


def _fit(
    model: LanguageModel,
    rows: list[dict[str, Any]],
    tuning: PolicySettings,
    online: Online | None,
    folder: Path,
    work: Path | None,
    progress: bool,
) -> dict[str, Any]:
    """One run of a trainer."""
    with ticking(progress, f"tuning by {tuning.method}", tuning.total_steps(len(rows))) as tick:
        fitted = fit(
            model, rows, tuning, online=online if tuning.online else None, work=work and work / "checkpoints", tick=tick
        )
    save_network(fitted.network, model, folder)
    seen = {k: thinned(v) for k, v in (("loss", fitted.loss), ("reward", fitted.reward)) if v}
    return {**seen, **({"left_out": fitted.left_out} if fitted.left_out else {})}
