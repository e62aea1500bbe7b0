"""Tuned diffusion policies: Diffusion-DPO, SePPO and policy gradients on networks of diffusers, whole or as LoRA
(PEFT).

A policy is a folder with a card, `steer.json`, that says which model it was tuned from and how. A whole network lies in
`unet/` (or `transformer/`), with scheduler and classifier beside it, so that `steer.load` takes the folder for a model;
a LoRA lies there in PEFT's layout. `DiffusionModel.tuned` takes either. The losses are in
`steer.train.diffusion_policy`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from steer.adapters.diffusers.loading import load
from steer.adapters.diffusers.model import DiffusionModel
from steer.adapters.diffusers.policy.data import read_data
from steer.adapters.diffusers.policy.folder import save_network, write_cards
from steer.adapters.diffusers.policy.lora import Lora
from steer.adapters.diffusers.policy.network import copied, fingerprint, network_of, tunable
from steer.adapters.diffusers.policy.own_samples import measure, own_pairs
from steer.artifacts import Card
from steer.core import Ability, Reward, check, check_whole
from steer.embedded import resolve
from steer.files import replacing_folder
from steer.rewards import as_reward
from steer.train.diffusion_policy.inputs import METHODS, PolicySettings
from steer.train.diffusion_policy.tuning import tune
from steer.train.policy_folder import check_target, claim, read_policy_card, thinned

__all__ = ["load_diffusion_policy", "train_diffusion_policy"]


_BETAS = {"dpo": 5000.0, "seppo": 5000.0, "pg": 1.0}
_RATES = {"dpo": 1e-5, "seppo": 1e-5, "pg": 3e-5}
"""Learning rates where all weights are tuned; ten times as much for LoRA."""
_STEPS = {"dpo": 200, "seppo": 200, "pg": 2}


def train_diffusion_policy(
    model: DiffusionModel,
    data: Sequence[Any] | Path | str,
    *,
    method: str,
    out: Path | str,
    reward: Reward | str | Callable[..., Any] | None = None,
    beta: float | None = None,
    lora_rank: int = 0,
    lora_alpha: int | None = None,
    lora_targets: str = "all",
    learning_rate: float | None = None,
    steps: int | None = None,
    rounds: int = 20,
    batch_size: int = 8,
    group_size: int = 8,
    num_steps: int = 25,
    eta: float = 1.0,
    guidance_scale: float | None = None,
    kind: str | None = None,
    advantage: str = "leave-one-out",
    clip_range: float = 0.2,
    share: float = 1.0,
    ema: float = 0.0,
    measured: int = 64,
    max_batch: int = 64,
    seed: int = 0,
    work: Path | str | None = None,
    progress: bool = False,
) -> Path:
    """Tune a diffusion model and write it to the folder `out`; `model` itself is not changed.

    Args:
        model: a network with its scheduler, from `steer.load`; a pipeline is refused.
        data: prompts for a reward; without one, rows `{"prompt", "chosen", "rejected"}` (dpo) or `{"prompt", "chosen"}`
            (seppo) whose images are tensors `[C, H, W]` in [0, 1] or paths of image files, or a folder with such rows
            in `pairs.jsonl`. With a reward, dpo and seppo make them of the base's own samples: for each prompt the best
            and the worst of `group_size`; a prompt that is there several times gives as many.
        method: "dpo" (Diffusion-DPO), "seppo", or "pg" (policy gradient on the stochastic chain, clipped as in PPO).
        out: folder; an older policy there is replaced in one step, anything else is refused.
        reward: what is raised; pg needs one. One that looks at a model looks at `model`.
        beta: of dpo and seppo, with the number of noise levels folded in (default 5000); of pg the KL coefficient in
            reward for each nat (default 1), 0 is off.
        lora_rank: 0 tunes all weights. lora_alpha: default twice the rank. lora_targets: "all" (linear layers and
            convolutions), "all-linear", "attention", or names of modules joined by commas.
        learning_rate: default by method.
        steps: updates (default 200); for pg those on every round of samples (default 2).
        rounds: of samples, for pg.
        batch_size: pairs of an update; for pg prompts of a round.
        group_size: samples for each prompt.
        num_steps, eta, guidance_scale, kind: of the chain that samples are drawn by, see `DiffusionModel.process`.
            dpo and seppo tune all noise levels, pg the steps of this chain.
        advantage: of pg: "leave-one-out", or "grpo", under which the optimum depends on `group_size`.
        clip_range, share: of pg: ratios beyond 1 +- `clip_range` bring no more; share of a chain's steps in an update.
        ema: decay of a moving average of the weights, which is then the policy; 0 is off.
        measured: samples on which the reward is measured before and after; 0 is none.
        max_batch: rows put through the network at once.
        work: folder for checkpoints and samples; a run that stopped goes on from there to the same weights.

    Raises:
        InputError: a bad setting, row, reward or folder; nothing has been trained.
        RewardError: scores that are not finite numbers, one for each sample.
        UnsupportedError: pg on a chain without noise; a pipeline.
        SteerError: PEFT is missing, or the loss is no longer finite.
    """
    check(method in METHODS, "method", method, ", ".join(METHODS))
    check_whole("lora_rank", lora_rank, 0, "an integer of 0 (all weights) or more")
    settings = PolicySettings(
        method=method,
        beta=_BETAS[method] if beta is None else beta,
        learning_rate=_RATES[method] * (10 if lora_rank else 1) if learning_rate is None else learning_rate,
        steps=_STEPS[method] if steps is None else steps,
        rounds=rounds, batch_size=batch_size, group_size=group_size, advantage=advantage, clip_range=clip_range,
        share=share, ema=ema, seed=seed,
    )  # fmt: skip
    lora = None if lora_rank == 0 else Lora.create(lora_rank, lora_alpha, lora_targets)
    check_whole("measured", measured, 0)
    check_whole("max_batch", max_batch, 1)
    final, state = Path(out), None if work is None else Path(work)
    check_target(final)
    given = as_reward(reward)
    check(given is not None or method != "pg", "reward", None, "one, for pg")
    drawing = {"eta": eta, "guidance_scale": guidance_scale, "kind": kind}
    chain = {"steps": num_steps, **drawing, "max_batch": max_batch}
    base = tunable(model, chain)
    if method == "pg":
        base.chain.require(Ability.BRANCH, "train policy by pg")
    prompts, pairs, hashed, rows = read_data(base, data, method, given is not None)
    bound = None if given is None else given.bind(model)
    if lora is not None:
        lora.names(network_of(model))
    recipe = {**settings.recipe(), **(lora.recipe() if lora else {"lora_rank": 0}), "num_steps": num_steps, **drawing}
    recipe |= {} if given is None else {"reward": str(given)}
    mark = fingerprint(network_of(model))
    run = {**recipe, "data": hashed, "model": mark, "max_batch": max_batch}
    claim(state, run)
    metrics: dict[str, Any] = {}
    policy = tunable(copied(model, lora, seed), chain)
    with replacing_folder(final) as temporary:
        if bound is not None and measured:
            metrics |= measure("before", base.chain, prompts, bound, measured, max_batch, seed)
        if bound is not None and method != "pg":
            pairs = own_pairs(base.chain, prompts, settings, bound, max_batch, state, progress)
        history = tune(
            policy, base, settings, prompts=prompts, pairs=pairs, reward=bound if method == "pg" else None,
            earlier=tunable(copied(model, lora, seed), chain) if method == "seppo" else None,
            rows=max_batch, work=state, run=run, progress=progress,
        )  # fmt: skip
        save_network(policy.module, model, temporary)
        if bound is not None and measured:
            after = tunable(model.tuned(temporary), chain).chain
            metrics |= measure("after", after, prompts, bound, measured, max_batch, seed)
        metrics |= {name: thinned(values) for name, values in history.items()}
        card = Card(
            kind="policy",
            model={"name": model.name, "fingerprint": mark, "model_type": type(network_of(model)).__name__},
            settings={"form": "lora" if lora else "full"},
            recipe=recipe,
            data={"sha256": hashed, "rows": rows},
            metrics=metrics,
        )
        write_cards(card, model, temporary, final.name)
    return final


def load_diffusion_policy(base: DiffusionModel | None, folder: Path | str) -> DiffusionModel:
    """The tuned policy as a model of its own, named `base+folder`; `base` is not changed.

    Args:
        base: the model that it was tuned from; None loads it by the name on the card.
        folder: what `train_diffusion_policy` wrote.

    Raises:
        InputError: not a policy, or one tuned from another model.
    """
    path = Path(folder)
    card = read_policy_card(path)
    if base is None:
        base = load(resolve(card.model["name"]), name=card.model["name"])
    check(isinstance(base, DiffusionModel), "policy", str(path), "a policy of a diffusion model")
    ours, theirs = fingerprint(network_of(base)), card.model["fingerprint"]
    given = f"{path} (tuned from {card.model.get('name')}, fingerprint {theirs})"
    check(ours == theirs, "policy", given, f"a policy tuned from {base.name} (fingerprint {ours})")
    return base.tuned(path, name=f"{base.name}+{path.name}")
