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
from steer.adapters.transformers.policy.data import Tuning, check_targets, read_rows
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

__all__ = ["train_policy"]


def train_policy(
    model: LanguageModel,
    data: Sequence[Any],
    *,
    method: str,
    out: Path | str,
    reward: Reward | str | Callable[..., Any] | None = None,
    beta: float = 0.1,
    loss: str | None = None,
    f_divergence: str = "reverse_kl",
    lora_rank: int = 16,
    lora_alpha: int | None = None,
    lora_targets: str = "all-linear",
    learning_rate: float | None = None,
    epochs: int = 1,
    steps: int | None = None,
    batch_size: int = 8,
    group_size: int = 8,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    rounds: int = 1,
    seed: int = 0,
    work: Path | None = None,
    progress: bool = False,
) -> Path:
    """Tune a policy and write it to the folder `out`; `model` itself is not changed.

    Args:
        model: a language model from `steer.load`.
        data: rows `{"prompt", "completion"}` (sft), `{"prompt", "chosen", "rejected"}` (dpo),
            `{"prompt", "completion", "label": bool}` (kto); for grpo and raft, and for dpo with a
            reward, prompts, or rows `{"prompt"}`. A prompt is text or messages and is encoded as for
            `generate`; completions are text, and end-of-sequence is added.
        method: "sft", "dpo", "kto", "grpo" (KL to the model in the loss), "raft" (in each of `rounds` rounds the best
            of `group_size` samples for each prompt, then SFT on them).
        out: folder; an older policy there is replaced in one step, anything else is refused.
        reward: what grpo and raft raise; with it dpo makes its own pairs, of the best and the worst of `group_size`
            samples for each prompt. Rewards that score under a model score under `model`.
        beta: KL coefficient of dpo, kto and grpo (there 0 is off).
        loss: TRL's name; default: nll, sigmoid, kto, dapo. For dpo several joined by `+`, of equal weight.
        f_divergence: between policy and model, for dpo: reverse_kl, forward_kl, js_divergence, alpha_divergence.
        lora_rank: 0 tunes all weights. lora_alpha: default twice the rank. lora_targets: "all-linear" (without the
            output head), or names of modules joined by commas.
        learning_rate: default by method; the schedule is a cosine. Weight decay and dropout are 0.
        epochs, steps: passes over the data, or updates (for raft: of every round); `steps` wins.
        batch_size: rows, pairs or prompts for each update.
        group_size, max_new_tokens, temperature: of the samples of grpo and raft.
        work: folder for checkpoints and samples; a run that stopped goes on from there to the same result.

    Raises:
        InputError: a bad setting, row, reward or folder; nothing has been trained.
        SteerError: TRL or PEFT is missing, or the loss is no longer finite.
    """
    tuning = Tuning.create(
        method=method, beta=beta, loss=loss, f_divergence=f_divergence, lora_rank=lora_rank, lora_alpha=lora_alpha,
        lora_targets=lora_targets, learning_rate=learning_rate, epochs=epochs, steps=steps, batch_size=batch_size,
        group_size=group_size, max_new_tokens=max_new_tokens, temperature=temperature, rounds=rounds, seed=seed,
    )  # fmt: skip
    final = Path(out)
    check_target(final)
    check_targets(model, tuning)
    given = as_reward(reward)
    paired = given is not None and method == "dpo"
    fits = paired or (given is not None) == tuning.online
    check(fits, "reward", reward, f"{'one' if tuning.online else 'none'} for {method}")
    rows = [] if paired else read_rows(model, data, tuning)
    require_libraries()
    recipe = {**tuning.recipe(), **({"reward": str(given)} if given is not None else {})}
    hashed = data_hash(list(data))
    claim(work, {**recipe, "data": hashed, "model": model.info.fingerprint})
    online = None if given is None else Online([prompt_of(row) for row in data], given.bind(model))
    metrics: dict[str, Any] = {}
    if paired:
        assert online is not None
        rows = read_rows(model, own_pairs(model, online, tuning, work, progress), tuning)
        metrics["pairs"] = len(rows)
    with quiet(), replacing_folder(final) as temporary, tempfile.TemporaryDirectory() as scratch:
        if online is not None:
            metrics["reward_before"] = mean_reward(model, model, online, tuning)
        if method == "raft":
            assert online is not None
            metrics |= run_raft(model, rows, online, tuning, temporary, work or Path(scratch), progress)
        else:
            with ticking(progress, f"tuning by {method}", tuning.total_steps(len(rows))) as tick:
                fitted = fit(
                    model,
                    rows,
                    tuning,
                    online=None if paired else online,
                    work=work and work / "checkpoints",
                    tick=tick,
                )
            metrics |= {k: thinned(v) for k, v in (("loss", fitted.loss), ("reward", fitted.reward)) if v}
            save_network(fitted.network, model, temporary)
        if online is not None:
            metrics["reward_after"] = mean_reward(open_network(model, temporary), model, online, tuning)
        card = Card(
            kind="policy",
            model=model.info.entry(),
            settings={"form": "lora" if lora_rank else "full"},
            recipe=recipe,
            data={"sha256": hashed, "rows": len(data)},
            metrics=metrics,
        )
        (temporary / CARD).write_text(json.dumps(asdict(card), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return final
