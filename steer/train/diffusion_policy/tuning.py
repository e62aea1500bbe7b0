"""Tuning of a diffusion model as a policy: Diffusion-DPO, SePPO and policy gradients, on any `DiffusionProcess`.

No engine is needed: a `Tunable` is a torch module and the chains that run it.

- dpo (Wallace et al. 2023): of an image that is preferred and one that is not, the noise in the first is to be
  predicted better than the base does it, and that in the second worse.
- seppo (Zhang et al. 2024): the second image is a sample of the reference, an earlier state of the policy; it is
  learnt from, in place of unlearnt, where that state predicts the first image better than the policy does.
- pg: the stochastic chain is a Markov decision process (DDPO, Black et al. 2023; for flows Flow-GRPO, Liu et al. 2025).
  Its objective is `E[r] - beta KL(policy || base)` over chains, whose optimum has `p(x) exp(r(x) / beta)` as its law of
  finished rows, up to what the last steps without noise add. So it is at every group size with the default advantage
  (`advantages.leave_one_out`, Kool et al. 2019; its scale in `losses.spreads`); GRPO's own form is `advantage="grpo"`.

The ratio of the densities of a step is that of all its dimensions together: log-densities are *summed*. The released
codes of DDPO and Flow-GRPO take their mean, which shrinks ratio, clipping range and KL by the number of dimensions;
only with the sum is the gradient that of the objective, and `beta` what it is everywhere else in `steer`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from steer.core import Ability, Prompt, Reward, SteerError, check
from steer.progress import note, ticking
from steer.ranks import ranks
from steer.train.diffusion_policy.inputs import DiffusionPolicySettings, Pair, Tunable
from steer.train.diffusion_policy.offline import Offline
from steer.train.diffusion_policy.online import Online
from steer.train.diffusion_policy.state import State
from steer.train.loop import average_gradients

__all__ = ["tune"]


EVERY = 10
"""Updates between two writes of the state, for dpo and seppo."""


def tune(
    policy: Tunable,
    base: Tunable,
    settings: DiffusionPolicySettings,
    *,
    prompts: Sequence[Prompt] = (),
    pairs: Sequence[Pair] = (),
    reward: Reward | None = None,
    earlier: Tunable | None = None,
    work: Path | None = None,
    run: dict[str, Any] | None = None,
    progress: bool = False,
) -> dict[str, list[float]]:
    """Tune `policy.module` in place; `base` is only read. Returns what was seen at each update, by name.

    All randomness depends on the seed and the number of the update. The state is written to `work` every `EVERY`
    updates, for pg after every round, atomically: a run that was stopped and started again ends at the same weights,
    bit for bit. On several ranks the rows of an update are shared out, and so are the samples; the weights are those of
    one process with the batches of all ranks, up to rounding.

    Args:
        policy: the module, with the weights of the base.
        base: the reference of dpo, and where pg's KL goes to.
        prompts, reward: of pg.
        pairs: of dpo and seppo.
        earlier: of seppo, a third copy, which takes the weights of earlier states of the policy.
        work: folder; `run` is what a state that lies there must have been made with.

    Raises:
        InputError: settings, data and method do not fit, or `work` holds the state of another run.
        RewardError: rewards that are not finite numbers, one for each sample.
        UnsupportedError: pg on a chain without noise; a network that keeps no gradient.
        SteerError: the loss is no longer finite.
    """
    _check_fit(policy, settings, prompts, pairs, reward, earlier)
    weights = policy.weights()
    check(bool(weights), "policy", type(policy.module).__name__, "a module with parameters that require a gradient")
    optimizer = torch.optim.AdamW(weights.values(), lr=settings.learning_rate, weight_decay=0.0)
    state = State(weights, optimizer, settings, run or settings.recipe(), work)
    state.resume()
    ranks().check_same("work", state.step, "a folder that all ranks see")
    tuner: Online | Offline
    if settings.method == "pg":
        assert reward is not None
        tuner = Online(policy, base, settings, list(prompts), reward)
        tuner.resume(state.history)
    else:
        tuner = Offline(policy, earlier if settings.method == "seppo" else base, settings, list(pairs), state)
    policy.module.eval()
    span = settings.steps if settings.method == "pg" else EVERY
    note(progress and state.step > 0, f"going on from update {state.step + 1} of {settings.total}")
    with ticking(progress and ranks().first, f"tuning by {settings.method}", settings.total) as tick:
        tick(state.step)
        while state.step < settings.total:
            seen = _update(tuner, state)
            state.advance(seen)
            tick(1, **seen)
            if ranks().first and (state.step % span == 0 or state.step == settings.total):
                state.save()
    if average := state.average:
        policy.put(average)
    return state.history


def _update(tuner: Online | Offline, state: State) -> dict[str, float]:
    """One step of the optimizer. Raises `SteerError` for a loss that is not finite, before any weight changes."""
    state.optimizer.zero_grad(set_to_none=True)
    seen = tuner.backward(state.step)
    average_gradients(state.weights.values())
    norm = nn.utils.clip_grad_norm_(state.weights.values(), _limit(state))
    if not (math.isfinite(seen["loss"]) and bool(norm.isfinite())):
        raise SteerError(f"train policy: the loss at update {state.step} is not finite; lower learning_rate")
    state.optimizer.step()
    return seen | ({"norm": float(norm)} if state.settings.method == "pg" else {})


def _limit(state: State) -> float:
    """Where the norm of a gradient is cut. A bound that pg's gradients meet often would move its optimum: they are
    skewed, and what is cut away lies on one side.
    """
    if state.settings.method != "pg":
        return 1.0
    seen = [norm for norm in state.history.get("norm", [])[-100:] if norm > 0]
    return 10 * median(seen) if seen else math.inf


def _check_fit(
    policy: Tunable,
    settings: DiffusionPolicySettings,
    prompts: Sequence[Prompt],
    pairs: Sequence[Pair],
    reward: Reward | None,
    earlier: Tunable | None,
) -> None:
    who = f"train policy by {settings.method}"
    policy.chain.require(Ability.GRADIENT, who)
    if settings.method == "pg":
        policy.chain.require(Ability.BRANCH, who)
        check(reward is not None, "reward", None, "one, for pg")
        check(len(prompts) > 0, "prompts", list(prompts), "at least one")
        policy.chain.denoiser.encode(prompts)
        return
    check(len(pairs) > 0, "pairs", list(pairs), "at least one")
    policy.levels.denoiser.encode([pair.prompt for pair in pairs])
    shape = pairs[0].chosen.shape
    for i, pair in enumerate(pairs):
        rows = [pair.chosen, *([pair.rejected] if settings.method == "dpo" else [])]
        for row in rows:
            check(row is not None and row.shape == shape, f"pairs[{i}]", getattr(row, "shape", None), f"{tuple(shape)}")
    check(settings.method == "dpo" or earlier is not None, "earlier", None, "a third copy of the model, for seppo")
